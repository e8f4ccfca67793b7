"""What a rule says of a node, and all that was said of a file."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Literal

from relu_deploy.targets import Target

# From worst to mildest.
Severity = Literal["rejected", "wrong", "float", "less accurate", "slower", "note"]
SEVERITIES: tuple[Severity, ...] = ("rejected", "wrong", "float", "less accurate", "slower", "note")
# The file does not do what it was quantised for.
FAULTS: tuple[Severity, ...] = ("rejected", "wrong", "float")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fault of a Q/DQ file, as one target takes it.

    Attributes:
        rule: Which rule; docs/lint.md has them all.
        node: The ONNX node; empty where it is the whole file.
        severity: ``rejected``: no engine; ``wrong``: other numbers than the file says; ``float``: a layer that was
            quantised runs in float; ``less accurate``; ``slower``; ``note``: nothing to fear, but good to know.
        consequence: What this target does with it.
        fix: What to do.
        automatic: Whether ``--fix`` does that.
    """

    rule: str
    node: str
    severity: Severity
    consequence: str
    fix: str
    automatic: bool = False


@dataclasses.dataclass(frozen=True)
class LintReport:
    """What a file is, and what is wrong with it.

    Attributes:
        target: For which runtime.
        quantizers: Number of QuantizeLinear and DequantizeLinear nodes.
        quantized_layers: Linear layers whose data and weights both come from a DequantizeLinear, the data perhaps
            through what the target carries codes through; and operators on codes.
        layers: All linear layers.
        opset: Of the default domain.
        ir_version: Of the file.
        findings: From worst to mildest; within one severity in the order of the rules.
    """

    target: Target
    quantizers: int
    quantized_layers: int
    layers: int
    opset: int
    ir_version: int
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        """Findings because of which the file does not do what it was quantised for."""
        return tuple(finding for finding in self.findings if finding.severity in FAULTS)

    def counts(self) -> dict[str, int]:
        """Rule -> number of findings, in the order of the findings."""
        return dict(Counter(finding.rule for finding in self.findings))


def like_rtx(target: Target, consequence: str) -> str:
    """What a TensorRT target does. Only the RTX compiler can be run here, and the other one is taken to be like it.

    >>> like_rtx("tensorrt-rtx", "the parser refuses it"), like_rtx("tensorrt", "the parser refuses it")
    ('the parser refuses it', 'the parser refuses it (as TensorRT-RTX 1.7 does; not tried with tensorrt)')
    """
    return (
        consequence
        if target == "tensorrt-rtx"
        else f"{consequence} (as TensorRT-RTX 1.7 does; not tried with tensorrt)"
    )
