"""The pure parts of the accuracy benchmark: scores, intervals, counts of layers, the page."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given

ROOT = Path(__file__).parents[2]
LETTERS = st.text("abc", max_size=7)


@pytest.fixture(scope="module")
def part():
    """A module of the benchmark, which is not installed: it is run from the repository's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield lambda name: importlib.import_module(f"benchmarks.accuracy.{name}")


@pytest.fixture(scope="module")
def scores(part):
    return part("scores")


# Scores


@given(a=LETTERS, b=LETTERS, c=LETTERS)
def test_edit_distance_is_a_distance(scores, a, b, c):
    distance = scores.edit_distance
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, b) == distance(b, a)
    assert distance(a, c) <= distance(a, b) + distance(b, c)
    assert abs(len(a) - len(b)) <= distance(a, b) <= max(len(a), len(b))


@given(text=LETTERS, place=st.integers(0, 6), letter=st.sampled_from("xyz"))
def test_one_letter_more_is_a_distance_of_one(scores, text, place, letter):
    assert scores.edit_distance(text, text[:place] + letter + text[place:]) == 1


@pytest.mark.parametrize(
    ("shift", "hits"),
    [(0.0, 1), (3.0, 1), (4.0, 0)],  # intersection over union: 1, 7/13 = 0.54, 6/14 = 0.43
)
def test_boxes_match_from_half_of_their_union(scores, shift, hits):
    box = np.array([[0.0, 0, 10, 10, 2]])
    assert scores.matched_boxes(box + np.array([shift, 0, shift, 0, 0]), box) == hits


def test_a_box_is_matched_once_and_by_the_better_one_first(scores):
    wanted = np.array([[0.0, 0, 10, 10, 0], [20, 0, 30, 10, 0]])
    found = np.array([[0.0, 0, 10, 10, 0], [1, 0, 11, 10, 0], [20, 0, 30, 10, 1]])
    score = scores.f1([found, np.empty((0, 5))], [wanted, np.empty((0, 5))])
    assert score.got.tolist() == [2, 0]  # one hit of three found and two wanted; the class of the third is wrong
    assert score.value == 2 * 1 / 5


def test_interval_is_that_of_the_difference_and_not_of_the_two_scores(scores):
    rng = np.random.default_rng(0)
    hard = rng.random(500) < 0.5  # what is hard is hard for both networks
    reference = scores.each(~hard)
    worse = scores.each(~hard & (np.arange(500) % 100 != 0))
    gap = scores.difference(worse, reference)
    lost = float((reference.got - worse.got).mean())
    assert gap.value == pytest.approx(-lost)
    assert gap.low < -lost < gap.high <= 0  # no resample can turn a loss into a gain
    assert gap.high - gap.low < 0.02  # unpaired, 500 answers at one half have an interval of 0.12


def test_interval_covers_the_true_difference_as_often_as_it_says(scores):
    """95 % nominal; of 200 draws at least 88 % have to cover (a percentile bootstrap of 60 samples is a bit short)."""
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        reference, other = scores.each(rng.random(60) < 0.8), scores.each(rng.random(60) < 0.7)
        gap = scores.difference(other, reference, seed=seed)
        covered += gap.low <= -0.1 <= gap.high
    assert 176 <= covered <= 199


def test_samples_must_be_the_same(scores):
    with pytest.raises(ValueError, match="samples against"):
        scores.difference(scores.each([1, 0]), scores.each([1]))


def test_ratio_of_sums_weighs_samples_by_what_there_was_to_reach(scores):
    score = scores.Score(np.array([9.0, 0.0]), np.array([9.0, 1.0]))
    assert score.value == 0.9
    assert scores.difference(score, score).value == 0


# Layers

QDQ = """<ir_version: 8, opset_import: ["": 17]>
g (float[1,4,8,8] x) => (float[1,4,8,8] y)
<float s = {0.1},
 int8 z = {0}, uint8 u = {0}, int8[4,4,1,1] w = {WEIGHTS}, float[4,4,1,1] f = {WEIGHTS}, float[8,8] m = {SQUARE}>
{
  xq = QuantizeLinear(x, s, u)
  xd = DequantizeLinear(xq, s, u)
  wd = DequantizeLinear(w, s, z)
  a = Conv(xd, wd)
  fq = QuantizeLinear(f, s, z)
  fd = DequantizeLinear(fq, s, z)
  aq = QuantizeLinear(a, s, u)
  ad = DequantizeLinear(aq, s, u)
  at = Transpose<perm = [0, 1, 3, 2]>(ad)
  b = Conv(at, fd)
  c = Conv(b, wd)
  d = Conv(ad, f)
  e = MatMul(c, d)
  y = MatMul(e, m)
}""".replace("WEIGHTS", ", ".join(["1"] * 16)).replace("SQUARE", ", ".join(["1"] * 64))


def test_a_layer_is_int8_when_data_and_weights_are_dequantised(part):
    layers = part("layers")
    # a and b are; c has float data, d float weights, y neither; the product e of two activations is no layer.
    assert layers.by_nodes(onnx.parser.parse_model(QDQ)) == layers.Count(2, 5)


def test_kernels_are_counted_in_what_the_runtime_made(part, tmp_path):
    layers = part("layers")
    onnx.save(onnx.parser.parse_model(QDQ), tmp_path / "qdq.onnx")
    # Only a has a quantised output, without which ONNX Runtime leaves a convolution in float.
    assert layers.by_kernels(tmp_path / "qdq.onnx") == layers.Count(1, 5)


# Cells and page


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("a\n\nonnx.checker.ValidationError: Bad\nmore: text", 1, "onnx.checker.ValidationError: Bad"),
        ("KeyError: 'x'\nDuring handling\nRuntimeError:   two  blanks", 1, "RuntimeError: two blanks"),
        ("Error: no luck\nFix: try\nsubprocess.CalledProcessError: Command ['x']", 1, "Error: no luck"),
        ("Killed", -9, "Killed"),
        ("", 3, "ended with 3"),
    ],
)
def test_last_words(part, text, code, words):
    assert part("cells").last_words(text, code) == words


def test_a_process_that_fails_says_why_and_one_that_works_says_nothing(part, tmp_path):
    limited = part("cells").limited
    assert limited([sys.executable, "-c", "print(1)"], tmp_path / "log") is None
    assert limited([sys.executable, "-c", "raise ValueError('no luck')"], tmp_path / "log") == "ValueError: no luck"


def test_a_process_that_takes_too_long_or_too_much_is_ended(part, tmp_path, monkeypatch):
    cells = part("cells")
    monkeypatch.setattr(cells, "SECONDS", 0.5)
    said = cells.limited([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    assert said == "took longer than 0.5 s"
    monkeypatch.setattr(cells, "SECONDS", 60)
    # The limit is set a moment after the start, so the process waits before it asks for memory.
    hungry = "import time; time.sleep(1); bytearray(64 << 30)"
    assert "MemoryError" in str(cells.limited([sys.executable, "-c", hungry], tmp_path / "log"))


def _row(part, name, environment, value, *, sqnr=20.0, error=None, symmetric=False, kernels=True):
    tools, page, task = part("peers.tools"), part("page"), part("task")
    metric = {"value": value, "float": 0.9, "difference": value - 0.9, "low": value - 0.91, "high": value - 0.89}
    result = {"error": error, "samples": 7, "metrics": {"right": metric}, "sqnr_db": str(sqnr), "nodes": [3, 4]}
    plan = task.Plan("digits", "Digits", None, None, None)
    tool = tools.Tool(name, environment, {}, default=True, symmetric=symmetric, integer_kernels=kernels)
    return page.Row(plan, tool, {**result, "kernels": [2, 4] if kernels else None})


@pytest.mark.parametrize(
    ("ours", "peer", "verdict"),
    [
        (0.89, 0.88, "yes"),
        (0.885, 0.88, "no, within the interval"),
        (0.87, 0.88, "no"),
        (0.9, 0.9, "yes"),
        (0.899, 0.9, "no, within the interval"),
        (0.91, 0.92, "yes"),
        (0.88, 0.92, "no"),
    ],
)
def test_verdict_is_half_of_the_loss_of_the_best_peer(part, ours, peer, verdict):
    rows = [
        _row(part, "mine", "ours", ours), _row(part, "theirs", "nncf", peer), _row(part, "worse", "ort", 0.2),
        _row(part, "broken", "ort", 0.99, error="ValueError: a | b in /tmp/x/y.py"),
    ]  # fmt: skip
    text = part("page").page(rows)
    (line,) = [line for line in text.splitlines() if line.startswith("| digits")]
    assert f"| {verdict} " in line
    assert "theirs" in line
    assert "ValueError: a / b in y.py" in text
    assert "3 of 4" in line


def test_float_arithmetic_and_failures_have_their_places(part):
    rows = [
        _row(part, "mine", "ours", 0.8, symmetric=True, kernels=False),
        _row(part, "broken", "ours", 0.8, error="took longer than 900 s"),
        _row(part, "other", "modelopt", 0.7, symmetric=True, kernels=False, sqnr=math.nan),
    ]
    text = part("page").page(rows)
    (line,) = [line for line in text.splitlines() if line.startswith("| digits")]
    assert line.count("0.8000") == 1  # the rtx column; the failed row gives none
    assert line.count("0.7000") == 2  # best peer and best modelopt
    assert "took longer than 900 s" in text


def test_every_setting_of_a_tool_has_a_name_of_its_own_and_a_script(part):
    tools = part("peers.tools")
    found = tools.tools()
    assert len(found) == len([*tools._ours(), *tools._ort(), *tools._nncf(), *tools._modelopt()])
    for tool in found.values():
        assert (tools.HERE / f"quantize_{tool.environment}.py").is_file()
        assert tool.environment == "ours" or tool.environment in tools.ENVIRONMENTS
    assert {tool.environment for tool in found.values() if tool.default} == {"ours", "ort", "nncf", "modelopt"}


def test_an_int8_file_with_weights_alone_rounds_no_activation_and_saturates_as_before(part):
    import onnxruntime as ort

    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1, 2] x) => (float[1, 2] y) '
        "<float s = {0.5}, uint8 z = {10}, float v = {0.25}, int8 n = {0}, int8[2, 2] c = {4, 0, 0, 8}> {"
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) w = DequantizeLinear(c, v, n) y = MatMul(d, w) }"
    )
    bare = part("limits").weights_alone(model)
    assert [node.op_type for node in bare.graph.node] == ["Clip", "DequantizeLinear", "MatMul"]
    onnx.checker.check_model(bare, full_check=True)
    options = ort.SessionOptions()  # optimised, ONNX Runtime would round what the product reads as it runs
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(bare.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for given_, wanted in (([0.3, 7.7], [0.3, 15.4]), ([-100.0, 1000.0], [-5.0, 245.0])):
        found = session.run(None, {"x": np.array([given_], np.float32)})[0]
        np.testing.assert_allclose(found, [wanted], rtol=1e-6)
