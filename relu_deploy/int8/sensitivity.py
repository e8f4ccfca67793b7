"""Which layers lose the most by INT8: each alone is switched to INT8, and the outputs are compared.

The network is built once, with a switch at every place that is rounded: the tensors that a quantiser stands on, and the
weights of the layers. One session then measures any combination, without quantising again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from calib.batches import batches
from calib.errors import message_of
from calib.inputs import Sample, model_inputs
from calib.progress import Progress, silent
from calib.runtime import RUNTIME_ERRORS
from calib.session import open_session
from relu_deploy import graph as files
from relu_deploy.errors import CheckFailedError, QuantizationError
from relu_deploy.int8.drift import COLLAPSE_DB, OutputDrift, sqnr_db
from relu_deploy.int8.formats import NumberFormat, quantize_symmetric, weight_scales
from relu_deploy.int8.granularity import shares_scale
from relu_deploy.int8.place import Placement
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
# Outputs that need help are taken clear of the floor, not just past it: there a network is of little use.
_CLEARANCE_DB = 10.0
_SWITCHES = "relu_deploy/switches"
# Past this a rounding cannot be seen at the outputs at all.
_CLEAN_DB = 200.0


@dataclasses.dataclass(frozen=True)
class Draft:
    """A network right before Q/DQ are written.

    Attributes:
        graph: Float, with every change that INT8 asked for.
        source: What it was imported from.
        placement: Where INT8 goes.
        bounds: Range of each tensor.
        number: The target's format.
    """

    graph: gs.Graph
    source: onnx.ModelProto
    placement: Placement
    bounds: dict[str, tuple[float, float]]
    number: NumberFormat


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
        layers: Worst first.
        kept: Layers to leave in float.
    """

    samples: int
    before_db: float
    after_db: float
    layers: tuple[Damage, ...]
    kept: tuple[str, ...]


def measure_sensitivity(
    draft: Draft, source: Iterable[Sample], *, keep: int = 0, floor_db: float = COLLAPSE_DB,
    progress: Progress = silent,
) -> Sensitivity:  # fmt: skip
    """Rank layers, and choose those to leave in float.

    Args:
        draft: The network. Not changed.
        source: Samples; the first few are used.
        keep: Leave at least as many of the worst in float.
        floor_db: Where an output is worse, or may be, leave as many as it takes to be well clear of this, a tenth of
            the layers at most.
        progress: Told of each layer.

    Raises:
        QuantizationError: the network does not run.
    """
    try:
        switched = _Switched(draft, source)
        layers = [layer.name for layer in draft.placement.layers if layer.int8]
        found = []
        for index, name in enumerate(layers):
            found.append(Damage(name, switched.sqnr(switched.of_layer(name))))
            progress("rank layers", index + 1, len(layers))
        found.sort(key=lambda damage: damage.sqnr_db)
        before = switched.sqnr(switched.without(()))
        kept = [damage.layer for damage in found[:keep]]
        weighted = _with_weights(draft)
        most = max(keep, int(MOST_FLOAT * weighted) - (weighted - len(layers)))
        after = switched.sqnr(switched.without(kept)) if kept else before
        aim = floor_db + _CLEARANCE_DB if after < floor_db + _DOUBT_DB else floor_db
        while after < aim and len(kept) < min(most, len(found)):
            kept.append(found[len(kept)].layer)
            after = switched.sqnr(switched.without(kept))
    except RUNTIME_ERRORS as error:
        raise QuantizationError(f"the network does not run with switches: {message_of(error)}") from error
    if not keep and after < before + 1:  # decibels: a layer in float is to be worth its time
        kept, after = [], before
    return Sensitivity(switched.samples, before, after, tuple(found), tuple(kept))


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

    def __init__(self, draft: Draft, source: Iterable[Sample]) -> None:
        self.sites: list[tuple[str, str]] = []  # kind and name, in the order of the switches
        self._draft = draft
        model = self._build(draft)
        specs = tuple(spec for spec in model_inputs(model) if spec.name != _SWITCHES)
        self._session = open_session(model, optimise=True)
        taken = list(itertools.islice(source, SAMPLES))
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
        worst = _CLEAN_DB
        for signal, noise in zip(*self._compare(switches), strict=True):
            worst = min(worst, (sqnr_db(signal, noise) or _CLEAN_DB) if np.isfinite(noise) else -_CLEAN_DB)
        return worst

    def _compare(self, switches: npt.NDArray[np.bool_]) -> tuple[list[float], list[float]]:
        signals, noises = [0.0] * len(self._reference[0]), [0.0] * len(self._reference[0])
        for wanted, found in zip(self._reference, self._run(switches), strict=True):
            for at, (a, b) in enumerate(zip(wanted, found, strict=True)):
                signals[at] += float(np.sum(a.astype(np.float64) ** 2))
                noises[at] += float(np.sum((a.astype(np.float64) - b.astype(np.float64)) ** 2))
        return signals, noises

    def _run(self, switches: npt.NDArray[np.bool_]) -> list[list[npt.NDArray[np.generic]]]:
        found = [self._session.run(None, {**feeds, _SWITCHES: switches}) for feeds in self._feeds]
        return [[v for v in values if isinstance(v, np.ndarray) and v.dtype.kind == "f"] for values in found]

    def _build(self, draft: Draft) -> onnx.ModelProto:
        graph = draft.graph.copy()
        switches = gs.Variable(_SWITCHES, dtype=np.bool_)
        tensors, nodes = graph.tensors(), {node.name: node for node in graph.nodes}
        for name, grid in activation_grids(draft.placement, draft.bounds, draft.number).items():
            tensor, readers = tensors[name], draft.placement.uses[name]
            ends = [node for node in list(tensor.outputs) if readers is None or node.name in readers]
            chosen = gs.Variable(f"{name}/switched", dtype=tensor.dtype, shape=tensor.shape)
            scale = gs.Constant(f"{name}/s", np.asarray(grid.scale, tensor.dtype or np.float32))
            zero = gs.Constant(f"{name}/z", np.asarray(grid.zero_point, grid.dtype))
            codes, rounded = gs.Variable(f"{name}/q", dtype=np.dtype(grid.dtype)), gs.Variable(f"{name}/d")
            rounded.dtype = tensor.dtype
            graph.nodes.append(gs.Node("QuantizeLinear", f"{name}/Q", inputs=[tensor, scale, zero], outputs=[codes]))
            graph.nodes.append(gs.Node("DequantizeLinear", f"{name}/D", inputs=[codes, scale, zero], outputs=[rounded]))
            for node in ends:
                node.inputs = [chosen if operand is tensor else operand for operand in node.inputs]
            self._switch(graph, switches, ("tensor", name), rounded, tensor, chosen)
        for name in sorted(draft.placement.chosen):
            node = nodes[name]
            weight, bias = layer_operands(node)
            node.attrs.pop("alpha", None)
            node.attrs.pop("beta", None)
            axis = None if shares_scale(node, draft.number) else weight_axis(node)
            scales = weight_scales(weight, axis, draft.number.weight_max)
            steps = scales.reshape([-1 if at == axis else 1 for at in range(weight.ndim)] if scales.ndim else ())
            values = quantize_symmetric(weight, scales, axis, draft.number.weight_max) * steps
            chosen = gs.Variable(f"{name}/weight/switched", dtype=weight.dtype, shape=weight.shape)
            exact = gs.Constant(f"{name}/weight/exact", np.ascontiguousarray(weight))
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
