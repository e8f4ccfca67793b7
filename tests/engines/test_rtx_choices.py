"""What the quantiser chooses for TensorRT-RTX, asked of the compiler: kernels and bytes, for docs/placement.md."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from relu_deploy.engines.audit import Audit
from relu_deploy.engines.plan import read_plan
from relu_deploy.engines.promise import disagreements
from relu_deploy.int8.lint import lint
from relu_deploy.int8.run import QuantReport, quantize

pytestmark = pytest.mark.engine

_SPEC = importlib.util.spec_from_file_location("quantizer", Path(__file__).with_name("test_quantizer_engines.py"))
quantizer = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(quantizer)


def compiled(
    model: onnx.ModelProto, folder: Path, *, slower: tuple[str, ...] = (), **options: object
) -> tuple[Audit, QuantReport]:
    """Quantise and build; report and engine have to agree, and lint has to find nothing but ``slower``."""
    quantized, report = quantize(model, quantizer.measured(model), target="tensorrt-rtx", **options)  # type: ignore[arg-type]
    audit = quantizer.build(quantized, folder).audit
    assert disagreements(quantized, audit) == ()
    assert {layer.name for layer in audit.fallbacks} == {layer.name for layer in report.layers if not layer.int8}
    found = {finding.node for finding in lint(quantized, "tensorrt-rtx").findings}
    assert found == set(slower)
    assert audit.bytes_moved is not None
    assert audit.kernels is not None
    return audit, report


def no_worse(chosen: Audit, other: Audit) -> bool:
    """No more kernels, and fewer bytes."""
    return (chosen.kernels or 0) <= (other.kernels or 0) and (chosen.bytes_moved or 0) < (other.bytes_moved or 0)


@pytest.mark.parametrize("activation", ["Relu", "Silu"])
def test_a_residual_network(residual_model: Callable, tmp_path: Path, activation: str) -> None:
    model = residual_model(activation=activation)
    chosen, report = compiled(model, tmp_path)
    plain, _ = compiled(model, tmp_path, float_part="fp32", weight_granularity="channel")
    assert report.float_part == "fp16"
    assert no_worse(chosen, plain)
    assert {layer.output for layer in chosen.linear} == {"fp16"}


def test_depthwise_convolutions_move_less_in_half(tmp_path: Path) -> None:
    model = quantizer.parse(quantizer.SEPARABLE, quantizer.SEPARABLE_WEIGHTS)
    chosen, report = compiled(model, tmp_path)
    assert {layer.name for layer in report.layers if not layer.int8} == {"depthwise1", "depthwise2"}
    plain, _ = compiled(model, tmp_path, float_part="fp32", weight_granularity="channel")
    assert plain.int8 == chosen.int8 + 2
    assert no_worse(chosen, plain)


def wide(layers: int, size: int) -> onnx.ModelProto:
    """A chain of convolutions on one map."""
    body, last, weights = "", "x", {}
    for i in range(layers):
        body += f"[c{i}] t{i} = Conv<pads=[1,1,1,1]>({last}, w{i}) r{i} = Relu(t{i}) "
        last, weights[f"w{i}"] = f"r{i}", (64, 64, 3, 3)
    io = f"(float[1,64,{size},{size}] x) => (float[1,64,{size},{size}] y)"
    return quantizer.parse(f"{io} {{ {body} y = Identity({last}) }}", weights)


@pytest.mark.parametrize(("size", "half_is_less"), [(48, True), (12, False)])
def test_when_a_layer_moves_less_in_half(tmp_path: Path, size: int, half_is_less: bool) -> None:
    """The rule of relu_deploy/int8/cheaper.py: 2 x 64 x size^2 numbers against 64 x 64 x 9 weights."""
    model = wide(4, size)
    int8, _ = compiled(model, tmp_path)
    half, report = compiled(model, tmp_path, keep_float=["c2"], slower=() if half_is_less else ("c2",))
    assert report.int8_layers == 3
    assert ((half.bytes_moved or 0) < (int8.bytes_moved or 0)) == half_is_less
    assert 2 * 64 * size**2 > 64 * 64 * 9 if half_is_less else 2 * 64 * size**2 < 64 * 64 * 9


CSP = """(float[1,64,32,32] x) => (float[1,64,32,32] y) {
  [left] a = Conv(x, w1, b1) ra = Relu(a) [right] b = Conv(x, w2, b1) rb = Relu(b)
  [inner] c = Conv<pads=[1,1,1,1]>(ra, w3, b1) rc = Relu(c) j = Concat<axis=1>(rc, rb)
  [join] d = Conv(j, w4, b2) y = Relu(d) }"""
CSP_WEIGHTS = {"w1": (32, 64, 1, 1), "b1": (32,), "w2": (32, 64, 1, 1), "w3": (32, 32, 3, 3), "w4": (64, 64, 1, 1),
               "b2": (64,)}  # fmt: skip


def test_merged_siblings_are_fewer_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantizer.parse(CSP, CSP_WEIGHTS)
    chosen, report = compiled(model, tmp_path)
    assert report.merged is not None
    assert report.merged.changed == ("left+right/Split",)
    monkeypatch.setattr("relu_deploy.int8.siblings.sibling_groups", lambda *_: [])
    apart, _ = compiled(model, tmp_path)
    assert (chosen.kernels or 0) < (apart.kernels or 0)
    assert (chosen.bytes_moved or 0) <= (apart.bytes_moved or 0)


def test_products_of_matrices_write_float16_with_a_scale_for_each_channel(tmp_path: Path) -> None:
    model = quantizer.parse(quantizer.ENCODER % (2, 2, "f2 = Relu(f1)"), quantizer.ENCODER_WEIGHTS)
    chosen, _ = compiled(model, tmp_path)
    attention = {"scores", "mix"}
    assert {layer.output for layer in chosen.linear if layer.name not in attention} == {"fp16"}
    for other in ({"weight_granularity": "tensor"}, {"float_part": "fp32"}):
        assert no_worse(chosen, compiled(model, tmp_path, **other)[0])


def test_a_batch_of_any_size(tmp_path: Path) -> None:
    """The projection behind attention is int8 there too, and attention itself."""
    model = quantizer.parse(quantizer.ENCODER % ("B", "B", "f2 = Relu(f1)"), quantizer.ENCODER_WEIGHTS)
    quantized, report = quantize(model, quantizer.measured(model), target="tensorrt-rtx")
    shapes = {"x": quantizer.ShapeRange((1, 32, 64), (2, 32, 64), (4, 32, 64))}
    audit = quantizer.build(quantized, tmp_path, shapes=shapes).audit
    assert audit.int8 == report.int8_layers == 8
    assert disagreements(quantized, audit) == ()


@pytest.mark.parametrize("sm", quantizer.SMS)
def test_other_cards(residual_model: Callable, tmp_path: Path, sm: str) -> None:
    model = residual_model()
    quantized, report = quantize(model, quantizer.measured(model), target="tensorrt-rtx")
    built = quantizer.build(quantized, tmp_path, sm=(sm,))
    assert quantizer.broken_promises(report, quantized, built, student=True) == []


def test_an_int8_depthwise_convolution_reads_four_times_the_codes(tmp_path: Path) -> None:
    """Why they stay in float16: three channels of zeros stand beside each. In groups of four it reads its input."""
    body = (
        "[first] a = Conv(x, w) s = HardSwish(a) [depth] b = Conv<pads=[1,1,1,1], group=%d>(s, v) [last] y = Conv(b, w)"
    )
    weight = np.random.default_rng(0).normal(0, 0.3, (64, 1, 3, 3)).astype(np.float32)
    wide = np.zeros((64, 4, 3, 3), np.float32)
    wide[np.arange(64), np.arange(64) % 4] = weight[:, 0]
    moved = {}
    for group, values in ((64, weight), (16, wide)):
        text = f"(float[1,64,40,40] x) => (float[1,64,40,40] y) {{ {body % group} }}"
        model = quantizer.parse(text, {"w": (64, 64, 1, 1), "v": values})
        quantized, report = quantize(model, quantizer.measured(model), target="tensorrt-rtx", float_part="fp32")
        assert report.int8_layers == 3
        moved[group] = quantizer.build(quantized, tmp_path).audit.bytes_moved
        (program,) = read_plan((tmp_path / "e.plan").read_bytes())
        (depth,) = [kernel for kernel in program.kernels if "depth" in {op.name for op in kernel.linear}]
        assert depth.reads[0].dims == (1, 256 if group == 64 else 64, 40, 40)
        assert depth.reads[0].dtype == "int8"
    assert (moved[16] or 0) < (moved[64] or 0)
