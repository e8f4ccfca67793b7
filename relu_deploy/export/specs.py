"""What goes into a model, as a person writes it: ``NAME=1x3x32x32[:dtype[:lo..hi]]`` and ``NAME:AXIS=MIN..MAX``."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from relu_deploy.errors import ExportError

DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
# A misplaced digit in a shape must not make us allocate the machine's memory.
_MAX_ELEMENTS = 1 << 30
_NAME = r"[A-Za-z_][A-Za-z0-9_.\-]*"
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_INPUT = re.compile(rf"({_NAME})=(\d+(?:x\d+)*|scalar)(?::(\w+))?(?::({_NUMBER})\.\.({_NUMBER}))?")
_DYNAMIC = re.compile(rf"({_NAME}):(\d+)=(\d+)\.\.(\d+)")


@dataclasses.dataclass(frozen=True)
class ExampleInput:
    """One input of a model to be exported: the example it is traced with, and the values it is compared on.

    Attributes:
        name: Its name in the ONNX file. When all names are parameters of ``forward``, inputs are passed by name,
            otherwise in the order given.
        shape: Of the example that is traced; ``()`` for a scalar.
        dtype: One of ``DTYPES``.
        low: Smallest random value; None: the default of the dtype (floats: a standard normal; integers: 0).
        high: Largest random value, included; None: the default (integers: 1).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(_NAME, self.name):
            raise ExportError(f"{self.name!r} cannot be the name of an input", hint="letters, digits, _ . - ")
        if self.dtype not in DTYPES:
            raise ExportError(f"input {self.name!r} has no dtype {self.dtype!r}", hint=f"one of {', '.join(DTYPES)}")
        if any(size < 1 for size in self.shape) or math.prod(self.shape) > _MAX_ELEMENTS:
            raise ExportError(f"input {self.name!r} cannot have the shape {format_shape(self.shape)}")
        if (self.low is None) != (self.high is None):
            raise ExportError(f"input {self.name!r} needs both ends of its range, or neither")
        if self.low is not None and self.high is not None:
            self._check_range(self.low, self.high)

    def _check_range(self, low: float, high: float) -> None:
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ExportError(f"input {self.name!r} cannot be drawn from {low:g}..{high:g}: the ends are not in order")
        if self.dtype == "bool":
            raise ExportError(f"input {self.name!r} is bool and takes no range")
        if "int" in self.dtype:
            info = np.iinfo(self.dtype)
            if not (float(low).is_integer() and float(high).is_integer() and info.min <= low and high <= info.max):
                raise ExportError(f"input {self.name!r} cannot be drawn from {low:g}..{high:g} as {self.dtype}")

    @property
    def is_float(self) -> bool:
        """Whether values are real numbers."""
        return self.dtype.startswith("float")


@dataclasses.dataclass(frozen=True)
class DynamicAxis:
    """An axis whose size is decided when the model runs.

    Attributes:
        input: Name of the input.
        axis: From 0.
        low: Smallest size that is promised to work, at least 1.
        high: Largest, more than ``low``.
    """

    input: str
    axis: int
    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low < self.high:
            raise ExportError(
                f"axis {self.axis} of {self.input!r} cannot range over {self.low}..{self.high}",
                hint="MIN is at least 1 and MAX is larger; a fixed size needs no --dynamic",
            )


def parse_input(text: str) -> ExampleInput:
    """Read ``NAME=1x3x32x32[:dtype[:lo..hi]]`` (``NAME=scalar`` has no axes).

    Raises:
        ExportError: ``text`` is not of that form.

    >>> parse_input("ids=1x16:int64:0..999")
    ExampleInput(name='ids', shape=(1, 16), dtype='int64', low=0.0, high=999.0)
    """
    match = _INPUT.fullmatch(text)
    if match is None:
        raise ExportError(f"cannot read the input {text!r}", hint="write NAME=1x3x32x32, or NAME=1x16:int64:0..99")
    name, sizes, dtype, low, high = match.groups()
    shape = () if sizes == "scalar" else tuple(int(size) for size in sizes.split("x"))
    return ExampleInput(
        name, shape, dtype or "float32", None if low is None else float(low), None if high is None else float(high)
    )


def parse_dynamic(text: str) -> DynamicAxis:
    """Read ``NAME:AXIS=MIN..MAX``.

    Raises:
        ExportError: ``text`` is not of that form.

    >>> parse_dynamic("image:0=1..64")
    DynamicAxis(input='image', axis=0, low=1, high=64)
    """
    match = _DYNAMIC.fullmatch(text)
    if match is None:
        raise ExportError(f"cannot read the dynamic axis {text!r}", hint="write NAME:AXIS=MIN..MAX, as image:0=1..64")
    name, *numbers = match.groups()
    return DynamicAxis(name, *(int(number) for number in numbers))


def check_specs(inputs: Sequence[ExampleInput], dynamic: Sequence[DynamicAxis]) -> None:
    """Hold inputs and dynamic axes against each other.

    Raises:
        ExportError: no inputs, a name or an axis twice, an axis of an input or of a rank that is not there, or an
            example size outside its own range.
    """
    if not inputs:
        raise ExportError("the model has no inputs to export with", hint="--input NAME=1x3x32x32, one for each input")
    by_name = {spec.name: spec for spec in inputs}
    if len(by_name) < len(inputs):
        raise ExportError("two inputs have one name", hint="every --input has a name of its own")
    seen: set[tuple[str, int]] = set()
    for axis in dynamic:
        spec = by_name.get(axis.input)
        if spec is None:
            raise ExportError(f"there is no input {axis.input!r} to make dynamic", hint=f"one of {', '.join(by_name)}")
        if axis.axis >= len(spec.shape):
            raise ExportError(f"input {axis.input!r} of shape {format_shape(spec.shape)} has no axis {axis.axis}")
        if (axis.input, axis.axis) in seen:
            raise ExportError(f"axis {axis.axis} of input {axis.input!r} is made dynamic twice")
        if not axis.low <= spec.shape[axis.axis] <= axis.high:
            raise ExportError(
                f"axis {axis.axis} of input {axis.input!r} is {spec.shape[axis.axis]} in the example, "
                f"outside {axis.low}..{axis.high}"
            )
        seen.add((axis.input, axis.axis))


def format_shape(shape: Sequence[int]) -> str:
    """A shape as it is written on the command line.

    >>> format_shape((1, 3, 32, 32)), format_shape(())
    ('1x3x32x32', 'scalar')
    """
    return "x".join(str(size) for size in shape) or "scalar"
