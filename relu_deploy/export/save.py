"""A network as a ``.pt2`` archive that ``relu-deploy export`` takes without the code that made it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.files import atomic_path
from relu_deploy.errors import ExportError
from relu_deploy.export.adapter import Adapter, Outputs, describe_outputs, evaluating, input_names, plain_strides
from relu_deploy.export.convert import cause, quiet
from relu_deploy.export.pt2 import load_pt2
from relu_deploy.export.specs import DTYPES, DynamicAxis, ExampleInput

MAX_BATCH = 64  # that the command which is shown asks for
# Two runs of one network may sum in another order.
_RTOL, _ATOL = 1e-4, 1e-5


@dataclasses.dataclass(frozen=True)
class SavedProgram:
    """A written archive.

    Attributes:
        path: The ``.pt2`` file.
        inputs: Its inputs, with one sample; whole numbers with the range that the example had.
        dynamic: The batch axes; empty if the network fixes its batch.
    """

    path: Path
    inputs: tuple[ExampleInput, ...]
    dynamic: tuple[DynamicAxis, ...]

    def command(self, onnx: Path) -> str:
        """The call that makes an ONNX file of it."""
        words = ["relu-deploy", "export", str(self.path)]
        for spec in self.inputs:
            ends = "" if spec.low is None or spec.high is None else f":{int(spec.low)}..{int(spec.high)}"
            dtype = "" if spec.dtype == "float32" else f":{spec.dtype}"
            words += ["--input", f"{spec.name}={'x'.join(map(str, spec.shape))}{dtype}{ends}"]
        for axis in self.dynamic:
            words += ["--dynamic", f"{axis.input}:{axis.axis}={axis.low}..{axis.high}"]
        return shlex.join([*words, "-o", str(onnx)])


class _Plain(nn.Module):
    """Takes tensors by position and gives a tensor or a dict of them: nothing that needs a class of its own."""

    def __init__(self, adapter: Adapter, outputs: Outputs, *, alone: bool) -> None:
        super().__init__()
        self.adapter, self.names, self.alone = adapter, outputs.names, alone

    def forward(self, *inputs: Tensor) -> Tensor | dict[str, Tensor]:
        """The tensor if the network returns one, else its tensors by name."""
        found = self.adapter(*inputs)
        return found[0] if self.alone else dict(zip(self.names, found, strict=True))


def save_program(model: nn.Module, inputs: Any, out: Path) -> SavedProgram:
    """Write a network as torch.export captures it, with any batch size if the network allows that.

    The archive is read back and run on the example before it gets its name.

    Args:
        model: On the CPU; exported in evaluation mode.
        inputs: An example of two samples or more: a tensor, a tuple of tensors, or a dict of keywords, samples on
            axis 0. A batch of one would be taken for a constant.
        out: The file.

    Raises:
        ExportError: torch cannot export it, or the archive does not compute the same.
        FileError: ``out`` cannot be written.
    """
    tensors, keywords = _in_order(model, inputs)
    names = tensors_named(model, inputs)
    adapter = Adapter(model, keywords)
    with evaluating(adapter), plain_strides(adapter):
        expected = adapter.call(*tensors)
        plain = _Plain(adapter, describe_outputs(expected, names), alone=isinstance(expected, Tensor))
        program, batched = _capture(plain, tensors)
        buffer = io.BytesIO()
        try:
            with quiet():
                torch.export.save(program, buffer)
        except Exception as error:  # the serialiser raises whatever it stumbles over
            raise ExportError(f"torch cannot store {type(model).__name__}: {cause(error)}") from error
        with atomic_path(out) as temporary:
            temporary.write_bytes(buffer.getbuffer())
            _check(temporary, plain, tensors if batched else tuple(t[:1] for t in tensors))
    specs = tuple(_spec(name, tensor) for name, tensor in zip(names, tensors, strict=True))
    axes = tuple(DynamicAxis(spec.name, 0, 1, MAX_BATCH) for spec in specs) if batched else ()
    return SavedProgram(out, specs, axes)


def tensors_named(model: nn.Module, inputs: Any) -> tuple[str, ...]:
    """Names for the inputs: the keywords, or the parameters of ``forward``."""
    if isinstance(inputs, Mapping):
        return tuple(map(str, inputs))
    return input_names(model, len(inputs) if isinstance(inputs, (tuple, list)) else 1)


def _in_order(model: nn.Module, inputs: Any) -> tuple[tuple[Tensor, ...], tuple[str, ...] | None]:
    """The tensors, and the keywords they are passed by; None: by position."""
    keywords = tuple(map(str, inputs)) if isinstance(inputs, Mapping) else None
    values: Sequence[Any] = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    tensors = tuple(values) if isinstance(values, (tuple, list)) else (values,)
    for name, value in zip(tensors_named(model, inputs), tensors, strict=True):
        if not isinstance(value, Tensor) or value.dim() == 0 or str(value.dtype).removeprefix("torch.") not in DTYPES:
            raise ExportError(f"the input {name!r} is no tensor with samples on axis 0, so it cannot be exported")
    if any(len(tensor) != len(tensors[0]) or len(tensor) < 2 for tensor in tensors):
        raise ExportError("the inputs have not one batch size, of two or more, on axis 0")
    return tensors, keywords


def _capture(plain: _Plain, tensors: tuple[Tensor, ...]) -> tuple[torch.export.ExportedProgram, bool]:
    """The program, and whether its batch is dynamic."""
    axes = tuple({0: torch.export.Dim.DYNAMIC(min=1)} for _ in tensors)
    with quiet():
        with contextlib.suppress(Exception):  # many reasons; the second try tells what is left of them
            return _bare(torch.export.export(plain, tensors, dynamic_shapes=(axes,), strict=False)), True
        try:
            return _bare(torch.export.export(plain, tuple(t[:1] for t in tensors), strict=False)), False
        except Exception as error:  # whatever the traced network stumbles over
            title = type(plain.adapter.model).__name__
            raise ExportError(f"torch.export fails on {title}: {cause(error)}") from error


def _bare(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without the checks of dtypes that torch writes beside casts: they compute nothing, and no reader needs them."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # noqa: SLF001  # its public name
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _check(path: Path, plain: _Plain, tensors: tuple[Tensor, ...]) -> None:
    program = load_pt2(path)
    for batch in (tensors, tuple(t[:1] for t in tensors)):
        for mine, its in zip(_leaves(program(*batch)), _leaves(plain(*batch)), strict=True):
            if mine.shape != its.shape or not torch.allclose(
                mine.double(), its.double(), rtol=_RTOL, atol=_ATOL + _RTOL * float(its.double().abs().max())
            ):
                raise ExportError(f"the archive of {type(plain.adapter.model).__name__} computes something else")


def _leaves(output: Any) -> list[Tensor]:
    return list(output.values()) if isinstance(output, Mapping) else [output]


def _spec(name: str, tensor: Tensor) -> ExampleInput:
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = (1, *tensor.shape[1:])
    if "int" not in dtype:
        return ExampleInput(name, shape, dtype)
    return ExampleInput(name, shape, dtype, float(tensor.min()), float(tensor.max()))
