"""Versions of a network compared on samples: as many as memory is given for, and the float network runs once."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from relu_deploy.int8 import outcome as module
from relu_deploy.int8.heads import CLEAN_DB, Heads
from relu_deploy.int8.outcome import Outcome


def scaled(factor: float) -> onnx.ModelProto:
    """``y = factor x``, of 16 floats."""
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[1, 16] x) => (float[1, 16] y) '
        f"<float f = {{{factor}}}> {{ y = Mul(x, f) }}"
    )


HEADS = Heads(gs.Graph(), (("y",),))


def samples(count: int):
    return ({"x": np.full((1, 16), value + 1, np.float32)} for value in range(count))


def test_each_version_is_compared_with_the_float_network():
    found = Outcome(HEADS, scaled(1.0), samples(4), 1)
    assert found.samples == 4
    assert found.worst_db(scaled(0.9)) == pytest.approx(20, abs=1e-3)
    assert found.worst_db(scaled(0.99)) == pytest.approx(40, abs=1e-2)
    assert found.worst_db(scaled(1.0)) == CLEAN_DB


@pytest.mark.parametrize(("least", "taken"), [(1, 4), (3, 4), (6, 6), (20, 9)])
def test_samples_end_where_the_memory_does_but_for_the_least(monkeypatch, least, taken):
    monkeypatch.setattr(module, "_HELD", 3 * 128)  # a sample is 64 bytes of input and as many of output
    assert Outcome(HEADS, scaled(1.0), samples(9), least).samples == taken


def test_float_weights_between_quantisers_are_taken_as_they_are():
    # Optimised, ONNX Runtime makes codes of such weights, with one scale: the small ones would be lost.
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(2, 3, 3, 3)) * np.array([100.0, 0.001])[:, None, None, None]

    def network(body: str) -> onnx.ModelProto:
        model = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17]> g (float[1, 3, 8, 8] x) => (float[1, 1, 6, 6] y) '
            "<float s = {1.0}, uint8 z = {0}, float t = {0.05}, int8 m = {0}, int64[1] last = {1}> {" + body + "}"
        )
        model.graph.initializer.append(onnx.numpy_helper.from_array(weights.astype(np.float32), "w"))
        return model

    rounded = network(
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) c = Conv(d, w) "
        "p = QuantizeLinear(c, t, m) e = DequantizeLinear(p, t, m) y = Gather<axis = 1>(e, last)"
    )
    feeds = [{"x": rng.integers(0, 256, size=(1, 3, 8, 8)).astype(np.float32)}]
    found = Outcome(HEADS, network("c = Conv(x, w) y = Gather<axis = 1>(c, last)"), feeds, 1)
    assert found.worst_db(rounded) > 20
