"""A float network made ready for Q/DQ: everything that changes the graph for a target before quantisers are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import onnx_graphsurgeon as gs

from calib.ranges import Ranges
from relu_deploy.graph import tidy
from relu_deploy.int8.cheaper import cheaper_in_half
from relu_deploy.int8.even_inputs import even_inputs
from relu_deploy.int8.even_rows import even_rows
from relu_deploy.int8.formats import NumberFormat, activation_qparams
from relu_deploy.int8.fuse import FusionReport, fuse_channels
from relu_deploy.int8.fuse_noise import Array
from relu_deploy.int8.islands import channels_of, even_islands
from relu_deploy.int8.islands_spell import shorten_islands
from relu_deploy.int8.kernels import respect_softmax
from relu_deploy.int8.lower import prelu_to_leaky, spatial_mean_to_pool
from relu_deploy.int8.lower_pools import spell_average_pools
from relu_deploy.int8.place import Placement, place, quantised_behind, with_attention, with_pooled
from relu_deploy.int8.siblings import merge_siblings
from relu_deploy.int8.tables import Site, stand_in, take_back
from relu_deploy.ops import is_pwlu
from relu_deploy.passes.affine import fold_affine
from relu_deploy.passes.dyrelu_spell import spell_dyrelu
from relu_deploy.passes.gemm import products_to_gemm
from relu_deploy.passes.prelu import spell_prelu
from relu_deploy.passes.pwlu import Bound, fold_pwlu
from relu_deploy.passes.pwlu_spell import spell_pwlu
from relu_deploy.passes.recognise import recognise_pwlu
from relu_deploy.report import PassReport

Bounds = dict[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is known of a network that is ready for Q/DQ.

    Attributes:
        bounds: Tensor name -> smallest and largest value, tensor units.
        place: Where Q/DQ go, with more layers in float, each with its reason.
        fusion: Channels that were scaled so that one scale fits all.
        folded: Activation without a kernel of its own -> the form that it got.
        sites: Activations that a table of codes can stand for.
        centres: Layer -> by how much the channels of what it reads were moved.
        islands: Tensors whose channels were scaled in front of a quantiser.
        rows: Layers whose output channels were scaled for the sake of their weights.
        merged: Layers that became one.
    """

    bounds: Bounds
    place: Callable[[Mapping[str, str]], Placement]
    fusion: FusionReport
    folded: Mapping[str, str]
    sites: tuple[Site, ...] = ()
    centres: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    islands: PassReport | None = None
    rows: PassReport | None = None
    merged: PassReport | None = None


def prepare_ort(
    graph: gs.Graph, ranges: Ranges, number: NumberFormat, *, channel_fusion: str, keep_float: frozenset[str]
) -> Prepared:
    """Give every operator a form that ONNX Runtime has an integer kernel for, and even out channels.

    Args:
        graph: Float, constants folded. Edited in place.
        ranges: Measured on it.
        number: The target's format.
        channel_fusion: ``pow2``, ``free`` or ``off``.
        keep_float: Layers to leave in float.
    """
    fusion = fuse_channels(graph, ranges, number, mode=channel_fusion)
    dynamic = spell_dyrelu(graph).notes
    aliases = products_to_gemm(graph, rows=True).aliases | spatial_mean_to_pool(graph)
    prelu_to_leaky(graph)
    spell_prelu(graph)
    spell_average_pools(graph)
    tidy(graph)
    bounds = respect_softmax(graph, _still_there(graph, fusion.bounds, aliases))
    recognise_pwlu(graph, for_file=False)
    shorten_islands(graph)
    tidy(graph)
    folded = _fold_learned(graph, bounds, number, _learned(graph))
    sites = stand_in(graph, bounds)
    sites = take_back(graph, sites, place(graph, bounds, number, keep_float=keep_float))
    islands: PassReport | None = None
    if channel_fusion != "off":
        islands = _even(graph, fusion.ranges, aliases, bounds, number, keep_float)
    tidy(graph)

    def placed(damaged: Mapping[str, str]) -> Placement:
        return place(graph, bounds, number, keep_float=keep_float, half=damaged)

    return Prepared(bounds, placed, fusion.report, folded | dynamic, sites, islands=islands)


def prepare_tensorrt(
    graph: gs.Graph, ranges: Ranges, number: NumberFormat, *, channel_fusion: str, keep_float: frozenset[str]
) -> Prepared:
    """Give every operator a form that TensorRT fuses, choose what is cheaper in float16, and even out channels.

    Arguments are those of :func:`prepare_ort`.
    """
    fusion = fuse_channels(graph, ranges, number, mode=channel_fusion)
    bounds = _still_there(graph, fusion.bounds, {})
    recognise_pwlu(graph, for_file=False)
    tidy(graph)
    learned = _learned(graph)
    folded = _fold_learned(graph, bounds, number, learned)
    left = cheaper_in_half(graph, number, keep=keep_float)
    merged = merge_siblings(graph, bounds, skip={*left, *keep_float}, number=number) if number.merges else None
    tidy(graph)
    splits = merged.changed if merged else ()

    def placed(damaged: Mapping[str, str]) -> Placement:
        found = place(graph, bounds, number, keep_float=keep_float, half={**left, **damaged}, splits=splits)
        return with_attention(graph, with_pooled(graph, found, learned, bounds), bounds, number, skip=keep_float)

    ready = Prepared(bounds, placed, fusion.report, folded, merged=merged)
    if number.target != "tensorrt-rtx" or channel_fusion == "off":
        return ready
    placement = placed({})
    rows = even_rows(graph, placement, fusion.ranges, bounds, number)
    moved = even_inputs(graph, placement, fusion.ranges, bounds, number)
    return dataclasses.replace(ready, rows=rows, islands=moved.report, centres=moved.centres)


def _still_there(graph: gs.Graph, bounds: Mapping[str, tuple[float, float]], aliases: Mapping[str, str]) -> Bounds:
    """Ranges of the tensors that the graph still has, and of new ones that hold what an old one held."""
    present = graph.tensors()
    left = {name: chosen for name, chosen in bounds.items() if name in present}
    return left | {new: left[old] for new, old in aliases.items() if old in left}


def _learned(graph: gs.Graph) -> set[str]:
    """Outputs of learned activations."""
    return {node.outputs[0].name for node in graph.nodes if is_pwlu(node)}


def _even(
    graph: gs.Graph, ranges: Ranges, aliases: Mapping[str, str], bounds: Bounds, number: NumberFormat,
    keep_float: frozenset[str],
) -> PassReport:  # fmt: skip
    """Even out the channels on the shores of float islands."""
    seen = {name: channels_of(measured, ranges.samples) for name, measured in ranges.tensors.items()}
    channels = {name: each for name, each in seen.items() if each is not None}
    channels |= {new: channels[old] for new, old in aliases.items() if old in channels}
    return even_islands(graph, place(graph, bounds, number, keep_float=keep_float), channels, bounds, number).report


def _fold_learned(graph: gs.Graph, bounds: Bounds, number: NumberFormat, learned: set[str]) -> dict[str, str]:
    """Fold learned activations to what is cheapest within half a step of their quantised output; says what became.

    The domain is the calibrated range of the input: past it the output is past its own range, and saturates.
    """
    if not learned:
        return {}
    planned = place(graph, bounds, number)
    planned = planned if number.unsigned else with_pooled(graph, planned, learned, bounds)
    allowed = {
        node.outputs[0].name: Bound(
            activation_qparams(*bounds[node.outputs[0].name], number).scale / 2, *bounds[node.inputs[0].name]
        )
        for node in graph.nodes
        if is_pwlu(node)
        and node.inputs[0].name in bounds
        and node.outputs[0].name in bounds
        and quantised_behind(node.outputs[0], planned)
    }
    # A scale folded into a layer changes its output's range, which ONNX Runtime's integer layers need.
    notes = fold_pwlu(graph, allowed, two_pieces=not number.unsigned).notes
    if number.unsigned:
        notes |= spell_pwlu(graph, number.target, allowed, most=1).notes  # one hinge is quicker than a table
    else:
        fold_affine(graph)
        notes |= spell_pwlu(graph, number.target, allowed).notes
    tidy(graph)
    return notes
