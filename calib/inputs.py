"""What a network expects at its inputs, and the one place where data is checked against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.errors import DataError

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One input that data must be given for.

    Attributes:
        name: Its name in the network.
        dtype: What the network takes.
        shape: Extents with the batch axis; None where an axis is dynamic. None as a whole: the rank is not known.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        return f"{self.name} {self.dtype.name}{show_shape(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample, checked and cast: ready to be fed at batch size 1.

    Attributes:
        feeds: Array by input name, each with the rank of the input: a batch axis of length 1 first, unless ``whole``.
        origin: Where it came from, for messages: a file and an index in it.
        whole: Some array is a complete input, batch axis and all (see :func:`split_samples`), so samples cannot be put
            side by side.
    """

    feeds: Mapping[str, Array]
    origin: str
    whole: bool = False


class Column(Protocol):
    """A stored array, read whole or one row at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def rows(self) -> Iterator[Array]:
        """Yield ``array[i : i + 1]`` in order."""

    def read(self) -> Array:
        """Return the whole array."""


class MemoryColumn:
    """A ``Column`` over an array in memory, or mapped into it."""

    def __init__(self, array: Array) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def rows(self) -> Iterator[Array]:
        """Yield ``array[i : i + 1]`` in order."""
        return (self.array[i : i + 1] for i in range(len(self.array)))

    def read(self) -> Array:
        """Return the whole array."""
        return self.array


def show_shape(shape: Iterable[int | None] | None) -> str:
    """Spell a shape, ``?`` for a dynamic axis.

    >>> show_shape((None, 3, 8, 8))
    '(?, 3, 8, 8)'
    """
    if shape is None:
        return "(unknown rank)"
    return "(" + ", ".join("?" if extent is None else str(extent) for extent in shape) + ")"


def model_inputs(model: onnx.ModelProto) -> tuple[InputSpec, ...]:
    """The inputs that a network needs data for: graph inputs without a default value.

    Raises:
        DataError: an input is no tensor of numbers (a sequence, strings), or there is no input at all.
    """
    defaults = {tensor.name for tensor in model.graph.initializer}
    specs = tuple(_spec(value) for value in model.graph.input if value.name not in defaults)
    if not specs:
        raise DataError("the model has no input, so there is nothing to feed data to")
    return specs


def _spec(value: onnx.ValueInfoProto) -> InputSpec:
    """Read one graph input."""
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor.elem_type in (0, onnx.TensorProto.STRING):
        raise DataError(f"input {value.name!r} of the model is no tensor of numbers; arrays cannot be fed to it")
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    if not tensor.HasField("shape"):
        return InputSpec(value.name, dtype, None)
    # Some exporters write -1 for an axis that is dynamic.
    return InputSpec(value.name, dtype, tuple(d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim))


def split_samples(columns: Mapping[str, Column], specs: Iterable[InputSpec], origin: str) -> Iterator[Sample]:
    """Take stored arrays apart into checked samples; one sample at a time is in memory.

    How the sample axis is recognised, per input of rank r: an array of rank r has samples on axis 0 (the batch axis);
    of rank r - 1 it is one sample; of rank r + 1 axis 0 counts complete inputs. An array of rank 0 for a rank-0 input
    is the same for every sample. Arrays that are one complete feed (see :func:`is_one_feed`) are one sample.

    Args:
        columns: By input name; names beyond the network's inputs (labels, say) are ignored.
        specs: The network's inputs.
        origin: Named in every message.

    Raises:
        DataError: an input is missing, shapes or dtypes do not fit, a value is NaN or Inf, or there is no sample.
    """
    specs = tuple(specs)
    total = count_samples(columns, specs, origin)
    if is_one_feed(columns, specs):
        yield Sample({spec.name: fit(spec, columns[spec.name].read(), origin) for spec in specs}, origin, whole=True)
        return
    readers = {spec.name: _rows(spec, columns[spec.name], total) for spec in specs}
    whole = any(is_whole(spec, len(columns[spec.name].shape)) for spec in specs)
    for index in range(total):
        where = f"{origin}, sample {index}" if total > 1 else origin
        feeds = {spec.name: fit(spec, next(readers[spec.name]), where) for spec in specs}
        yield Sample(feeds, where, whole)


def count_samples(columns: Mapping[str, Column], specs: Iterable[InputSpec], origin: str) -> int:
    """How many samples stored arrays hold; names, types and shapes are checked. Raises: as :func:`split_samples`."""
    specs = tuple(specs)
    check_names(columns, specs, origin)
    if is_one_feed(columns, specs):
        return 1
    counts: dict[str, int] = {}
    for spec in specs:
        column = columns[spec.name]
        check_dtype(spec, column.dtype, origin)
        count = _count(spec, column.shape, origin)
        if count is not None:
            counts[spec.name] = count
    if len(set(counts.values())) > 1:
        raise DataError(
            f"{origin} has different numbers of samples for its inputs: {counts}",
            hint="where axis 0 of an input is no batch axis, give complete inputs: arrays of shape (samples, *shape of "
            "the input)",
        )
    total = next(iter(counts.values()), 1)
    if not total:
        raise DataError(f"{origin} is empty: it holds no sample", hint="calibration needs at least one sample")
    return total


def is_one_feed(columns: Mapping[str, Column], specs: Iterable[InputSpec]) -> bool:
    """Whether arrays are, as they are, what the network is fed once, though their lengths differ.

    So it is where axis 0 of an input is no batch axis, as in the state of a recurrent network, which has its layers
    there. The network must fix that axis, and all that it leaves open must have one length: else it is a mistake.
    """
    lengths: set[int] = set()
    fixed: set[int] = set()
    for spec in specs:
        found = columns[spec.name].shape
        if spec.shape is None or len(found) != len(spec.shape):
            return False
        if any(want not in (None, got) for want, got in zip(spec.shape, found, strict=True)) or 0 in found:
            return False
        if found:
            (lengths if spec.shape[0] is None else fixed).add(found[0])
    return len(lengths) <= 1 < len(lengths | fixed)


def is_whole(spec: InputSpec, rank: int) -> bool:
    """Whether data of this rank holds complete inputs, which cannot be put side by side on a batch axis."""
    return spec.shape is not None and (not spec.shape or rank == len(spec.shape) + 1)


def _count(spec: InputSpec, shape: tuple[int, ...], origin: str) -> int | None:
    """Samples in an array of this shape; None: the same for every sample. Raises: DataError when it does not fit."""
    rank = len(spec.shape) if spec.shape is not None else max(len(shape), 1)
    if len(shape) == rank + 1:
        if shape[0]:
            check_extents(spec, shape[1:], origin, first=0)
        return shape[0]
    if len(shape) == rank - 1:
        check_extents(spec, (1, *shape), origin)
        return 1
    if rank == 0:
        check_extents(spec, shape, origin)
        return None
    check_extents(spec, shape, origin)
    return shape[0]


def _rows(spec: InputSpec, column: Column, total: int) -> Iterator[Array]:
    """Yield each sample's array, with the rank of the input."""
    rank = len(spec.shape) if spec.shape is not None else max(len(column.shape), 1)
    if len(column.shape) == rank + 1:
        yield from (row[0] for row in column.rows())
    elif len(column.shape) == rank and rank:
        yield from column.rows()
    else:
        array = column.read()
        for _ in range(total):
            yield array if rank == 0 else array[None]


def check_names(names: Iterable[str], specs: Iterable[InputSpec], origin: str) -> None:
    """Refuse data that lacks an input; names beyond the network's inputs (labels, say) are allowed.

    Raises:
        DataError: with the names found and the names needed.
    """
    names, specs = set(names), tuple(specs)
    missing = [spec.name for spec in specs if spec.name not in names]
    if missing:
        found = ", ".join(sorted(map(repr, names))) or "nothing"
        raise DataError(
            f"{origin} has no array for input {missing[0]!r} of the model; it holds {found}",
            hint="the model's inputs are " + "; ".join(map(str, specs)),
        )


def fit(spec: InputSpec, array: Array, origin: str) -> Array:
    """Check one array against an input, and cast it where no value can change its meaning.

    Casts that are made: between float widths, and between integer widths when every value is in range. Integers are not
    turned into floats: pixels 0..255 given to a network that wants normalised ones would calibrate without a word.

    Raises:
        DataError: wrong rank, extent or dtype; NaN or Inf.
    """
    check_dtype(spec, array.dtype, origin)
    check_extents(spec, array.shape, origin)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = "NaN" if np.isnan(array).any() else "Inf"
        raise DataError(f"{origin}: input {spec.name!r} contains {bad}", hint="clean the data: no range can hold it")
    return _cast(spec, array, origin)


def check_dtype(spec: InputSpec, found: np.dtype[Any], origin: str) -> None:
    """Refuse a dtype that no safe cast leads from. Raises: DataError."""
    kinds = {"f": "f", "i": "iu", "u": "iu", "b": "b", "c": "c"}
    # bfloat16 and the 8-bit floats are not numpy's own and carry kind V; float data is cast to them like to float16.
    if found.kind in kinds.get(spec.dtype.kind, "f"):
        return
    hint = f"convert it: array.astype({spec.dtype.name!r})"
    if spec.dtype.kind == "f" and found.kind in "iu":
        hint += ", after the scaling that the network was trained with (pixels are often divided by 255)"
    raise DataError(f"{origin}: input {spec.name!r} takes {spec.dtype.name}, the data is {found}", hint=hint)


def check_extents(spec: InputSpec, found: tuple[int, ...], origin: str, *, first: int = 1) -> None:
    """Refuse a wrong rank, or extents from axis ``first`` on that differ. Raises: DataError."""
    if spec.shape is None:
        return
    expected = spec.shape
    same = len(found) == len(expected) and all(
        want is None or want == got for want, got in zip(expected[first:], found[first:], strict=True)
    )
    if same and 0 not in found[first:]:
        return
    hint = None
    if len(found) == 4 == len(expected) and found[-1] == expected[1]:
        hint = "it looks like NHWC data for an NCHW input: array.transpose(0, 3, 1, 2)"
    elif len(found) == 4 == len(expected) and found[1] == expected[-1]:
        hint = "it looks like NCHW data for an NHWC input: array.transpose(0, 2, 3, 1)"
    raise DataError(
        f"{origin}: input {spec.name!r} takes shape {show_shape(expected)}, the data has {show_shape(found)}", hint=hint
    )


def _cast(spec: InputSpec, array: Array, origin: str) -> Array:
    """Cast within a family of types, refusing values that the target cannot hold."""
    if array.dtype == spec.dtype:
        return np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
    if spec.dtype.kind in "iu":
        limits = np.iinfo(spec.dtype)
        if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
            raise DataError(
                f"{origin}: input {spec.name!r} takes {spec.dtype.name}; the data has values out of its range"
            )
    with np.errstate(over="ignore"):
        cast = np.asarray(array.astype(spec.dtype), order="C")
    if spec.dtype.kind == "f" and not np.isfinite(cast).all():
        raise DataError(f"{origin}: input {spec.name!r} takes {spec.dtype.name}; the data has values too large for it")
    return cast


def make_sample(arrays: Mapping[str, Array], specs: Iterable[InputSpec], origin: str) -> Sample:
    """Check one sample whose arrays have a batch axis of length 1, and cast it. Raises: as :func:`split_samples`."""
    columns = {name: MemoryColumn(np.asarray(array)) for name, array in arrays.items()}
    samples = list(split_samples(columns, specs, origin))
    if len(samples) != 1:
        raise DataError(f"{origin} holds {len(samples)} samples where one belongs")
    return samples[0]
