"""Weights that a network only names are those that it had."""

from __future__ import annotations

import gc

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper

from calib.session import Session
from calib.stages import Stages
from calib.weights import apart, values_of

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 64] x, float[64, 64] default) => (float[N, 64] y)
{ a = MatMul(x, large) b = MatMul(a, listed) c = MatMul(b, default) d = Cast<to = 10>(c) e = MatMul(d, half)
  f = Cast<to = 1>(e) y = Add(f, small) }"""


def network():
    """A large weight of every kind, of which only one is plain float32 bytes."""
    model = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    large, listed, default = (rng.standard_normal((64, 64)).astype(np.float32) for _ in range(3))
    model.graph.initializer.extend(
        (
            numpy_helper.from_array(large, "large"),
            onnx.helper.make_tensor("listed", TensorProto.FLOAT, listed.shape, listed.reshape(-1)),
            numpy_helper.from_array(default, "default"),
            numpy_helper.from_array(large.astype(np.float16) / 8, "half"),
            numpy_helper.from_array(large[0], "small"),
        )
    )
    return model


@pytest.mark.parametrize("optimise", [False, True])
def test_a_network_computes_the_same_and_its_weights_live_as_long_as_it_does(optimise):
    model, x = network(), np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    truth = Session(model, optimise=optimise).run(["y"], {"x": x}, "test")[0]
    before = model.SerializeToString(deterministic=True)
    bare, weights = apart(model)
    assert model.SerializeToString(deterministic=True) == before
    session = Session(bare, optimise=optimise, weights=weights)
    del bare, weights, model.graph.initializer[:]
    gc.collect()
    overwritten = [np.full((64, 64), np.nan, np.float32) for _ in range(64)]
    assert np.array_equal(session.run(["y"], {"x": x}, "test")[0], truth)
    assert len(overwritten) == 64


def test_only_large_plain_weights_are_taken_apart():
    bare, weights = apart(network())
    assert list(weights) == list(values_of(bare, weights)) == ["large"]
    external = [t.name for t in bare.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert external == ["large"]
    assert bare.ByteSize() < network().ByteSize() - 64 * 64 * 4 + 200


def test_a_weight_of_another_size_than_it_says_is_left_to_the_runtime_to_refuse():
    model = network()
    model.graph.initializer[0].dims[0] = 63
    assert apart(model)[1] == {}


def test_a_stage_is_handed_only_its_own_weights(monkeypatch):
    monkeypatch.setattr("calib.stages.STAGE_BYTES", 0)
    model, x = network(), np.ones((2, 64), np.float32)
    types = dict.fromkeys(["x", *"abcfy"], "tensor(float)") | dict.fromkeys("de", "tensor(float16)")
    sizes = dict.fromkeys("abcfy", 512)
    bare, weights = apart(model)
    whole, cut = (
        dict(Stages(network_, sizes, sizes, types, threads=1, weights=given).run({"x": x}, "test"))
        for network_, given in ((model, None), (bare, weights))
    )
    assert list(whole) == list(cut) == list("abcfy")
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)


def test_functions_and_sparse_weights_stay(residual_model):
    model = residual_model()
    model.functions.add(name="f", domain="mine", output=["q"]).node.add(op_type="Constant", output=["q"])
    model.graph.sparse_initializer.add(dims=[4]).values.name = "s"
    bare, weights = apart(model)
    assert bare.functions == model.functions
    assert bare.graph.sparse_initializer == model.graph.sparse_initializer
    for tensor in bare.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(weights[tensor.name])
    assert bare.graph == model.graph
