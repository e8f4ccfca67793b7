"""Mend a Q/DQ file for a target: every change that needs no data, in order, checked against the file as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import onnx

from calib.errors import first_line
from calib.runtime import RUNTIME_ERRORS
from calib.session import open_session
from relu_deploy import graph as files
from relu_deploy.errors import CheckFailedError, ModelError
from relu_deploy.int8.drift import sqnr_db
from relu_deploy.int8.lint import lint
from relu_deploy.int8.lint.codes import WHOLE
from relu_deploy.int8.lint.edit import drop_unread, dtype_of
from relu_deploy.int8.lint.finding import LintReport
from relu_deploy.int8.lint.fix_activations import mend_activations
from relu_deploy.int8.lint.fix_operators import spell_integer_operators
from relu_deploy.int8.lint.fix_places import (
    drop_before_relu,
    drop_in_float,
    drop_twice,
    float_transposed,
    quantize_behind,
    quantize_shortcuts,
)
from relu_deploy.int8.lint.fix_weights import float_constants, integer_biases, store_codes, symmetric_weights
from relu_deploy.int8.lint.network import Network
from relu_deploy.passes.verify import is_float, random_feeds
from relu_deploy.report import PassReport
from relu_deploy.targets import Target

# Random inputs of each comparison.
_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What mending did.

    Attributes:
        before: Findings of the file as it was.
        passes: What each change did; the note under ``""`` says what it does to the numbers.
        sqnr_db: Output -> how far it moved on random inputs, against the file as it was; None where it did not.
        notes: Why nothing could be compared, and other remarks.
        after: Findings that are left.
    """

    before: LintReport
    passes: tuple[PassReport, ...]
    sqnr_db: dict[str, float | None]
    notes: tuple[str, ...]
    after: LintReport


def fix(model: onnx.ModelProto, target: Target) -> tuple[onnx.ModelProto, Fixed]:
    """Mend what can be mended without data.

    Args:
        model: As parsed; not changed.
        target: The runtime that is to take it.

    Returns:
        The mended model, and what was done. Mending it again changes nothing.

    Raises:
        CheckFailedError: what came out is no valid ONNX although what went in was, or does not run.
    """
    mended = onnx.ModelProto()
    mended.CopyFrom(model)
    files.name_nodes(mended.graph)
    reports = []
    for step in _steps(target):
        reports.append(step(mended))
        drop_unread(mended)
    after = lint(mended, target)
    _check(model, mended)
    moved, notes = _compare(model, mended)
    return mended, Fixed(lint(model, target), tuple(reports), moved, notes, after)


def _steps(target: Target) -> tuple[Callable[[onnx.ModelProto], PassReport], ...]:
    """The passes of a target, in order: first one form for all, then numbers, then places."""
    if target == "ort":
        return (
            lower_versions, drop_before_relu, drop_twice,
            lambda model: symmetric_weights(model, asymmetric=True), lambda model: mend_activations(model, target),
            lambda model: quantize_behind(model, target), integer_biases,
        )  # fmt: skip
    transposed = (float_transposed,) if target == "tensorrt-rtx" else ()
    return (
        spell_integer_operators, store_codes, float_constants, symmetric_weights, drop_before_relu, drop_twice,
        lambda model: mend_activations(model, target), *transposed, drop_in_float,
        lambda model: quantize_behind(model, target), quantize_shortcuts,
    )  # fmt: skip


def lower_versions(model: onnx.ModelProto) -> PassReport:
    """Lower IR version and opset to what ONNX Runtime reads, where onnx's converter can."""
    changed = []
    if files.opset(model) > files.MAX_OPSET:
        try:
            lowered = onnx.version_converter.convert_version(model, files.MAX_OPSET)
        except (RuntimeError, IndexError, ValueError, onnx.checker.ValidationError):
            pass  # the finding stays, and says so
        else:
            model.CopyFrom(lowered)
            files.name_nodes(model.graph)
            changed.append("opset")
    if model.ir_version > files.MAX_IR_VERSION:
        model.ir_version = files.MAX_IR_VERSION
        changed.append("IR version")
    return PassReport("lower_versions", tuple(changed), (), {"": "the same numbers"} if changed else {})


def _check(model: onnx.ModelProto, mended: onnx.ModelProto) -> None:
    """Run the checker of onnx, unless it refused the file as it was too."""
    try:
        files.check_model(mended, "the mended file")
    except ModelError as error:
        try:
            files.check_model(model, "the file")
        except ModelError:
            return
        raise CheckFailedError(
            str(error), hint="nothing was written; this is a fault of --fix, please report it with the model"
        ) from error


def _in_range(net: Network, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Normal numbers spread over the range that each input is quantised to; beyond it all is saturation."""
    spread = dict(feed)
    for q in net.quantizers:
        value = feed.get(q.source)
        if value is not None and is_float(value) and q.scale is not None and np.isfinite(q.scale).all():
            end = float(np.abs(q.scale).max()) * (2 ** (8 * dtype_of(q.codes).itemsize) if q.codes in WHOLE else 256)
            spread[q.source] = np.clip(value * (end / 8), -end / 2, end / 2).astype(value.dtype)
    return spread


def _compare(model: onnx.ModelProto, mended: onnx.ModelProto) -> tuple[dict[str, float | None], tuple[str, ...]]:
    """Run both, as ONNX defines them, on random inputs."""
    try:
        before = open_session(model)
    except RUNTIME_ERRORS as error:
        return {}, (f"not compared: ONNX Runtime cannot load the file as it was: {first_line(error)}",)
    feeds = [
        _in_range(Network(model), feed) for seed in range(_RUNS) for feed in random_feeds(model, before, seed)[1:2]
    ]
    if not feeds:
        return {}, ("not compared: no random input was found that the file accepts",)
    try:
        after = open_session(mended)
        runs = [(before.run(None, dict(feed)), after.run(None, dict(feed))) for feed in feeds]
    except RUNTIME_ERRORS as error:
        raise CheckFailedError(f"the mended file does not run in ONNX Runtime: {first_line(error)}") from error
    moved: dict[str, float | None] = {}
    for index, output in enumerate(before.get_outputs()):
        if all(is_float(old[index]) for old, _ in runs):
            wide = [(old[index].astype(np.float64), new[index].astype(np.float64)) for old, new in runs]
            signal = sum(float(np.sum(old**2)) for old, _ in wide)
            moved[output.name] = sqnr_db(signal, sum(float(np.sum((old - new) ** 2)) for old, new in wide))
    return moved, ()
