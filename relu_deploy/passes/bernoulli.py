"""``Bernoulli`` as its documentation has it: 1 with probability p.

The function body that the ONNX standard gives beside that text (``Greater(uniform, p)``, opset 15 and 22) draws 1 with
probability 1 - p, and ONNX Runtime runs that body. A network that was exported from training means what the text says,
and so do the passes here; a comparison in ONNX Runtime needs the operator spelled out.
"""

from __future__ import annotations

import onnx

from relu_deploy.graph import all_nodes


def spell_out_bernoulli(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with ``Less(RandomUniformLike(p), p)`` for every ``Bernoulli(p)`` of its main graph.

    Args:
        model: Not changed.

    Returns:
        ``model`` itself where it has none.
    """
    if not any(_is_bernoulli(node) for node in all_nodes(model.graph)):
        return model
    spelled = onnx.ModelProto()
    spelled.CopyFrom(model)
    nodes = [part for node in model.graph.node for part in (_parts(node) if _is_bernoulli(node) else [node])]
    del spelled.graph.node[:]
    spelled.graph.node.extend(nodes)
    return spelled


def _is_bernoulli(node: onnx.NodeProto) -> bool:
    return node.op_type == "Bernoulli" and node.domain in ("", "ai.onnx")


def _parts(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    drawn, truth = f"{node.output[0]}/drawn", f"{node.output[0]}/truth"
    make = onnx.helper.make_node
    dtype = next((attribute.i for attribute in node.attribute if attribute.name == "dtype"), None)
    end = (
        make("CastLike", [truth, node.input[0]], node.output)
        if dtype is None
        else make("Cast", [truth], node.output, to=dtype)
    )
    return [
        make("RandomUniformLike", node.input, [drawn], low=0.0, high=1.0),
        make("Less", [drawn, node.input[0]], [truth]),
        end,
    ]
