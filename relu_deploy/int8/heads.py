"""What of a network's outputs is measured: parts that mean one thing each, and no probabilities.

An output that puts boxes in pixels beside scores from 0 to 1 is measured part by part: of the whole, only the boxes
would be seen. And where a classifier is sure, its probabilities are 0 and 1 whatever INT8 does, and calibration data is
often of that kind; what decides the samples on which it is not sure is seen in front of the Softmax. Of what is chosen
by values (ArgMax, NonMaxSuppression) the floats are measured that it is chosen from and by.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.int8.choices import chosen_tensors, comparable
from relu_deploy.int8.draft import Draft
from relu_deploy.int8.drift import sqnr_db
from relu_deploy.int8.place import MOVING_OPS
from relu_deploy.passes.edit import is_standard

# ReduceMean takes its axes as an input from this opset on.
_AXES_INPUT = 18
# Past this a rounding cannot be seen at the outputs at all.
CLEAN_DB = 200.0


@dataclasses.dataclass(frozen=True)
class Heads:
    """A network whose outputs are the parts of its outputs.

    Attributes:
        graph: Computes them.
        parts: Names of outputs that belong together, as those of several levels of a pyramid.
    """

    graph: gs.Graph
    parts: tuple[tuple[str, ...], ...]

    def worst_db(self, wanted: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> float:
        """Signal over noise of the worst part over samples, decibels; ``-CLEAN_DB`` where it is not finite.

        Args:
            wanted: Arrays of the float network by output name, for each sample. Where they hold infinity, as a mask
                around scores does, there is nothing to be compared.
            found: Those of another one.
        """
        worst = CLEAN_DB
        for names in self.parts:
            signal, noise = 0.0, 0.0
            for (a, b), name in itertools.product(zip(wanted, found, strict=True), names):
                seen = ~np.isinf(a[name])
                exact = a[name][seen].astype(np.float64)
                signal += _power(exact)
                noise += _power(exact - b[name][seen])
            ratio = sqnr_db(signal, noise) if np.isfinite(noise) else -CLEAN_DB
            worst = min(worst, CLEAN_DB if ratio is None else ratio)
        return worst


def heads(draft: Draft) -> Heads:
    """Take the outputs of a draft apart.

    A Concat at the end is followed to what it joins; where it joins other Concats, what has the same place in each of
    them belongs together. A last Softmax or LogSoftmax is replaced by its input, less the mean over its axis: a number
    added to all scores changes nothing behind it.
    """
    graph = draft.graph.copy()
    chosen = chosen_tensors(graph)
    floats = [found for tensor in graph.outputs for found in comparable(tensor, chosen)]
    outputs = {id(tensor) for tensor in graph.outputs}
    parts: list[tuple[str, ...]] = []
    made: dict[str, gs.Variable] = {}
    for output in floats:
        for kind in _kinds(output):
            names = []
            for tensor in kind:
                node = tensor.inputs[0] if tensor.inputs else None
                soft = node is not None and is_standard(node, "Softmax", "LogSoftmax")
                bare = soft and tensor.name not in draft.placement.uses and _ends(tensor, outputs)
                name = f"{tensor.name}/part"
                if name not in made:
                    made[name] = gs.Variable(name, dtype=tensor.dtype or output.dtype)
                    _append(graph, node if bare else None, tensor, made[name])
                names.append(name)
            parts.append(tuple(names))
    graph.outputs = list(made.values())
    graph.cleanup()
    graph.toposort()
    return Heads(graph, tuple(dict.fromkeys(parts)))


def _kinds(tensor: gs.Tensor) -> list[list[gs.Tensor]]:
    """What is put together in a tensor, grouped by what belongs together."""
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or not node.inputs:
        return [[tensor]]
    if is_standard(node, *MOVING_OPS, "Cast") and len(node.outputs) == 1 and isinstance(node.inputs[0], gs.Variable):
        kinds = _kinds(node.inputs[0])
        return kinds if _joined(kinds) or _softmax(kinds) else [[tensor]]
    if not is_standard(node, "Concat") or not all(isinstance(part, gs.Variable) for part in node.inputs):
        return [[tensor]]
    below = [_kinds(part) for part in node.inputs]
    if all(len(kinds) > 1 and len(kinds) == len(below[0]) for kinds in below):
        return [[part for same in group for part in same] for group in zip(*below, strict=True)]
    return [kind for kinds in below for kind in kinds]


def _joined(kinds: list[list[gs.Tensor]]) -> bool:
    return len(kinds) > 1 or len(kinds[0]) > 1


def _softmax(kinds: list[list[gs.Tensor]]) -> bool:
    return any(part.inputs and is_standard(part.inputs[0], "Softmax", "LogSoftmax") for part in kinds[0])


def _ends(tensor: gs.Variable, outputs: set[int]) -> bool:
    """Whether nothing but an output of the network comes of a tensor."""
    readers = [node for node in tensor.outputs if not node.name.endswith("/part")]
    if not readers:
        return id(tensor) in outputs
    ways = (*MOVING_OPS, "Cast", "Concat")
    return all(is_standard(node, *ways) and _ends(node.outputs[0], outputs) for node in readers)


def _append(graph: gs.Graph, softmax: gs.Node | None, tensor: gs.Variable, part: gs.Variable) -> None:
    """Make a part: the tensor itself, or the centred scores of the Softmax that it comes from."""
    if softmax is None:
        graph.nodes.append(gs.Node("Identity", part.name, inputs=[tensor], outputs=[part]))
        return
    axis = int(softmax.attrs.get("axis", -1))
    mean = gs.Variable(f"{part.name}/mean", dtype=part.dtype)
    inputs: list[gs.Tensor] = [softmax.inputs[0]]
    attrs: dict[str, Any] = {"keepdims": 1, "axes": [axis]}
    if graph.opset >= _AXES_INPUT:
        inputs.append(gs.Constant(f"{part.name}/axis", np.asarray(attrs.pop("axes"), np.int64)))
    graph.nodes.append(gs.Node("ReduceMean", mean.name, attrs=attrs, inputs=inputs, outputs=[mean]))
    graph.nodes.append(gs.Node("Sub", part.name, inputs=[softmax.inputs[0], mean], outputs=[part]))


def _power(values: npt.NDArray[Any]) -> float:
    return float(np.sum(values.astype(np.float64) ** 2))
