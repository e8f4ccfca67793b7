# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""Small networks in ONNX text, in the shapes that networks have around their activations, gates and heads."""

from __future__ import annotations

import re

import numpy as np
import onnx
from hypothesis import strategies as st

from relu_deploy.passes import roles
from relu_deploy.passes.fused import RECURRENT

IMAGE = "float[N,8,16,16] x"
WORDS = "float[N,6,8] x"


def network(
    body: str, *, inputs: str = IMAGE, outputs: str = "float y", opset: int = 17, types: bool = True, domain: str = ""
) -> onnx.ModelProto:
    """A checked network from ONNX text; ``#0.5`` is a scalar and ``%[8,8]`` a tensor of random numbers."""
    made: list[onnx.TensorProto] = []

    def number(match: re.Match[str]) -> str:
        value = np.float32(match[1])
        made.append(onnx.numpy_helper.from_array(np.asarray(value), f"number{len(made)}"))
        return made[-1].name

    def weight(match: re.Match[str]) -> str:
        shape = [int(size) for size in match[1].split(",")]
        values = np.random.default_rng(len(made)).normal(size=shape).astype(np.float32)
        made.append(onnx.numpy_helper.from_array(values, f"weight{len(made)}"))
        return made[-1].name

    def list_of_ints(match: re.Match[str]) -> str:
        made.append(onnx.numpy_helper.from_array(np.array([int(v) for v in match[1].split(",")]), f"ints{len(made)}"))
        return made[-1].name

    text = re.sub(r"%\[([\d,]+)\]", weight, re.sub(r"#([-+.\de]+)", number, body))
    if "zeros" in body:
        made.append(onnx.numpy_helper.from_array(np.zeros((2, 8), np.float32), "zeros"))
    text = re.sub(r"@\[([-\d,]+)\]", list_of_ints, text)
    names = ", ".join(f"{kind}[] {name}" for kind, name in (item.split() for item in outputs.split(", ")))
    imports = f', "{domain}": 1' if domain else ""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}{imports}]> g ({inputs}) => ({names}) {{ {text} }}'
    )
    model.graph.initializer.extend(made)
    inferred = onnx.shape_inference.infer_shapes(model)
    for output, known in zip(model.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(known)
        if not output.type.tensor_type.HasField("shape"):
            output.type.tensor_type.shape.SetInParent()
    if not domain:
        onnx.checker.check_model(model, full_check=True)
    return inferred if types else model


POOL = "p = GlobalAveragePool(a)"
EXCITE = "q = Conv(p, %[2,8,1,1]) r = Relu(q) s = Conv(r, %[8,2,1,1])"
STEM = "c = Conv(x, %[8,8,1,1])"
LAST = "y = Conv(z, %[8,8,1,1])"
NORM = "m = ReduceMean <axes = [-1]> (x) d = Sub(x, m) q = Pow(d, #2) v = ReduceMean <axes = [-1]> (q) e = Add(v, #1e-5) s = Sqrt(e) n = Div(d, s) w = Mul(n, %[8]) l = Add(w, %[8])"

# name: body, inputs, counts, left alone with the reason
PLACES: dict[str, tuple[str, str, dict[str, int], dict[str, str]]] = {
    "squeeze-excite after HardSwish": (f"{STEM} a = HardSwish(c) {POOL} {EXCITE} g = HardSigmoid(s) z = Mul(a, g) {LAST}", IMAGE,
                                       {"hardswish": 1, "relu": 1}, {"hard_sigmoid": roles.SQUEEZE_EXCITE}),
    "squeeze-excite without an activation before it": (f"a = Conv(x, %[8,8,1,1]) {POOL} {EXCITE} g = Sigmoid(s) z = Mul(g, a) {LAST}", IMAGE,
                                                       {"relu": 1}, {"sigmoid": roles.SQUEEZE_EXCITE}),
    "squeeze-excite as Keras writes it": (f"{STEM} t = Sigmoid(c) a = Mul(c, t) p = ReduceMean <axes = [2, 3], keepdims = 0> (a) h = MatMul(p, %[8,2]) k = Sigmoid(h) i = Mul(h, k) s = MatMul(i, %[2,8]) b = Add(s, %[8]) g = Sigmoid(b) r = Reshape(g, @[-1,8,1,1]) z = Mul(a, r) {LAST}", IMAGE,
                                          {"silu": 2}, {"sigmoid": roles.SQUEEZE_EXCITE}),
    "squeeze-excite with a gate of Add, Clip and Div": (f"{STEM} a = Relu(c) {POOL} {EXCITE} b = Add(s, #3) h = Clip(b, #0, #6) g = Div(h, #6) z = Mul(a, g) {LAST}", IMAGE,
                                                        {"relu": 2}, {"hard_sigmoid": roles.SQUEEZE_EXCITE}),
    "squeeze-excite, whose excitation is pooled from elsewhere": (f"{STEM} a = Relu(x) {POOL} {EXCITE} g = Sigmoid(s) t = Sigmoid(c) u = Mul(c, t) z = Mul(u, g) {LAST}", IMAGE,
                                                                 {"silu": 1, "relu": 2}, {"sigmoid": roles.SQUEEZE_EXCITE}),
    "spatial attention of an attention U-Net": (f"{STEM} a = Relu(c) s = Conv <strides = [2, 2]> (a, %[1,8,1,1]) h = Sigmoid(s) g = Resize(h, , , @[1,1,16,16]) z = Mul(a, g) {LAST}", "float[1,8,16,16] x",
                                                {"relu": 1}, {"sigmoid": roles.SELF_GATE}),
    "spatial attention of CBAM": (f"{STEM} a = Relu(c) m = ReduceMean <axes = [1]> (a) n = ReduceMax <axes = [1]> (a) u = Concat <axis = 1> (m, n) s = Conv <pads = [1, 1, 1, 1]> (u, %[1,2,3,3]) g = Sigmoid(s) z = Mul(a, g) {LAST}", IMAGE,
                                  {"relu": 1}, {"sigmoid": roles.SELF_GATE}),
    "GLU": (f"{STEM} a, b = Split <axis = 1> (c, @[4,4]) s = Sigmoid(b) z = Mul(a, s) y = Conv(z, %[8,4,1,1])", IMAGE, {}, {"sigmoid": roles.GLU}),
    "GLU of the input itself": ("a, b = Split <axis = 1> (x, @[4,4]) s = Sigmoid(b) y = Mul(a, s)", IMAGE, {}, {"sigmoid": roles.GLU}),
    "SwiGLU": ("g = MatMul(x, %[8,16]) u = MatMul(x, %[8,16]) s = Sigmoid(g) a = Mul(g, s) m = Mul(a, u) y = MatMul(m, %[16,8])", WORDS, {}, {"silu": roles.GLU}),
    "GEGLU by Slice": ("h = MatMul(x, %[8,32]) a = Slice(h, @[0], @[16], @[2]) b = Slice(h, @[16], @[32], @[2]) d = Div(b, #1.4142135) e = Erf(d) p = Add(e, #1) q = Mul(b, p) g = Mul(q, #0.5) m = Mul(a, g) y = MatMul(m, %[16,8])", WORDS,
                       {}, {"gelu_erf": roles.GLU}),
    "ReGLU": ("g = MatMul(x, %[8,16]) u = MatMul(x, %[8,16]) a = Relu(g) m = Mul(a, u) y = MatMul(m, %[16,8])", WORDS, {"relu": 1}, {}),
    "a gate that the gated tensor opens itself": (f"{STEM} a = Relu(c) s = Conv(a, %[8,8,1,1]) g = Sigmoid(s) z = Mul(a, g) {LAST}", IMAGE, {"relu": 1}, {"sigmoid": roles.SELF_GATE}),
    "WaveNet's gate": (f"f = Conv(x, %[8,8,1,1]) g = Conv(x, %[8,8,1,1]) a = Tanh(f) b = Sigmoid(g) z = Mul(a, b) {LAST}", IMAGE, {}, {"tanh": roles.GLU, "sigmoid": roles.GLU}),
    "a cell of a GRU, unrolled": ("z = Gemm(x, %[8,8]) u = Sigmoid(z) n = Gemm(x, %[8,8]) t = Tanh(n) k = Sub(#1, u) a = Mul(k, t) b = Mul(u, h) s = Add(a, b) y = Gemm(s, %[8,8])", "float[N,8] x, float[N,8] h",
                                 {}, {"sigmoid": roles.GLU, "tanh": roles.GLU}),
    "the first cell of an LSTM, unrolled": ("g = Gemm(x, %[8,32]) i, f, o, k = Split <axis = 1> (g, @[8,8,8,8]) a = Sigmoid(i) b = Sigmoid(f) d = Sigmoid(o) t = Tanh(k) u = Mul(b, zeros) v = Mul(a, t) c = Add(u, v) w = Tanh(c) h = Mul(d, w) y = Gemm(h, %[8,8])", "float[2,8] x",
                                            {}, {"sigmoid": roles.GLU, "tanh": roles.GLU}),
    "attention": ("q = MatMul(x, %[8,8]) k = MatMul(x, %[8,8]) v = MatMul(x, %[8,8]) t = Transpose <perm = [0, 2, 1]> (k) d = MatMul(q, t) e = Div(d, #2.828) s = Softmax <axis = -1> (e) o = MatMul(s, v) y = MatMul(o, %[8,8])", WORDS,
                  {}, {"softmax": roles.ATTENTION}),
    "attention with capped scores and a mask": ("q = MatMul(x, %[8,8]) t = Transpose <perm = [0, 2, 1]> (x) d = MatMul(q, t) e = Div(d, #50) h = Tanh(e) k = Mul(h, #50) m = Add(k, mask) s = Softmax <axis = -1> (m) o = MatMul(s, x) y = MatMul(o, %[8,8])", f"{WORDS}, float[N,6,6] mask",
                                                {}, {"tanh": roles.ATTENTION, "softmax": roles.ATTENTION}),
    "attention by sigmoid": ("q = MatMul(x, %[8,8]) t = Transpose <perm = [0, 2, 1]> (x) d = MatMul(q, t) s = Sigmoid(d) o = MatMul(s, x) y = MatMul(o, %[8,8])", WORDS,
                             {}, {"sigmoid": roles.ATTENTION}),
    "softmax spelled out": ("d = MatMul(x, %[8,8]) m = ReduceMax <axes = [-1]> (d) k = Sub(d, m) e = Exp(k) s = ReduceSum(e, @[-1]) o = Div(e, s) y = MatMul(o, %[8,8])", WORDS, {}, {}),
    "LayerNorm spelled out": (f"{NORM} y = MatMul(l, %[8,8])", WORDS, {}, {}),
    "LayerNorm between layers": (f"i = MatMul(x, %[8,8]) {NORM.replace('(x', '(i')} y = MatMul(l, %[8,8])", WORDS, {}, {}),
    "RMSNorm": ("i = MatMul(x, %[8,8]) q = Pow(i, #2) v = ReduceMean <axes = [-1]> (q) e = Add(v, #1e-5) s = Sqrt(e) r = Reciprocal(s) n = Mul(i, r) y = MatMul(n, %[8,8])", WORDS, {}, {}),
    "RMSNorm by a power": ("i = MatMul(x, %[8,8]) q = Mul(i, i) v = ReduceMean <axes = [-1]> (q) e = Add(v, #1e-5) r = Pow(e, #-0.5) n = Mul(i, r) y = MatMul(n, %[8,8])", WORDS, {}, {}),
    "a norm that is kept from zero": ("i = MatMul(x, %[8,8]) q = ReduceL2 <axes = [-1]> (i) m = Max(q, #1e-12) n = Div(i, m) y = MatMul(n, %[8,8])", WORDS, {}, {}),
    "a variance that is kept from below zero": ("i = MatMul(x, %[8,8]) q = Mul(i, i) v = ReduceMean <axes = [-1]> (q) m = ReduceMean <axes = [-1]> (i) k = Mul(m, m) d = Sub(v, k) r = Max(d, #0) s = Sqrt(r) n = Div(i, s) y = MatMul(n, %[8,8])", WORDS, {}, {}),
    "a bias in the units of a dynamic quantiser": ("h = MatMul(x, %[8,8]) i = Mul(h, #2) q, scale, zero = DynamicQuantizeLinear(i) b = Div(%[8], scale) f = Floor(b) m = Mul(f, scale) d = DequantizeLinear(q, scale, zero) e = Add(d, m) y = MatMul(e, %[8,8])", WORDS, {}, {}),
    "positions": ("f = Mul(t, #0.01) s = Sin(f) c = Cos(f) a = Mul(x, c) b = Mul(x, s) z = Add(a, b) y = MatMul(z, %[8,8])", f"{WORDS}, float[N,6,1] t", {}, {}),
    "positions by a layer": ("f = MatMul(t, %[1,4]) s = Sin(f) c = Cos(f) u = Concat <axis = -1> (s, c) a = Mul(x, u) y = MatMul(a, %[8,8])", f"{WORDS}, float[N,6,1] t", {}, {}),
    "Fourier features": ("f = MatMul(x, %[8,4]) s = Sin(f) c = Cos(f) u = Concat <axis = -1> (s, c) y = MatMul(u, %[8,8])", WORDS, {}, {}),
    "BatchNorm as Mul and Add": (f"{STEM} m = Mul(c, %[8,1,1]) a = Add(m, %[8,1,1]) z = Relu(a) {LAST}", IMAGE, {"relu": 1}, {}),
    "BatchNorm as Mul and Add, before SiLU": (f"{STEM} m = Mul(c, %[8,1,1]) a = Add(m, %[8,1,1]) s = Sigmoid(a) z = Mul(a, s) {LAST}", IMAGE, {"silu": 1}, {}),
    "BatchNorm as Mul and Add, before clipping": (f"{STEM} m = Mul(c, %[8,1,1]) a = Add(m, %[8,1,1]) z = Clip(a, #0, #6) {LAST}", IMAGE, {"relu6": 1}, {}),
    "an activation and a scale behind it": (f"{STEM} s = Sigmoid(c) m = Mul(c, s) z = Mul(m, #1.78) {LAST}", IMAGE, {"silu": 1}, {}),
    "two activations in a row": (f"{STEM} m = Softplus(c) z = Clip(m, #0, #6) {LAST}", IMAGE, {"softplus": 1, "relu6": 1}, {}),
    "an activation behind a residual sum": (f"{STEM} r = Add(c, x) z = Relu(r) {LAST}", IMAGE, {"relu": 1}, {}),
    "head of classes": (f"{STEM} a = Relu(c) h = Conv(a, %[2,8,1,1]) y = Sigmoid(h)", IMAGE, {"relu": 1}, {"sigmoid": roles.HEAD}),
    "softmax of classes": ("h = Gemm(x, %[8,8]) r = Relu(h) g = Gemm(r, %[8,3]) y = Softmax(g)", "float[N,8] x", {"relu": 1}, {"softmax": roles.HEAD}),
    "tanh of a generator": (f"{STEM} a = LeakyRelu(c) h = ConvTranspose(a, %[8,3,2,2]) y = Tanh(h)", IMAGE, {"leaky_relu": 1}, {"tanh": roles.HEAD}),
    "boxes of YOLOv5": (f"{STEM} t = Sigmoid(c) a = Mul(c, t) h = Conv(a, %[8,8,1,1]) s = Sigmoid(h) i, w, o = Split <axis = 1> (s, @[2,2,4]) d = Mul(i, #2) g = Add(d, %[1,2,16,16]) b = Mul(g, #8) e = Mul(w, #2) q = Pow(e, #2) n = Mul(q, %[2,1,1]) y = Concat <axis = 1> (b, n, o)", IMAGE,
                        {"silu": 1}, {"sigmoid": roles.HEAD}),
    "boxes of YOLOv8": (f"{STEM} t = Sigmoid(c) a = Mul(c, t) h = Conv(a, %[64,8,1,1]) r = Reshape(h, @[0,4,16,-1]) v = Transpose <perm = [0, 2, 1, 3]> (r) s = Softmax <axis = 1> (v) d = Conv(s, %[1,16,1,1]) f = Reshape(d, @[0,4,-1]) k = Conv(a, %[3,8,1,1]) l = Reshape(k, @[0,3,-1]) p = Sigmoid(l) y = Concat <axis = 1> (f, p)", IMAGE,
                        {"silu": 1}, {"softmax": roles.SOFTMAX, "sigmoid": roles.HEAD}),
    "boxes of YOLOX": (f"{STEM} a = Relu(c) h = Conv(a, %[4,8,1,1]) i, w = Split <axis = 1> (h, @[2,2]) g = Add(i, %[1,2,16,16]) b = Mul(g, #8) e = Exp(w) n = Mul(e, #8) y = Concat <axis = 1> (b, n)", IMAGE,
                       {"relu": 1}, {}),
    "clipped boxes": (f"{STEM} a = Relu(c) h = Conv(a, %[4,8,1,1]) y = Clip(h, #0, #416)", IMAGE, {"relu": 1}, {"clipped_relu": roles.HEAD}),
    "half precision between layers": ("h = MatMul(x, %[8,8]) a = Cast <to = 10> (h) b = Cast <to = 1> (a) y = MatMul(b, %[8,8])", WORDS, {}, {}),
    "magnitudes between layers": ("h = MatMul(x, %[8,8]) a = Abs(h) y = MatMul(a, %[8,8])", WORDS, {"abs": 1}, {}),
    "a product of two scores": (f"{STEM} a = Relu(c) h = Conv(a, %[4,8,1,1]) o, k = Split <axis = 1> (h, @[1,3]) s = Sigmoid(o) t = Sigmoid(k) y = Mul(s, t)", IMAGE, {"relu": 1}, {"sigmoid": roles.HEAD}),
    "a guard against overflow": (f"{STEM} a = Clip(c, #-64504, #64504) b = Conv(a, %[8,8,1,1]) z = Relu(b) {LAST}", IMAGE, {"relu": 1}, {}),
    "heads of CenterNet": (f"{STEM} a = Relu(c) b = Conv(a, %[8,8,1,1]) d = Relu(b) h = Conv(d, %[3,8,1,1]) s = Sigmoid(h) y = Clip(s, #0.0001, #0.9999)", IMAGE, {"relu": 2}, {"sigmoid": roles.HEAD}),
    "a score that picks boxes for a second stage": (f"{STEM} a = Relu(c) h = Conv(a, %[1,8,1,1]) s = Sigmoid(h) f = Reshape(s, @[1,-1]) v, i = TopK(f, @[4]) k = Cast <to = 1> (i) r = Mul(k, #0.1) e = Reshape(r, @[4,1]) j = Concat <axis = 1> (e, e, e, e) u = RoiAlign <output_height = 2, output_width = 2> (a, j, @[0,0,0,0]) z = Relu(u) y = Conv(z, %[2,8,1,1])", "float[1,8,16,16] x",
                                                    {"relu": 2}, {"sigmoid": roles.HEAD}),
    "SiLU at the end of a backbone": (f"{STEM} s = Sigmoid(c) y = Mul(c, s)", IMAGE, {"silu": 1}, {}),
    "ReLU at the end": (f"{STEM} y = Relu(c)", IMAGE, {"relu": 1}, {}),
    "a mask from outside": (f"{STEM} g = HardSwish(c) z = Mul(g, mask) {LAST}", f"{IMAGE}, float[N,1,16,16] mask", {"hardswish": 1}, {}),
    "a mask of the input": ("e = Gather(%[9,8], x) h = MatMul(e, %[8,8]) s = Sigmoid(h) a = Mul(h, s) n = Equal(x, @[0]) k = Not(n) f = Cast <to = 1> (k) u = Unsqueeze(f, @[-1]) z = Mul(a, u) y = MatMul(z, %[8,8])", "int64[N,6] x", {"silu": 1}, {}),
    "channels last": (f"{STEM} t = Transpose <perm = [0, 2, 3, 1]> (c) b = Add(t, %[8]) s = Sigmoid(b) m = Mul(b, s) z = Transpose <perm = [0, 3, 1, 2]> (m) {LAST}", IMAGE, {"silu": 1}, {}),
    "PRelu of Keras, channels last and a slope for each place": (f"{STEM} t = Transpose <perm = [0, 2, 3, 1]> (c) p = PRelu(t, %[16,16,8]) z = Transpose <perm = [0, 3, 1, 2]> (p) {LAST}", IMAGE, {"prelu": 1}, {}),
    "PRelu with live slopes": (f"{STEM} k = GlobalAveragePool(c) z = PRelu(c, k) {LAST}", IMAGE, {}, {"prelu": "its slopes are computed at run time"}),
    "a mixer": ("t = Transpose <perm = [0, 2, 1]> (x) a = MatMul(t, %[6,12]) d = Div(a, #1.4142135) e = Erf(d) p = Add(e, #1) q = Mul(a, p) g = Mul(q, #0.5) b = MatMul(g, %[12,6]) u = Transpose <perm = [0, 2, 1]> (b) r = Add(u, x) h = MatMul(r, %[8,16]) i = Mul(h, #0.70710678) j = Erf(i) k = Add(j, #1) l = Mul(h, k) m = Mul(l, #0.5) y = MatMul(m, %[16,8])", WORDS, {"gelu_erf": 2}, {}),
    "LSTM and a ReLU": ("t = Transpose <perm = [1, 0, 2]> (x) o = LSTM <hidden_size = 8> (t, %[1,32,8], %[1,32,8]) r = Relu(o) y = MatMul(r, %[8,3])", WORDS, {"relu": 1}, {"lstm": RECURRENT}),
    "maxout": (f"a = Conv(x, %[8,8,1,1]) b = Conv(x, %[8,8,1,1]) z = Max(a, b) {LAST}", IMAGE, {}, {}),
    "a table that is computed from constants": ("t = Relu(%[6,8]) u = MatMul(t, %[8,8]) s = Sigmoid(u) i = MatMul(x, %[8,8]) z = Add(i, s) y = MatMul(z, %[8,8])", WORDS, {}, {}),
    "images brought into range": (f"d = Div(x, #255) k = Clip(d, #0, #1) c = Conv(k, %[8,8,1,1]) z = Relu(c) {LAST}", IMAGE, {"relu": 1}, {}),
    "an input that a sigmoid brings into range": (f"k = Sigmoid(x) c = Conv(k, %[8,8,1,1]) z = Relu(c) {LAST}", IMAGE, {"relu": 1}, {"sigmoid": roles.NO_LAYER}),
    "sigmoid between layers": ("h = Gemm(x, %[8,8]) s = Sigmoid(h) y = Gemm(s, %[8,3])", "float[N,8] x", {"sigmoid": 1}, {}),
    "pooler of BERT": ("h = Gemm(x, %[8,8]) t = Tanh(h) y = Gemm(t, %[8,3])", "float[N,8] x", {"tanh": 1}, {}),
}  # fmt: skip


def network_without_check(body: str) -> onnx.ModelProto:
    return network(body, domain="unchecked")


def quantised(before: str, after: str) -> str:
    return f"{after}_q = QuantizeLinear({before}, #0.05, zero) {after} = DequantizeLinear({after}_q, #0.05, zero)"


def quantised_network() -> onnx.ModelProto:
    """SiLU with Q/DQ before it, inside it and behind it, and a PRelu whose slope is quantised."""
    body = (
        f"{quantised('x', 'i')} c = Conv(i, %[8,8,1,1]) {quantised('c', 'd')} s0 = Sigmoid(d) {quantised('s0', 's')} "
        f"m = Mul(d, s) {quantised('m', 'n')} e = Conv(n, %[8,8,1,1]) slope = DequantizeLinear(codes, #0.01, zero) "
        "p = PRelu(e, slope) y = Conv(p, %[8,8,1,1])"
    )
    model = network_without_check(body)
    codes = np.arange(8, dtype=np.int8).reshape(8, 1, 1)
    model.graph.initializer.append(onnx.numpy_helper.from_array(codes, "codes"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int8), "zero"))
    del model.opset_import[1:]
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model)


UNARY = (
    "Relu",
    "Sigmoid",
    "Tanh",
    "Exp",
    "Abs",
    "Neg",
    "Softplus",
    "HardSigmoid",
    "HardSwish",
    "Erf",
    "Elu",
    "Identity",
)
JOINED = ("Add", "Mul", "Sub", "Max", "Min", "Div")
SCALARS = ("#0", "#1", "#-1", "#0.5", "#2", "#3", "#6", "#0.044715")


@st.composite
def networks_of_anything(draw) -> str:
    """Nodes in any order and with any operands: activations, gates and nonsense, with layers in between."""
    names, nodes = ["x"], []
    for number in range(draw(st.integers(1, 16))):
        one, other = (draw(st.sampled_from(names)) for _ in range(2))
        nodes.append(
            draw(
                st.sampled_from(
                    [
                        *(f"{op}({one})" for op in UNARY),
                        *(f"{op}({one}, {other})" for op in JOINED),
                        *(f"{op}({one}, {draw(st.sampled_from(SCALARS))})" for op in JOINED),
                        f"Conv({one}, %[8,8,1,1])",
                        f"GlobalAveragePool({one})",
                    ]
                )
            )
        )
        names.append(f"t{number}")
    body = " ".join(f"t{number} = {node}" for number, node in enumerate(nodes))
    return f"{body} y = Identity({names[-1]}) z = Identity({draw(st.sampled_from(names))})"
