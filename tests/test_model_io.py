from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from relu_deploy.errors import ModelError
from relu_deploy.model_io import model_io
from relu_deploy.tensors import TensorSpec


def model(*, batch: int | str | None, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, kind, [batch, 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


# An extent of -1 is how some exporters write a dynamic axis; calib.inputs reads it so too.
@pytest.mark.parametrize(("batch", "axis"), [(4, 4), ("N", "N"), (None, "?"), (-1, "?")])
def test_axes(batch: int | str | None, axis: int | str) -> None:
    assert model_io(model(batch=batch)) == (
        (TensorSpec("x", (axis, 3), "float32"),), (TensorSpec("y", (axis, 3), "float32"),),
    )  # fmt: skip


def test_a_type_that_numpy_has_not_is_refused() -> None:
    with pytest.raises(ModelError, match="'x' is not a tensor of a type"):
        model_io(model(batch=1, kind=TensorProto.UNDEFINED))


def test_what_a_tensor_accepts() -> None:
    spec = TensorSpec("x", ("N", 3), "float32")
    assert spec.dynamic
    assert spec.accepts((7, 3))
    assert not spec.accepts((7, 4))
    assert not spec.accepts((7, 3, 1))
    assert TensorSpec("s", (), "int64").accepts(())
    assert TensorSpec.from_json({"name": "x", "shape": ["N", 3], "dtype": "float32"}) == spec
