"""Every PWLU of a model as one node ``relu_deploy::PWLU`` while it is exported."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from relu_deploy.nn.pwlu_function import Parameters, Tables, evaluate, tables_of, work_dtype
from relu_deploy.ops import DOMAIN, PWLU, VERSION

NodeForm = Literal["dynamo", "torchscript"]
"""Which of torch's exporters is at work: they want a foreign operator in two different ways."""

_STATIC = ("right", "values", "slope_left", "slope_right")


@contextlib.contextmanager
def pwlu_nodes(model: nn.Module, exporter: NodeForm) -> Iterator[None]:
    """Let every PWLU of ``model`` become one node for a while; in eager PyTorch it must not be called meanwhile.

    Its parameters are those that it works with: boundaries that training drove across each other are apart, and all are
    float32 at least. Afterwards everything is as it was.
    """
    from relu_deploy.nn import pwlu

    units = [module for module in model.modules() if isinstance(module, (pwlu.PWLU, pwlu.StaticPWLU))]
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for unit in units:
            if isinstance(unit, pwlu.StaticPWLU):
                for name, value in zip(_STATIC, _parameters(unit)[1:], strict=True):
                    unit.register_buffer(name, value)
            else:
                raw = unit.parameters_in_order()
                work = raw.as_work(torch.promote_types(raw.values.dtype, torch.float32))
                kept += [(parameter, parameter.data) for parameter in raw]
                for parameter, value in zip(raw, work, strict=True):
                    parameter.data = value.detach().contiguous()
            unit.node_form = exporter
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
        for unit in units:
            unit.node_form = None
            if isinstance(unit, pwlu.StaticPWLU):
                for name in _STATIC:
                    delattr(unit, name)


def pwlu_node(x: Tensor, p: Parameters, axis: int, exporter: NodeForm) -> Tensor:
    """The node itself; ``axis`` counts from the front."""
    if exporter == "torchscript":
        traced: Tensor = _TracedNode.apply(x, *p, axis)  # type: ignore[no-untyped-call]  # torch's own signature
        return traced
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{PWLU}", (x, *p), {"channel_axis": axis}, dtype=x.dtype, shape=x.shape, version=VERSION
    )


class _TracedNode(torch.autograd.Function):
    """For the exporter that traces: it runs ``forward`` and writes what ``symbolic`` says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:  # noqa: ARG004  # torch's signature
        *parameters, axis = rest
        raw = Parameters(*parameters)
        with warnings.catch_warnings():
            # Nothing of this is written, so nothing of it can become a wrong constant.
            warnings.simplefilter("ignore", TracerWarning)
            return evaluate(x, tables_of(raw.as_work(work_dtype(x, raw.values))), axis)

    @staticmethod
    def symbolic(g: Any, x: Any, *rest: Any) -> Any:
        *parameters, axis = rest
        node = g.op(f"{DOMAIN}::{PWLU}", x, *parameters, channel_axis_i=axis)
        node.setType(x.type())
        return node


def _parameters(unit: Any) -> Parameters:
    """What a unit of tables would have learned."""
    tables = Tables(unit.left, unit.width, unit.slopes, unit.offsets)
    tables = Tables(*(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tables))
    intervals = tables.slopes.shape[1] - 2
    steps = torch.arange(intervals, dtype=tables.left.dtype) / intervals
    starts = tables.left.unsqueeze(1) + tables.width.unsqueeze(1) * steps
    right = tables.left + tables.width
    inner = tables.slopes[:, 1:-1] * starts + tables.offsets[:, 1:-1]
    last = tables.slopes[:, -1] * right + tables.offsets[:, -1]
    values = torch.cat((inner, last.unsqueeze(1)), 1)
    return Parameters(tables.left, right, values, tables.slopes[:, 0].clone(), tables.slopes[:, -1].clone())
