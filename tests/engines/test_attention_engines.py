"""Attention in INT8, asked of TensorRT-RTX: one kernel where its sizes have one, and none of it where they have not."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest

from relu_deploy.engines.audit import Audit
from relu_deploy.engines.base import ShapeRange
from relu_deploy.engines.promise import disagreements
from relu_deploy.int8 import prepare
from relu_deploy.int8.lint import lint
from relu_deploy.int8.place_attention import HEADS, find_attention
from relu_deploy.int8.placement import Placement
from relu_deploy.int8.run import QuantReport, quantize

pytestmark = pytest.mark.engine

_SPEC = importlib.util.spec_from_file_location("quantizer", Path(__file__).with_name("test_quantizer_engines.py"))
quantizer = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(quantizer)


def encoder(tokens: int, width: int, *, scores: str = "s1 = Mul(s0, scale)", batch: str = "1") -> onnx.ModelProto:
    """Attention with two heads; small queries and keys, so that no probability is near 1."""
    inside = 2 * width
    text = f"""(float[{batch},{tokens},{inside}] x) => (float[{batch},{tokens},{inside}] y)
    <int64[4] heads = {{0, 0, 2, {width}}}, int64[3] flat = {{0, 0, {inside}}}, float scale = {{0.25}}> {{
      q0 = MatMul(x, wq) q1 = Add(q0, b) q2 = Reshape(q1, heads) q3 = Transpose<perm=[0,2,1,3]>(q2)
      k0 = MatMul(x, wk) k1 = Add(k0, b) k2 = Reshape(k1, heads) k3 = Transpose<perm=[0,2,3,1]>(k2)
      v0 = MatMul(x, wv) v1 = Add(v0, b) v2 = Reshape(v1, heads) v3 = Transpose<perm=[0,2,1,3]>(v2)
      [scores] s0 = MatMul(q3, k3) {scores} p = Softmax<axis=-1>(s1)
      [mix] o0 = MatMul(p, v3) o1 = Transpose<perm=[0,2,1,3]>(o0) o2 = Reshape(o1, flat)
      [proj] o3 = MatMul(o2, wo) o4 = Add(o3, b) y = Add(o4, x) }}"""
    random = np.random.default_rng(0)
    small = {f"w{name}": random.normal(0, 0.02, (inside, inside)).astype(np.float32) for name in "qk"}
    mask = {"m": np.zeros((1, 1, 1, tokens), np.float32)} if "(s2, m)" in scores or "(s0, m)" in scores else {}
    return quantizer.parse(text, {**small, "wv": (inside, inside), "wo": (inside, inside), "b": (inside,), **mask})


def compiled(model: onnx.ModelProto, folder: Path, **options: object) -> tuple[Audit, QuantReport]:
    """The report's int8 layers are the engine's."""
    quantized, report = quantize(model, quantizer.measured(model), target="tensorrt-rtx", **options)  # type: ignore[arg-type]
    assert lint(quantized, "tensorrt-rtx").findings == ()
    audit = quantizer.build(quantized, folder).audit
    assert disagreements(quantized, audit) == ()
    found = {layer.name for layer in audit.linear if layer.precision == "int8"}
    assert found == {layer.name for layer in report.layers if layer.int8}
    return audit, report


def moves_less(one: Audit, other: Audit) -> bool:
    return (one.kernels or 0) < (other.kernels or 0) and (one.bytes_moved or 0) < (other.bytes_moved or 0)


@pytest.mark.parametrize("options", [{}, {"float_part": "fp32"}], ids=["float16", "float32"])
@pytest.mark.parametrize("width", HEADS)
def test_one_kernel_of_codes(tmp_path: Path, width: int, options: dict[str, str]) -> None:
    model = encoder(128, width)
    chosen, report = compiled(model, tmp_path, **options)
    assert report.int8_layers == 6
    assert {layer.kernel for layer in chosen.linear if layer.name in ("scores", "mix")} == {"_gemm_mha_v2"}
    assert {layer.output for layer in chosen.linear if layer.name in ("scores", "mix")} == {"int8"}
    plain, other = compiled(model, tmp_path, keep_float=["scores"], **options)
    assert other.int8_layers == 4
    assert moves_less(chosen, plain)


MASKED = {
    "no scale": "s1 = Identity(s0)",
    "divided": "s1 = Div(s0, scale)",
    "mask behind": "s2 = Mul(s0, scale) s1 = Add(s2, m)",
    "mask in front": "s2 = Add(s0, m) s1 = Mul(scale, s2)",
}


@pytest.mark.parametrize("name", MASKED)
def test_scales_and_masks(tmp_path: Path, name: str) -> None:
    _, report = compiled(encoder(64, 32, scores=MASKED[name]), tmp_path)
    assert report.int8_layers == 6


def everything(graph: object, placement: Placement, *_: object, **__: object) -> Placement:
    """Quantise every attention, whatever its sizes."""
    uses, names = dict(placement.uses), set[str]()
    for attention in find_attention(graph):  # type: ignore[arg-type]
        names |= {attention.scores.name, attention.mix.name}
        for tensor, reader in attention.operands:
            uses[tensor.name] = (uses.get(tensor.name) or frozenset()) | {reader.name}
    layers = [dataclasses.replace(x, int8=True, live=True) if x.name in names else x for x in placement.layers]
    return dataclasses.replace(placement, uses=uses, layers=tuple(layers))


@pytest.mark.parametrize(("tokens", "width"), [(128, 15), (128, 24), (128, 48), (64, 80), (64, 128), (513, 32)])
def test_other_sizes_would_fall_to_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, width: int
) -> None:
    """Why they are left alone: when this fails with a newer compiler, HEADS or MOST_TOKENS may grow."""
    model = encoder(tokens, width)
    chosen, report = compiled(model, tmp_path)
    assert report.int8_layers == 4
    monkeypatch.setattr(prepare, "with_attention", everything)
    quantized, forced = quantize(model, quantizer.measured(model), target="tensorrt-rtx")
    assert forced.int8_layers == 6
    pieces = quantizer.build(quantized, tmp_path).audit
    assert (pieces.kernels or 0) > (chosen.kernels or 0)


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_one_operand_less_and_it_is_no_int8_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    model = encoder(128, 32)
    whole, _ = compiled(model, tmp_path)

    def without(graph: object, placement: Placement, *_: object, **__: object) -> Placement:
        (attention,) = find_attention(graph)  # type: ignore[arg-type]
        uses = dict(everything(graph, placement).uses)
        tensor, reader = attention.operands[left]
        uses[tensor.name] = (uses[tensor.name] or frozenset()) - {reader.name}
        return dataclasses.replace(placement, uses={name: nodes for name, nodes in uses.items() if nodes})

    monkeypatch.setattr(prepare, "with_attention", without)
    quantized, _ = quantize(model, quantizer.measured(model), target="tensorrt-rtx")
    assert moves_less(whole, quantizer.build(quantized, tmp_path).audit)


@pytest.mark.parametrize("sm", ["75", *quantizer.SMS])
def test_other_cards(tmp_path: Path, sm: str) -> None:
    model = encoder(64, 32)
    quantized, _ = quantize(model, quantizer.measured(model), target="tensorrt-rtx")
    audit = quantizer.build(quantized, tmp_path, sm=(sm,)).audit
    assert {layer.precision for layer in audit.linear if layer.name in ("scores", "mix")} == {"int8"}


def test_a_batch_of_any_size(tmp_path: Path) -> None:
    model = encoder(64, 32, batch="B")
    quantized, report = quantize(model, quantizer.measured(model), target="tensorrt-rtx")
    shapes = {"x": ShapeRange((1, 64, 64), (2, 64, 64), (4, 64, 64))}
    audit = quantizer.build(quantized, tmp_path, shapes=shapes).audit
    assert audit.int8 == report.int8_layers == 6
    assert disagreements(quantized, audit) == ()
