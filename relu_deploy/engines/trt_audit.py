"""Turn what a plan and a build log tell into an audit, and hold the one against the other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import onnx

from relu_deploy.engines.audit import UNKNOWN, Activation, Audit, LinearLayer, part_of
from relu_deploy.engines.kernels import SIZES, Kernel, LinearOp, Operand
from relu_deploy.engines.log import Log
from relu_deploy.engines.plan import Program
from relu_deploy.engines.promise import ACTIVATIONS, LINEAR, Promises

# Words for activations in fused flags, inside fusions, and as syllables in the names of generated kernels.
# Relu, Max and Min are not among them: quantising clips with them too.
_WORDS = {"silu": "silu", "swish": "silu", "sigm": "sigmoid", "sigmoid": "sigmoid", "tanh": "tanh", "erf": "erf",
          "gelu": "gelu", "gelu_erf": "gelu", "elu": "elu", "leaky_relu": "leaky_relu"}  # fmt: skip
# In the name of the kernel of attention, which holds both products and the Softmax between them.
_ATTENTION = "_gemm_mha"


def audit_engine(
    programs: Sequence[Program],
    log: Log,
    model: onnx.ModelProto | None,
    *,
    optimum: Mapping[str, tuple[int, ...]] | None = None,
) -> Audit:
    """Audit an engine.

    Args:
        programs: From :func:`relu_deploy.engines.plan.read_plan`; where it is empty the log's kernels are used.
        log: From :func:`relu_deploy.engines.log.read_log`.
        model: What was compiled; None: names and operators are taken from the log.
        optimum: Shape of each dynamic input for which bytes are counted.
    """
    # A plan for several cards may hold the same subgraph once for each; one card runs one of them.
    chosen = [program for program in programs if program.accelerators == programs[0].accelerators]
    kernels = [kernel for program in chosen for kernel in program.kernels] or list(log.kernels)
    if not kernels:
        return Audit("none", notes=("neither the plan nor the build log tells which kernels the engine holds",))
    promises = Promises(model) if model else None
    ops = {name: node.op_type for name, node in promises.nodes.items()} if promises else dict(log.nodes)
    bytes_moved, notes = _bytes(kernels, _symbols(chosen, optimum or {}))
    unread = sum(program.unread for program in chosen)
    notes += [f"{unread} lines of the plan could not be read"] * bool(unread)
    notes += ["the plan holds no readable program: kernels are those of the build log"] * (not chosen)
    return Audit(
        source="plan" if chosen else "build log",
        kernels=len(kernels),
        linear=_linear(kernels, ops, promises, turing=any("sm75" in program.accelerators for program in chosen)),
        activations=(*_activations(kernels, ops), *_spelled_out(kernels)),
        bytes_moved=bytes_moved,
        conflicts=_conflicts(kernels, log.kernels) if chosen else (),
        notes=tuple(notes),
    )


def _linear(
    kernels: Iterable[Kernel], ops: Mapping[str, str], promises: Promises | None, *, turing: bool
) -> tuple[LinearLayer, ...]:
    """Every linear layer of the network with the kernel that does its work, or ``unknown`` where none names it."""
    found: dict[str, LinearLayer] = {}
    for kernel in kernels:
        for op in kernel.linear:
            names = [op.name] if op.name in ops else [name for name in op.layers if ops.get(name) in LINEAR]
            for name in names or [op.name]:
                found[name] = _layer(name, op, kernel, _reason(name, op, promises, turing=turing))
    for name in (name for name, op in ops.items() if op in LINEAR):
        if name not in found:
            holders = [kernel for kernel in kernels if name in kernel.layers]
            found[name] = _held(name, holders[0] if holders else None, promises)
    return tuple(found.values())


def _held(name: str, holder: Kernel | None, promises: Promises | None) -> LinearLayer:
    """A product that is no operation of its own: in the kernel of attention it has the type of what that reads."""
    if holder is None:
        return LinearLayer(name, UNKNOWN, kernel="", reason="no kernel names it; it may have been folded away")
    types = {operand.dtype for operand in holder.reads if operand.dtype != "bool"}
    if _ATTENTION in holder.name and len(types) == 1:
        written = holder.writes[0].dtype if len(holder.writes) == 1 else UNKNOWN
        (kind,) = types
        reason = None if promises is None or kind == "int8" else promises.why_float(name)
        return LinearLayer(name, kind, kernel=holder.name, output=written, reason=reason)
    return LinearLayer(name, UNKNOWN, kernel=holder.name, reason=f"only {holder.name} names it")


def _layer(name: str, op: LinearOp, kernel: Kernel, reason: str | None) -> LinearLayer:
    """What is known of one linear layer."""
    fused = op.fused
    bias = None if fused is None else "bias" in fused
    if bias is False and fused is not None and "add" in fused:
        bias = None  # the sum inside a fusion may be a bias or a residual
    return LinearLayer(
        name=name,
        precision=op.precision,
        output=op.output,
        kernel=kernel.name,
        relu=None if fused is None else "relu" in fused,
        bias=bias,
        reason=reason,
    )


def _reason(name: str, op: LinearOp, promises: Promises | None, *, turing: bool) -> str | None:
    """Why a layer is not int8, where the network or its operator tells."""
    if promises is None or op.precision == "int8":
        return None
    if promises.int8.get(name) == "ConvTranspose" and promises.why_float(name) is None:
        return "the compiler chose no int8 kernel for this ConvTranspose"
    if turing and promises.int8.get(name) == "Conv" and promises.why_float(name) is None:
        return "for SM 75, alone or among others, this compiler computes every convolution in float"
    return promises.why_float(name)


def _activations(kernels: Sequence[Kernel], ops: Mapping[str, str]) -> Iterable[Activation]:
    """Activations of the network that a kernel names, then those that a kernel computes without naming a node."""
    explained: set[int] = set()
    last = {name: index for index, kernel in enumerate(kernels) for name in kernel.layers}
    for name, index in last.items():
        if part_of(name) is not None:
            continue
        kind = ACTIVATIONS.get(ops.get(name, ""))
        if kind is None:
            continue
        # A kernel also names neighbours whose operands it only prepares; prefer one that shows the activation.
        shown = [i for i, kernel in enumerate(kernels) if name in kernel.layers and _evidence(kernel)]
        at = shown[0] if shown and kind not in ("relu", "clip") else index
        explained.add(at)
        words = _evidence(kernels[at])
        yield Activation(name, "silu" if kind == "sigmoid" and "silu" in words else kind, kernels[at].name)
    for index, kernel in enumerate(kernels):
        if index not in explained or not any(_smooth(ops.get(name)) for name in kernel.layers):
            yield from (Activation(kernel.name, word, kernel.name) for word in sorted(_evidence(kernel)))
        if not ops and ("relu" in kernel.ops or any("relu" in (op.fused or ()) for op in kernel.linear)):
            yield Activation(kernel.name, "relu", kernel.name)


def _spelled_out(kernels: Sequence[Kernel]) -> Iterable[Activation]:
    """Activations spelled out in other operators, each with all kernels that compute a part of it."""
    units: dict[tuple[str, str], dict[int, str]] = {}
    for index, kernel in enumerate(kernels):
        for part in filter(None, map(part_of, kernel.layers)):
            units.setdefault(part, {})[index] = kernel.name  # by number: generated names are cut short, and repeat
    return (Activation(unit, kind, ", ".join(names.values())) for (unit, kind), names in units.items())


def _smooth(op: str | None) -> bool:
    """Whether an operator is an activation other than ReLU, or holds one inside (a Softmax has an exponential)."""
    return op is not None and ACTIVATIONS.get(op, "relu") not in ("relu", "clip")


def _evidence(kernel: Kernel) -> set[str]:
    """Activations that a kernel shows by its fused flags, its inner operators or its name."""
    words = set(kernel.ops) | {flag for op in kernel.linear for flag in op.fused or ()}
    return {_WORDS[word] for word in words if word in _WORDS}


def _bytes(kernels: Iterable[Kernel], symbols: Mapping[str, int]) -> tuple[int | None, list[str]]:
    """Bytes that all kernels read and write; None with the reason when a tensor's size is not known."""
    total = 0
    for kernel in kernels:
        places = {(operand.place, operand.dims): operand for operand in (*kernel.reads, *kernel.writes)}
        for operand in places.values():
            size = _size(operand, symbols)
            if size is None:
                return None, [f"bytes moved are not known: the size of {operand.name} in {kernel.name} is not"]
            total += size
    return total, []


def _size(operand: Operand, symbols: Mapping[str, int]) -> int | None:
    """Bytes of a tensor; None when an extent or the type is not known."""
    extents = [symbols.get(extent) if isinstance(extent, str) else extent for extent in operand.dims]
    known = [extent for extent in extents if extent is not None and extent >= 0]
    if len(known) != len(extents) or operand.dtype not in SIZES:
        return None
    return math.prod(known) * SIZES[operand.dtype]


def _symbols(programs: Iterable[Program], optimum: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Values of the compiler's names for dynamic axes, found where they stand in the extents of an input."""
    values: dict[str, int] = {}
    for program in programs:
        for name, shape in optimum.items():
            tensor = program.tensors.get(name) or program.tensors.get(f"{name}.1")
            if tensor and len(tensor.dims) == len(shape):
                values.update({dim: size for dim, size in zip(tensor.dims, shape, strict=True) if isinstance(dim, str)})
    return values


def _conflicts(kernels: Sequence[Kernel], logged: Sequence[Kernel]) -> tuple[str, ...]:
    """Where the log's list of kernels differs from the plan's: in number, or in the types of a linear layer."""
    if not logged:
        return ()
    found = []
    if len(kernels) != len(logged):
        found.append(f"the plan holds {len(kernels)} kernels, the build log {len(logged)}")
    in_plan, in_log = (Counter(_typed(listing)) for listing in (kernels, logged))
    for name, data, weight, output in sorted(set(in_plan) ^ set(in_log)):
        where = "plan" if (name, data, weight, output) in in_plan else "build log"
        found.append(f"only the {where} says that {name} reads {data} and {weight} and writes {output}")
    return tuple(found)


def _typed(kernels: Iterable[Kernel]) -> Iterable[tuple[str, str, str, str]]:
    """Name and types of each linear kernel that is not a fusion (the log does not look inside those)."""
    for kernel in kernels:
        if kernel.kind != "runtime_fusion":
            for op in kernel.linear:
                yield (op.name, op.data, op.weight, op.output)
