"""What the engines are fed: one batch, the same for all of them, from data or from a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from relu_deploy.errors import DataError
from relu_deploy.tensors import TensorSpec

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class InputPlan:
    """One input as it is measured.

    Attributes:
        name: Of the tensor.
        shape: Without any dynamic axis left.
        dtype: numpy name, as the original takes it.
    """

    name: str
    shape: Shape
    dtype: str


def plan_inputs(
    specs: Sequence[TensorSpec], *, batch: int | None, shapes: Mapping[str, Shape]
) -> tuple[int, tuple[InputPlan, ...]]:
    """Settle the batch and every shape.

    The first axis of an input of rank 2 or more is its batch, but where it is fixed and that of another is not, or is
    another: a recurrent state has its layers there. What is dynamic there becomes ``batch``; every other dynamic axis
    must be given. Without ``batch`` it is what the shapes say, and 1 where they say nothing.

    Args:
        specs: Inputs of the original.
        batch: Items an inference, or None.
        shapes: Whole shapes by input name; they may also replace nothing but dynamic axes.

    Returns:
        The batch, and one plan an input.

    Raises:
        DataError: an unknown name, a shape that contradicts the network or the batch, a dynamic axis nobody gave.
    """
    unknown = sorted(set(shapes) - {spec.name for spec in specs})
    if unknown:
        raise DataError(f"there is no input {unknown[0]!r}", hint=f"the inputs are {', '.join(s.name for s in specs)}")
    batched = _batched(specs)
    settled = batch if batch is not None else _implied_batch(batched, shapes)
    return settled, tuple(
        InputPlan(s.name, _resolve(s, settled, shapes.get(s.name), batched=s in batched), s.dtype) for s in specs
    )


def _batched(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Inputs whose first axis is the batch."""
    several = [spec for spec in specs if len(spec.shape) >= 2]
    dynamic = [spec for spec in several if isinstance(spec.shape[0], str)]
    alike = len({spec.shape[0] for spec in several}) == 1
    return dynamic or (several if alike else [])


def _implied_batch(batched: Sequence[TensorSpec], shapes: Mapping[str, Shape]) -> int:
    """What the first axes say that are fixed, by the caller or by the network; 1 if none is."""
    for spec in batched:
        first = shapes[spec.name][:1] if spec.name in shapes else spec.shape[:1]
        if first and isinstance(first[0], int):
            return int(first[0])
    return 1


def _resolve(spec: TensorSpec, batch: int, given: Shape | None, *, batched: bool) -> Shape:
    """The shape of one input; ``batched`` says whether its first axis is the batch."""
    if given is not None:
        return _checked(spec, batch, given, batched=batched)
    if batched and isinstance(spec.shape[0], int) and spec.shape[0] != batch:
        raise DataError(
            f"input {spec} has a fixed batch of {spec.shape[0]}; {batch} was asked for",
            hint=f"use --batch {spec.shape[0]}, or export the network with a dynamic batch",
        )
    shape = tuple(batch if index == 0 and isinstance(axis, str) else axis for index, axis in enumerate(spec.shape))
    if any(isinstance(axis, str) for axis in shape):
        example = "x".join(str(axis) if isinstance(axis, int) else "N" for axis in shape)
        raise DataError(
            f"input {spec} has dynamic axes besides the batch, and their extent decides the speed",
            hint=f"give the shape: --shape {spec.name}={example} with numbers for N",
        )
    return tuple(int(axis) for axis in shape)


def _checked(spec: TensorSpec, batch: int, given: Shape, *, batched: bool) -> Shape:
    if not spec.accepts(given) or min(given, default=1) < 1:
        raise DataError(f"the shape {'x'.join(map(str, given))} does not fit input {spec}")
    if batched and given[0] != batch:
        raise DataError(
            f"the shape {'x'.join(map(str, given))} of input {spec.name!r} has a batch of {given[0]}, "
            f"not the {batch} asked for",
            hint="leave --batch out, or make the two equal",
        )
    return given


def random_feeds(plans: Sequence[InputPlan], *, seed: int) -> Feeds:
    """Inputs for measuring speed where no data is given.

    Floats are standard normal. Integers of 32 and 64 bits are 0 or 1, since they may be indices into a table (token
    ids) or a mask, and both values are valid for every table of two rows or more; narrower integers are uniform over
    their range, since they are pixels or codes.
    """
    rng = np.random.default_rng(seed)
    return {plan.name: _random(plan, rng) for plan in plans}


def _random(plan: InputPlan, rng: np.random.Generator) -> Array:
    dtype = np.dtype(plan.dtype)
    if dtype.kind == "f":
        return np.asarray(rng.standard_normal(plan.shape), dtype=dtype)
    if dtype.kind == "b" or dtype.itemsize > 2:
        return np.asarray(rng.integers(0, 2, plan.shape), dtype=dtype)
    limits = np.iinfo(dtype)
    return np.asarray(rng.integers(limits.min, limits.max, plan.shape, endpoint=True), dtype=dtype)


def check_same_inputs(original: Sequence[TensorSpec], engine: Sequence[TensorSpec], plans: Sequence[InputPlan]) -> None:
    """Refuse an engine that cannot be fed what its original is fed.

    A float of another width is cast (an FP16 engine of an FP32 network); everything else must agree.

    Raises:
        DataError: other names, another kind of number, or a shape that does not fit.
    """
    found = {spec.name: spec for spec in engine}
    if set(found) != {spec.name for spec in original}:
        raise DataError(
            f"its inputs are {_names(engine)}; those of the original are {_names(original)}",
            hint="measure engines of the same network; rename inputs when they are exported",
        )
    for plan in plans:
        spec = found[plan.name]
        if np.dtype(spec.dtype) != np.dtype(plan.dtype) and {np.dtype(d).kind for d in (spec.dtype, plan.dtype)} != {
            "f"
        }:
            raise DataError(f"its input {spec.name!r} takes {spec.dtype}; the original takes {plan.dtype}")
        if not spec.accepts(plan.shape):
            raise DataError(
                f"its input {spec} cannot take the shape {'x'.join(map(str, plan.shape))} that is measured",
                hint="choose --batch and --shape so that every engine takes them",
            )


def cast_feeds(feeds: Feeds, specs: Sequence[TensorSpec]) -> Feeds:
    """The same feeds in the float width that an engine takes."""
    return {spec.name: feeds[spec.name].astype(spec.dtype, copy=False) for spec in specs}


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(sorted(repr(spec.name) for spec in specs)) or "none"
