"""Float islands with as few operators as they can have, before quantisers are put around them."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from relu_deploy.passes.affine import fold_affine
from relu_deploy.passes.dead import drop_detached
from relu_deploy.passes.edit import detach
from relu_deploy.passes.functions import Functions
from relu_deploy.passes.spans import Span, find_spans


def shorten_islands(graph: gs.Graph) -> None:
    """Fold shifts in front of activations into layers, and spell HardSwish with two operators, in place.

    A shift between a layer and an activation would be an operator of the island, or worse, one between two quantisers.
    HardSwish as ``x * clip(x + 3, 0, 6) / 6`` reads and writes floats four times, as ``x * HardSigmoid(x)`` twice; the
    operator HardSwish itself needs opset 14.

    Args:
        graph: Sorted topologically, for ``ort``.
    """
    fold_affine(graph, into_curved=True)
    graph.cleanup().toposort()
    for span in find_spans(Functions(graph)):
        if span.label.kind == "hardswish" and len(span.nodes) > 2 and _is_private(span):
            _respell(graph, span)
    drop_detached(graph)
    graph.cleanup().toposort()


def _is_private(span: Span) -> bool:
    """Whether nothing outside reads what lies between the ends, and the ends are of one shape."""
    inner = {id(node) for node in span.nodes}
    between = [tensor for node in span.nodes for tensor in node.outputs if tensor is not span.bottom.tensor]
    closed = all(id(reader) in inner for tensor in between for reader in tensor.outputs)
    return closed and span.top.tensor.shape is not None and span.top.tensor.shape == span.bottom.tensor.shape


def _respell(graph: gs.Graph, span: Span) -> None:
    source, result, last = span.top.tensor, span.bottom.tensor, span.nodes[-1].name
    for node in span.nodes:
        detach(node)
    gate = gs.Variable(f"{result.name}/gate", dtype=result.dtype, shape=result.shape)
    alpha = {"alpha": 1 / 6, "beta": 0.5}
    graph.nodes.append(gs.Node("HardSigmoid", f"{last}/gate", attrs=alpha, inputs=[source], outputs=[gate]))
    graph.nodes.append(gs.Node("Mul", last, inputs=[source, gate], outputs=[result]))
