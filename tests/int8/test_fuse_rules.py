"""Operator by operator: channels pass what is homogeneous, with any factors and the same bits; all else is refused."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

_SPEC = importlib.util.spec_from_file_location("test_fuse", Path(__file__).with_name("test_fuse.py"))
fusing = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fusing)
any_factors = fusing.any_factors

# Between a convolution to 8 channels (c) and one that reads them (p), on 2 x 8 x 6 x 6.
PASSES = {
    "Relu": "p = Relu(c)",
    "LeakyRelu": "p = LeakyRelu<alpha=0.1>(c)",
    "PRelu shared": "p = PRelu(c, k1)",
    "PRelu by channel": "p = PRelu(c, k8)",
    "Clip at 0": "p = Clip(c, zero)",
    "Identity, Dropout": "i = Identity(c) p = Dropout(i)",
    "Cast": "d = Cast<to=11>(c) p = Cast<to=1>(d)",
    "Sum": "r = Relu(c) p = Sum(c, r, c)",
    "Max of two": "r = Neg(c) p = Max(c, r)",
    "max(x, s x)": "r = Mul(c, k1) p = Max(c, r)",
    "offset by channel": "p = Add(k8, c)",
    "Sub from a vector": "p = Sub(k8, c)",
    "scalar factor": "p = Mul(c, k1)",
    "factor by channel": "p = Mul(c, k8)",
    "divisor": "p = Div(c, k8)",
    "Where": "p = Where(yes, c, k8)",
    "MaxPool": "p = MaxPool<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(c)",
    "AveragePool": "p = AveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(c)",
    "GlobalMaxPool": "p = GlobalMaxPool(c)",
    "ReduceMean": "p = ReduceMean<axes=[2, 3]>(c)",
    "ReduceSum": "p = ReduceSum(c, spatial)",
    "ReduceMax": "p = ReduceMax<axes=[-1]>(c)",
    "ReduceMin, no axis kept": "r = ReduceMin<axes=[3], keepdims=0>(c) p = Unsqueeze(r, three)",
    "Squeeze": "m = GlobalAveragePool(c) s = Squeeze(m, spatial) p = Unsqueeze(s, spatial)",
    "Expand": "m = GlobalAveragePool(c) p = Expand(m, whole)",
    "Tile": "p = Tile(c, twice)",
    "Tile channels": "t = Tile(c, double) p = Slice(t, four, twelve, one)",
    "DepthToSpace": "p = DepthToSpace<blocksize=2>(c)",
    "DepthToSpace CRD": 'p = DepthToSpace<blocksize=2, mode="CRD">(c)',
    "SpaceToDepth": "p = SpaceToDepth<blocksize=2>(c)",
    "pixel shuffle": "r = Reshape(c, apart) t = Transpose<perm=[0, 1, 4, 2, 5, 3]>(r) p = Reshape(t, shuffled)",
    "Pad": "p = Pad(c, around)",
    "Pad with edges": 'p = Pad<mode="edge">(c, around)',
    "linear Resize": 'p = Resize<mode="linear">(c, , scales)',
    "cubic Resize": 'p = Resize<mode="cubic", coordinate_transformation_mode="align_corners">(c, , scales)',
    "Concat of positions": "r = Relu(c) p = Concat<axis=2>(c, r)",
    "Concat of channels": "r = Relu(c) m = MaxPool<kernel_shape=[1, 1]>(r) p = Concat<axis=-3>(m, c)",
    "Concat with a constant": "p = Concat<axis=1>(c, block)",
    "Concat of positions with a constant": "p = Concat<axis=2>(c, line)",
    "gate": "m = GlobalAveragePool(c) g = Sigmoid(h) p = Mul(c, g)",
    "gate first": "g = Sigmoid(h) p = Mul(g, c)",
    "constant gate of positions": "p = Mul(c, map)",
    "live divisor": "e = Exp(h) p = Div(c, e)",
    "InstanceNormalization": "p = InstanceNormalization(c, g8, k8v)",
    "BatchNormalization": "p = BatchNormalization(c, g8, k8v, k8v, g8)",
    "LayerNormalization": "t = Transpose<perm=[0, 2, 3, 1]>(c) n = LayerNormalization(t, g8, k8v) "
    "p = Transpose<perm=[0, 3, 1, 2]>(n)",
    "normalised by hand": "m = ReduceMean<axes=[1]>(c) d = Sub(c, m) p = Mul(d, k8)",
    "Split": "r, s = Split<axis=1>(c) p = Concat<axis=1>(s, r)",
    "Gather": "p = Gather<axis=1>(c, numbers)",
    "depthwise": "p = Conv<group=8, pads=[1, 1, 1, 1]>(c, depthwise, k8v)",
    "transposed": "p = ConvTranspose<strides=[2, 2]>(c, transposed, k8v)",
    "transposed groups": "p = ConvTranspose<group=2>(c, transposed2, k8v)",
    "matrix from the left": "q = Softmax(positions) p = MatMul(q, c)",
}  # fmt: skip
REFUSES = {
    "Sigmoid": ("p = Sigmoid(c)", "Sigmoid p is not homogeneous"),
    "Clip at 6": ("p = Clip(c, zero, six)", "Clip p has a bound that does not scale: 0.0 to 6.0"),
    "HardSwish by hand": ("a = Add(c, three_f) k = Clip(a, zero, six) p = Mul(c, k)", "a bound that does not scale"),
    "SiLU by hand": ("g = Sigmoid(c) p = Mul(c, g)", "Sigmoid g is not homogeneous"),
    "Pow": ("p = Pow(c, six)", "Pow p is not homogeneous"),
    "square": ("p = Mul(c, c)", "it multiplies another tensor in Mul p"),
    "mean of channels": ("m = ReduceMean<axes=[1]>(c) p = Sub(c, m)", "ReduceMean m reduces channels"),
    "reciprocal": ("p = Div(six, c)", "Div p divides by it"),
    "Softmax": ("p = Softmax<axis=1>(c)", "Softmax p is not homogeneous"),
    "Pad with 1": ("p = Pad(c, around, k1s)", "Pad p pads with another number than 0"),
    "Cast to integers": ("i = Cast<to=7>(c) p = Cast<to=1>(i)", "Cast i rounds to whole numbers"),
    "Gather by computed numbers": (
        "n = ArgMax<axis=1, keepdims=0>(h) f = Reshape(n, minus) p = Gather<axis=1>(c, f)",
        "Gather p takes channels by numbers computed at run time",
    ),
    "sum over channels": (
        "t = Transpose<perm=[0, 2, 3, 1]>(c) k = Transpose<perm=[0, 2, 1, 3]>(h) p = MatMul(t, k)",
        "it multiplies another tensor in MatMul p",
    ),
    "sum over channels on the right": (
        "t = Transpose<perm=[0, 2, 1, 3]>(c) p = MatMul(positions8, t)",
        "MatMul p sums over its channels",
    ),
    "live slopes": ("p = PRelu(h, c)", "it is a slope of PRelu p"),
    "LayerNormalization": (
        "t = Transpose<perm=[0, 2, 3, 1]>(c) n = LayerNormalization(t, g8, k8v) p = Transpose<perm=[0, 3, 1, 2]>(n)",
        "LayerNormalization n normalises it",
    ),
    "Resize of channels": ('p = Resize<mode="linear">(c, , thick)', "may interpolate between channels"),
}  # fmt: skip


def constants():
    rng = np.random.default_rng(0)
    floats = {
        "w": rng.normal(size=(8, 4, 3, 3)), "b": rng.normal(size=8), "v": rng.normal(size=(8, 4, 1, 1)),
        "k1": np.array([0.3]), "k1s": np.array(1.0), "k8": rng.normal(size=(8, 1, 1)), "k8v": rng.normal(size=8),
        "g8": rng.uniform(0.5, 2, 8), "zero": np.array(0.0), "six": np.array(6.0), "three_f": np.array(3.0),
        "scales": np.array([1, 1, 2, 2.0]), "thick": np.array([1, 2, 1, 1.0]), "block": rng.normal(size=(2, 3, 6, 6)),
        "line": rng.normal(size=(2, 8, 1, 6)), "map": rng.normal(size=(1, 1, 6, 6)),
        "depthwise": rng.normal(size=(8, 1, 3, 3)), "transposed": rng.normal(size=(8, 8, 2, 2)),
        "transposed2": rng.normal(size=(8, 4, 1, 1)), "positions": rng.normal(size=(6, 6)),
        "positions8": rng.normal(size=(4, 8)),
    }  # fmt: skip
    integers = {
        "spatial": [2, 3], "three": [3], "whole": [2, 8, 6, 6], "twice": [1, 1, 2, 1], "double": [1, 2, 1, 1],
        "four": [4], "twelve": [12], "one": [1], "apart": [2, 2, 2, 2, 6, 6], "shuffled": [2, 2, 12, 12],
        "around": [0, 0, 1, 1, 0, 0, 1, 1], "numbers": [7, 7, 0, 3], "minus": [-1],
    }  # fmt: skip
    values = {name: np.asarray(value, np.float32) for name, value in floats.items()}
    values |= {name: np.asarray(value, np.int64) for name, value in integers.items()}
    return values | {"yes": np.arange(6) % 2 == 0}


def model_of(body):
    """``c`` from a convolution, the body, and a convolution of ``p`` to 5 channels; ``h`` is made like ``c``."""
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[2, 4, 6, 6] x) => (float[n, 5, i, j] y) '
        f"{{ c = Conv<pads=[1, 1, 1, 1]>(x, w, b) h = Conv<pads=[1, 1, 1, 1]>(x, w, b) {body} y = Conv(p, u) }}"
    )
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    stored = [numpy_helper.from_array(values, name) for name, values in constants().items() if name in used]
    model.graph.initializer.extend(stored)
    for node in model.graph.node:
        node.name = node.output[0]
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info}
    channels = known["p"].type.tensor_type.shape.dim[1].dim_value
    last = np.random.default_rng(1).normal(size=(5, channels, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(last, "u"))
    return model


@pytest.mark.parametrize("case", PASSES)
def test_channels_pass(case, any_factors):
    model, data = model_of(PASSES[case]), fusing.normal(4, 4, 6, 6)
    before, after, fusion = fusing.fuse(model, fusing.measured(model, data))
    made_by_norm = "ormal" in case and "Batch" not in case
    assert "u/fused" in {t.name for t in after.graph.initializer}, fusion.report.layers.skipped
    assert made_by_norm or "c" in fusion.report.layers.changed, fusion.report.layers.skipped
    fusing.assert_same_bits(before, after, {"x": data[:2]})
    fusing.assert_measured_again(after, data, fusion)


@pytest.mark.parametrize("case", REFUSES)
def test_channels_are_refused(case, any_factors):
    body, reason = REFUSES[case]
    model, data = model_of(body), fusing.normal(4, 4, 6, 6)
    before, after, fusion = fusing.fuse(model, fusing.measured(model, data))
    refused = {skip.name: skip.reason for skip in fusion.report.layers.skipped}
    assert reason in refused["c"]
    fusing.assert_same_bits(before, after, {"x": data[:2]})
