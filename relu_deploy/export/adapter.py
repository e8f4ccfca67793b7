"""One calling convention for every model: tensors in, in order; a tuple of named tensors out."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from relu_deploy.errors import ExportError

# The exporters put this before every name inside the wrapped model; ``convert`` takes it off again.
INNER = "model"


class Adapter(nn.Module):
    """Calls a model with inputs by name or by position, and flattens what it returns to its tensors."""

    def __init__(self, model: nn.Module, keywords: Sequence[str] | None) -> None:
        super().__init__()
        self.model = model
        self.keywords = None if keywords is None else tuple(keywords)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the model's result, in the order of its structure."""
        return tuple(leaf for leaf in pytree.tree_leaves(self.call(*inputs)) if isinstance(leaf, Tensor))

    def call(self, *inputs: Tensor) -> Any:
        """The model's result as it is."""
        if self.keywords is None:
            return self.model(*inputs)
        return self.model(**dict(zip(self.keywords, inputs, strict=True)))


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model returns.

    Attributes:
        names: One ONNX name for each tensor, in the order of :class:`Adapter`.
        dropped: Values that are no tensors and so cannot be exported, described.
    """

    names: tuple[str, ...]
    dropped: tuple[str, ...]


def adapt(model: nn.Module, names: Sequence[str]) -> Adapter:
    """Pass inputs to ``model.forward`` by keyword where all their names are its parameters, else by position.

    Raises:
        ExportError: a parameter without default gets no input, there are more inputs than parameters, or a name is
            that of a parameter at another position.
    """
    parameters = _parameters(model)
    if parameters is None:
        return Adapter(model, None)
    known = [parameter.name for parameter in parameters]
    by_name = all(name in known for name in names)
    given = set(names) if by_name else set(known[: len(names)])
    lacking = [p.name for p in parameters if p.default is p.empty and p.name not in given]
    title = type(model).__name__
    if lacking:
        raise ExportError(
            f"{title}.forward needs {', '.join(known)}; no input is given for {', '.join(lacking)}",
            hint=f"add {' '.join(f'--input {name}=SHAPE' for name in lacking)}",
        )
    if len(names) > len(known):
        raise ExportError(f"{title}.forward takes {len(known)} inputs ({', '.join(known)}), {len(names)} are given")
    for position, name in enumerate(names):
        if not by_name and name in known and known.index(name) != position:
            raise ExportError(
                f"input {name!r} is number {position + 1} of the inputs and number {known.index(name) + 1} of "
                f"{title}.forward",
                hint=f"name all inputs as forward does: {', '.join(known)}",
            )
    return Adapter(model, names if by_name else None)


def input_names(model: nn.Module, count: int) -> tuple[str, ...]:
    """Names for inputs that are passed by position: those of the parameters of ``forward``, where they can be told."""
    parameters = _parameters(model)
    known = [parameter.name for parameter in parameters or ()][:count]
    return (*known, *(f"input_{i}" for i in range(len(known), count)))


def describe_outputs(result: Any, taken: Sequence[str]) -> Outputs:
    """Name the tensors of a result by where they stand: a key of a dict, ``output`` alone, ``output_0`` in a tuple.

    Args:
        result: What the model returned.
        taken: Names of the inputs, which outputs may not have.

    Raises:
        ExportError: there is no tensor in it, or one of its parts is of a class that torch cannot look into.
    """
    names: list[str] = []
    dropped: list[str] = []
    for path, leaf in pytree.tree_flatten_with_path(result)[0]:
        name = "_".join(_token(key) for key in path)
        if isinstance(leaf, Tensor):
            base = re.sub(r"\W", "_", name if name and not name[0].isdigit() else f"output_{name}".rstrip("_"))
            names.append(_unique(base, (*taken, *names)))
        elif isinstance(leaf, (int, float, bool, str)):
            dropped.append(f"{name or 'the result'} = {leaf!r}")
        elif leaf is not None:
            raise ExportError(
                f"the model returns a {type(leaf).__name__}, neither a tensor nor a tuple, list or dict of tensors",
                hint="return tensors, or register the class with torch.utils._pytree.register_dataclass",
            )
    if not names:
        raise ExportError("the model returns no tensor, so there is nothing to export")
    return Outputs(tuple(names), tuple(dropped))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, then every module as it was: BatchNorm of training must not be exported."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def plain_strides(model: nn.Module) -> Iterator[None]:
    """Weights in the usual order of memory for a while (not channels-last), then as they were.

    Strides are no part of ONNX, but torch 2.13's dynamo exporter follows them into shape arithmetic and gathers.
    """
    strided = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_contiguous()]
    kept = [tensor.data for tensor in strided]
    for tensor in strided:
        tensor.data = tensor.data.contiguous()
    try:
        yield
    finally:
        for tensor, data in zip(strided, kept, strict=True):
            tensor.data = data


def _parameters(model: nn.Module) -> list[inspect.Parameter] | None:
    """Parameters of ``forward`` that an input can reach by name; None when they cannot be told."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None
    parameters = list(signature.parameters.values())
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    return [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]


def _token(key: Any) -> str:
    """One step of a path into a nested result: the key of a dict, the index of a list, the field of a dataclass."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _unique(base: str, taken: Sequence[str]) -> str:
    name, number = base, 2
    while name in taken:
        name = f"{base}_out" if number == 2 and f"{base}_out" not in taken else f"{base}_{number}"
        number += 1
    return name
