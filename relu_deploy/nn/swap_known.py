"""Which known smooth function a module, a function or an expression computes: found by calling it, not by its name."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses


class QuickGELU(nn.GELU):
    """``x sigmoid(1.702 x)``, the fast approximation of GELU; elementwise, any shape and floating dtype.

    Source: Hendrycks and Gimpel, "Gaussian error linear units", arXiv:1606.08415, section 2.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the argument's name in nn.GELU
        """Elementwise."""
        return input * torch.sigmoid(1.702 * input)


@dataclasses.dataclass(frozen=True)
class Known:
    """A function found out: its name, and how to make a module that computes it."""

    name: str
    make: Callable[[], nn.Module]


KNOWN: Final = (
    Known("GELU", nn.GELU), Known("GELU(tanh)", functools.partial(nn.GELU, approximate="tanh")),
    Known("QuickGELU", QuickGELU), Known("SiLU", nn.SiLU), Known("Hardswish", nn.Hardswish), Known("Mish", nn.Mish),
    Known("SELU", nn.SELU), Known("Softplus", nn.Softplus),
)  # fmt: skip

# Without one of these words in its code a function is not called at all: calling strangers has effects.
PRIMITIVES: Final = frozenset(
    [
        "gelu",
        "silu",
        "swish",
        "hardswish",
        "hard_swish",
        "mish",
        "elu",
        "celu",
        "selu",
        "sigmoid",
        "tanh",
        "erf",
        "softplus",
        "hardsigmoid",
        "relu6",
        "clamp",
        "clip",
        "exp",
        "expit",
        "expm1",
        "ndtr",
        "hardtanh",
    ]
)
# Any smooth one of these that runs outside a replaced place is reported; relu6 and clamp are piecewise linear.
SMOOTH_CALLS: Final = (PRIMITIVES - {"relu6", "clamp", "clip", "hardtanh", "exp"}) | {
    "_transformer_encoder_layer_fwd", "log_sigmoid", "logsigmoid",
}  # fmt: skip
# Those of them that gates, heads and poolers are made of.
GATE_CALLS: Final = frozenset(["sigmoid", "tanh", "softplus", "hardsigmoid", "log_sigmoid", "logsigmoid", "expit"])
# What an activation may be spelled with besides: functions and methods of a tensor that act element by element.
ELEMENTWISE: Final = PRIMITIVES | {
    "mul",
    "multiply",
    "add",
    "sub",
    "subtract",
    "div",
    "divide",
    "true_divide",
    "pow",
    "square",
    "sqrt",
    "rsqrt",
    "neg",
    "log",
    "log1p",
    "relu",
    "maximum",
    "minimum",
    "abs",
    "clamp_min",
    "clamp_max",
    "where",
    "float",
    "to",
    "double",
    "type_as",
    "erfc",
    "reciprocal",
    "clone",
    "contiguous",
}
# 1e-5 passes constants printed with six digits (0.797885, 1.41421) and is far below the 4.7e-4 between the two closest
# functions of the table, GELU by erf and by tanh.
TOLERANCE: Final = 1e-5
_GRID: Final = torch.linspace(-30.0, 30.0, 2401, dtype=torch.float64)


def recognise(function: Callable[[Any], Any]) -> Known | None:
    """The known smooth function that a callable computes on float64 points from -30 to 30, within 1e-5, or None.

    The random state is untouched. Whatever the callable raises means "not an activation": it was called to find out.
    """
    grid = _GRID.clone()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            values = function(grid.reshape(1, -1))
            turned = function(_GRID.clone().flip(0))  # another place and shape: only an elementwise function agrees
    except Exception:  # noqa: BLE001  # a stranger's code, called only to find out what it is
        return None
    if not isinstance(values, Tensor) or values.shape != (1, _GRID.numel()) or not values.is_floating_point():
        return None
    values = values.double().flatten()
    if not isinstance(turned, Tensor) or turned.shape != _GRID.shape or not _close(values, turned.double().flip(0)):
        return None
    return next((known for known in KNOWN if _close(values, known.make()(_GRID))), None) or _elu(values)


def recognise_function(function: object) -> Known | None:
    """The same for a value found in an attribute, which is called only if its code looks like an activation's."""
    if isinstance(function, (type, nn.Module)) or not callable(function) or not looks_smooth(function):
        return None
    return recognise(function)


def recognise_module(module: nn.Module) -> Known | None:
    """The same for a module with no tensors of its own; a copy in evaluation mode is what is called."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()) or _hooked(module):
        return None
    if type(module).__module__.startswith("torch.nn.modules") or not _module_looks_smooth(module):
        return None
    return recognise(copy.deepcopy(module).eval())


def looks_smooth(function: object) -> bool:
    """Whether a function is, or names in its code, an elementwise primitive.

    >>> looks_smooth(F.gelu), looks_smooth(lambda x: x * torch.sigmoid(x)), looks_smooth(print)
    (True, True, False)
    """
    if isinstance(function, functools.partial):
        return looks_smooth(function.func)
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if isinstance(code, types.CodeType) and _mentions(code):
        return True
    module = getattr(function, "__module__", None) or ""
    own = isinstance(function, types.BuiltinFunctionType) or module.startswith("torch")
    return own and str(getattr(function, "__name__", "")).rstrip("_") in PRIMITIVES


def _mentions(code: types.CodeType) -> bool:
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return not PRIMITIVES.isdisjoint(code.co_names) or any(_mentions(part) for part in inner)


def _module_looks_smooth(module: nn.Module) -> bool:
    forward = getattr(type(module).forward, "__wrapped__", type(module).forward)
    values = [*vars(module).values(), *module.children()]
    return looks_smooth(forward) or any(
        looks_smooth(value) for value in values if callable(value) and not isinstance(value, (type, nn.Module))
    ) or any(child.__class__.__name__.lower() in PRIMITIVES for child in module.children())  # fmt: skip


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001  # there is no public list


def _close(values: Tensor, expected: Tensor) -> bool:
    return bool(torch.isfinite(values).all()) and float((values - expected).abs().max()) <= TOLERANCE


def _elu(values: Tensor) -> Known | None:
    """ELU and CELU have a parameter: minus the value far left."""
    alpha = -float(values[0])
    if alpha <= TOLERANCE:
        return None
    shapes = (("ELU", F.elu, nn.ELU), ("CELU", F.celu, nn.CELU))
    alpha = round(alpha, 9)  # exp(-30) = 1e-13 is what is missing from the value far left
    for name, function, make in shapes:
        if _close(values, function(_GRID, alpha=alpha)):
            return Known(name if alpha == 1 else f"{name}({alpha:g})", functools.partial(make, alpha=alpha))
    return None
