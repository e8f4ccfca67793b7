"""From a model file to an engine: rewrite, calibrate, quantise and build, each of them as needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx

from calib import ranges as ranges_file
from calib.files import check_writable, make_folder, write_json
from calib.fingerprint import model_fingerprint
from calib.progress import Progress, silent
from calib.ranges import Ranges
from calib.run import calibrate
from calib.sources import Source
from relu_deploy.engines.base import BuildConfig, BuildReport, get_backend
from relu_deploy.errors import QuantizationError, RangesError
from relu_deploy.graph import load_model, save_model
from relu_deploy.int8.drift import COLLAPSE_DB, OutputDrift
from relu_deploy.int8.evidence import Evidence
from relu_deploy.int8.run import QuantReport, quantize, refuse_quantized
from relu_deploy.int8.sensitivity import refuse_collapse
from relu_deploy.passes.run import RewriteReport, rewrite, spell
from relu_deploy.report import to_json


@dataclasses.dataclass(frozen=True)
class Int8Plan:
    """Where the ranges of an INT8 build come from, and how it is quantised.

    Attributes:
        source: Calibration data; None where ``ranges`` is given.
        ranges: A ranges file measured on the model, as given or as rewritten.
        samples: How many samples to use at most; None for all.
        batch_size: Samples a run, where the batch axis is dynamic.
        weight_bits: 8 or 7; None: what this CPU multiplies without saturating.
        keep_float: Linear layers to leave in float.
        weight_granularity: A weight scale for each output ``channel`` or one for a ``tensor``; ``auto``: what pays.
        channel_fusion: ``pow2``, ``free`` or ``off``.
        method: How a range is chosen from what ``source`` gives, one of :data:`calib.options.METHODS`.
        percentile: Of the method of that name.
        float_part: What is left in float computes in ``fp32`` or ``fp16``; ``auto``: what suits the target.
        keep_worst: Leave at least so many of the layers in float that INT8 damages most; needs ``source``.
        min_sqnr: Signal over noise that every output is to have, decibels.
        correct: Choose weight codes and biases by what they do on ``source``.
        rank: Rank all layers by the damage that INT8 does, also where nothing depends on it; needs ``source``.
        allow_collapse: Build it even where INT8 destroys an output.
    """

    source: Source | None = None
    ranges: Path | None = None
    samples: int | None = None
    batch_size: int = 1
    weight_bits: int | None = None
    keep_float: tuple[str, ...] = ()
    weight_granularity: str = "auto"
    channel_fusion: str = "pow2"
    method: str = "max"
    percentile: float | None = None
    float_part: str = "auto"
    keep_worst: int = 0
    min_sqnr: float = COLLAPSE_DB
    correct: bool = True
    rank: bool = False
    allow_collapse: bool = False

    def __post_init__(self) -> None:
        if (self.source is None) == (self.ranges is None):
            raise QuantizationError(
                "an INT8 build needs calibration data or a ranges file" if self.source is None else
                "calibration data and a ranges file are both given: only one of them can decide the scales",
                hint="give either --calib DATA or --ranges FILE",
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Which ranges were used.

    Attributes:
        samples: How many samples they rest on.
        tensors: How many tensors they cover.
        method: How they were chosen.
        data: Fingerprint of the data.
        file: The ranges file they came from; None where they were measured now.
    """

    samples: int
    tensors: int
    method: str
    data: str
    file: str | None


@dataclasses.dataclass(frozen=True)
class EngineBuilt:
    """What every step of a build did.

    Attributes:
        rewrite: Graph passes.
        calibration: None for a float build.
        quantize: None for a float build.
        drift: How far each output of the INT8 network is from the float one's, on the first calibration samples; empty
            without calibration data.
        engine: The backend's report, also written beside the engine.
        kept: Files that ``keep`` asked for.
    """

    rewrite: RewriteReport
    calibration: Calibrated | None
    quantize: QuantReport | None
    drift: tuple[OutputDrift, ...]
    engine: BuildReport
    kept: tuple[str, ...]


def build_engine(
    model: Path | onnx.ModelProto,
    out: Path,
    config: BuildConfig,
    *,
    int8: Int8Plan | None = None,
    keep: Path | None = None,
    progress: Progress = silent,
) -> EngineBuilt:
    """Build an engine from a network.

    Args:
        model: Float ONNX file, or what :func:`relu_deploy.graph.load_model` made of it; without ``int8`` a Q/DQ network
            is built as it is.
        out: Engine to write; its report goes to ``<out>.json``.
        config: Target and how to build for it.
        int8: Quantise first; None builds the network as it is.
        keep: Folder for what lies between: ``rewritten.onnx``, ``ranges.json``, ``int8.onnx``, ``steps.json``.
        progress: Told how far calibration is.

    Raises:
        ToolkitError: any step's own errors; nothing is left of an engine that failed.
    """
    check_writable(out)
    backend = get_backend(config.target)
    if keep is not None:
        make_folder(keep)
    original = load_model(model) if isinstance(model, Path) else model
    backend.check(original, config)  # told before minutes of calibration, not after
    if int8 is not None:
        refuse_quantized(original)
    rewritten, rewrite_report = rewrite(original)
    ranges, quant_report = None, None
    if int8 is None:
        network, _ = spell(rewritten, config.target)  # quantising spells by itself, and knows how exact it has to be
    else:
        ranges = _ranges(int8, original, rewritten, progress)
        network, quant_report = _quantized(rewritten, ranges, int8, config, progress)
    engine = backend.build(network, out, config)
    calibrated = None if ranges is None or int8 is None else _summary(ranges, int8)
    drift = () if quant_report is None else quant_report.drift
    built = EngineBuilt(rewrite_report, calibrated, quant_report, drift, engine, _kept_names(keep, ranges))
    if keep is not None:
        _keep(keep, rewritten, ranges, network, built)
    return built


def _quantized(
    model: onnx.ModelProto, ranges: Ranges, plan: Int8Plan, config: BuildConfig, progress: Progress
) -> tuple[onnx.ModelProto, QuantReport]:
    """Quantise, and compare with the float network where there is data.

    Raises:
        CheckFailedError: an output collapses, and the plan does not allow it.
    """
    evidence = None
    if plan.source is not None:
        evidence = Evidence(
            plan.source, plan.samples, keep_worst=plan.keep_worst, floor_db=plan.min_sqnr, rank=plan.rank,
            correct=plan.correct, progress=progress,
        )  # fmt: skip
    network, report = quantize(
        model, ranges, target=config.target, weight_bits=plan.weight_bits, keep_float=plan.keep_float,
        check_ranges=False, extra_warnings=_card_warnings(config), weight_granularity=plan.weight_granularity,
        float_part=plan.float_part, channel_fusion=plan.channel_fusion, evidence=evidence,
    )  # fmt: skip
    if not plan.allow_collapse:
        refuse_collapse(report.drift, report.sensitivity, plan.min_sqnr)
    return network, report


def _card_warnings(config: BuildConfig) -> tuple[str, ...]:
    """What a card is known not to do in INT8: tests/engines/test_quantizer_engines.py asks the compiler."""
    text = (
        "with SM 75 among the targets TensorRT-RTX 1.7 computes every convolution in float, on all of them, and takes "
        "matrix products only in float16 networks: build for SM 75 separately"
    )
    return (text,) if config.target == "tensorrt-rtx" and "75" in config.sm else ()


def _ranges(int8: Int8Plan, original: onnx.ModelProto, rewritten: onnx.ModelProto, progress: Progress) -> Ranges:
    """Measure the ranges, or read them and make sure that they belong to this network."""
    if int8.ranges is None:
        assert int8.source is not None  # noqa: S101 - Int8Plan has exactly one of the two
        return calibrate(
            rewritten, int8.source, method=int8.method, percentile=int8.percentile, max_samples=int8.samples,
            batch_size=int8.batch_size, progress=progress,
        )  # fmt: skip
    ranges = ranges_file.load(int8.ranges)
    # Rewriting keeps the value of every tensor whose name survives, so ranges of the model as given serve as well.
    if ranges.model not in (model_fingerprint(original), model_fingerprint(rewritten)):
        raise RangesError(
            f"{int8.ranges} was measured on another network than the model given",
            hint="calibrate again on this model, or give --calib DATA instead of --ranges",
        )
    return ranges


def _summary(ranges: Ranges, int8: Int8Plan) -> Calibrated:
    file = None if int8.ranges is None else str(int8.ranges)
    return Calibrated(ranges.samples, len(ranges.tensors), ranges.method, ranges.data, file)


def _kept_names(keep: Path | None, ranges: Ranges | None) -> tuple[str, ...]:
    if keep is None:
        return ()
    between = ("rewritten.onnx", "ranges.json", "int8.onnx", "steps.json")
    return tuple(str(keep / name) for name in between if ranges is not None or name not in between[1:3])


def _keep(
    keep: Path, rewritten: onnx.ModelProto, ranges: Ranges | None, network: onnx.ModelProto, built: EngineBuilt
) -> None:
    save_model(rewritten, keep / "rewritten.onnx")
    if ranges is not None:
        ranges_file.save(ranges, keep / "ranges.json")
        save_model(network, keep / "int8.onnx")
    write_json(keep / "steps.json", to_json(built))
