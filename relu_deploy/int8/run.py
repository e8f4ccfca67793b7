"""Quantise a network: place, write, check, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import onnx

from calib.model import first_quantized
from calib.ranges import Ranges, check_fresh
from relu_deploy import graph as files
from relu_deploy.errors import ModelError, QuantizationError
from relu_deploy.int8.correct import Correction
from relu_deploy.int8.decide import Decided, decide
from relu_deploy.int8.draft import Draft
from relu_deploy.int8.drift import SAMPLES, OutputDrift, measure_drift
from relu_deploy.int8.evidence import Evidence
from relu_deploy.int8.formats import NumberFormat, QParams, number_format, weight_bits_for_cpu
from relu_deploy.int8.fuse import FusionReport
from relu_deploy.int8.half import halve
from relu_deploy.int8.place import Layer, Placement
from relu_deploy.int8.prepare import prepare_ort, prepare_tensorrt
from relu_deploy.int8.qoperator_files import IntegerReport
from relu_deploy.int8.sensitivity import Sensitivity
from relu_deploy.int8.settle import settle
from relu_deploy.int8.shield import shield_float_layers
from relu_deploy.int8.spare import spare_products
from relu_deploy.int8.tables import as_floats, take_back, write_tables
from relu_deploy.int8.widen import widen, with_names
from relu_deploy.int8.write import Written, write
from relu_deploy.machine import describe_machine
from relu_deploy.ops import is_definition
from relu_deploy.passes.constants import fold_constants
from relu_deploy.passes.identity import remove_identities
from relu_deploy.passes.pwlu_spell import spell_pwlu
from relu_deploy.passes.run import inline_functions
from relu_deploy.report import PassReport

# The first opset with per-channel QuantizeLinear and DequantizeLinear, and the first with float16 ones.
_PER_CHANNEL_OPSET = 13
_FLOAT16_OPSET = 19
# What is left of a granularity in a float32 network.
_GRANULARITY = {"channel": "channel", "tensor": "tensor", "auto": "channel"}


@dataclasses.dataclass(frozen=True)
class QuantReport:
    """What quantising did.

    Attributes:
        target: The runtime the file is for.
        weight_bits: 8, or 7 for CPUs without VNNI.
        weight_granularity: ``channel`` (a scale for each output channel) or ``tensor`` (one for each layer).
        layers: Every linear layer, INT8 or float with the reason.
        activations: Tensor name -> scale and zero point.
        dropped_activations: ReLU and Clip nodes that became the clipping of a quantiser.
        opset: Of the file written; raised where Q/DQ needs it.
        warnings: What a user should know before trusting the file.
        folded: Activation without a kernel of its own -> the form that it got.
        fusion: Channels that were scaled so that one scale fits all.
        islands: Tensors at the shores of float islands whose channels were scaled, and those that were not; on
            TensorRT-RTX all tensors that layers read.
        rows: Convolutions whose weights were evened out row by row, and those that were not.
        sensitivity: Layers by the damage that INT8 does, where data to measure it on was given.
        correction: Weights and biases chosen on that data.
        drift: How far each output is from the float network's on its first samples; empty without it.
        integer: The form in integer operators and its multipliers, where they were asked for.
        float_part: Type in which what is left in float computes: ``fp32`` or ``fp16``.
        half: Nodes that became float16, and those that stay float32 with the reason.
        merged: Convolutions of one tensor that became one.
    """

    target: str
    weight_bits: int
    weight_granularity: str
    layers: tuple[Layer, ...]
    activations: dict[str, QParams]
    dropped_activations: tuple[str, ...]
    opset: int
    warnings: tuple[str, ...]
    folded: dict[str, str] = dataclasses.field(default_factory=dict)
    float_part: str = "fp32"
    fusion: FusionReport | None = None
    half: PassReport | None = None
    merged: PassReport | None = None
    islands: PassReport | None = None
    rows: PassReport | None = None
    sensitivity: Sensitivity | None = None
    correction: Correction | None = None
    drift: tuple[OutputDrift, ...] = ()
    integer: IntegerReport | None = None

    @property
    def int8_layers(self) -> int:
        """How many linear layers got INT8 inputs and weights."""
        return sum(layer.int8 for layer in self.layers)


def quantize(
    model: onnx.ModelProto,
    ranges: Ranges,
    *,
    target: str = "ort",
    weight_bits: int | None = None,
    weight_granularity: str = "auto",
    float_part: str = "auto",
    channel_fusion: str = "pow2",
    keep_float: Iterable[str] = (),
    check_ranges: bool = True,
    extra_warnings: Iterable[str] = (),
    evidence: Evidence | None = None,
) -> tuple[onnx.ModelProto, QuantReport]:
    """Quantise a float network to INT8 with Q/DQ.

    Args:
        model: A checked float model; it is not changed.
        ranges: Measured on this very model.
        target: ``ort``, ``tensorrt-rtx`` or ``tensorrt``.
        weight_bits: 8 or 7 (``ort`` only); None: what this CPU multiplies without saturating, and a warning where that
            is 7.
        weight_granularity: ``channel``, ``tensor`` or ``auto``, see :func:`relu_deploy.int8.formats.number_format`.
        float_part: ``fp32``, ``fp16`` or ``auto``: what is left in float computes in it. Inputs and outputs keep their
            types.
        channel_fusion: ``pow2``, ``free`` or ``off``, see :func:`relu_deploy.int8.fuse.fuse_channels`.
        keep_float: Names of linear layers to leave in float.
        extra_warnings: What the caller found worth warning of; they go into the report.
        evidence: Samples to measure on which layers are to stay in float too, and to choose weights and biases by.
        check_ranges: False where the caller knows that ``ranges`` belongs to an equal network with the same tensor
            names.

    Returns:
        The quantised model and the report.

    Raises:
        RangesError: the ranges were measured on another network.
        QuantizationError: the model is quantised already, has no linear layer, or a name in ``keep_float`` is none.
        ModelError: its opset cannot be lifted.
    """
    bits, cpu_warnings = _weight_bits(weight_bits, target)
    number = number_format(target, weight_bits=bits, weight_granularity=weight_granularity, float_part=float_part)
    refuse_quantized(model)
    if check_ranges:
        check_fresh(ranges, model)
    given, ranges, half_warnings = _widened(model, ranges, number)
    lifted, number, opset_warnings = _prepare(given, number, asked=float_part)
    graph = files.import_graph(lifted)
    fold_constants(graph)
    remove_identities(graph)  # an Identity between a layer and its ReLU would be quantised, and then the ReLU again
    files.tidy(graph)
    kept = frozenset(keep_float)
    prepare = prepare_ort if number.unsigned else prepare_tensorrt
    ready = prepare(graph, ranges, number, channel_fusion=channel_fusion, keep_float=kept)
    decided = Decided(ready.place({}))
    _check_layers(decided.placement, kept)
    sites = take_back(graph, ready.sites, decided.placement)
    if evidence is not None:
        runs = as_floats(graph, sites) if sites else graph
        draft = Draft(runs, lifted, decided.placement, ready.bounds, number, ready.centres)
        decided = decide(draft, ready.place, evidence)
        sites = take_back(graph, sites, decided.placement)
    placement, folded = decided.placement, dict(ready.folded)
    stored = settle(graph, placement, ready.centres, decided.weights, number)
    written = write(graph, placement, ready.bounds, number, stored)
    write_tables(graph, sites, written.activations)
    files.tidy(graph)
    half = halve(graph, ready.bounds) if number.half and not is_half(lifted) else None
    if number.unsigned:
        folded |= {site.name: f"a table of 256 codes for {site.channels} functions" for site in sites}
        folded |= spell_pwlu(graph, number.target).notes  # those between floats
        spare_products(graph)
        shield_float_layers(graph)
    quantized = files.export_graph(graph, lifted)
    files.check_model(quantized, "the quantised model")
    told = (*cpu_warnings, *half_warnings, *opset_warnings, *extra_warnings)
    report = _report(quantized, placement, written, number, told, folded)
    report = dataclasses.replace(
        report, fusion=ready.fusion, islands=ready.islands, rows=ready.rows, half=half, merged=ready.merged
    )
    return quantized, report if evidence is None else _measured(report, decided, model, quantized, evidence)


def _measured(
    report: QuantReport, decided: Decided, model: onnx.ModelProto, quantized: onnx.ModelProto,
    evidence: Evidence,
) -> QuantReport:  # fmt: skip
    """The report with what was seen on samples."""
    integer = report.target == "ort"
    drift = measure_drift(model, quantized, evidence.first(SAMPLES), integer_kernels=integer)
    told = (*report.warnings, *decided.warnings)
    found, done = decided.sensitivity, decided.correction
    return dataclasses.replace(report, drift=drift, sensitivity=found, correction=done, warnings=told)


def _weight_bits(asked: int | None, target: str) -> tuple[int, tuple[str, ...]]:
    """Width of weights for a target; and a warning where this CPU decided it, or does not bear what was asked."""
    if target != "ort":
        return asked or 8, ()
    here = weight_bits_for_cpu(describe_machine().flags)
    if asked is None and here == 7:
        return here, (
            "this CPU has no VNNI, so weights have 7 bits; for a CPU that has it, ask for 8 (--weight-bits 8)",
        )
    if asked == 8 and here == 7:
        return asked, ("this CPU has no VNNI: 8-bit weights saturate here and lose accuracy; with VNNI they do not",)
    return asked or here, ()


def refuse_quantized(model: onnx.ModelProto) -> None:
    """Raise where a model holds Q/DQ or integer operators already.

    Raises:
        QuantizationError: it does; names the first such node.
    """
    node = first_quantized(model)
    if node is not None:
        raise QuantizationError(
            f"the model is quantised already: node {node.name!r} is a {node.op_type}",
            hint="start from the float model",
        )


def _widened(
    model: onnx.ModelProto, ranges: Ranges, number: NumberFormat
) -> tuple[onnx.ModelProto, Ranges, tuple[str, ...]]:
    """A float16 network in float32 where integer kernels give that, with its ranges; others as they are."""
    if not (number.unsigned and is_half(model)):
        return model, ranges, ()
    wide, names = widen(inline_functions(model) if model.functions else model)
    told = "the network is float16: what is left in float computes in float32, as ONNX Runtime's integer kernels do"
    return wide, with_names(ranges, names), (told,)


def _prepare(
    model: onnx.ModelProto, number: NumberFormat, *, asked: str
) -> tuple[onnx.ModelProto, NumberFormat, tuple[str, ...]]:
    """Unfold local functions, lift the opset as far as Q/DQ needs it, and infer the types of all tensors.

    Returns:
        The model; the number format, with a float32 float part where it was left open and the opset cannot be lifted as
        far as float16 Q/DQ need it; and a warning then.
    """
    if not all(map(is_definition, model.functions)):
        model = inline_functions(model)
    given_half = is_half(model)
    warnings: tuple[str, ...] = ()
    try:
        lifted = files.convert_opset(model, lowest=_FLOAT16_OPSET if given_half or number.half else _PER_CHANNEL_OPSET)
    except ModelError as error:
        if given_half or not number.half or asked == "fp16":
            raise
        warnings = (f"the float part stays float32: {error.message}",)
        number = number_format(number.target, weight_granularity=_GRANULARITY[number.weight_granularity])
        lifted = files.convert_opset(model, lowest=_PER_CHANNEL_OPSET)
    if files.fits_one_message(lifted):
        lifted = onnx.shape_inference.infer_shapes(lifted, data_prop=True)
    return lifted, number, warnings


def is_half(model: onnx.ModelProto) -> bool:
    """Whether a network is given in float16: it stores weights in it."""
    return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)


def _check_layers(placement: Placement, keep_float: frozenset[str]) -> None:
    names = {layer.name for layer in placement.layers}
    for name in sorted(keep_float):
        if name not in names:
            raise QuantizationError(f"there is no linear layer named {name!r} to keep in float")
    if not names:
        raise QuantizationError("the model has no Conv, ConvTranspose, Gemm or MatMul: nothing would become INT8")
    if not any(layer.int8 for layer in placement.layers):
        first = placement.layers[0]
        raise QuantizationError(
            f"none of the {len(names)} linear layers can become INT8; {first.name}: {first.reason}",
            hint="measure the ranges on this very model with 'relu-deploy calibrate'"
            if "no range" in first.reason
            else None,
        )


def _report(
    model: onnx.ModelProto, placement: Placement, written: Written, number: NumberFormat, extra: Iterable[str],
    folded: dict[str, str],
) -> QuantReport:  # fmt: skip
    warnings = list(extra)
    if written.dead:
        warnings.append(
            f"{len(written.dead)} tensors were zero in every sample, so their scale is arbitrary: "
            + ", ".join(written.dead[:5])
        )
    if written.faint:
        warnings.append(
            f"{len(written.faint)} tensors are too small for any scale and become 0: " + ", ".join(written.faint[:5])
        )
    if written.dead_channels:
        total = sum(written.dead_channels.values())
        warnings.append(f"{total} output channels in {len(written.dead_channels)} layers have only zero weights")
    if number.target == "tensorrt" and any(layer.int8 and layer.op == "ConvTranspose" for layer in placement.layers):
        warnings.append("ConvTranspose is given INT8, which was not tried with tensorrt; TensorRT-RTX 1.7 ignores it")
    if left := [layer for layer in placement.layers if not layer.int8]:
        warnings.append(f"{len(left)} of {len(placement.layers)} linear layers stay float")
    return QuantReport(
        number.target, number.weight_bits, number.weight_granularity, placement.layers, written.activations,
        tuple(written.dropped), files.opset(model), tuple(warnings), folded, number.float_part,
    )  # fmt: skip
