"""What a compiler really did with a network: kernels, precision of each linear layer, activations left, bytes moved.

The facts come from three places: the optimised graph of ONNX Runtime, the programs inside a serialised TensorRT plan,
and TensorRT's verbose build log. The last two are undocumented; what cannot be read is ``unknown`` or None, never
guessed.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal

UNKNOWN = "unknown"
# What a ReLU student may still hold: a ReLU, or the clipping that a ReLU6 (or a quantiser) is.
RELU_KINDS = frozenset({"relu", "clip"})
# How a note begins that an engine is good for nothing but measuring its speed.
UNTRAINED = "its activations were replaced by ReLU"


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """One Conv, ConvTranspose, Gemm or MatMul of the network.

    Attributes:
        name: Its ONNX node.
        precision: What it multiplies: ``int8``, ``fp16``, ``fp32``, ..., or ``unknown``.
        output: Type of what it writes: ``int8``, ``fp16``, ``fp32``, ..., or ``unknown``.
        kernel: The kernel or optimised node that does the work; empty where none was found.
        relu: Whether a ReLU is fused into that kernel; None: not known.
        bias: Whether a bias is fused into it; None: not known.
        reason: Why it is not int8, where that is known.
    """

    name: str
    precision: str
    output: str = UNKNOWN
    kernel: str = ""
    relu: bool | None = None
    bias: bool | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Activation:
    """One activation that is still computed.

    Attributes:
        name: Its ONNX node, or the kernel where no node could be named.
        kind: ``relu``, ``clip``, ``silu``, ``sigmoid``, ``erf``, ...; ``hinges`` or ``table`` for one that is spelled
            out in other operators.
        kernel: The kernel or node that computes it; several, joined by commas, where it was cut up.
    """

    name: str
    kind: str
    kernel: str = ""


# How passes name the nodes that stand for one activation which has no operator of its own.
_PARTS = re.compile(r"(?P<unit>.+?)/(?:(?P<hinges>hinge_\d+)/\w+|(?:(?:slopes|offsets)/)?found)")


def part_of(name: str) -> tuple[str, str] | None:
    """The activation that a node is a part of, and its form (``hinges`` or ``table``); None for other nodes.

    >>> part_of("act3/hinge_0/Relu"), part_of("act3/found"), part_of("act3")
    (('act3', 'hinges'), ('act3', 'table'), None)
    """
    match = _PARTS.fullmatch(name)
    return None if match is None else (match["unit"], "hinges" if match["hinges"] else "table")


def joined(activations: Iterable[Activation]) -> tuple[Activation, ...]:
    """The same, where the parts of one activation become one, with all its kernels."""
    kept: dict[tuple[str, str], list[Activation]] = {}
    for activation in activations:
        kept.setdefault(part_of(activation.name) or (activation.name, activation.kind), []).append(activation)
    return tuple(
        Activation(name, kind, ", ".join(dict.fromkeys(part.kernel for part in parts)))
        for (name, kind), parts in kept.items()
    )


@dataclasses.dataclass(frozen=True)
class Audit:
    """What the compiler did.

    Attributes:
        source: Where the facts were read: ``optimised graph``, ``plan``, ``build log`` or ``none``.
        kernels: Kernels launched an inference (for ``ort``: nodes executed); None: not known.
        linear: Every linear layer.
        activations: Every activation that is still computed, ReLU included.
        bytes_moved: Bytes read and written an inference: each tensor, also a slice of a concatenation, counted once for
            each kernel that reads or writes it. None: not known.
        islands: Float computation between quantised layers, one entry an island: its nodes joined by commas.
        conflicts: Where the build log and the plan contradict one another.
        notes: What could not be read, and other remarks.
    """

    source: Literal["optimised graph", "plan", "build log", "none"]
    kernels: int | None = None
    linear: tuple[LinearLayer, ...] = ()
    activations: tuple[Activation, ...] = ()
    bytes_moved: int | None = None
    islands: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def int8(self) -> int:
        """Number of linear layers that run in int8."""
        return sum(layer.precision == "int8" for layer in self.linear)

    @property
    def fallbacks(self) -> tuple[LinearLayer, ...]:
        """Linear layers that do not run in int8, or of which nothing is known."""
        return tuple(layer for layer in self.linear if layer.precision != "int8")

    @property
    def left(self) -> tuple[Activation, ...]:
        """Activations other than ReLU."""
        return tuple(activation for activation in self.activations if activation.kind not in RELU_KINDS)

    def activation_counts(self) -> dict[str, int]:
        """Kind -> number, most frequent first."""
        return dict(Counter(activation.kind for activation in self.activations).most_common())
