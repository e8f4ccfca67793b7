"""A network walked piece by piece gives what it gives at once, each node once, and takes changes ahead of it."""

import numpy as np
import onnx
import pytest

from calib.session import open_session
from relu_deploy.errors import QuantizationError
from relu_deploy.int8 import walk as module
from relu_deploy.int8.walk import Walk

TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x, bool c) => (float[N, 4] y, float[N, 4] z)
<float[4, 4] w, float[4, 4] v> {
  a = MatMul(x, w)
  r = Relu(a)
  b = MatMul(r, v)
  s = Add(b, a)
  z = Tanh(s)
  i = If(c) <then_branch = t () => (float[N, 4] p) { p = Neg(a) }, else_branch = e () => (float[N, 4] q) { q = Abs(s) }>
  y = Add(i, r)
}"""


def network():
    model = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    del model.graph.initializer[:]
    for name in ("w", "v"):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=(4, 4)).astype(np.float32), name))
    feeds = [{"x": rng.normal(size=(rows, 4)).astype(np.float32), "c": np.array(rows % 2 == 0)} for rows in (1, 2, 3)]
    return model, feeds


def at_once(model, feeds, *names):
    session = open_session(model)
    return [dict(zip(names, session.run(list(names), feed), strict=True)) for feed in feeds]


@pytest.mark.parametrize("order", [("a", "r", "b", "s", "y", "z"), ("y", "z"), ("s", "z", "y"), ("z", "r", "y")])
def test_any_order_gives_what_the_whole_network_gives(order):
    model, feeds = network()
    walk = Walk(model, feeds)
    found = {name: walk.fetch(name) for name in order}
    for at, wanted in enumerate(at_once(model, feeds, "y", "z")):
        for name, value in wanted.items():
            assert (found[name][at] == value).all()


def test_each_node_runs_once(monkeypatch):
    model, feeds = network()
    ran = []
    opened = module.open_session
    monkeypatch.setattr(
        module, "open_session", lambda part: (ran.extend(n.output[0] for n in part.graph.node), opened(part))[1]
    )
    walk = Walk(model, feeds)
    for name in ("a", "s", "z", "y", "y"):
        walk.fetch(name)
    assert sorted(ran) == ["a", "b", "i", "r", "s", "y", "z"]


def test_what_nobody_will_read_is_forgotten():
    model, feeds = network()
    walk = Walk(model, feeds)
    walk.fetch("s")
    assert set(walk._values) == {"s", "a", "r", "c"}
    walk.fetch("y")
    walk.fetch("z")
    assert set(walk._values) == {"y", "z"}


def test_weights_ahead_can_be_changed_and_those_behind_not():
    model, feeds = network()
    walk = Walk(model, feeds)
    walk.fetch("r")
    new = np.eye(4, dtype=np.float32)
    walk.replace("v", new)
    with pytest.raises(QuantizationError, match="w was read already"):
        walk.replace("w", new)
    with pytest.raises(KeyError):
        walk.replace("nothing", new)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(new, "v"))
    for at, wanted in enumerate(at_once(changed, feeds, "y", "z")):
        assert (walk.fetch("y")[at] == wanted["y"]).all()
        assert (walk.fetch("z")[at] == wanted["z"]).all()
    assert onnx.numpy_helper.to_array(model.graph.initializer[1]).tolist() != new.tolist(), "the model is not changed"
