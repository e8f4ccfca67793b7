"""Torch's two exporters, made quiet, with one kind of error and tidy names."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import onnx
import torch
from torch import Tensor
from torch.jit._trace import TracerWarning

from relu_deploy.errors import ExportError
from relu_deploy.export.adapter import INNER, Adapter
from relu_deploy.export.specs import DynamicAxis
from relu_deploy.graph import all_nodes, opset
from relu_deploy.nn.pwlu_export import pwlu_nodes
from relu_deploy.ops import DEFINITION_OPSET, define_operators

Exporter = Literal["dynamo", "torchscript"]

# onnxruntime 1.20 and TensorRT 10 read IR 10 and nothing newer.
_IR_VERSION = 10
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SHOWN = 3


def convert(
    adapter: Adapter,
    example: Sequence[Tensor],
    names: Sequence[str],
    outputs: Sequence[str],
    dynamic: Sequence[DynamicAxis],
    *,
    opset_version: int,
    exporter: Exporter,
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Run an exporter in memory.

    Returns:
        The model, with names as the model's own modules have them, and what the exporter warned of.

    Raises:
        ExportError: the exporter failed, fixed an axis that was to be dynamic, or gave another opset.
    """
    run = _dynamo if exporter == "dynamo" else _torchscript
    # Older opsets cannot spell the definition that stands beside such a node: there it stays plain operators.
    nodes = pwlu_nodes(adapter, exporter) if opset_version >= DEFINITION_OPSET else contextlib.nullcontext()
    with quiet() as told, nodes:
        try:
            model = run(adapter, tuple(example), list(names), list(outputs), dynamic, opset_version)
        except Exception as error:  # an exporter raises whatever it or the traced model stumbles over
            raise ExportError(
                f"torch's {exporter} exporter failed on {type(adapter.model).__name__}: {cause(error)}",
                hint=_advice(error, exporter),
            ) from error
    if opset(model) != opset_version:
        raise ExportError(
            f"the {exporter} exporter gave opset {opset(model)} instead of {opset_version}",
            hint="use --opset 18 or newer",
        )
    define_operators(model, opset_version)
    _tidy(model)
    _name_dimensions(model, dynamic)
    return model, tuple(dict.fromkeys(told))


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Hold back warnings and log lines; the list has the warnings that speak of the model (the tracer's) at the end."""
    before = logging.root.manager.disable
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logging.disable(logging.WARNING)
        try:
            yield told
        finally:
            logging.disable(before)
            told.extend(
                str(warning.message).strip().splitlines()[0]
                for warning in caught
                if issubclass(warning.category, TracerWarning)
            )


def _dynamo(
    adapter: Adapter,
    example: tuple[Tensor, ...],
    names: list[str],
    outputs: list[str],
    dynamic: Sequence[DynamicAxis],
    opset_version: int,
) -> onnx.ModelProto:
    # torch.onnx.export would capture the program itself, but it answers a refused dynamic axis by quietly fixing its
    # size.
    axes: list[dict[int, object]] = [{} for _ in names]
    for axis in dynamic:
        # A hint and not a named Dim: axes that must agree (two inputs of one batch) are found instead of refused.
        axes[names.index(axis.input)][axis.axis] = torch.export.Dim.DYNAMIC(min=axis.low, max=axis.high)
    program = torch.export.export(adapter, example, dynamic_shapes=(tuple(axes),), strict=False)
    converted = torch.onnx.export(
        program, (), input_names=names, output_names=outputs, opset_version=opset_version, verbose=False
    )
    if converted is None:
        raise ExportError("the exporter returned nothing")
    model: onnx.ModelProto = converted.model_proto
    return model


def _torchscript(
    adapter: Adapter,
    example: tuple[Tensor, ...],
    names: list[str],
    outputs: list[str],
    dynamic: Sequence[DynamicAxis],
    opset_version: int,
) -> onnx.ModelProto:
    # A trace cannot find out which sizes must agree, so the same axis over the same range is taken to be one size.
    axes: dict[str, dict[int, str]] = {}
    for axis in dynamic:
        axes.setdefault(axis.input, {})[axis.axis] = f"size_{axis.axis}_{axis.low}_{axis.high}"
    # Into a folder: past 2 GiB this exporter puts one file a weight beside the model.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            adapter, example, str(path), input_names=names, output_names=outputs, opset_version=opset_version,
            dynamic_axes=axes or None, dynamo=False,
        )  # fmt: skip
        return onnx.load(path)


def _tidy(model: onnx.ModelProto) -> None:
    """Take out what is of no use to a reader of the file, stack traces with the paths of this machine among it."""
    model.ir_version = min(model.ir_version, _IR_VERSION)
    graphs = [model.graph]
    for node in all_nodes(model.graph):
        node.doc_string = ""
        del node.metadata_props[:]
        graphs.extend(attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH)
    for graph in graphs:
        graph.doc_string = ""
        del graph.metadata_props[:]
        for value in (*graph.input, *graph.output, *graph.value_info):
            value.doc_string, value.name = "", _own_name(value.name)
            del value.metadata_props[:]
        for tensor in graph.initializer:
            tensor.doc_string, tensor.name = "", _own_name(tensor.name)
            del tensor.metadata_props[:]
        for node in graph.node:
            node.name = _own_name(node.name)
            node.input[:] = [_own_name(name) for name in node.input]
            node.output[:] = [_own_name(name) for name in node.output]


def _own_name(name: str) -> str:
    """The name inside the model that the adapter wraps.

    >>> _own_name("model.features.0.weight"), _own_name("/model/features/Conv"), _own_name("image")
    ('features.0.weight', '/features/Conv', 'image')
    """
    return name.removeprefix(f"{INNER}.") if name.startswith(f"{INNER}.") else re.sub(rf"^/{INNER}/", "/", name)


def _name_dimensions(model: onnx.ModelProto, dynamic: Sequence[DynamicAxis]) -> None:
    """Give dynamic sizes names that mean something (``batch``, ``image_2``); axes that must agree share one.

    Raises:
        ExportError: the exporter made a requested axis static, or a formula of another axis.
    """
    inputs = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    named: dict[str, str] = {}
    for axis in dynamic:
        if axis.input not in inputs:
            continue  # the model does not use this input
        symbol = inputs[axis.input][axis.axis].dim_param
        if not symbol.isidentifier():
            found = (
                f"tied to another size by {symbol}" if symbol else f"fixed at {inputs[axis.input][axis.axis].dim_value}"
            )
            raise ExportError(
                f"axis {axis.axis} of input {axis.input!r} cannot be dynamic: the model's own code leaves it {found}",
                hint="replace fixed sizes in its reshape and view calls (x.flatten(1), x.shape[0]), or drop --dynamic",
            )
        meaning = "batch" if axis.axis == 0 and "batch" not in named.values() else f"{axis.input}_{axis.axis}"
        named.setdefault(symbol, meaning)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = _renamed(dimension.dim_param, named)


def _renamed(expression: str, named: Mapping[str, str]) -> str:
    """An expression of sizes with its symbols renamed.

    >>> _renamed("2*s77 + s7", {"s77": "batch"})
    '2*batch + s7'
    """
    return re.sub(r"[A-Za-z_]\w*", lambda match: named.get(match[0], match[0]), expression)


def cause(error: BaseException) -> str:
    """The first lines of the innermost error: the outer ones only say that exporting failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = _COLOUR.sub("", str(error)).strip() or "no reason given"
    lines = [line.strip() for line in io.StringIO(text) if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:_SHOWN])}"[:600]


def _advice(error: BaseException, exporter: Exporter) -> str:
    text = str(error)
    if "data-dependent" in text:
        return "the model branches on the values of a tensor: use torch.where or torch.cond"
    if "marked" in text and "dynamic" in text.lower():
        return (
            "the model's code fixes a size that --dynamic lets vary: use x.shape[0] or x.flatten(1), or drop --dynamic"
        )
    other = "torchscript" if exporter == "dynamo" else "dynamo"
    return f"--exporter {other} may take what this one does not"
