"""Which layers lose the most by INT8: each alone is switched to INT8, and the outputs are compared.

The network is built once, with a switch at every place that is rounded: the tensors that a quantiser stands on, and the
weights of the layers. One session then measures any combination, without quantising again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from calib.batches import batches
from calib.errors import message_of
from calib.inputs import model_inputs
from calib.progress import Progress
from calib.runtime import RUNTIME_ERRORS
from calib.session import open_session
from relu_deploy import graph as files
from relu_deploy.errors import CheckFailedError, QuantizationError
from relu_deploy.int8.draft import Draft
from relu_deploy.int8.drift import COLLAPSE_DB, OutputDrift
from relu_deploy.int8.evidence import GOOD_DB, Evidence
from relu_deploy.int8.formats import quantize_symmetric, weight_scales
from relu_deploy.int8.granularity import shares_scale
from relu_deploy.int8.heads import heads
from relu_deploy.int8.rounded import round_tensor
from relu_deploy.int8.settle import steady
from relu_deploy.int8.store import layer_operands, weight_axis
from relu_deploy.int8.write import activation_grids

# Enough to rank layers by, few enough for minutes at most.
SAMPLES = 4
# At most this part of the linear layers with weights is left in float without being asked to.
MOST_FLOAT = 0.1
# Layers named by an error.
_NAMED = 3
# Few samples and no integer kernels: predictions were seen to be up to 3.4 dB better than the file that was written.
_DOUBT_DB = 4.0
# Decibels that a layer left in float is to bring: it computes slower.
_WORTH_DB = 0.5
_SWITCHES = "relu_deploy/switches"


@dataclasses.dataclass(frozen=True)
class Damage:
    """What INT8 does to the outputs where only one layer has it.

    Attributes:
        layer: Its node.
        sqnr_db: Signal over noise of the worst output, the layer's weights and the tensors it reads and makes rounded.
    """

    layer: str
    sqnr_db: float


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Layers by the damage that INT8 does to them.

    Attributes:
        samples: How many were compared.
        before_db: Signal over noise of the worst output with all layers INT8.
        after_db: The same with those in ``kept`` in float.
        layers: Worst first; empty where the outputs are good and nobody asked.
        kept: Layers to leave in float.
    """

    samples: int
    before_db: float
    after_db: float
    layers: tuple[Damage, ...]
    kept: tuple[str, ...]


def measure_sensitivity(draft: Draft, evidence: Evidence) -> Sensitivity:
    """Measure what INT8 does to the outputs; where it does harm, rank the layers and choose those to leave in float.

    Harm is less than ``GOOD_DB`` at an output. Layers are then left in float, worst first, as long as each is worth its
    time, a tenth of them at most.

    Args:
        draft: The network. Not changed.
        evidence: Samples, of which the first few are used; and what is asked for.

    Raises:
        QuantizationError: the network does not run.
    """
    aim = max(GOOD_DB, evidence.floor_db + _DOUBT_DB)
    try:
        switched = _Switched(draft, evidence)
        before = switched.sqnr(switched.without(()))
        if before >= aim and not evidence.rank and not evidence.keep_worst:
            return Sensitivity(switched.samples, before, before, (), ())
        found = _ranked(switched, draft, evidence.progress)
        kept, after = _kept(switched, [damage.layer for damage in found], before, aim, draft, evidence.keep_worst)
    except RUNTIME_ERRORS as error:
        raise QuantizationError(f"the network does not run with switches: {message_of(error)}") from error
    return Sensitivity(switched.samples, before, after, tuple(found), tuple(kept))


def _ranked(switched: _Switched, draft: Draft, progress: Progress) -> list[Damage]:
    """Every INT8 layer by what it does alone, worst first."""
    layers = [layer.name for layer in draft.placement.layers if layer.int8]
    found = []
    for index, name in enumerate(layers):
        found.append(Damage(name, switched.sqnr(switched.of_layer(name))))
        progress("rank layers", index + 1, len(layers))
    return sorted(found, key=lambda damage: damage.sqnr_db)


def _kept(
    switched: _Switched, ranked: Sequence[str], before: float, aim: float, draft: Draft, least: int
) -> tuple[list[str], float]:
    """Layers to leave in float, at least ``least``, and signal over noise of the worst output then.

    Of all numbers of layers that are allowed, that with the most decibels, less what each layer is to be worth.
    """
    weighted = _with_weights(draft)
    most = min(max(least, int(MOST_FLOAT * weighted) - (weighted - len(ranked))), len(ranked))
    best, reached, value = least, before if not least else switched.sqnr(switched.without(ranked[:least])), 0.0
    value = reached - _WORTH_DB * least
    after = reached
    for count in range(least + 1, most + 1):
        if after >= aim:
            break
        after = switched.sqnr(switched.without(ranked[:count]))
        if after - _WORTH_DB * count > value:
            best, reached, value = count, after, after - _WORTH_DB * count
    return list(ranked[:best]), reached


def refuse_collapse(drift: Iterable[OutputDrift], found: Sensitivity | None, floor_db: float = COLLAPSE_DB) -> None:
    """Raise where an output is worse than it may be.

    Raises:
        CheckFailedError: names the outputs, the worst layers, and what to do.
    """
    bad = [out for out in drift if out.max_abs_error is None or (out.sqnr_db is not None and out.sqnr_db < floor_db)]
    if not bad:
        return
    outputs = ", ".join(f"{o.name} ({'not finite' if o.sqnr_db is None else f'{o.sqnr_db:.1f} dB'})" for o in bad)
    ranked = () if found is None else found.layers[:_NAMED]
    layers = ", ".join(f"{layer.layer} ({layer.sqnr_db:.1f} dB alone)" for layer in ranked)
    raise CheckFailedError(
        f"INT8 destroys the outputs: {outputs}; at least {floor_db:g} dB are asked for"
        + (f". The worst layers: {layers}" if layers else ""),
        hint="check that the calibration data is what the network is fed in use; then keep the worst layers in float "
        "(--keep-float; 'quantize --keep-float N' finds them), or write the file as it is (--allow-collapse)",
    )


class _Switched:
    """The network with a switch at every rounding, and its outputs with all of them off."""

    def __init__(self, draft: Draft, evidence: Evidence) -> None:
        self.sites: list[tuple[str, str]] = []  # kind and name, in the order of the switches
        self._draft, self._heads = draft, heads(draft)
        model = self._build(draft)
        specs = tuple(spec for spec in model_inputs(model) if spec.name != _SWITCHES)
        self._session = open_session(model, optimise=True)
        taken = evidence.first(SAMPLES)
        self._feeds = [dict(batch.feeds) for batch in batches(taken, specs, batch_size=1)]
        self.samples = len(taken)
        self._reference = self._run(np.zeros(len(self.sites), dtype=bool))

    def of_layer(self, name: str) -> npt.NDArray[np.bool_]:
        """Switches with one layer in INT8: its weights, and the tensors that it reads and makes."""
        node = next(node for node in self._draft.graph.nodes if node.name == name)
        around = {("tensor", tensor.name) for tensor in (node.inputs[0], *_behind(node))} | {("weight", name)}
        return np.array([site in around for site in self.sites], dtype=bool)

    def without(self, layers: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Switches with all but some layers in INT8."""
        nodes = {node.name: node for node in self._draft.graph.nodes}
        chosen = self._draft.placement.chosen - set(layers)
        off = {("weight", name) for name in layers}
        for name in layers:
            off |= {("tensor", tensor.name) for tensor in _behind(nodes[name])}
            data = nodes[name].inputs[0]
            if not any(reader.name in chosen for reader in data.outputs):
                off.add(("tensor", data.name))
        return np.array([site not in off for site in self.sites], dtype=bool)

    def sqnr(self, switches: npt.NDArray[np.bool_]) -> float:
        """Signal over noise of the worst output, decibels."""
        return self._heads.worst_db(self._reference, self._run(switches))

    def _run(self, switches: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
        names = [output.name for output in self._session.get_outputs()]
        found = [self._session.run(names, {**feeds, _SWITCHES: switches}) for feeds in self._feeds]
        return [dict(zip(names, values, strict=True)) for values in found]

    def _build(self, draft: Draft) -> onnx.ModelProto:
        graph = self._heads.graph.copy()
        switches = gs.Variable(_SWITCHES, dtype=np.bool_)
        tensors, nodes = graph.tensors(), {node.name: node for node in graph.nodes}
        for name, grid in activation_grids(draft.placement, draft.bounds, draft.number).items():
            if name not in tensors:  # it leads to no output that is measured
                continue
            tensor, readers = tensors[name], draft.placement.uses[name]
            ends = [node for node in list(tensor.outputs) if readers is None or node.name in readers]
            chosen = gs.Variable(f"{name}/switched", dtype=tensor.dtype, shape=tensor.shape)
            rounded = round_tensor(graph, tensor, grid)
            for node in ends:
                node.inputs = [chosen if operand is tensor else operand for operand in node.inputs]
            self._switch(graph, switches, ("tensor", name), rounded, tensor, chosen)
        for name in sorted(draft.placement.chosen & nodes.keys()):
            node = nodes[name]
            weight, bias = layer_operands(node)
            axis = None if shares_scale(node, draft.number) else weight_axis(node)
            scales = weight_scales(weight, axis, draft.number.weight_max)
            steps = scales.reshape([-1 if at == axis else 1 for at in range(weight.ndim)] if scales.ndim else ())
            values = quantize_symmetric(weight, scales, axis, draft.number.weight_max) * steps
            chosen = gs.Variable(f"{name}/weight/switched", dtype=weight.dtype, shape=weight.shape)
            exact = gs.Constant(f"{name}/weight/exact", np.ascontiguousarray(weight))
            values = steady(node, values, draft.centres.get(name))
            node.attrs.pop("alpha", None)
            node.attrs.pop("beta", None)
            stored = gs.Constant(f"{name}/weight/rounded", values.astype(weight.dtype))
            node.inputs[1] = chosen
            if bias is not None:
                node.inputs[2] = gs.Constant(f"{name}/bias/plain", np.ascontiguousarray(bias.astype(weight.dtype)))
            self._switch(graph, switches, ("weight", name), stored, exact, chosen)
        switches.shape = (len(self.sites),)
        graph.inputs.append(switches)
        graph.toposort()
        return files.export_graph(graph, draft.source)

    def _switch(
        self, graph: gs.Graph, switches: gs.Variable, site: tuple[str, str], on: gs.Tensor, off: gs.Tensor,
        result: gs.Variable,
    ) -> None:  # fmt: skip
        number = len(self.sites)
        self.sites.append(site)
        flag = gs.Variable(f"{_SWITCHES}/{number}", dtype=np.bool_, shape=())
        at = gs.Constant(f"{_SWITCHES}/at/{number}", np.asarray(number, np.int64))
        graph.nodes.append(gs.Node("Gather", f"{_SWITCHES}/take/{number}", inputs=[switches, at], outputs=[flag]))
        graph.nodes.append(gs.Node("Where", f"{_SWITCHES}/on/{number}", inputs=[flag, on, off], outputs=[result]))


def _with_weights(draft: Draft) -> int:
    """How many linear layers have weights: products of two live tensors are float by nature and use up no share."""
    nodes = {node.name: node for node in draft.graph.nodes}
    layers = [nodes[layer.name] for layer in draft.placement.layers if layer.name in nodes]
    return sum(isinstance(node.inputs[1], gs.Constant) for node in layers)


def _behind(node: gs.Node) -> list[gs.Variable]:
    """What a layer makes, and what the ReLU fused with it makes."""
    made = node.outputs[0]
    return [made, *(reader.outputs[0] for reader in made.outputs if reader.op in ("Relu", "Clip"))]
