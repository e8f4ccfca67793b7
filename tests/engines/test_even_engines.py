"""Factors and offsets in front of quantisers and behind convolutions, asked of TensorRT-RTX: they cost no kernel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest

from relu_deploy.engines.audit import Audit
from relu_deploy.engines.promise import disagreements
from relu_deploy.int8.lint import lint
from relu_deploy.int8.run import QuantReport, quantize

pytestmark = pytest.mark.engine

_SPEC = importlib.util.spec_from_file_location("quantizer", Path(__file__).with_name("test_quantizer_engines.py"))
quantizer = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(quantizer)

SIZES = np.logspace(-1, 1, 64).astype(np.float32)


def uneven(*shape: int) -> np.ndarray:
    """Weights whose output channels, on axis 0, differ by a factor of 100."""
    weight = np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32)
    return np.asarray(weight * SIZES[: shape[0]].reshape(-1, *(1,) * (len(shape) - 1)), dtype=np.float32)


def compiled(model: onnx.ModelProto, folder: Path, **options: object) -> tuple[Audit, QuantReport]:
    quantized, report = quantize(model, quantizer.measured(model), target="tensorrt-rtx", **options)  # type: ignore[arg-type]
    audit = quantizer.build(quantized, folder).audit
    assert disagreements(quantized, audit) == ()
    assert lint(quantized, "tensorrt-rtx").findings == ()
    assert audit.bytes_moved is not None
    assert audit.kernels is not None
    return audit, report


def costs_nothing(with_it: Audit, without: Audit) -> bool:
    """No more kernels, and at most the constants more: 1 % of the bytes of these small networks."""
    more = (with_it.bytes_moved or 0) / (without.bytes_moved or 1)
    return (with_it.kernels or 0) <= (without.kernels or 0) and more < 1.01


CHAIN = """(float[1,64,40,40] x) => (float[1,64,40,40] y) <float lo = {{0}}, float hi = {{6}}> {{
  [c1] a = Conv(x, w, b) r1 = {0} [c2] c = Conv(r1, w, b) r2 = {1} [c3] d = Conv(r2, w, b) y = {2} }}"""
ACTIVATIONS = {
    "Relu": "Relu({})",
    "Clip": "Clip({}, lo, hi)",
    "LeakyRelu": "LeakyRelu<alpha=0.1>({})",
    "HardSwish": "HardSwish({})",
    "Sigmoid": "Sigmoid({})",
    "none": "Identity({})",
}
WEIGHTS = {"w": uneven(64, 64, 1, 1), "b": (64,)}


def chain(activation: str) -> onnx.ModelProto:
    text = ACTIVATIONS[activation]
    return quantizer.parse(CHAIN.format(text.format("a"), text.format("c"), text.format("d")), WEIGHTS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_chain_of_convolutions(tmp_path: Path, activation: str) -> None:
    chosen, report = compiled(chain(activation), tmp_path, keep_float=["c3"])
    assert report.rows is not None
    assert report.islands is not None
    assert set(report.islands.changed) >= {"r1"} if activation != "none" else {"a"}
    plain, other = compiled(chain(activation), tmp_path, keep_float=["c3"], channel_fusion="off")
    assert other.rows is other.islands is None
    assert costs_nothing(chosen, plain)


@pytest.mark.parametrize("activation", ["HardSwish", "Sigmoid"])
def test_even_rows_make_convolutions_write_float16(tmp_path: Path, activation: str) -> None:
    """With a scale for each channel they write float32, and a kernel adds the bias."""
    chosen, report = compiled(chain(activation), tmp_path)
    assert report.rows is not None
    assert set(report.rows.changed) >= {"c1", "c2"} - {layer.name for layer in report.layers if not layer.int8}
    plain, _ = compiled(chain(activation), tmp_path, channel_fusion="off")
    inner = {layer.name: layer.output for layer in chosen.linear}
    before = {layer.name: layer.output for layer in plain.linear}
    assert inner["c2"] == "fp16"
    assert before["c2"] == "fp32"
    assert (chosen.bytes_moved or 0) < (plain.bytes_moved or 0)


RESIDUAL = """(float[1,64,40,40] x) => (float[1,64,40,40] y) {
  [c1] a = Conv(x, w, b) r1 = Relu(a) [c2] c = Conv<pads=[1,1,1,1]>(r1, v, b) s = Add(c, x) r2 = Relu(s)
  [c3] d = Conv(r2, w, b) r3 = Relu(d) [c4] e = Conv<pads=[1,1,1,1]>(r3, v, b) t = Add(r2, e) y = Relu(t) }"""


@pytest.mark.parametrize("granularity", ["auto", "tensor"])
def test_residual_sums(tmp_path: Path, granularity: str) -> None:
    """The factor stands between the convolution and the sum, and the shortcut is read as codes all the same."""
    model = quantizer.parse(RESIDUAL, {**WEIGHTS, "v": uneven(64, 64, 3, 3)})
    chosen, report = compiled(model, tmp_path, weight_granularity=granularity)
    assert report.rows is not None
    assert {"c2", "c4"} <= set(report.rows.changed)
    plain, _ = compiled(model, tmp_path, weight_granularity=granularity, channel_fusion="off")
    assert costs_nothing(chosen, plain)


@pytest.mark.parametrize("options", [{}, {"float_part": "fp32"}], ids=["float16", "float32"])
def test_an_encoder(tmp_path: Path, options: dict[str, str]) -> None:
    """LayerNorm and GELU quantise in their own kernels; attention writes codes by itself, and is left alone."""
    model = quantizer.parse(quantizer.ENCODER % (1, 1, quantizer.GELU), quantizer.ENCODER_WEIGHTS)
    chosen, report = compiled(model, tmp_path, **options)
    assert report.islands is not None
    assert set(report.islands.changed) == {"x", "n1", "f2"}
    assert [skip.name for skip in report.islands.skipped] == ["o2", "q3", "k3", "p", "v3"]
    plain, _ = compiled(model, tmp_path, channel_fusion="off", **options)
    assert (chosen.kernels or 0) <= (plain.kernels or 0)
    assert (chosen.bytes_moved or 0) < 1.03 * (plain.bytes_moved or 0)  # 32 tokens: constants weigh more than there


def test_a_classifier_behind_a_mean(tmp_path: Path) -> None:
    model = quantizer.parse(quantizer.SEPARABLE, quantizer.SEPARABLE_WEIGHTS)
    chosen, report = compiled(model, tmp_path)
    assert report.islands is not None
    assert {"r1", "r3", "f"} <= set(report.islands.changed)
    plain, _ = compiled(model, tmp_path, channel_fusion="off")
    assert costs_nothing(chosen, plain)


POOLS = """(float[1,64,40,40] x) => (float[1,64,40,40] y) {
  [c1] a = Conv(x, w, b) r = Relu(a) m1 = MaxPool<kernel_shape=[5,5], pads=[2,2,2,2]>(r)
  m2 = MaxPool<kernel_shape=[9,9], pads=[4,4,4,4]>(r) j = Concat<axis=1>(r, m1, m2)
  [c2] c = Conv(j, v, b) [c3] y = Conv(c, w, b) }"""


def test_arithmetic_behind_a_concat_would_move_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why what selects or joins values is left alone: codes are pooled and joined, and floats would be instead."""
    model = quantizer.parse(POOLS, {**WEIGHTS, "v": uneven(64, 192, 1, 1)})
    chosen, report = compiled(model, tmp_path, keep_float=["c1"])
    assert report.islands is not None
    assert "j" in {skip.name for skip in report.islands.skipped}
    monkeypatch.setattr("relu_deploy.int8.even_inputs._refuse_unfused", lambda _: None)
    moved, other = compiled(model, tmp_path, keep_float=["c1"])
    assert other.islands is not None
    assert "j" in other.islands.changed
    assert (moved.bytes_moved or 0) > (chosen.bytes_moved or 0)


@pytest.mark.parametrize(("spread", "left_alone"), [(3.0, True), (100.0, False)])
def test_factors_in_front_of_a_float_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: float, left_alone: bool
) -> None:
    """They would be a kernel there; but where one scale is too coarse otherwise, a kernel adds the bias instead."""
    sizes = np.geomspace(1 / spread, 1, 64)[:, None, None, None]
    weight = np.random.default_rng(0).normal(size=(64, 64, 1, 1)) * sizes
    text = CHAIN.format("Relu(a)", "Relu(c)", "Relu(d)")
    model = quantizer.parse(text, {**WEIGHTS, "w": (weight * 0.1).astype(np.float32)})
    chosen, report = compiled(model, tmp_path, keep_float=["c1", "c3"])
    assert report.rows is not None
    assert report.rows.changed == (() if left_alone else ("c2",))
    if left_alone:
        assert {skip.name: skip.reason for skip in report.rows.skipped} == {"c2": "Conv c3 reads it in float"}
        monkeypatch.setattr("relu_deploy.int8.even_rows._refuse_costly", lambda *_: None)
        moved, other = compiled(model, tmp_path, keep_float=["c1", "c3"])
        assert other.rows is not None
        assert other.rows.changed == ("c2",)
        assert (moved.kernels or 0) > (chosen.kernels or 0)
    else:
        plain, _ = compiled(model, tmp_path, keep_float=["c1", "c3"], channel_fusion="off")
        assert (chosen.kernels or 0) <= (plain.kernels or 0)
        assert (chosen.bytes_moved or 0) < 0.9 * (plain.bytes_moved or 0)
