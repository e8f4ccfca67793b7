"""A factor and an offset for each channel of what INT8 layers of TensorRT-RTX read.

No INT8 layer of TensorRT-RTX 1.7 writes codes: what the next one reads is quantised by a kernel of its own, together
with whatever elementwise arithmetic stands before (docs/placement.md). Arithmetic in front of a quantiser therefore
costs no kernel, and next to no bytes. With ``x = y / g + c``, exactly,

    W x + b  =  (W / g) y + (b + W c),    y = (x - c) g

and ``y`` is rounded instead of ``x``: its channels fill the codes evenly, and all codes of a symmetric type, half of
which would stand empty where ``x`` is never negative (ReLU) or hardly (GELU, HardSwish). The factors weigh the rounding
of ``y`` against that of the layers' weights, by the noise model of :mod:`relu_deploy.int8.fuse_noise`. Where a layer
pads its input with zeros it gets factors only, since ``c`` is not what it pads with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from calib.ranges import Ranges
from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.fuse_factors import alive_channels, choose_first
from relu_deploy.int8.fuse_noise import Array, Product, Span
from relu_deploy.int8.granularity import shares_scale
from relu_deploy.int8.islands import channels_of
from relu_deploy.int8.islands_absorb import shaped
from relu_deploy.int8.islands_terms import inlet_terms
from relu_deploy.int8.placement import MOVING_OPS, Placement
from relu_deploy.passes.edit import Names, RefusedError, dims, pinned_names, producer_of, set_input
from relu_deploy.passes.linear import Affine, Layer, before, bias_behind, read_layer, write
from relu_deploy.report import PassReport, Skip

Bounds = dict[str, tuple[float, float]]
_CODES = 127
# Float16 holds it, and its inverse as a normal number.
LARGEST_FACTOR = 4096.0
# Every value goes to exactly one place: what stands before them is looked at.
_SAME_VALUES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity")


@dataclasses.dataclass(frozen=True)
class EvenInputs:
    """What was done.

    Attributes:
        report: Changed: names of the tensors, with what was done to them. Skipped: those left alone.
        centres: Layer -> by how much the channels of what it now reads were moved, ``(C,)``, in units of that: what
            :func:`relu_deploy.int8.settle.settle` needs once the weights are codes.
    """

    report: PassReport
    centres: dict[str, Array]


def even_inputs(
    graph: gs.Graph, placement: Placement, ranges: Ranges, bounds: Bounds, number: NumberFormat
) -> EvenInputs:
    """Scale and centre the channels of what layers read, in place.

    Args:
        graph: What ``placement`` was made from. Sorted again afterwards.
        placement: For ``tensorrt-rtx``.
        ranges: Measured by channel. Tensors that are not in it are left alone.
        bounds: Tensor name -> range of its quantiser; gets those of the new tensors.
        number: The target's format.
    """
    work = _Work(graph, placement, ranges, bounds, number)
    changed, skipped, notes = [], [], {}
    for name in placement.uses:
        try:
            note = work.tensor(name)
        except RefusedError as refused:
            skipped.append(Skip(name, str(refused)))
            continue
        if note:
            changed.append(name)
            notes[name] = note
    graph.toposort()
    return EvenInputs(PassReport("even_inputs", tuple(changed), tuple(skipped), notes), work.centres)


class _Work:
    """The pass while it runs."""

    def __init__(
        self, graph: gs.Graph, placement: Placement, ranges: Ranges, bounds: Bounds, number: NumberFormat
    ) -> None:
        self.graph, self.placement, self.ranges, self.bounds, self.number = graph, placement, ranges, bounds, number
        self.names, self.tensors, self.pinned = Names(graph), graph.tensors(), pinned_names(graph)
        self.centres: dict[str, Array] = {}

    def tensor(self, name: str) -> str:
        """Change one tensor; what was done, or nothing where nothing is gained."""
        tensor, readers = self.tensors[name], self.placement.uses[name]
        nodes = [node for node in tensor.outputs if readers is None or node.name in readers]
        if any(node.name not in self.placement.chosen for node in nodes):
            raise RefusedError("an operator without weights reads its codes")
        _refuse_unfused(tensor)
        layers = [read_layer(node, bias_behind(node, self.pinned)) for node in nodes]
        low, high, power = self._seen(name, layers)
        centre = np.where(_may_centre(layers), (low + high) / 2, 0.0)
        # An offset below half a code changes nothing but the constant's place among float16's small numbers.
        centre[np.abs(centre) < (high - low) / (4 * _CODES)] = 0
        reach = np.maximum(high - centre, centre - low)
        factors = choose_first(self._terms(layers, low, high, power, reach), reach > 0)
        if (factors == 1).all() and not centre.any():
            return ""
        # Any multiple of the factors is as good; this one leaves the largest value what it was.
        factors = np.minimum(factors * max(-low.min(), high.max()) / (reach * factors).max(), LARGEST_FACTOR)
        self._rewrite(tensor, layers, Affine(factors, centre))
        inner = layers[0].node.inputs[0].name
        self.bounds[inner] = float(((low - centre) * factors).min()), float(((high - centre) * factors).max())
        return f"{factors.size} channels scaled" + (", and centred" if centre.any() else "")

    def _seen(self, name: str, layers: Sequence[Layer]) -> tuple[Array, Array, Array]:
        """Extremes and mean square of each channel, as far as the quantiser's range goes."""
        measured, shape = self.ranges.tensors.get(name), dims(self.tensors[name])
        found = None if measured is None else channels_of(measured, self.ranges.samples)
        if measured is None or found is None or shape is None:
            raise RefusedError("its range was not measured by channel")
        if any(measured.axis != (1 if layer.node.op == "Conv" else len(shape) - 1) for layer in layers):
            raise RefusedError("its channels lie on another axis")
        first, last = self.bounds[name]
        low, high = np.clip(found.low, min(first, 0.0), 0.0), np.clip(found.high, 0.0, max(last, 0.0))
        if not (high > low).any():
            raise RefusedError("it is always 0")
        alive = alive_channels(np.maximum(-low, high))
        return np.where(alive, low, 0), np.where(alive, high, 0), np.where(alive, found.power, 0)

    def _terms(
        self, layers: Sequence[Layer], low: Array, high: Array, power: Array, reach: Array
    ) -> list[Product | Span]:
        terms: list[Product | Span] = []
        shared = iter([shares_scale(layer.node, self.number) for layer in layers])
        for term in inlet_terms(layers, low, high, power, self.number):
            if isinstance(term, Span):
                terms.append(dataclasses.replace(term, below=reach, above=reach, codes=_CODES, signed=True))
            else:
                terms.append(dataclasses.replace(term, shared=next(shared)))
        return terms

    def _rewrite(self, tensor: gs.Variable, layers: Sequence[Layer], affine: Affine) -> None:
        """Compute ``y`` of a tensor, and let the layers read that."""
        inverse = Affine(1 / affine.factor, affine.offset)
        for layer, weights in [(layer, before(layer, inverse)) for layer in layers]:
            write(layer, weights, self.names, "even")
        source = tensor
        for op, values in (("Add", -affine.offset), ("Mul", affine.factor)):
            if (values != (0 if op == "Add" else 1)).any():
                name = f"{tensor.name}/{'centred' if op == 'Add' else 'even'}"
                result = gs.Variable(self.names.new(name), dtype=tensor.dtype, shape=tensor.shape)
                stored = self.names.constant(
                    f"{name}/constant", shaped(values, layers[0]).astype(layers[0].weight.dtype)
                )
                self.graph.nodes.append(gs.Node(op, self.names.new(f"{name}/{op}"), {}, [source, stored], [result]))
                source = result
        for layer in layers:
            set_input(layer.node, 0, source)
            if affine.offset.any():
                self.centres[layer.node.name] = affine.offset * affine.factor


def _refuse_unfused(tensor: gs.Variable) -> None:
    """Refuse where the quantiser is not in a kernel that computes what it reads.

    The compiler moves it through what selects or joins values, and into its kernel of attention; arithmetic stays
    behind and becomes a kernel, or moves a float.
    """
    maker = producer_of(tensor)
    while maker is not None and maker.op in _SAME_VALUES:
        maker = producer_of(maker.inputs[0])
    if maker is not None and (maker.op in MOVING_OPS or maker.op == "Concat"):
        raise RefusedError(f"its quantiser moves through {maker.op} {maker.name}")
    if maker is not None and maker.op == "MatMul" and not any(isinstance(t, gs.Constant) for t in maker.inputs):
        raise RefusedError(f"its quantiser is part of the kernel of attention that {maker.name} is in")


def _may_centre(layers: Sequence[Layer]) -> bool:
    """Whether all layers take an offset: none pads, and each has a place for what the offset adds."""
    for layer in layers:
        node = layer.node
        padded = any(node.attrs.get("pads", ())) or str(node.attrs.get("auto_pad", "")).startswith("SAME")
        if node.op not in ("Conv", "Gemm", "MatMul") or (node.op == "Conv" and padded):
            return False
        if node.op == "Gemm" and node.attrs.get("beta", 1.0) == 0:
            return False
        if node.op == "MatMul" and layer.bias_add is None and layer.rank != 2:
            return False
    return True
