"""Spell PReLU as ``max(x, s x)`` for ONNX Runtime, whose PRelu with a slope for each channel is slow on CPUs.

For ``s <= 1`` the larger of the two is ``s x`` left of 0 and ``x`` right of it, and rounding keeps the order, so not
one bit changes. Only an infinite input meets a slope of 0 otherwise: ``max(inf, 0 inf)`` is NaN.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.edit import Names, float_values, is_standard
from relu_deploy.report import PassReport, Skip


def spell_prelu(graph: gs.Graph) -> PassReport:
    """Replace ``PRelu`` with slopes for channels by ``Mul`` and ``Max``, where no slope is above 1.

    A PRelu of one slope is left: LeakyRelu does the same, and has an integer kernel.

    Args:
        graph: Sorted topologically; edited in place.

    Returns:
        Changed: the nodes whose output Max now makes. Skipped: the others, with reasons.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    names = Names(graph)
    for place, node in enumerate(graph.nodes):
        if not is_standard(node, "PRelu"):
            continue
        slopes = float_values(node.inputs[1])
        if slopes is None:
            skipped.append(Skip(node.name, "its slopes are computed at run time"))
            continue
        if slopes.size == 1:
            continue
        if not (slopes <= 1).all():
            skipped.append(
                Skip(node.name, f"a slope of {float(np.max(slopes)):.3g} is above 1: max(x, s x) is not PReLU")
            )
            continue
        data, result = node.inputs[0], node.outputs[0]
        scaled = gs.Variable(names.new(f"{node.name}/scaled"), dtype=data.dtype, shape=data.shape)
        product = gs.Node("Mul", f"{node.name}/Mul", inputs=[data, node.inputs[1]], outputs=[scaled])
        node.inputs.clear()
        node.outputs.clear()
        graph.nodes[place] = gs.Node("Max", node.name, inputs=[data, scaled], outputs=[result])
        graph.nodes.append(product)
        changed.append(node.name)
    return PassReport("spell_prelu", tuple(changed), tuple(skipped))
