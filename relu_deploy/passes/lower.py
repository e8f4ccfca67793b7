"""What each elementwise ONNX operator computes, as primitives: the one place that knows attributes and opset versions.

Source: the ONNX operator specification, versions 7 to 28. An operator that is not in ``LOWERINGS`` ends a region.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from relu_deploy.passes.program import Builder

# Types that hold every value of the key: a cast to one of them changes nothing that arithmetic in the key would keep.
CONTAINS: dict[int, tuple[int, ...]] = {
    TensorProto.FLOAT16: (TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE),
    TensorProto.BFLOAT16: (TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE),
    TensorProto.FLOAT: (TensorProto.FLOAT, TensorProto.DOUBLE),
    TensorProto.DOUBLE: (TensorProto.DOUBLE,),
}


class UnsupportedError(Exception):
    """An operator is used in a way that has no lowering; the message says which."""


@dataclasses.dataclass
class Call:
    """One node on its way into a program.

    Attributes:
        build: Where its steps go.
        args: Step of each input; None where an optional input is left out.
        attrs: Attributes, as graphsurgeon reads them.
        types: ONNX type of each input, 0 where it is not known.
        root_type: ONNX type of the region's input.
        integers: Whether a side constant is of an integer type.
        name: The node's.
    """

    build: Builder
    args: list[int | None]
    attrs: dict[str, Any]
    types: list[int]
    root_type: int
    integers: bool
    name: str = ""

    def arg(self, index: int = 0) -> int:
        """Step of a required input."""
        step = self.args[index]
        if step is None:
            raise UnsupportedError("a required input is missing")
        return step

    def has(self, index: int) -> bool:
        """Whether an optional input is there."""
        return index < len(self.args) and self.args[index] is not None

    def attr(self, name: str, default: float) -> int:
        """A float attribute as a constant; defaults are float32, as attributes are."""
        return self.build.const(float(np.float32(self.attrs.get(name, default))))


def _clip(call: Call) -> int:
    """``min(max(x, low), high)``: bounds are attributes before opset 11, optional inputs since."""
    build, result = call.build, call.arg()
    if call.has(1):
        result = build.step("max", result, call.arg(1))
    elif "min" in call.attrs:
        result = build.step("max", result, call.attr("min", 0.0))
    if call.has(2):
        return build.step("min", result, call.arg(2))
    if "max" in call.attrs:
        return build.step("min", result, call.attr("max", 0.0))
    return result


def _affine(build: Builder, x: int, scale: int, offset: int) -> int:
    return build.step("add", build.step("mul", scale, x), offset)


def _relu(build: Builder, x: int) -> int:
    return build.step("max", x, build.const(0.0))


def _leaky(build: Builder, x: int, slope: int) -> int:
    """``x < 0 ? slope x : x``."""
    return build.step("select", build.step("gt", build.const(0.0), x), build.step("mul", slope, x), x)


def _hard_sigmoid(build: Builder, x: int, alpha: int, beta: int) -> int:
    return build.step("max", build.const(0.0), build.step("min", build.const(1.0), _affine(build, x, alpha, beta)))


def _expm1(build: Builder, x: int) -> int:
    return build.step("add", build.fn("exp", x), build.const(-1.0))


def _elu(build: Builder, x: int, alpha: int) -> int:
    """``x > 0 ? x : alpha (exp(x) - 1)``."""
    low = build.step("mul", alpha, _expm1(build, x))
    return build.step("select", build.step("gt", x, build.const(0.0)), x, low)


def _selu(call: Call) -> int:
    inner = _elu(call.build, call.arg(), call.attr("alpha", 1.67326319217681884765625))
    return call.build.step("mul", call.attr("gamma", 1.05070102214813232421875), inner)


def _celu(call: Call) -> int:
    """``max(0, x) + min(0, alpha (exp(x / alpha) - 1))``."""
    build, x, alpha = call.build, call.arg(), call.attr("alpha", 1.0)
    low = build.step("mul", alpha, _expm1(build, build.step("div", x, alpha)))
    return build.step("add", _relu(build, x), build.step("min", build.const(0.0), low))


def _gelu(call: Call) -> int:
    build, x = call.build, call.arg()
    half, one = build.const(0.5), build.const(1.0)
    approximate = call.attrs.get("approximate", "none")
    if approximate in ("tanh", b"tanh"):
        cubed = build.step("mul", build.const(0.044715), build.fn("cube", x))
        inner = build.fn("tanh", build.step("mul", build.const(np.sqrt(2 / np.pi)), build.step("add", x, cubed)))
    else:
        inner = build.fn("erf", build.step("mul", x, build.const(np.sqrt(0.5))))
    return build.step("mul", x, build.step("mul", half, build.step("add", one, inner)))


def _swish(call: Call) -> int:
    x = call.arg()
    return call.build.step("mul", x, call.build.fn("sigmoid", call.build.step("mul", call.attr("alpha", 1.0), x)))


def _mish(call: Call) -> int:
    x = call.arg()
    return call.build.step("mul", x, call.build.fn("tanh", call.build.fn("softplus", x)))


def _hard_swish(call: Call) -> int:
    build, x = call.build, call.arg()
    return build.step("mul", x, _hard_sigmoid(build, x, build.const(1 / 6), build.const(0.5)))


def _thresholded(call: Call) -> int:
    """``x > alpha ? x : 0``."""
    build, x = call.build, call.arg()
    return build.step("select", build.step("gt", x, call.attr("alpha", 1.0)), x, build.const(0.0))


def _shrink(call: Call) -> int:
    """``x < -lambd ? x + bias : x > lambd ? x - bias : 0``."""
    build, x = call.build, call.arg()
    bias, bound = call.attr("bias", 0.0), call.attr("lambd", 0.5)
    high = build.step("select", build.step("gt", x, bound), build.step("add", x, build.neg(bias)), build.const(0.0))
    return build.step("select", build.step("gt", build.neg(bound), x), build.step("add", x, bias), high)


def _sign(call: Call) -> int:
    build, x, zero = call.build, call.arg(), call.build.const(0.0)
    low = build.step("select", build.step("gt", zero, x), build.const(-1.0), zero)
    return build.step("select", build.step("gt", x, zero), build.const(1.0), low)


def _sub(call: Call) -> int:
    return call.build.step("add", call.arg(0), call.build.neg(call.arg(1)))


def _div(call: Call) -> int:
    if call.integers:
        raise UnsupportedError("integer division truncates")
    return call.build.step("div", call.arg(0), call.arg(1))


def _mean(call: Call) -> int:
    args = [call.arg(index) for index in range(len(call.args))]
    return call.build.step("div", call.build.chain("add", args), call.build.const(float(len(args))))


def _pow(call: Call) -> int:
    build, x, exponent = call.build, call.arg(0), call.arg(1)
    forms: dict[int, Callable[[], int]] = {
        build.const(1.0): lambda: x,
        build.const(2.0): lambda: build.step("mul", x, x),
        build.const(3.0): lambda: build.fn("cube", x),
        build.const(0.5): lambda: build.fn("sqrt", x),
        build.const(-1.0): lambda: build.step("div", build.const(1.0), x),
    }
    if exponent not in forms:
        raise UnsupportedError("the exponent is not one of 1, 2, 3, 0.5 and -1")
    return forms[exponent]()


def _not(call: Call) -> int:
    return call.build.step("select", call.arg(), call.build.const(0.0), call.build.const(1.0))


def _and(call: Call) -> int:
    return call.build.step("select", call.arg(0), call.arg(1), call.build.const(0.0))


def _cast(call: Call) -> int:
    to = call.attrs.get("to", 0)
    return _cast_to(call, to if isinstance(to, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(to)))


def _cast_like(call: Call) -> int:
    if not call.types[1]:
        raise UnsupportedError("the type that it is cast to is not known")
    return _cast_to(call, call.types[1])


def _cast_to(call: Call, target: int) -> int:
    source, build, x = call.types[0], call.build, call.arg()
    if not source:
        raise UnsupportedError("the type that is cast is not known")
    if source == target or source == TensorProto.BOOL or target in CONTAINS.get(call.root_type, ()):
        return x
    if target == TensorProto.BOOL:
        return _not(dataclasses.replace(call, args=[build.step("eq", x, build.const(0.0))]))
    if target in (TensorProto.INT32, TensorProto.INT64):
        return build.fn("integer", x)
    for narrow, name in ((TensorProto.FLOAT16, "float16"), (TensorProto.BFLOAT16, "bfloat16")):
        if target == narrow:
            return build.fn(name, x)
    raise UnsupportedError(f"a cast to {onnx.helper.tensor_dtype_to_string(target)} changes values")


def _dropout(call: Call) -> int:
    """The identity at inference; opset 12 has a training flag as third input, opset 6 an attribute.

    And in training, where nothing is dropped: the ratio is 0.
    """
    if (call.has(1) and call.arg(1) == call.build.const(0.0)) or call.attrs.get("ratio", 0.5) == 0:
        return call.arg()
    if call.has(2) and call.arg(2) != call.build.const(0.0):
        raise UnsupportedError("Dropout is in training mode")
    if call.attrs.get("is_test", 1) != 1:
        raise UnsupportedError("Dropout is in training mode")
    return call.arg()


def _random_like(call: Call) -> int:
    """A draw for each element of a tensor, of which only the shape is read."""
    return call.build.step("random", call.attr("low", 0.0), call.attr("high", 1.0), param=call.name)


def _fn(name: str) -> Callable[[Call], int]:
    return lambda call: call.build.fn(name, call.arg())


def _many(op: str) -> Callable[[Call], int]:
    return lambda call: call.build.chain(op, [call.arg(index) for index in range(len(call.args))])


def _swapped(op: str) -> Callable[[Call], int]:
    return lambda call: call.build.step(op, call.arg(1), call.arg(0))


LOWERINGS: dict[str, Callable[[Call], int]] = {
    "Abs": lambda call: call.build.step("max", call.arg(), call.build.neg(call.arg())),
    "Add": _many("add"), "And": _and, "Asinh": _fn("asinh"), "Atan": _fn("atan"),
    "Bernoulli": lambda call: call.build.step("bernoulli", call.arg(), param=call.name), "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _fn("ceil"), "Celu": _celu, "Clip": _clip, "Cos": _fn("cos"), "Cosh": _fn("cosh"), "Div": _div,
    "Dropout": _dropout, "Elu": lambda call: _elu(call.build, call.arg(), call.attr("alpha", 1.0)),
    "Equal": _many("eq"), "Erf": _fn("erf"), "Exp": _fn("exp"), "Floor": _fn("floor"), "Gelu": _gelu,
    "Greater": _many("gt"), "GreaterOrEqual": _many("ge"), "HardSwish": _hard_swish,
    "HardSigmoid": lambda call: _hard_sigmoid(call.build, call.arg(), call.attr("alpha", 0.2), call.attr("beta", 0.5)),
    "Identity": lambda call: call.arg(),
    "LeakyRelu": lambda call: _leaky(call.build, call.arg(), call.attr("alpha", 0.01)),
    "Less": _swapped("gt"), "LessOrEqual": _swapped("ge"), "Log": _fn("log"), "Max": _many("max"), "Mean": _mean,
    "Min": _many("min"), "Mish": _mish, "Mul": _many("mul"), "Neg": lambda call: call.build.neg(call.arg()),
    "Not": _not, "Or": _many("max"), "PRelu": lambda call: _leaky(call.build, call.arg(0), call.arg(1)), "Pow": _pow,
    "RandomUniformLike": _random_like,
    "Reciprocal": lambda call: call.build.step("div", call.build.const(1.0), call.arg()),
    "Relu": lambda call: _relu(call.build, call.arg()), "Round": _fn("round"), "Selu": _selu, "Shrink": _shrink,
    "Sigmoid": _fn("sigmoid"), "Sign": _sign, "Sin": _fn("sin"), "Sinh": _fn("sinh"), "Softplus": _fn("softplus"),
    "Softsign": _fn("softsign"), "Sqrt": _fn("sqrt"), "Sub": _sub, "Sum": _many("add"), "Swish": _swish,
    "Tanh": _fn("tanh"), "ThresholdedRelu": _thresholded,
    "Where": lambda call: call.build.step("select", call.arg(0), call.arg(1), call.arg(2)),
}  # fmt: skip
