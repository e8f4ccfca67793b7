"""The layer that INT8 damages is found, kept in float, and a collapse is refused."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from calib import ranges as ranges_file
from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source
from relu_deploy.cli import main
from relu_deploy.engines.base import BuildConfig
from relu_deploy.errors import CheckFailedError
from relu_deploy.flow import Int8Plan, build_engine
from relu_deploy.int8.evidence import GOOD_DB, Evidence
from relu_deploy.int8.run import quantize

CHANNELS = 8


def fragile_model(share: float = 0.01, *, tail: bool = True) -> onnx.ModelProto:
    """Four layers, or two without a tail; the second adds channels that nearly cancel, so that INT8 leaves nothing."""
    rng = np.random.default_rng(0)
    more = "[s] s = Sigmoid(b) [three] c = Conv(s, w3) [r] r = Relu(c) [four] y = Conv(r, w4)" if tail else ""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {'
        f"[one] a = Conv(x, w1) [two] {'b' if tail else 'y'} = Conv(a, w2) {more} }}"
    )
    # a0 = x0 + share x1 and a1 = -0.7 x0 round differently; a0 + a1 / 0.7 is far below a step of either.
    first, second = np.zeros((CHANNELS, CHANNELS)), np.zeros((CHANNELS, CHANNELS))
    for even in range(0, CHANNELS, 2):
        first[even, [even, even + 1]], first[even + 1, even] = (1, share), -0.7
        second[even, [even, even + 1]] = second[even + 1, [even, even + 1]] = 1 / share, 1 / share / 0.7
        second[even + 1] *= -1
    parts = {"w1": first, "w2": second, "w3": rng.normal(size=(8, 8)), "w4": rng.normal(size=(8, 8))}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(v.astype(np.float32).reshape(8, 8, 1, 1), k) for k, v in parts.items()
    )
    return onnx.shape_inference.infer_shapes(model)


DATA = np.random.default_rng(1).normal(size=(8, CHANNELS, 6, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def fragile():
    model = fragile_model()
    source = open_source(DATA, model_inputs(model))
    return model, source, calibrate(model, source)


def inspected(fragile, **options):
    model, source, ranges = fragile
    evidence = Evidence(source, rank=True, correct=False, **options)
    return quantize(model, ranges, target="ort", weight_bits=8, evidence=evidence)


def test_the_layer_that_loses_most_comes_first(fragile):
    _, report = inspected(fragile)
    found = report.sensitivity
    assert {layer.layer for layer in found.layers} == {"one", "two", "three", "four"}
    assert {found.layers[0].layer, found.layers[1].layer} == {"one", "two"}, "they share the tensor that is rounded"
    assert [layer.sqnr_db for layer in found.layers] == sorted(layer.sqnr_db for layer in found.layers)
    assert found.kept == ()
    assert found.before_db <= found.layers[0].sqnr_db + 3, "all together are no better than the worst alone"


def test_the_worst_are_kept_and_the_outputs_gain(fragile):
    plain, _ = inspected(fragile)
    kept, report = inspected(fragile, keep_worst=2)
    assert set(report.sensitivity.kept) == {"one", "two"}
    assert {layer.name for layer in report.layers if not layer.int8} == {"one", "two"}
    assert all("dB" in layer.reason for layer in report.layers if not layer.int8)
    assert report.sensitivity.after_db > report.sensitivity.before_db + 10
    assert sum(n.op_type == "QuantizeLinear" for n in kept.graph.node) < sum(
        n.op_type == "QuantizeLinear" for n in plain.graph.node
    )


@pytest.mark.parametrize("floor", [0, 6, 190])
def test_no_more_than_a_tenth_is_left_in_float_unasked(fragile, floor):
    """Neither where outputs are clear of the floor, nor where half of the layers in float do not lift them to it."""
    _, report = inspected(fragile, floor_db=floor)
    assert report.sensitivity.kept == ()
    assert report.int8_layers == 4


@pytest.mark.parametrize("correct", [False, True])
def test_the_fewest_layers_in_float_that_lift_the_outputs_to_the_floor(fragile, correct):
    model, source, ranges = fragile
    evidence = Evidence(source, floor_db=20, correct=correct)
    _, report = quantize(model, ranges, target="ort", weight_bits=8, evidence=evidence)
    assert report.sensitivity.kept == ("one", "two")
    assert report.drift[0].sqnr_db > 24
    assert any("with fewer than 2 layers in float" in warning for warning in report.warnings)


def moved_model() -> onnx.ModelProto:
    """A layer behind what moves its input, of which one channel is a thousand times the others; and another layer."""
    rng = np.random.default_rng(5)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 6, 6, 8] x) => (float[N, 8, 6, 6] y) {'
        "[t] a = Transpose<perm = [0, 3, 1, 2]>(x) [one] b = Conv(a, w1) [r] c = Relu(b) [two] y = Conv(c, w2) }"
    )
    first = rng.normal(size=(8, 8, 1, 1))
    first[:, 0] = 0  # all that the large channel does is to make the steps wide
    for name, values in (("w1", first), ("w2", rng.normal(size=(8, 8, 1, 1)))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("keep", [0, 1])
def test_a_layer_in_float_reads_floats_past_what_moves_its_input(keep):
    model = moved_model()
    data = np.random.default_rng(6).normal(size=(8, 6, 6, 8)).astype(np.float32)
    data[..., 0] *= 1000
    source = open_source(data, model_inputs(model))
    evidence = Evidence(source, rank=True, correct=False, keep_worst=keep)
    _, report = quantize(
        model, calibrate(model, source), target="ort", weight_bits=8, channel_fusion="off", evidence=evidence
    )
    found = report.sensitivity
    assert found.layers[0].layer == "one"
    assert found.layers[0].sqnr_db < 10, "alone it reads what is rounded"
    assert found.after_db == pytest.approx(report.drift[0].sqnr_db, abs=0.5)
    assert (found.after_db > 30) == bool(keep)


def test_what_is_predicted_is_what_the_file_does(fragile):
    from relu_deploy.int8.drift import measure_drift

    model, source, _ = fragile
    # Where layers are kept in float other tensors are rounded around them, which the switches only come close to.
    for keep, within in ((0, 0.5), (2, 5.0)):
        quantized, report = inspected(fragile, keep_worst=keep)
        (drift,) = measure_drift(model, quantized, list(source)[:4], integer_kernels=False)
        assert drift.sqnr_db == pytest.approx(report.sensitivity.after_db, abs=within)


@pytest.fixture
def files(fragile, tmp_path):
    model, _, ranges = fragile
    onnx.save(model, tmp_path / "m.onnx")
    np.save(tmp_path / "d.npy", DATA)
    ranges_file.save(ranges, tmp_path / "r.json")
    return tmp_path


def run(files, *options):
    given = [str(files / "m.onnx"), "--ranges", str(files / "r.json"), "-o", str(files / "q.onnx"), *options]
    return CliRunner().invoke(main, ["quantize", *given, "--weight-bits", "8"])


def test_a_collapse_is_no_file(files):
    asked = ("--calib", str(files / "d.npy"), "--min-sqnr", "60")
    failed = run(files, *asked)
    assert failed.exit_code == 1
    assert not (files / "q.onnx").exists()
    for part in ("y (", "dB", "two", "--keep-float", "--allow-collapse"):
        assert part in failed.output
    assert run(files, *asked, "--allow-collapse").exit_code == 0
    assert (files / "q.onnx").exists()


def test_what_would_be_refused_is_written_with_more_layers_in_float(files):
    done = run(files, "--calib", str(files / "d.npy"), "--min-sqnr", "20")
    assert done.exit_code == 0, done.output
    assert "with fewer than 2 layers in float (at least 20 dB" in " ".join(done.output.split())
    assert "2 of 4 linear layers" in done.output


def test_a_number_of_layers_is_kept_and_reported(files):
    report = files / "report.json"
    done = run(files, "--calib", str(files / "d.npy"), "--keep-float", "2", "--report", str(report))
    assert done.exit_code == 0, done.output
    assert "2 of 4 linear layers" in done.output
    found = json.loads(report.read_text())
    assert set(found["sensitivity"]["kept"]) == {"one", "two"}
    assert len(found["sensitivity"]["layers"]) == 4


@pytest.mark.parametrize("options", [("--keep-float", "2"), ("--report", "r.json")])
def test_what_needs_data_says_so(files, options):
    failed = run(files, *options)
    assert failed.exit_code == 2
    assert "--calib" in failed.output


def test_build_engine_refuses_a_collapse(tmp_path):
    model = fragile_model(1e-4, tail=False)
    plan = Int8Plan(open_source(DATA, model_inputs(model)), weight_bits=8)
    with pytest.raises(CheckFailedError, match="INT8 destroys the outputs: y"):
        build_engine(model, tmp_path / "e.onnx", BuildConfig("ort"), int8=plan)
    assert not list(tmp_path.iterdir())
    allowed = dataclasses.replace(plan, allow_collapse=True)
    built = build_engine(model, tmp_path / "e.onnx", BuildConfig("ort"), int8=allowed)
    assert built.drift[0].collapsed
    assert built.quantize.sensitivity.layers


def chained():
    model = fragile_model()
    tail = [f"[l{i}] t{i} = Conv({f't{i - 1}' if i else 'q'}, w5)" for i in range(16)]
    products = "[p] u = MatMul(t15, x) [q] v = MatMul(u, x) [r2] z = MatMul(v, x)"
    body = onnx.printer.to_text(model.graph).split("{")[-1].rpartition("}")[0].replace("y = Conv", "q = Conv")
    longer = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] z) {'
        f"{body} {' '.join(tail)} {products} }}"
    )
    longer.graph.initializer.extend(model.graph.initializer)
    longer.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(8, dtype=np.float32)[..., None, None], "w5"))
    longer = onnx.shape_inference.infer_shapes(longer)
    source = open_source(DATA, model_inputs(longer))
    return longer, source, calibrate(longer, source)


def test_products_of_live_tensors_use_up_no_share_and_outputs_are_taken_clear_of_the_floor():
    measured = chained()
    _, report = inspected(measured, floor_db=8)
    found = report.sensitivity
    assert 8 < found.before_db < 12, "past the floor by less than such predictions are wrong by"
    assert set(found.kept) == {"one", "two"}, "two of twenty layers with weights are allowed, and each brings something"
    assert found.after_db > 18


def test_layers_are_kept_only_as_long_as_each_is_worth_it():
    """Sixteen layers that do no harm are behind two that do: only one or both of those are kept in float."""
    _, report = inspected(chained(), floor_db=0)
    found = report.sensitivity
    assert found.kept
    assert set(found.kept) <= {"one", "two"}
    assert found.after_db >= found.before_db + 0.25 * len(found.kept)


def test_good_outputs_are_not_ranked_unless_asked():
    rng = np.random.default_rng(3)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 8] x) => (float[N, 4] y) {'
        "[one] a = Gemm(x, w) r = Relu(a) [two] y = Gemm(r, v) }"
    )
    for name, shape in (("w", (8, 16)), ("v", (16, 4))):
        values = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    source = open_source(rng.normal(size=(64, 8)).astype(np.float32), model_inputs(model))
    ranges = calibrate(model, source)
    told = []
    for rank in (False, True):
        seen = Evidence(source, rank=rank, progress=lambda step, *_: told.append(step))
        _, report = quantize(model, ranges, weight_bits=8, evidence=seen)
        assert report.sensitivity.before_db > GOOD_DB
        assert bool(report.sensitivity.layers) == rank == ("rank layers" in told)


def test_layers_that_destroy_the_outputs_alone_are_all_left_in_float():
    """One of the two that share the damage does not help while the other is there."""
    _, report = inspected(chained(), floor_db=0)
    found = report.sensitivity
    alone = {layer.layer for layer in found.layers if layer.sqnr_db < GOOD_DB}
    assert alone >= {"one", "two"}
    assert len(found.kept) == 2, "a tenth of twenty"
    assert set(found.kept) <= alone
