"""Read the programs inside a serialised TensorRT plan, without TensorRT and without a GPU.

A plan of TensorRT-RTX 1.7 holds, as plain text, one program for each compiled subgraph: ``header``, ``descriptors``
(every tensor with its type, extents and place in memory) and ``main`` (one line a kernel). Fusions that are compiled on
the card at load time carry a small program of their own. None of this is documented: a line that does not look as
expected is left out and counted, and a plan without any program gives an empty result.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from relu_deploy.engines.kernels import TYPES, UNKNOWN, Kernel, LinearOp, Operand, layer_names, syllables

# The compiler's words for convolution, transposed convolution and matrix product.
LINEAR_KINDS = frozenset({"corrltn", "deconvolution", "fully_connected", "gemm", "batch_gemm"})
# Lines of a program that launch nothing on the card.
SILENT_KINDS = frozenset({"signal", "wait", "shape_call", "assert"})
FUSED_FLAGS = ("relu", "gelu", "gelu_erf", "tanh", "sigmoid", "swish", "leaky_relu", "bias")

_BLOCKS = (b"header {", b"descriptors {", b"main {", b"shape_main {")
_LINE = re.compile(r"^  (\w+)=\{ ?(.*)\}\s*$")
_QUOTED = re.compile(r'"([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a plan.

    Attributes:
        accelerators: What it was compiled for (``sm89``); ``*`` marks the inner program of a fusion.
        tensors: Name -> tensor.
        kernels: In order of launch.
        unread: Number of lines that could not be read.
    """

    accelerators: tuple[str, ...]
    tensors: dict[str, Operand]
    kernels: tuple[Kernel, ...]
    unread: int = 0


def read_plan(data: bytes) -> tuple[Program, ...]:
    """All outer programs of a plan; what their fusions hold inside is joined to them.

    Args:
        data: The plan. Untrusted: nothing is executed, and time is linear in its length.

    Returns:
        Empty when the plan holds no program that can be read.
    """
    programs = [_program(blocks) for blocks in _texts(data)]
    inner = {
        frozenset(name for kernel in program.kernels for name in kernel.layers): program
        for program in programs
        if "*" in program.accelerators
    }
    return tuple(
        dataclasses.replace(program, kernels=tuple(_open_fusion(kernel, inner) for kernel in program.kernels))
        for program in programs
        if "*" not in program.accelerators
    )


def _texts(data: bytes) -> Iterator[dict[str, list[str]]]:
    """The blocks of each program, by name."""
    start = data.find(b"header {\n")
    while start >= 0:
        blocks: dict[str, list[str]] = {}
        position = start
        while (block := next((b for b in _BLOCKS if data.startswith(b + b"\n", position)), None)) is not None:
            end = data.find(b"\n}\n", position)
            if end < 0:
                position = len(data)  # no later block ends either: to look for each one's end would be quadratic
                break
            text = data[position + len(block) + 1 : end].decode("utf-8", "replace")
            blocks[block.decode().removesuffix(" {")] = text.split("\n")
            position = end + 3
            while data.startswith(b"\n", position):
                position += 1
        if "main" in blocks:
            yield blocks
        start = data.find(b"header {\n", max(position, start + 1))


def _program(blocks: dict[str, list[str]]) -> Program:
    """Turn the text of one program into kernels."""
    target = re.search(r"accelerators=\{([^}]*)\}", "\n".join(blocks["header"]))
    on_host = set(re.findall(r"region = \{ name=(\S+) [^}]*place=host", "\n".join(blocks["header"])))
    tensors = _tensors(blocks.get("descriptors", []), on_host)
    kernels, unread = [], 0
    for line in blocks["main"]:
        found = _LINE.match(line)
        if found is None:
            unread += not re.fullmatch(r"\s*(label \w+:\s*)?", line)
        elif found[1] not in SILENT_KINDS:
            kernels.append(_kernel(found[1], found[2], tensors))
    return Program(tuple(target[1].split()) if target else (), tensors, tuple(kernels), unread)


def _tensors(lines: list[str], on_host: set[str]) -> dict[str, Operand]:
    """Every tensor on the card. Scratch space, and literals and extents in host memory, are not moved by kernels."""
    tensors: dict[str, Operand] = {}
    for line in lines:
        name, kind = re.search(r' name="([^"]*)"', line), re.search(r" type=(\w+)", line)
        dims = re.search(r" dims=\{((?:[^}\"]|\"[^\"]*\")*)\}", line)
        region = re.search(r' region="?([^\s"]*)', line)
        if not (name and kind and dims) or "is_scratchspace=1" in line or (region and region[1] in on_host):
            continue
        extents = tuple(
            int(word) if re.fullmatch(r"-?\d{1,18}", word) else word.strip('"')
            for word in re.findall(r'"[^"]*"|[^\s"]+', dims[1])
        )
        base = re.search(r'^\s*sub_tensor=\{.*?base="([^"]*)"', line)
        offset = re.search(r"const_offset=(\d+)", line)
        place = (base[1], offset[1] if offset else name[1]) if base else (name[1], "")
        tensors[name[1]] = Operand(name[1], TYPES.get(kind[1], UNKNOWN), extents, place)
    return tensors


def _kernel(kind: str, body: str, tensors: dict[str, Operand]) -> Kernel:
    """One line of ``main``."""
    named = re.search(r'(?:^|\s)name="([^"]*)"|(?:^|\s)name=(\S+)', body)
    name = (named[1] or named[2] or "") if named else ""
    metadata = re.search(r'\slayers="([^"]*)"', body)
    layers = layer_names(metadata[1]) if metadata else ()
    read_all, write_all = _list(body, "input"), _list(body, "output")
    reads = tuple(tensors[tensor] for tensor in read_all if tensor in tensors)
    writes = tuple(tensors[tensor] for tensor in write_all if tensor in tensors)
    linear: tuple[LinearOp, ...] = ()
    if kind in LINEAR_KINDS:
        fused = frozenset(flag for flag in FUSED_FLAGS if re.search(rf"\s{flag}=true\b", body))
        known = fused if re.search(r"\srelu=(true|false)\b", body) else None
        types = [tensors[tensor].dtype if tensor in tensors else UNKNOWN for tensor in read_all[:2]]
        data, weight = (types + [UNKNOWN] * 2)[:2]
        output = writes[0].dtype if writes else UNKNOWN
        linear = (LinearOp(name, data, weight, output, known, layers),)
    return Kernel(name, kind, reads, writes, layers, linear, syllables(name) | {kind})


def _list(body: str, which: str) -> list[str]:
    """Names in ``input={ ... }`` or ``input_args={ ... }``."""
    found = re.search(rf'\s{which}(?:_args)?=\{{((?:\s*"[^"]*")*)\s*\}}', body)
    return _QUOTED.findall(found[1]) if found else []


def _open_fusion(kernel: Kernel, inner: dict[frozenset[str], Program]) -> Kernel:
    """Join what a fusion holds inside to the kernel that launches it."""
    program = inner.get(frozenset(kernel.layers)) if kernel.kind == "runtime_fusion" else None
    if program is None:
        return kernel
    written = kernel.writes[0].dtype if len(kernel.writes) == 1 else UNKNOWN
    inside = frozenset(word for part in program.kernels for word in part.ops)
    linear = tuple(
        dataclasses.replace(op, output=written, fused=None if op.fused is None else op.fused | inside)
        for part in program.kernels
        for op in part.linear
    )
    return dataclasses.replace(kernel, linear=linear, ops=kernel.ops | inside)
