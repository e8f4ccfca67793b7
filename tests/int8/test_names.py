"""Names that networks have, and that quantising would give: nothing may take the place of anything."""

import numpy as np
import onnx
import onnxruntime
import pytest

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source
from relu_deploy.graph import load_model
from relu_deploy.int8.qoperator import to_qoperator
from relu_deploy.int8.run import quantize

NODES = (("Conv", "xwb", "c"), ("Relu", "c", "r"), ("Mul", "rk", "s"), ("Conv", "sv", "z"), ("Sub", "zl", "y"))


def network(names, *, ir_version=8, opset=17):
    """Two convolutions with constants between them; ``names`` renames tensors and, by ``node.x``, nodes."""
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 4, 1, 1), "b": (4,), "k": (1, 4, 1, 1), "v": (4, 4, 1, 1), "l": (1, 4, 1, 1)}
    stored = [
        onnx.numpy_helper.from_array((3 * rng.standard_normal(shape)).astype(np.float32), names.get(old, old))
        for old, shape in shapes.items()
    ]
    nodes = [
        onnx.helper.make_node(
            op, [names.get(i, i) for i in inputs], [names.get(output, output)], name=names.get(f"node.{output}", output)
        )
        for op, inputs, output in NODES
    ]
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1, 4, 5, 5]) for name in "xy"]
    listed = [onnx.helper.make_tensor_value_info(t.name, 1, t.dims) for t in stored] if ir_version < 4 else []
    graph = onnx.helper.make_graph(nodes, "g", [ends[0], *listed], ends[1:], stored)
    imports = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def outputs(model, samples):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.stack([session.run(["y"], {"x": sample})[0] for sample in samples])


def quantized(model, samples, target, path):
    onnx.save(model, path)
    loaded = load_model(path)
    ranges = calibrate(loaded, open_source(samples[:, 0], model_inputs(loaded)))
    return quantize(loaded, ranges, target=target, float_part="fp32")[0]


@pytest.fixture
def samples():
    return np.random.default_rng(1).standard_normal((4, 1, 4, 5, 5)).astype(np.float32)


@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
@pytest.mark.parametrize(
    "names",
    [
        {"k": "s/scale"},
        {"l": "s/scale"},
        {"l": "x/zero_point"},
        {"b": "z/bias", "l": "c/bias"},
        {"v": "c/weight/scale"},
        {"r": "x/quantized", "c": "x/dequantized"},
        {"z": "x/scale", "c": "s/scale"},
        {"s": "x/quantized", "r": "s/zero_point"},
        {"node.z": "x/QuantizeLinear", "node.c": "s/DequantizeLinear"},
        {"l": "c/uneven/factors", "k": "c/uneven"},
    ],
    ids=str,
)
def test_names_that_quantising_gives_too(names, target, samples, tmp_path):
    plain = quantized(network({}), samples, target, tmp_path / "plain.onnx")
    clash = quantized(network(names), samples, target, tmp_path / "clash.onnx")
    expected = outputs(plain, samples)
    assert np.array_equal(outputs(clash, samples), expected)
    if target == "ort":
        assert np.array_equal(outputs(to_qoperator(clash)[0], samples), outputs(to_qoperator(plain)[0], samples))


@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
def test_initialisers_that_are_inputs_too(target, samples, tmp_path):
    """IR 3, as old exporters wrote it: every initialiser is listed among the inputs. Ours are not."""
    old = quantized(network({}, ir_version=3, opset=9), samples, target, tmp_path / "old.onnx")
    new = quantized(network({}, opset=9), samples, target, tmp_path / "new.onnx")
    assert [value.name for value in old.graph.input] == ["x"]
    assert np.array_equal(outputs(old, samples), outputs(new, samples))
