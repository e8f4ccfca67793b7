# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""Activations as exporters, converters and people write them in ONNX, with the function that each of them is.

``#0.5`` is a scalar constant, ``#[1,2,3,4]`` one with an entry for each of four channels,
``~[1,2]`` a table; ``x`` goes in, ``y`` comes out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
import onnx

CHANNELS = 4
NEWEST = 26
TYPES = {"float": np.float32, "float16": np.float16, "double": np.float64}
Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One way to write one function.

    Attributes:
        kind: What it is.
        text: Nodes in ONNX's text format.
        first: Opset that it needs.
        last: Newest opset that still reads it.
        function: Its values, ``(channel, x) -> y``; None where the kind says it.
    """

    kind: str
    text: str
    first: int = 7
    last: int = NEWEST
    function: Callable[[int, Array], Array] | None = None

    def values(self, channel: int, x: Array) -> Array:
        """What it has to compute, in float64."""
        return FORMULAS[self.kind](x) if self.function is None else self.function(channel, x)

    def operators(self) -> set[str]:
        return set(re.findall(r"= (\w+)", self.text))

    def opsets(self) -> list[int]:
        """Opsets in which any of its operators is another than in the one before, and both ends."""
        versions = {
            s.since_version
            for s in onnx.defs.get_all_schemas_with_history()
            if s.domain == "" and s.name in self.operators()
        }
        return sorted({self.first, self.last, *(v for v in versions if self.first <= v <= self.last)})


def model(text: str, *, opset: int = 17, kind: str = "float", wrapped: bool = True) -> onnx.ModelProto:
    """A network around some nodes: ``image -> Conv -> x -> ... -> y -> Conv -> out``, or the nodes alone."""
    constants: dict[str, np.ndarray] = {}

    def constant(match: re.Match[str]) -> str:
        values = np.array([float(v) for v in match[1].strip("[]").split(",")])
        constants[name := f"const{len(constants)}"] = (
            values.reshape(-1, 1, 1) if match[1].startswith("[") else values[0]
        )
        return name

    def table(match: re.Match[str]) -> str:
        constants[name := f"const{len(constants)}"] = np.array([float(v) for v in match[1].split(",")])
        return name

    text = re.sub(r"~\[([^\]]*)\]", table, text)
    body = re.sub(r"#(\[[^\]]*\]|[-+.\deinf]+)", constant, text)
    shape = f"{kind}[1,{CHANNELS},5,5]"
    inner = f"x = Conv(image, first) {body} out = Conv(y, second)" if wrapped else body
    ends = ("image", "out") if wrapped else ("x", "y")
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g ({shape} {ends[0]}) => ({shape} {ends[1]}) {{ {inner} }}'
    )
    weights = np.random.default_rng(0).normal(size=(2, CHANNELS, CHANNELS, 1, 1))
    constants |= {"first": weights[0], "second": weights[1]} if wrapped else {}
    element = onnx.TensorProto.DataType.Value(kind.upper())
    for name, value in constants.items():
        proto.graph.initializer.append(onnx.helper.make_tensor(name, element, np.shape(value), np.ravel(value)))
    return proto


def erf(x: Array) -> Array:
    return np.vectorize(math.erf)(x)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def elu(x: Array, alpha: float = 1.0) -> Array:
    return np.where(x > 0, x, alpha * np.expm1(x))


FORMULAS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "silu": lambda x: x * sigmoid(x),
    "gelu_erf": lambda x: x / 2 * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_sigmoid": lambda x: x * sigmoid(1.702 * x),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "selu": lambda x: 1.0507009873554805 * elu(x, 1.6732632423543772),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "golu": lambda x: x * np.exp(-np.exp(-x)),
    "telu": lambda x: x * np.tanh(np.exp(x)),
    "tanhshrink": lambda x: x - np.tanh(x),
    "log_sigmoid": lambda x: np.log(sigmoid(x)),
}
SLOPES = (0.1, -0.2, 0.25, 0.0)
LERP = "r = Relu(x) d = Sub(r, a) w = Mul(d, #{alpha}) y = Add(a, w)"
SILU, GELU = (
    "s = Sigmoid(x) a = Mul(x, s)",
    "d0 = Div(x, #1.4142135) e = Erf(d0) f = Add(e, #1) g = Mul(x, f) a = Mul(g, #0.5)",
)
MISH, HARD = (
    "p = Softplus(x) t = Tanh(p) a = Mul(x, t)",
    "b0 = Add(x, #3) b1 = Clip(b0, #0, #6) b2 = Mul(x, b1) a = Div(b2, #6)",
)
EXP = "n = Neg(x) e = Exp(n) "
ROOT, INNER = "0.7978845608", "0.044715"


def leaky(slope: float) -> Callable[[int, Array], Array]:
    return lambda _, x: np.where(x > 0, x, slope * x)


def per_channel(slopes: tuple[float, ...]) -> Callable[[int, Array], Array]:
    return lambda c, x: np.where(x > 0, x, slopes[c] * x)


def blend(kind: str, gamma: float) -> Callable[[int, Array], Array]:
    return lambda _, x: gamma * (elu(x) if kind == "elu" else FORMULAS[kind](x)) + (1 - gamma) * np.maximum(x, 0)


def only(function: Callable[[Array], Array]) -> Callable[[int, Array], Array]:
    return lambda _, x: function(x)


def swish(beta: float) -> Callable[[int, Array], Array]:
    return lambda _, x: x * sigmoid(beta * x)


SPELLINGS: dict[str, Spelling] = {
    # ReLU
    "Relu": Spelling("relu", "y = Relu(x)"),
    "Max(x, 0)": Spelling("relu", "y = Max(x, #0)", 8),
    "Max(0, x), channels": Spelling("relu", "y = Max(#[0,0,0,0], x)", 8),
    "Clip(min 0), attribute": Spelling("relu", "y = Clip <min = 0.0> (x)", 7, 10),
    "Clip(min 0), input": Spelling("relu", "y = Clip(x, #0)", 11),
    "Where(x > 0, x, 0)": Spelling("relu", "c = Greater(x, #0) y = Where(c, x, #0)", 9),
    "x * (x > 0)": Spelling("relu", "c = Greater(x, #0) m = Cast <to = 1> (c) y = Mul(x, m)", 9),
    "-Min(-x, 0)": Spelling("relu", "n = Neg(x) m = Min(n, #0) y = Neg(m)", 8),
    "(x + |x|) / 2": Spelling("relu", "b = Abs(x) s = Add(x, b) y = Mul(s, #0.5)"),
    "LeakyRelu(0)": Spelling("relu", "y = LeakyRelu <alpha = 0.0> (x)"),
    "PRelu(0)": Spelling("relu", "y = PRelu(x, #[0,0,0,0])"),
    "ThresholdedRelu(0)": Spelling("relu", "y = ThresholdedRelu <alpha = 0.0> (x)", 10),
    "SAT of SiLU, gamma 0": Spelling("relu", f"{SILU} r = Relu(x) p = Mul(a, #0) q = Mul(r, #1) y = Add(p, q)"),
    "SAT of GELU, gamma 0": Spelling("relu", f"{GELU} r = Relu(x) p = Mul(a, #0) q = Mul(r, #1) y = Add(p, q)", 9),
    "PEA of Mish, alpha 1": Spelling("relu", f"{MISH} {LERP.format(alpha=1)}"),
    "SAT of SiLU, gamma 0 in each channel": Spelling("relu", f"{SILU} r = Relu(x) p = Mul(a, #[0,0,0,0]) y = Add(p, r)"),
    # clipped
    "Clip(0, 6), attributes": Spelling("relu6", "y = Clip <min = 0.0, max = 6.0> (x)", 7, 10),
    "Clip(0, 6), inputs": Spelling("relu6", "y = Clip(x, #0, #6)", 11),
    "Min(Max(x, 0), 6)": Spelling("relu6", "m = Max(x, #0) y = Min(m, #6)", 8),
    "Min(Relu(x), 6)": Spelling("relu6", "r = Relu(x) y = Min(r, #6)", 8),
    "Relu(x) - Relu(x - 6)": Spelling("relu6", "r = Relu(x) b = Sub(x, #6) s = Relu(b) y = Sub(r, s)"),
    "Clip(0, 5.9)": Spelling("clipped_relu", "m = Max(x, #0) y = Min(m, #5.9)", 8, function=only(lambda x: np.clip(x, 0, 5.9))),
    "Clip(0, 20)": Spelling("clipped_relu", "y = Clip(x, #0, #20)", 11, function=only(lambda x: np.clip(x, 0, 20))),
    "hard tanh": Spelling("clip", "y = Clip(x, #-1, #1)", 11, function=only(lambda x: np.clip(x, -1, 1))),
    # leaky
    "LeakyRelu": Spelling("leaky_relu", "y = LeakyRelu <alpha = 0.125> (x)", function=leaky(0.125)),
    "LeakyRelu, default slope": Spelling("leaky_relu", "y = LeakyRelu(x)", function=leaky(0.01)),
    "Max(x, 0.1 x)": Spelling("leaky_relu", "m = Mul(x, #0.1) y = Max(x, m)", 8, function=leaky(0.1)),
    "Where(x > 0, x, 0.1 x)": Spelling("leaky_relu", "c = Greater(x, #0) m = Mul(x, #0.1) y = Where(c, x, m)", 9, function=leaky(0.1)),
    "Relu(x) - 0.1 Relu(-x)": Spelling("leaky_relu", "r = Relu(x) n = Neg(x) s = Relu(n) m = Mul(s, #0.1) y = Sub(r, m)", function=leaky(0.1)),
    "RReLU in evaluation": Spelling("leaky_relu", "y = LeakyRelu <alpha = 0.22916666> (x)", function=leaky(0.22916666)),
    "PRelu, shared": Spelling("prelu", "y = PRelu(x, #0.25)", function=leaky(0.25)),
    "PRelu, channels": Spelling("prelu", "y = PRelu(x, #[0.1,-0.2,0.25,0])", function=per_channel(SLOPES)),
    "PRelu by Relu": Spelling("prelu", "r = Relu(x) n = Neg(x) s = Relu(n) m = Mul(s, #[-0.1,0.2,-0.25,0]) y = Add(r, m)", function=per_channel(SLOPES)),
    "PRelu by Max and Min": Spelling("prelu", "r = Max(x, #0) n = Min(x, #0) m = Mul(n, #[0.1,-0.2,0.25,0]) y = Add(r, m)", 8, function=per_channel(SLOPES)),
    "PRelu by Abs": Spelling("prelu", "r = Relu(x) b = Abs(x) n = Sub(x, b) m = Mul(n, #[0.1,-0.2,0.25,0]) h = Mul(m, #0.5) y = Add(r, h)", function=per_channel(SLOPES)),
    "PRelu with 1 in its first channel": Spelling("prelu", "y = PRelu(x, #[1,0.5,0.25,0.125])", function=per_channel((1, 0.5, 0.25, 0.125))),
    "|x|": Spelling("abs", "y = Abs(x)", function=only(np.abs)),
    "Max(x, -x)": Spelling("abs", "n = Neg(x) y = Max(x, n)", 8, function=only(np.abs)),
    # SiLU
    "x * Sigmoid(x)": Spelling("silu", "s = Sigmoid(x) y = Mul(x, s)"),
    "Sigmoid(x) * x": Spelling("silu", "s = Sigmoid(x) y = Mul(s, x)"),
    "x * Sigmoid(1.0 x)": Spelling("silu", "m = Mul(x, #1) s = Sigmoid(m) y = Mul(x, s)"),
    "x / (1 + exp(-x))": Spelling("silu", f"{EXP} p = Add(e, #1) y = Div(x, p)"),
    "x * 1 / (1 + exp(-x))": Spelling("silu", f"{EXP} p = Add(#1, e) d = Div(#1, p) y = Mul(x, d)"),
    "x * Reciprocal": Spelling("silu", f"{EXP} p = Add(e, #1) d = Reciprocal(p) y = Mul(d, x)"),
    "SiLU by Tanh": Spelling("silu", "h = Mul(x, #0.5) t = Tanh(h) p = Add(t, #1) y = Mul(h, p)"),
    "Swish": Spelling("silu", "y = Swish(x)", 24),
    "Swish(1.0)": Spelling("silu", "y = Swish <alpha = 1.0> (x)", 24),
    "Swish(1.1)": Spelling("swish", "y = Swish <alpha = 1.1> (x)", 24, function=swish(1.1)),
    "x * Sigmoid(1.1 x)": Spelling("swish", "m = Mul(x, #1.1) s = Sigmoid(m) y = Mul(x, s)", function=swish(1.1)),
    "Swish with a beta for each channel": Spelling("swish", "m = Mul(x, #[0.5,1,1.5,2.5]) s = Sigmoid(m) y = Mul(x, s)", function=lambda c, x: x * sigmoid((0.5, 1, 1.5, 2.5)[c] * x)),
    "APTx": Spelling("swish", "t = Tanh(x) p = Add(t, #1) h = Mul(x, #0.5) y = Mul(p, h)", function=swish(2)),
    # GELU
    "Gelu": Spelling("gelu_erf", "y = Gelu(x)", 20),
    "Gelu(none)": Spelling("gelu_erf", 'y = Gelu <approximate = "none"> (x)', 20),
    "x (1 + erf(x / sqrt 2)) 0.5": Spelling("gelu_erf", "d = Div(x, #1.4142135381698608) e = Erf(d) p = Add(e, #1) m = Mul(x, p) y = Mul(m, #0.5)", 9),
    "0.5 x (1 + erf)": Spelling("gelu_erf", "h = Mul(x, #0.5) d = Div(x, #1.4142135) e = Erf(d) p = Add(e, #1) y = Mul(h, p)", 9),
    "x (0.5 (1 + erf))": Spelling("gelu_erf", "d = Div(x, #1.4142135) e = Erf(d) p = Add(#1, e) h = Mul(#0.5, p) y = Mul(x, h)", 9),
    "x (0.5 + 0.5 erf)": Spelling("gelu_erf", "d = Mul(x, #0.70710678) e = Erf(d) h = Mul(e, #0.5) p = Add(h, #0.5) y = Mul(x, p)", 9),
    "erf of a rounded constant": Spelling("gelu_erf", "d = Mul(x, #0.7071) e = Erf(d) p = Add(e, #1) m = Mul(x, p) y = Mul(m, #0.5)", 9),
    "erf, Sqrt(2) not folded": Spelling("gelu_erf", "q = Sqrt(#2) d = Div(x, q) e = Erf(d) p = Add(e, #1) m = Mul(x, p) y = Mul(m, #0.5)", 9),
    "erf, 2 ** -0.5 not folded": Spelling("gelu_erf", "q = Pow(#2, #-0.5) d = Mul(x, q) e = Erf(d) p = Add(e, #1) m = Mul(x, p) y = Div(m, #2)", 9),
    "x - x (1 - Phi(x))": Spelling("gelu_erf", "n = Neg(x) d = Div(n, #1.4142135) e = Erf(d) p = Add(e, #1) h = Mul(p, #0.5) m = Mul(x, h) y = Sub(x, m)", 9),
    "Gelu(tanh)": Spelling("gelu_tanh", 'y = Gelu <approximate = "tanh"> (x)', 20),
    "tanh, Pow(x, 3)": Spelling("gelu_tanh", f"c = Pow(x, #3) m = Mul(c, #{INNER}) a = Add(x, m) b = Mul(a, #{ROOT}) t = Tanh(b) p = Add(t, #1) h = Mul(x, #0.5) y = Mul(h, p)"),
    "tanh, x * x * x": Spelling("gelu_tanh", f"q = Mul(x, x) c = Mul(q, x) m = Mul(#{INNER}, c) a = Add(x, m) b = Mul(#{ROOT}, a) t = Tanh(b) p = Add(#1, t) o = Mul(x, p) y = Mul(#0.5, o)"),
    "tanh, Pow(x, 2)": Spelling("gelu_tanh", f"q = Pow(x, #2) m = Mul(q, #{INNER}) p = Add(m, #1) r = Mul(x, p) b = Mul(r, #{ROOT}) t = Tanh(b) u = Add(t, #1) h = Mul(u, #0.5) y = Mul(x, h)"),
    "tanh, fast": Spelling("gelu_tanh", f"a = Mul(x, #{INNER}) b = Mul(a, x) p = Add(b, #1) c = Mul(x, #{ROOT}) d = Mul(c, p) t = Tanh(d) u = Add(t, #1) h = Mul(x, #0.5) y = Mul(h, u)"),
    "tanh, Sqrt(2 / pi) not folded": Spelling("gelu_tanh", f"k = Sqrt(#0.63661977) c = Pow(x, #3) m = Mul(c, #{INNER}) a = Add(x, m) b = Mul(a, k) t = Tanh(b) p = Add(t, #1) h = Mul(x, #0.5) y = Mul(h, p)"),
    "tanh by Sigmoid": Spelling("gelu_tanh", f"c = Pow(x, #3) m = Mul(c, #{INNER}) a = Add(x, m) b = Mul(a, #1.5957691) s = Sigmoid(b) y = Mul(x, s)"),
    "x * Sigmoid(1.702 x)": Spelling("gelu_sigmoid", "m = Mul(x, #1.702) s = Sigmoid(m) y = Mul(x, s)"),
    # HardSwish and HardSigmoid
    "HardSwish": Spelling("hardswish", "y = HardSwish(x)", 14),
    "x * HardSigmoid": Spelling("hardswish", "s = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x) y = Mul(x, s)"),
    "Add-Clip-Mul-Div": Spelling("hardswish", "a = Add(x, #3) c = Clip(a, #0, #6) m = Mul(x, c) y = Div(m, #6)", 11),
    "Add-Clip-Mul-Div, attributes": Spelling("hardswish", "a = Add(x, #3) c = Clip <min = 0.0, max = 6.0> (a) m = Mul(x, c) y = Div(m, #6)", 7, 10),
    "Add-Clip-Mul-Mul": Spelling("hardswish", "a = Add(x, #3) c = Clip(a, #0, #6) m = Mul(x, c) y = Mul(m, #0.16666667)", 11),
    "Add-Clip-Div-Mul": Spelling("hardswish", "a = Add(x, #3) c = Clip(a, #0, #6) d = Div(c, #6) y = Mul(x, d)", 11),
    "Add-Max-Min-Mul-Div": Spelling("hardswish", "a = Add(x, #3) c = Max(a, #0) e = Min(c, #6) m = Mul(x, e) y = Div(m, #6)", 8),
    "Add-Relu-Min-Mul-Mul": Spelling("hardswish", "a = Add(x, #3) c = Relu(a) e = Min(c, #6) d = Mul(e, #0.16666667) y = Mul(d, x)", 8),
    "Mul-Add-Clip-Mul": Spelling("hardswish", "m = Mul(x, #0.16666667) a = Add(m, #0.5) c = Clip(a, #0, #1) y = Mul(x, c)", 11),
    "HardSwish without its 6": Spelling("scaled_hardswish", "a = Add(x, #3) c = Clip(a, #0, #6) y = Mul(x, c)", 11, function=only(lambda x: x * np.clip(x + 3, 0, 6))),
    "HardSigmoid": Spelling("hard_sigmoid", "y = HardSigmoid(x)", function=only(lambda x: np.clip(0.2 * x + 0.5, 0, 1))),
    "Add-Clip-Div": Spelling("hard_sigmoid", "a = Add(x, #3) c = Clip(a, #0, #6) y = Div(c, #6)", 11, function=only(lambda x: np.clip(x + 3, 0, 6) / 6)),
    "Mul-Add-Clip": Spelling("hard_sigmoid", "m = Mul(x, #0.2) a = Add(m, #0.5) y = Clip(a, #0, #1)", 11, function=only(lambda x: np.clip(0.2 * x + 0.5, 0, 1))),
    # Mish and Softplus
    "Mish": Spelling("mish", "y = Mish(x)", 18),
    "x * Tanh(Softplus(x))": Spelling("mish", "p = Softplus(x) t = Tanh(p) y = Mul(x, t)"),
    "x * Tanh(Log(1 + Exp(x)))": Spelling("mish", "e = Exp(x) p = Add(e, #1) l = Log(p) t = Tanh(l) y = Mul(x, t)"),
    "Mish without a logarithm": Spelling("mish", "e = Exp(x) a = Add(e, #2) n = Mul(e, a) d = Add(n, #2) q = Div(n, d) y = Mul(x, q)"),
    "Softplus": Spelling("softplus", "y = Softplus(x)", function=only(lambda x: np.log1p(np.exp(x)))),
    "Log(1 + Exp(x))": Spelling("softplus", "e = Exp(x) p = Add(e, #1) y = Log(p)", function=only(lambda x: np.log1p(np.exp(x)))),
    "Max(x, 0) + Log(1 + Exp(-|x|))": Spelling("softplus", "b = Abs(x) n = Neg(b) e = Exp(n) p = Add(e, #1) l = Log(p) r = Relu(x) y = Add(r, l)", function=only(lambda x: np.log1p(np.exp(x)))),
    "Softplus with beta 2": Spelling("softplus", "m = Mul(x, #2) p = Softplus(m) y = Div(p, #2)", function=only(lambda x: np.log1p(np.exp(2 * x)) / 2)),
    "Softplus with torch's threshold": Spelling("softplus", "e = Exp(x) p = Add(e, #1) l = Log(p) c = Greater(x, #20) y = Where(c, x, l)", 9, function=only(lambda x: np.log1p(np.exp(x)))),
    "LogSigmoid": Spelling("log_sigmoid", "s = Sigmoid(x) y = Log(s)"),
    "-Softplus(-x)": Spelling("log_sigmoid", "n = Neg(x) p = Softplus(n) y = Neg(p)"),
    # exponential units
    "Elu": Spelling("elu", "y = Elu(x)", function=only(elu)),
    "Elu(0.5)": Spelling("elu", "y = Elu <alpha = 0.5> (x)", function=only(lambda x: elu(x, 0.5))),
    "Elu by Where": Spelling("elu", "e = Exp(x) m = Sub(e, #1) c = Greater(x, #0) y = Where(c, x, m)", 9, function=only(elu)),
    "Elu by Relu": Spelling("elu", "r = Relu(x) n = Min(x, #0) e = Exp(n) m = Sub(e, #1) y = Add(r, m)", 8, function=only(elu)),
    "Elu by two Relus": Spelling("elu", "r = Relu(x) e = Exp(x) m = Sub(#1, e) q = Relu(m) y = Sub(r, q)", function=only(elu)),
    "Selu": Spelling("selu", "y = Selu(x)"),
    "Selu by Elu": Spelling("selu", "e = Elu <alpha = 1.6732632> (x) y = Mul(e, #1.050701)"),
    "Selu by Where": Spelling("selu", "e = Exp(x) m = Mul(e, #1.6732632) q = Sub(m, #1.6732632) c = Greater(x, #0) w = Where(c, x, q) y = Mul(w, #1.050701)", 9),
    "Celu": Spelling("elu", "y = Celu(x)", 12, function=only(elu)),
    "Celu(2)": Spelling("celu", "y = Celu <alpha = 2.0> (x)", 12, function=only(lambda x: np.maximum(x, 0) + np.minimum(0, 2 * np.expm1(x / 2)))),
    "Celu(2) by Elu": Spelling("celu", "d = Div(x, #2) e = Elu(d) y = Mul(e, #2)", function=only(lambda x: np.maximum(x, 0) + np.minimum(0, 2 * np.expm1(x / 2)))),
    # bounded
    "Sigmoid": Spelling("sigmoid", "y = Sigmoid(x)"),
    "1 / (1 + exp(-x))": Spelling("sigmoid", f"{EXP} p = Add(e, #1) y = Div(#1, p)"),
    "Reciprocal(1 + exp(-x))": Spelling("sigmoid", f"{EXP} p = Add(e, #1) y = Reciprocal(p)"),
    "0.5 + 0.5 tanh(x / 2)": Spelling("sigmoid", "h = Mul(x, #0.5) t = Tanh(h) m = Mul(t, #0.5) y = Add(m, #0.5)"),
    "Tanh": Spelling("tanh", "y = Tanh(x)"),
    "2 sigmoid(2 x) - 1": Spelling("tanh", "d = Mul(x, #2) s = Sigmoid(d) m = Mul(s, #2) y = Sub(m, #1)"),
    "Softsign": Spelling("softsign", "y = Softsign(x)"),
    "x / (1 + |x|)": Spelling("softsign", "b = Abs(x) p = Add(b, #1) y = Div(x, p)"),
    "x - Tanh(x)": Spelling("tanhshrink", "t = Tanh(x) y = Sub(x, t)"),
    # the rest
    "Relu, Mul": Spelling("relu_squared", "r = Relu(x) y = Mul(r, r)"),
    "Relu, Pow": Spelling("relu_squared", "r = Relu(x) y = Pow(r, #2)"),
    "Relu(x) * x": Spelling("relu_squared", "r = Relu(x) y = Mul(r, x)"),
    "GoLU": Spelling("golu", f"{EXP} m = Neg(e) f = Exp(m) y = Mul(x, f)"),
    "TeLU": Spelling("telu", "e = Exp(x) t = Tanh(e) y = Mul(x, t)"),
    "SmeLU": Spelling("smelu", "a = Add(x, #1) c = Clip(a, #0, #2) q = Mul(c, c) m = Mul(q, #0.25) b = Sub(x, #1) r = Relu(b) y = Add(m, r)", 11,
                      function=only(lambda x: np.clip(x + 1, 0, 2) ** 2 / 4 + np.maximum(x - 1, 0))),
    "Squareplus": Spelling("squareplus", "q = Mul(x, x) p = Add(q, #4) s = Sqrt(p) a = Add(x, s) y = Mul(a, #0.5)", function=only(lambda x: (x + np.sqrt(x * x + 4)) / 2)),
    "APTx with other constants": Spelling("aptx", "b = Mul(x, #0.5) t = Tanh(b) p = Add(t, #1.5) h = Mul(x, #0.4) y = Mul(p, h)", function=only(lambda x: (1.5 + np.tanh(x / 2)) * 0.4 * x)),
    "SAU": Spelling("sau", "d = Mul(x, #0.70710678) e = Erf(d) p = Add(e, #1) h = Mul(p, #0.5) m = Mul(x, h) q = Mul(x, x) k = Mul(q, #-0.5) g = Exp(k) w = Mul(g, #0.39894228) y = Add(m, w)", 9,
                    function=only(lambda x: x / 2 * (1 + erf(x / math.sqrt(2))) + np.exp(-x * x / 2) / math.sqrt(2 * math.pi))),
    # what an unfinished schedule leaves behind
    "SAT of SiLU, gamma 0.01": Spelling("blend", f"{SILU} r = Relu(x) p = Mul(a, #0.01) q = Mul(r, #0.99) y = Add(p, q)", function=blend("silu", 0.01)),
    "SAT of SiLU, gamma 0.01, 1 - gamma not folded": Spelling("blend", f"{SILU} r = Relu(x) o = Sub(#1, #0.01) p = Mul(a, #0.01) q = Mul(r, o) y = Add(p, q)", function=blend("silu", 0.01)),
    "PEA of GELU, alpha 0.98": Spelling("blend", f"{GELU} {LERP.format(alpha=0.98)}", 9, function=blend("gelu_erf", 0.02)),
    "PEA of Mish, alpha 0.5": Spelling("blend", f"{MISH} {LERP.format(alpha=0.5)}", function=blend("mish", 0.5)),
    "SAT of HardSwish, gamma 0.3": Spelling("blend", f"{HARD} r = Relu(x) p = Mul(a, #0.3) q = Mul(r, #0.7) y = Sum(p, q)", 11, function=blend("hardswish", 0.3)),
    "SAT of ELU, gamma 0.01": Spelling("blend", "a = Elu(x) r = Relu(x) p = Mul(a, #0.01) q = Mul(r, #0.99) y = Add(p, q)", function=blend("elu", 0.01)),
    "half-folded SAT": Spelling("blend", "s = Sigmoid(x) k = Mul(s, #0.25) a = Mul(x, k) r = Relu(x) q = Mul(r, #0.75) y = Add(a, q)", function=blend("silu", 0.25)),
    "blend of Swish with beta 1.5": Spelling("blend", "m = Mul(x, #1.5) s = Sigmoid(m) a = Mul(x, s) r = Relu(x) p = Mul(a, #0.1) q = Mul(r, #0.9) y = Add(p, q)", function=only(lambda x: 0.1 * x * sigmoid(1.5 * x) + 0.9 * np.maximum(x, 0))),
    "blend, gamma for each channel": Spelling("blend", f"{SILU} r = Relu(x) p = Mul(a, #[0,0.01,0.1,0.5]) q = Mul(r, #[1,0.99,0.9,0.5]) y = Add(p, q)", function=lambda c, x: blend("silu", (0, 0.01, 0.1, 0.5)[c])(c, x)),
    # wrong constants: neighbours of well-known functions
    "GELU with 0.51": Spelling("scaled_gelu_erf", "d = Div(x, #1.4142135) e = Erf(d) p = Add(e, #1) m = Mul(x, p) y = Mul(m, #0.51)", 9, function=only(lambda x: 1.02 * FORMULAS["gelu_erf"](x))),
    "GELU with erf(x / 1.5)": Spelling("unknown", "d = Div(x, #1.5) e = Erf(d) p = Add(e, #1) m = Mul(x, p) y = Mul(m, #0.5)", 9, function=only(lambda x: x / 2 * (1 + erf(x / 1.5)))),
    "GELU (tanh) with 0.054715": Spelling("unknown", f"c = Pow(x, #3) m = Mul(c, #0.054715) a = Add(x, m) b = Mul(a, #{ROOT}) t = Tanh(b) p = Add(t, #1) h = Mul(x, #0.5) y = Mul(h, p)", function=only(lambda x: x / 2 * (1 + np.tanh(0.7978845608 * (x + 0.054715 * x**3))))),
    "HardSwish with 2.9": Spelling("unknown", "a = Add(x, #2.9) c = Clip(a, #0, #6) m = Mul(x, c) y = Div(m, #6)", 11, function=only(lambda x: x * np.clip(x + 2.9, 0, 6) / 6)),
    "SiLU plus 0.001 x": Spelling("aptx", f"{SILU} m = Mul(x, #0.001) y = Add(a, m)", function=only(lambda x: x * sigmoid(x) + 0.001 * x)),
    "ReLU and a narrow spike": Spelling("piecewise_linear", "k = Sub(x, #3.14159) a = Abs(k) m = Sub(#1e-3, a) s = Max(m, #0) r = Relu(x) y = Add(r, s)", 8,
                                        function=only(lambda x: np.maximum(x, 0) + np.maximum(1e-3 - np.abs(x - 3.14159), 0))),
    "ReLU shifted by 0.001": Spelling("clip", "y = Max(x, #0.001)", 8, function=only(lambda x: np.maximum(x, 0.001))),
    "soft threshold": Spelling("piecewise_linear", "y = Shrink <lambd = 0.5, bias = 0.5> (x)", 9, function=only(lambda x: np.where(x < -0.5, x + 0.5, np.where(x > 0.5, x - 0.5, 0)))),
    "different in each channel": Spelling("mixed", f"{SILU} r = Relu(x) n = Min(x, #0) i = Add(r, n) p = Mul(a, #[1,0,0,1]) q = Mul(i, #[0,1,1,0]) y = Add(p, q)", 8,
                                          function=lambda c, x: x * sigmoid(x) if c in (0, 3) else x),
    "hinge sum": Spelling("pwlu", "h0 = Add(x, #1) r0 = Relu(h0) r1 = Relu(x) h2 = Sub(x, #1) r2 = Relu(h2) h3 = Sub(x, #2) r3 = Relu(h3) m0 = Mul(r0, #[0.1,0.2,0.3,0.4]) m1 = Mul(r1, #0.5) m2 = Mul(r2, #0.25) m3 = Mul(r3, #-0.5) y = Sum(m0, m1, m2, m3)", 8,
                          function=lambda c, x: (0.1, 0.2, 0.3, 0.4)[c] * np.maximum(x + 1, 0) + 0.5 * np.maximum(x, 0) + 0.25 * np.maximum(x - 1, 0) - 0.5 * np.maximum(x - 2, 0)),
    "floor and tables": Spelling("pwlu", "d = Add(x, #2) f = Floor(d) a = Add(f, #1) c = Clip(a, #0, #5) j = Cast <to = 7> (c) k = Gather(~[0.1,-0.1,0.1,0.8,1.2,1], j) z = Gather(~[0.2,-0.2,0,0,-0.4,0], j) m = Mul(k, x) y = Add(m, z)", 11,
                                 function=only(lambda x: np.select([x < -2, x < -1, x < 0, x < 1, x < 2], [0.1 * x + 0.2, -0.1 * x - 0.2, 0.1 * x, 0.8 * x, 1.2 * x - 0.4], x))),
    "Where chain": Spelling("pwlu", "c0 = Less(x, #-1) c1 = Less(x, #0) c2 = Less(x, #1) l1 = Mul(x, #-0.25) p1 = Sub(l1, #0.25) l3 = Mul(x, #1.5) p3 = Sub(l3, #0.25) l4 = Mul(x, #0.75) p4 = Add(l4, #0.5) w2 = Where(c2, p3, p4) w1 = Where(c1, p1, w2) y = Where(c0, #0, w1)", 9,
                            function=only(lambda x: np.where(x < -1, 0, np.where(x < 0, -0.25 * x - 0.25, np.where(x < 1, 1.5 * x - 0.25, 0.75 * x + 0.5))))),
}  # fmt: skip
