"""How fast would the network be with ReLU: every smooth activation becomes one Relu, untrained.

The result computes something else than the network. It answers whether distilling a student is worth the effort, and
carries a mark that says so wherever it goes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_graphsurgeon as gs

from relu_deploy.graph import WHAT_IF, check_model, export_graph
from relu_deploy.passes.fates import TOLERANCE, TRAINING
from relu_deploy.passes.quantisers import real_source
from relu_deploy.passes.surroundings import LINEAR
from relu_deploy.passes.survey import Site, Survey, typed_graph
from relu_deploy.report import PassReport, Skip

MARK = "not trained, for speed measurement only"


def replace_by_relu(model: onnx.ModelProto, found: Survey) -> tuple[onnx.ModelProto, PassReport]:
    """Let a Relu make the result of every smooth activation that is counted.

    Args:
        model: The network. Not changed.
        found: Its survey.

    Returns:
        The network with ReLU, marked in its metadata, and what was replaced and what was not. Where nothing smooth is
        counted it is ``model`` itself, unmarked.

    Raises:
        ModelError: the result fails onnx's checker.
    """
    graph, source = typed_graph(model)
    report = _replace_all(graph, [site for site in found.activations if site.becomes in (TRAINING, TOLERANCE)])
    if not report.changed:
        return model, report
    result = export_graph(graph, source)
    kept = [entry for entry in result.metadata_props if entry.key != WHAT_IF]
    del result.metadata_props[:]
    result.metadata_props.extend([*kept, onnx.StringStringEntryProto(key=WHAT_IF, value=MARK)])
    check_model(result, "the network with ReLU")
    return result, report


def _replace_all(graph: gs.Graph, sites: list[Site]) -> PassReport:
    places = {node.name: index for index, node in enumerate(graph.nodes)}
    changed, skipped = [], []
    for site in sites:
        try:
            source, target = _ends(site, [graph.nodes[places[name]] for name in site.nodes])
        except _CannotReplaceError as error:
            skipped.append(Skip(site.name, str(error)))
            continue
        old = target.inputs[0]
        old.inputs.clear()
        old.outputs.clear()
        graph.nodes[places[site.name]] = gs.Node("Relu", old.name, inputs=[source], outputs=[target])
        changed.append(site.name)
    return PassReport("what_if_relu", tuple(changed), tuple(skipped))


class _CannotReplaceError(Exception):
    """Why an activation stays."""


def _ends(site: Site, nodes: list[gs.Node]) -> tuple[gs.Tensor, gs.Tensor]:
    """What the Relu reads, behind the quantisers that the survey looked through, and what it makes."""
    if any(node.op.startswith("QLinear") for node in nodes):
        raise _CannotReplaceError("it computes on integers; a network with Q/DQ or floats can be replaced")
    if nodes[-1].op in LINEAR:
        raise _CannotReplaceError("it is fused into the layer")
    if nodes[-1].domain not in (None, "", "ai.onnx") and len(nodes[-1].inputs) > 1:
        raise _CannotReplaceError("a bias is fused into it")
    (target,) = (tensor for tensor in nodes[-1].outputs if tensor.name == site.output)
    readable = (tensor for node in nodes for tensor in node.inputs)
    source = next((t for t in readable if site.input in (t.name, real_source(t).name)), None)
    if source is None:
        raise _CannotReplaceError(f"none of its nodes reads {site.input}")
    if None not in (source.dtype, target.dtype) and source.dtype != target.dtype:
        raise _CannotReplaceError("it changes the type")
    if not _may_be_alike(source.shape, target.shape):
        raise _CannotReplaceError(f"it turns shape {list(source.shape)} into {list(target.shape)}")
    return source, target


def _may_be_alike(first: Sequence[object] | None, second: Sequence[object] | None) -> bool:
    """Whether two shapes can be the same, as far as their sizes are known; one size may go by several names."""
    if first is None or second is None:
        return True
    known = (pair for pair in zip(first, second, strict=False) if all(isinstance(size, int) for size in pair))
    return len(first) == len(second) and all(one == other for one, other in known)
