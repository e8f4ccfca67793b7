# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""Every pass on every model: valid, equal, final. The whole of it, about four minutes:

    python tests/passes/sweep.py [model.onnx ...]

Models are the single-operator cases of onnx's own backend tests, each as it comes, with all inputs but the first turned
into weights, and with all; small graphs made for the passes; and the files named. ``test_every_pass.py`` runs a part.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from calib.runtime import RUNTIME_ERRORS
from calib.session import open_session
from relu_deploy import ops
from relu_deploy.errors import ModelError
from relu_deploy.graph import (
    MAX_IR_VERSION,
    MAX_OPSET,
    MIN_OPSET,
    check_model,
    export_graph,
    import_graph,
    load_model,
    name_nodes,
    opset,
)
from relu_deploy.passes import PIPELINE
from relu_deploy.passes.run import _EXACT
from relu_deploy.passes.shapes import annotate
from relu_deploy.passes.verify import ROUNDING_TOLERANCE, compare, computes_in_half, random_feeds

Pass = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and inputs for it."""

    name: str
    model: onnx.ModelProto
    feeds: dict[str, Any]


# Graphs that give each pass something to do, and next to it something of the kind that it must leave alone. Weights are
# random, of the shapes named.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "normalised conv": (
        "(float[N, 4, 9, 9] x) => (float[N, 6, A, B] y, float[N, 6, C, D] z) { c = Conv(x, w, b) n = BatchNormalization(c, s, t, m, v) r = Relu(n) a = Add(r, q) d = Conv(a, u) z = Mul(d, q) e = Conv(a, u) y = BatchNormalization(e, s, t, m, v) }",
        {"w": (6, 4, 3, 3), "b": (6,), "u": (6, 6, 3, 3), "q": (6, 1, 1), **dict.fromkeys("stmv", (6,))},
    ),
    "normalised products": (
        "(float[N, 4] x) => (float[N, 6] y, float[N, 6] z) { c = MatMul(x, w) d = Add(c, b) n = BatchNormalization(d, s, t, m, v) e = MatMul(n, u) y = Add(e, b) f = Sub(n, b) z = Div(f, s) }",
        {"w": (4, 6), "b": (6,), "u": (6, 6), **dict.fromkeys("stmv", (6,))},
    ),
    "normalised input": (
        "(float[N, 4, 8, 8] x) => (float[N, 6, A, B] y) { n = BatchNormalization(x, s, t, m, v) y = Conv(n, w) }",
        {"w": (6, 4, 3, 3), **dict.fromkeys("stmv", (4,))},
    ),
    "feed forward": (
        "(float[N, 5, 4] x) => (float[N, 5, 4] y) { c = MatMul(x, w) d = Add(c, b) r = Relu(d) e = MatMul(r, u) f = Add(e, x) o = Identity(one) y = Mul(f, o) }",
        {"w": (4, 6), "b": (6,), "u": (6, 4), "one": np.ones(4, np.float32)},
    ),
    "focus": (
        "(float[N, 3, H, H] x) => (float[N, 5, A, B] y, float[N, 3, C, D] z) { s0 = Slice(x, p00, e, hw, two) s1 = Slice(x, p10, e, hw, two) s2 = Slice(x, p01, e, hw, two) s3 = Slice(x, p11, e, hw, two) f = Concat <axis = 1> (s0, s1, s2, s3) y = Conv <pads = [1, 1, 1, 1]> (f, w) z = Neg(s2) }",
        {"w": (5, 12, 3, 3), "e": np.array([2**63 - 1] * 2), "hw": np.array([2, 3]), "two": np.array([2, 2]),
         **{f"p{i}{j}": np.array([i, j]) for i in (0, 1) for j in (0, 1)}},
    ),
    "padded": (
        "(float[N, 3, 8, 8] x) => (float[N, 5, A, B] y, float[N, 3, C, D] z) { p = Pad(x, pads) y = Conv(p, w) r = Relu(x) q = Pad(r, pads) z = MaxPool <kernel_shape = [3, 3]> (q) }",
        {"w": (5, 3, 3, 3), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
    ),
    "blends": (
        "(float[N, 6] x) => (float[N, 6] y) { c = Gemm(x, w) s = Sigmoid(c) a = Mul(c, s) p = Mul(a, zero) r = Relu(c) q = Mul(r, one) d = Add(p, q) e = MatMul(d, w) m = Max(e, zero) i = Identity(m) y = Gemm(i, w) }",
        {"w": (6, 6), "zero": np.float32(0), "one": np.float32(1)},
    ),
    "chains": (
        "(float[N, 3, 4] x) => (float[N, 12] y, float[N, 3, 4] z) { a = Transpose <perm = [0, 2, 1]> (x) b = Transpose <perm = [0, 2, 1]> (a) c = Reshape(b, same) d = Unsqueeze(c, one) e = Squeeze(d, one) f = Cast <to = 11> (e) g = Cast <to = 1> (f) h = Add(g, zero) k = Flatten(h) y = Dropout(k) z = Identity(h) }",
        {"same": np.array([0, -1, 4]), "one": np.array([1]), "zero": np.float32(0)},
    ),
    "twins": (
        "(float[N, 3] x, float[N, 3] o) => (float[N, 3] y) { a = Add(x, p) b = Add(x, q) c = Mul(a, b) d = Mul(b, a) u = Sin(o) y = Sub(c, d) }",
        {"p": np.float32([1, 2, 3]), "q": np.float32([1, 2, 3])},
    ),
    "branches": (
        "(float[3] x) => (float[3] y, int64[1] n) { k = Sin(x) s = Shape(x) g = Greater(s, zero) c = Squeeze(g) y = If (c) <then_branch = t () => (float[3] a) { h = Exp(k) a = Neg(h) }, else_branch = e () => (float[3] b) { b = Abs(k) }> n = Add(s, zero) }",
        {"zero": np.array([0])},
    ),
    "a known branch": (
        "(float[3] x) => (float[3] y) { k = Sin(x) y = If (c) <then_branch = t () => (float[3] a) { h = Exp(k) a = Neg(h) }, else_branch = e () => (float[3] b) { b = Abs(k) }> }",
        {"c": np.array(True)},
    ),
    "learned, spelled out": (
        "(float[N, 3] x) => (float[N, 3] y) { a = Add(x, two) p = Relu(a) b = Add(x, one) q = Relu(b) r = Relu(x) c = Sub(x, one) s = Relu(c) t = Mul(p, u) v = Mul(q, w) z = Mul(s, u) d = Sub(t, v) e = Add(d, r) y = Sub(e, z) }",
        {"one": np.float32(1), "two": np.float32(2), "u": np.float32([0.5, 0.25, 0.125]), "w": np.float32(0.25)},
    ),
    "learned": (
        "(float[N, 3] x) => (float[N, 3] y) { y = relu_deploy.PWLU <channel_axis = 1> (x, left, right, values, down, up) }",
        {"left": np.float32([-1]), "right": np.float32([1]), "values": np.float32([[0, 0, 1]]), "down": np.float32([0]), "up": np.float32([1])},
    ),
    "recurrent": (
        "(float[5, 1, 6] x) => (float[5, 1, 1, 2] y) { h = MatMul(x, s) y, a, c = LSTM <hidden_size = 2> (h, w, r) }",
        {"s": (6, 6), "w": (1, 8, 6), "r": (1, 8, 2)},
    ),
    "quantised": (
        "(float[N, 4] x) => (float[N, 4] y) { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) w = DequantizeLinear(k, t, z) m = MatMul(d, w) a = Add(m, b) r = Relu(a) e = QuantizeLinear(r, s, z) y = DequantizeLinear(e, t, z) }",
        {"s": np.float32(0.05), "t": np.float32(0.05), "z": np.int8(0), "k": np.arange(16, dtype=np.int8).reshape(4, 4), "b": (4,)},
    ),
}  # fmt: skip


def small() -> Iterator[Case]:
    """The graphs made for the passes."""
    for name, (text, weights) in SMALL.items():
        random = np.random.default_rng(0)
        model = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": 17, "{ops.DOMAIN}": {ops.VERSION}]> g {text}'
        )
        ops.drop_definitions(model)
        ops.define_operators(model, 17)
        for weight, given in weights.items():
            values = (
                random.uniform(0.5, 1.5, given).astype(np.float32) if isinstance(given, tuple) else np.asarray(given)
            )
            model.graph.initializer.append(numpy_helper.from_array(values, weight))
        check_model(model, name)
        name_nodes(model.graph)
        yield Case(name, model, _feeds(model))


def from_file(path: Path) -> Case:
    """A network on the disk."""
    model = load_model(path)
    return Case(path.stem, model, _feeds(model))


def _feeds(model: onnx.ModelProto) -> dict[str, Any]:
    feeds = random_feeds(model, open_session(model), 0)
    assert feeds, "no input was found that the model accepts"
    return dict(feeds[1])


def operators(step: int = 1) -> Iterator[Case]:
    """Every ``step``-th single-operator model of onnx, in three variants."""
    from onnx.backend.test.case import node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases divide by zero and overflow on purpose
        found = [case for case in node.collect_testcases(None) if case.model is not None and case.data_sets]
    for case in found[::step]:
        model = _readable(case.model)
        if model is None:
            continue
        names = [value.name for value in model.graph.input]
        given = [np.asarray(value) if isinstance(value, np.generic) else value for value in case.data_sets[0][0]]
        feeds = dict(zip(names, given, strict=False))
        for variant, live in (("as it comes", len(names)), ("with weights", 1), ("of constants", 0)):
            if live < len(names) and not all(isinstance(feeds.get(name), np.ndarray) for name in names[live:]):
                continue
            changed = _with_weights(model, {name: feeds[name] for name in names[live:]})
            if changed is not None and (variant == "as it comes" or live < len(names)):
                yield Case(f"{case.name}, {variant}", changed, {name: feeds[name] for name in names[:live]})


def _readable(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """In an opset that this package reads, if the operator has not changed since."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = min(copy.ir_version, MAX_IR_VERSION)
    for entry in copy.opset_import:
        entry.version = min(entry.version, MAX_OPSET) if entry.domain in ("", "ai.onnx") else entry.version
    name_nodes(copy.graph)
    try:
        check_model(copy, "the case")
        import_graph(copy)  # refuses inputs and outputs that are neither tensors nor sequences
    except ModelError:
        return None
    return copy if opset(copy) >= MIN_OPSET else None


def _with_weights(model: onnx.ModelProto, weights: dict[str, np.ndarray]) -> onnx.ModelProto | None:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name, values in weights.items():
        copy.graph.initializer.append(numpy_helper.from_array(values, name))
    live = [value for value in copy.graph.input if value.name not in weights]
    del copy.graph.input[:]
    copy.graph.input.extend(live)
    try:
        check_model(copy, "the case")
    except ModelError:  # constants let onnx see that a declared output shape is not what comes out
        return None
    return copy


def apply(function: Pass, model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """One pass as the pipeline runs it; the model as it is where nothing changes."""
    source = onnx.ModelProto()
    source.CopyFrom(model)  # graphsurgeon names tensors that it shares with what it was given
    graph = import_graph(source)
    annotate(graph, source)
    changed = function(graph).changed
    return (export_graph(graph, source) if changed else model), changed


def check(case: Case, function: Pass) -> str:
    """Apply a pass and prove it: what became of the case, in a word.

    Raises:
        AssertionError: the result is invalid, different, or not final.
    """
    name = f"{function.__name__} on {case.name}"
    after, changed = apply(function, case.model)
    if not changed:
        return "unchanged"
    check_model(after, name)
    again = apply(function, after)[1]
    assert again == (), f"{name}: a second run changes {again}"
    try:
        wanted = open_session(case.model, threads=1).run(None, case.feeds)
    except (*RUNTIME_ERRORS, KeyError):
        return "not comparable"  # ONNX Runtime does not run the original
    if function.__name__ not in _EXACT:  # the runner's own comparison, which knows how a network amplifies rounding
        return "equal" if compare(case.model, after, exact=False, samples=[case.feeds]).samples else "not comparable"
    got = open_session(after, threads=1).run(None, {i: case.feeds[i] for i in case.feeds})
    for old, new in zip(wanted, got, strict=True):
        _compare(old, new, half=computes_in_half(case.model), name=name)
    return "equal"


def _compare(old: Any, new: Any, *, half: bool, name: str) -> None:
    """Bit for bit, NaN like NaN; to float16's rounding where anything is in float16."""
    if not isinstance(old, np.ndarray) or old.dtype.kind not in "fiub":
        assert str(old) == str(new), name
        return
    assert (old.dtype, old.shape) == (new.dtype, new.shape), name
    if not half or old.dtype.kind != "f":
        np.testing.assert_array_equal(new, old, err_msg=name)
        return
    largest = float(np.abs(old[np.isfinite(old)].astype(np.float64)).max(initial=0))
    np.testing.assert_allclose(new, old, rtol=0, atol=ROUNDING_TOLERANCE["float16"] * largest, err_msg=name)


def _fate(case: Case, function: Pass) -> tuple[str, str]:
    """What became of a case, and what is wrong with it."""
    try:
        return check(case, function), ""
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        return "WRONG", f"{function.__name__} on {case.name}: {type(error).__name__}: {str(error).strip()[:400]}"


def main(paths: Sequence[str]) -> int:
    """Everything, and a table of what happened."""
    start, fates, wrong, cases = time.monotonic(), Counter(), [], 0
    files = (from_file(Path(path)) for path in paths)
    for case in (one for source in (small(), files, operators()) for one in source):
        cases += 1
        for function in PIPELINE:
            fate, why = _fate(case, function)
            fates[function.__name__, fate] += 1
            wrong.extend([why] if why else [])
    print(f"{cases} models, onnx {onnx.__version__}, onnxruntime {ort.__version__}, {time.monotonic() - start:.0f} s")
    for function in PIPELINE:
        counts = {fate: fates[function.__name__, fate] for fate in ("equal", "not comparable", "unchanged", "WRONG")}
        print(f"{function.__name__:20}", ", ".join(f"{count} {fate}" for fate, count in counts.items() if count))
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
