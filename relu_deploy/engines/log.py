"""Read TensorRT's verbose build log: what the parser saw, the kernels it ended with, and what went wrong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from relu_deploy.engines.kernels import TYPES, UNKNOWN, Kernel, LinearOp, Operand, layer_names, syllables

# The log's words for convolution, transposed convolution and matrix product, and for what launches nothing.
LINEAR_KINDS = frozenset({"correlation", "convolution", "deconv", "deconvolution", "gemm", "fully_connected"})
SILENT_KINDS = frozenset({"signal", "wait", "shape_call", "assert", "shape"})

_ENTRY = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*?)\]"
    r"(?:, Constants: \[(?P<constants>.*?)\])?"
    r", Outputs: \[(?P<outputs>.*?)\](?:, (?:TacticName|ParameterType|StreamId).*?)?(?:, Metadata: (?P<metadata>.*))?$"
)
_TENSOR = re.compile(r"\{ Name: (.*?), (?:Location: \w+, )?Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)")


@dataclasses.dataclass(frozen=True)
class Log:
    """What a build log tells.

    Attributes:
        nodes: ONNX node -> operator, as the parser met them.
        kernels: The engine's kernels; empty when the log ends before them (a failed build, or one that is not verbose).
        errors: Messages of errors, in order.
    """

    nodes: dict[str, str]
    kernels: tuple[Kernel, ...]
    errors: tuple[str, ...] = ()


def read_log(messages: Sequence[str], *, errors: Sequence[str] = ()) -> Log:
    """Read the messages of one build.

    Args:
        messages: All messages, in order, one entry each.
        errors: Those of severity error.
    """
    nodes: dict[str, str] = {}
    kernels: list[Kernel] = []
    for message in messages:
        if parsed := re.fullmatch(r"Parsing node: (.*) \[(\w+)\]", message):
            nodes[parsed[1]] = parsed[2]
        elif message.startswith("Layers:\n"):
            kernels = _kernels(message)
    return Log(nodes, tuple(kernels), tuple(errors))


def _kernels(listing: str) -> list[Kernel]:
    """Kernels in the layer information that a detailed build ends with; lines that do not fit are left out."""
    kernels = []
    for line in re.split(r"\n(?=Name: )", listing.partition("\n\n")[0]):
        # The tensor lists hold brackets of their own: dimensions. `]` ends a list only before `, Constants` and so on.
        found = _ENTRY.match(line)
        if found and found["kind"] not in SILENT_KINDS:
            kernels.append(_kernel(found))
    return kernels


def _kernel(found: re.Match[str]) -> Kernel:
    """One entry of the listing."""
    name = re.sub(r"_myl\d+_\d+$", "", found["name"])
    inputs, constants, outputs = (_tensors(found[part] or "") for part in ("inputs", "constants", "outputs"))
    layers, reads = layer_names(found["metadata"] or ""), (*inputs, *constants)
    linear: tuple[LinearOp, ...] = ()
    if found["kind"] in LINEAR_KINDS:
        data = inputs[0].dtype if inputs else UNKNOWN
        weight = _weight(inputs, constants)
        linear = (LinearOp(name, data, weight, outputs[0].dtype if outputs else UNKNOWN, None, layers),)
    return Kernel(name, found["kind"], reads, outputs, layers, linear, syllables(name))


def _weight(inputs: Sequence[Operand], constants: Sequence[Operand]) -> str:
    """Type of the weights of a linear kernel.

    They are its second input, or its first constant. A second input beside constant weights is a residual that is
    added on the way out; constants beside computed weights are factors and a bias, which extend along axis 1 at most.
    """
    stored = constants[0] if constants else None
    if len(inputs) > 1 and (stored is None or len(stored.dims) < 2 or set(stored.dims[:1] + stored.dims[2:]) == {1}):
        return inputs[1].dtype
    return stored.dtype if stored is not None else UNKNOWN


def _tensors(text: str) -> tuple[Operand, ...]:
    """The tensors of one list."""
    found = []
    for name, dims, kind in _TENSOR.findall(text):
        if "_const-lit-in" in name:
            continue  # a literal that the host hands over with the launch, as the plan tells
        extents = tuple(int(e) if re.fullmatch(r"\d{1,18}", e) else "?" for e in dims.split(",") if e)
        found.append(Operand(name, TYPES.get(kind.lower(), UNKNOWN), extents, (name, str(extents))))
    return tuple(found)
