"""Spell PReLU in vectorised operators for ONNX Runtime, whose PRelu with a slope for each channel is slow on CPUs.

For ``s <= 1`` it is ``max(x, s x)``: the larger of the two is ``s x`` left of 0 and ``x`` right of it, and rounding
keeps the order. With a slope above 1 it is ``relu(x) + s min(x, 0)``, of which one side is 0. Either way not one bit
changes; only an infinite input meets a slope of 0 otherwise: ``0 inf`` is NaN.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.edit import Names, float_values, is_standard
from relu_deploy.report import PassReport, Skip


def spell_prelu(graph: gs.Graph) -> PassReport:
    """Replace every ``PRelu`` with slopes for channels.

    A PRelu of one slope is left: LeakyRelu does the same, and has an integer kernel.

    Args:
        graph: Sorted topologically; edited in place.

    Returns:
        Changed: the nodes whose output is now made otherwise; notes say how. Skipped: the others, with reasons.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    notes: dict[str, str] = {}
    names = Names(graph)
    for place, node in enumerate(list(graph.nodes)):
        if not is_standard(node, "PRelu"):
            continue
        slopes = float_values(node.inputs[1])
        if slopes is None:
            skipped.append(Skip(node.name, "its slopes are computed at run time"))
            continue
        if slopes.size == 1:
            continue
        form = _as_max if (slopes <= 1).all() else _as_sum
        last, *before = form(node, names)
        result = node.outputs[0]
        node.inputs.clear()
        node.outputs.clear()
        last.outputs = [result]
        graph.nodes[place] = last
        graph.nodes.extend(before)
        changed.append(node.name)
        notes[node.name] = "max(x, s x)" if form is _as_max else "relu(x) + s min(x, 0)"
    return PassReport("spell_prelu", tuple(changed), tuple(skipped), notes)


def _as_max(node: gs.Node, names: Names) -> list[gs.Node]:
    """The node that makes the result first, without its output."""
    data, slopes = node.inputs
    scaled = _like(data, names.new(f"{node.name}/scaled"))
    product = gs.Node("Mul", f"{node.name}/Mul", inputs=[data, slopes], outputs=[scaled])
    return [gs.Node("Max", node.name, inputs=[data, scaled]), product]


def _as_sum(node: gs.Node, names: Names) -> list[gs.Node]:
    """The same."""
    data, slopes = node.inputs
    zero = names.constant(f"{node.name}/zero", np.zeros((), slopes.dtype))
    right, left, scaled = (_like(data, names.new(f"{node.name}/{name}")) for name in ("right", "left", "scaled"))
    return [
        gs.Node("Add", node.name, inputs=[right, scaled]),
        gs.Node("Relu", f"{node.name}/Relu", inputs=[data], outputs=[right]),
        gs.Node("Min", f"{node.name}/Min", inputs=[data, zero], outputs=[left]),
        gs.Node("Mul", f"{node.name}/Mul", inputs=[left, slopes], outputs=[scaled]),
    ]


def _like(tensor: gs.Tensor, name: str) -> gs.Variable:
    return gs.Variable(name, dtype=tensor.dtype, shape=tensor.shape)
