"""Export a torch model, and write the file only when ONNX Runtime computes what torch computes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx

from calib.files import check_writable
from calib.progress import Progress, silent
from relu_deploy import __version__
from relu_deploy.errors import ExportError
from relu_deploy.export.report import ExportReport, OutputCheck
from relu_deploy.export.samples import make_sample, make_samples, traced_shapes
from relu_deploy.export.source import require_torch
from relu_deploy.export.specs import DynamicAxis, ExampleInput, check_specs
from relu_deploy.graph import check_model, name_nodes, save_model
from relu_deploy.model_io import model_io

if TYPE_CHECKING:
    from torch import nn

    from relu_deploy.export.adapter import Adapter

# The newest that both onnxruntime 1.20 (up to 21) and TensorRT 10.0 (up to 20) read; it keeps GELU one node.
DEFAULT_OPSET = 20
# What torch writes without converting versions afterwards, which it does not always manage.
_OPSETS = {"dynamo": range(18, 24), "torchscript": range(11, 21)}


def export_model(
    model: nn.Module,
    inputs: Sequence[ExampleInput],
    out: Path,
    *,
    dynamic: Sequence[DynamicAxis] = (),
    opset: int = DEFAULT_OPSET,
    exporter: Literal["dynamo", "torchscript"] = "dynamo",
    source: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> ExportReport:
    """Write ``model`` as ONNX, after holding ONNX Runtime against torch on seeded random inputs.

    The model is exported in evaluation mode and left in the mode it was in. Compared are inputs from all, the lower
    half and the upper half of their range at the example's shapes, and at the smallest, the largest and a middle size
    of every dynamic axis.

    Args:
        model: On the CPU.
        inputs: In the order of ``forward``, or named as its parameters.
        out: The ``.onnx`` file. An older one survives every failure.
        dynamic: Axes whose size is decided at run time.
        opset: Of the file, 11 to 23; torchscript writes at most 20, dynamo at least 18.
        exporter: torch's ``dynamo`` (torch.export) or the older ``torchscript`` (tracing).
        source: How the report and the file name the model; its class by default.
        rtol: Largest error, relative to the largest magnitude of an output. None: 1e-4 for float32, 2e-2 for float16,
            1e-8 for float64, because both sides sum in another order. Integer outputs must be equal.
        atol: Added to it. None: 1e-6, 1e-3, 1e-12.
        seed: Of the random inputs.
        progress: Told while comparing.

    Raises:
        ExportError: inputs do not fit the model, the model fails on them, or the exporter does.
        CheckFailedError: ONNX Runtime fails or differs. Nothing is written.
        FileError: ``out`` cannot be written.
        MissingExtraError: torch or onnxscript is not installed.
    """
    require_torch()
    from relu_deploy.export.adapter import adapt, evaluating, plain_strides

    check_writable(out)
    check_specs(inputs, dynamic)
    _check_options(model, opset, exporter, rtol=rtol, atol=atol)
    job = _Job(tuple(inputs), tuple(dynamic), opset, exporter, rtol, atol, seed)
    title = source or type(model).__name__
    adapter = adapt(model, [spec.name for spec in inputs])
    with evaluating(adapter), plain_strides(adapter):
        exported, checks, samples, notes = job.run(adapter, progress)
    _sign(exported, title, exporter)
    check_model(exported, f"what the {exporter} exporter made of {title}")
    save_model(exported, out)
    return ExportReport(out, title, exporter, opset, exported.ir_version, model_io(exported)[0], checks, samples, notes)


@dataclasses.dataclass(frozen=True)
class _Job:
    """The options of one export, and its two steps: convert, compare."""

    inputs: tuple[ExampleInput, ...]
    dynamic: tuple[DynamicAxis, ...]
    opset: int
    exporter: Literal["dynamo", "torchscript"]
    rtol: float | None
    atol: float | None
    seed: int

    def run(
        self, adapter: Adapter, progress: Progress
    ) -> tuple[onnx.ModelProto, tuple[OutputCheck, ...], int, tuple[str, ...]]:
        """Model, checks, number of samples, notes."""
        import torch

        from relu_deploy.export.adapter import describe_outputs
        from relu_deploy.export.compare import Comparison, run_torch
        from relu_deploy.export.convert import convert

        names = [spec.name for spec in self.inputs]
        traced = make_sample(self.inputs, traced_shapes(self.inputs, self.dynamic), "any", seed=self.seed)
        outputs = describe_outputs(run_torch(adapter.call, traced), names)
        progress("export", 0, None)
        example = [torch.from_numpy(array) for array in traced.feeds.values()]
        exported, warned = convert(
            adapter, example, names, outputs.names, self.dynamic, opset_version=self.opset, exporter=self.exporter
        )
        comparison = Comparison(adapter, exported, outputs.names, rtol=self.rtol, atol=self.atol, warned=warned)
        comparison.repeatable(traced)
        samples, notes = make_samples(self.inputs, self.dynamic, self._symbols(exported), seed=self.seed)
        for number, sample in enumerate(samples, start=1):
            comparison.check(sample)
            progress("compare", number, len(samples))
        notes += [f"not exported, as it is no tensor: {text}" for text in outputs.dropped]
        notes += [f"input {name!r} is not used by the model" for name in names if name not in comparison.inputs]
        notes += [f"the exporter warned: {text}" for text in warned]
        return exported, comparison.results(), len(samples), tuple(notes)

    def _symbols(self, exported: onnx.ModelProto) -> dict[tuple[str, int], str]:
        """What the file calls the size of each dynamic axis; an input it does not have varies alone."""
        shapes = {tensor.name: tensor.shape for tensor in model_io(exported)[0]}
        return {
            (axis.input, axis.axis): str(shapes[axis.input][axis.axis])
            if axis.input in shapes
            else f"{axis.input}.{axis.axis}"
            for axis in self.dynamic
        }


def _check_options(model: nn.Module, opset: int, exporter: str, *, rtol: float | None, atol: float | None) -> None:
    if exporter not in ("dynamo", "torchscript"):
        raise ExportError(f"there is no exporter {exporter!r}", hint="dynamo or torchscript")
    if opset not in _OPSETS[exporter]:
        lowest, highest = _OPSETS[exporter][0], _OPSETS[exporter][-1]
        raise ExportError(
            f"the {exporter} exporter cannot write opset {opset}",
            hint=f"--opset {lowest} to {highest}, or the other exporter",
        )
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ExportError(f"{name} is {value}; it must be a number of at least 0")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ExportError(
                f"{name} lies on the device {tensor.device}; a model is exported from the CPU", hint="model.cpu()"
            )


def _sign(model: onnx.ModelProto, title: str, exporter: str) -> None:
    """Say in the file where it comes from. Of a path only the name: nobody needs to know its author's home."""
    source = Path(title).name if "/" in title else title
    del model.metadata_props[:]
    onnx.helper.set_model_props(
        model, {"producer": f"relu-deploy {__version__}", "source": source, "exporter": exporter}
    )
    name_nodes(model.graph)
