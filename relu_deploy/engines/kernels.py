"""One form for what TensorRT's plan and its build log both tell: kernels, what they read and write, what is fused."""

from __future__ import annotations

import dataclasses
import re

UNKNOWN = "unknown"
# Names of types in the plan and in the log -> ours, and bytes an element.
TYPES = {
    "float": "fp32", "half": "fp16", "bf16": "bf16", "bfloat16": "bf16", "int8": "int8", "uint8": "uint8",
    "int32": "int32", "int64": "int64", "bool": "bool", "fp8": "fp8", "fp8_e4m3": "fp8", "double": "fp64",
}  # fmt: skip
SIZES = {"fp64": 8, "int64": 8, "fp32": 4, "int32": 4, "fp16": 2, "bf16": 2, "int8": 1, "uint8": 1, "bool": 1, "fp8": 1}


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads or writes.

    Attributes:
        name: As the compiler calls it.
        dtype: Ours (``fp32``, ...), or ``unknown``.
        dims: Numbers, or the compiler's names of axes that are known only at run time.
        place: The memory it lies in: a slice of a concatenation has its base's name and its own offset.
    """

    name: str
    dtype: str = UNKNOWN
    dims: tuple[int | str, ...] = ()
    place: tuple[str, str] = ("", "")


@dataclasses.dataclass(frozen=True)
class LinearOp:
    """A convolution or matrix product inside a kernel.

    Attributes:
        name: The compiler's name, mostly the ONNX node's.
        data: Type of its first operand.
        weight: Type of its second.
        output: Type of what it writes.
        fused: What is fused into it (``relu``, ``bias``, ``sigmoid``, ...); None: not known.
        layers: ONNX nodes it stands for.
    """

    name: str
    data: str
    weight: str
    output: str
    fused: frozenset[str] | None
    layers: tuple[str, ...]

    @property
    def precision(self) -> str:
        """Type of both operands when they agree; else ``unknown``."""
        return self.data if self.data == self.weight else UNKNOWN


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: The compiler's name.
        kind: The compiler's word for it (``function``, ``corrltn``, ``kgen``, ...).
        reads: Tensors it reads, constants among them.
        writes: Tensors it writes.
        layers: ONNX nodes that it stands for, as the compiler says.
        linear: Convolutions and matrix products inside.
        ops: Words for what it computes, lower case: the operators inside a fusion, the syllables of a generated name.
    """

    name: str
    kind: str
    reads: tuple[Operand, ...]
    writes: tuple[Operand, ...]
    layers: tuple[str, ...]
    linear: tuple[LinearOp, ...] = ()
    ops: frozenset[str] = frozenset()


def layer_names(metadata: str) -> tuple[str, ...]:
    r"""ONNX nodes in a kernel's metadata, where they stand in brackets between separators.

    >>> layer_names("[ONNX Layer: conv]\x1e[ONNX Layer: a[0]]")
    ('conv', 'a[0]')
    """
    return tuple(re.findall(r"\[ONNX Layer: ([^\x1d-\x1f]*?)\](?=[\x1d-\x1f]|$|\[ONNX Layer: )", metadata))


def syllables(name: str) -> frozenset[str]:
    """The operators in the name of a generated kernel.

    >>> sorted(syllables("__myl_MulAddSiluRounCast"))
    ['add', 'cast', 'mul', 'roun', 'silu']
    """
    generated = re.match(r"__my\w*?_([A-Z][A-Za-z0-9]*)", name)
    return frozenset(word.lower() for word in re.findall(r"[A-Z][a-z0-9]*", generated[1])) if generated else frozenset()
