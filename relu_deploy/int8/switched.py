"""A network with a switch at every place that is rounded: what a quantiser stands on, and the weights of the layers.

One session measures any combination, without quantising again. A switch is an If: what is off costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from calib.batches import batches
from calib.inputs import Sample, model_inputs
from calib.session import open_session
from relu_deploy import graph as files
from relu_deploy.int8.draft import Draft
from relu_deploy.int8.heads import heads
from relu_deploy.int8.placement import MOVING_OPS
from relu_deploy.int8.rounded import nearest, round_tensor, rounded_tensors
from relu_deploy.int8.settle import steady
from relu_deploy.int8.store import layer_operands

_SWITCHES = "relu_deploy/switches"


class Switched:
    """The network with a switch at every rounding, and its outputs with all of them off.

    Args:
        draft: Not changed.
        samples: What it is run on.

    Raises:
        RUNTIME_ERRORS: it does not run.
    """

    def __init__(self, draft: Draft, samples: Sequence[Sample]) -> None:
        self.sites: list[tuple[str, str]] = []  # kind and name, in the order of the switches
        self._draft, self._heads = draft, heads(draft)
        model = self._build(draft)
        specs = tuple(spec for spec in model_inputs(model) if spec.name != _SWITCHES)
        self._session = open_session(model, optimise=True)
        self._feeds = [dict(batch.feeds) for batch in batches(samples, specs, batch_size=1)]
        self.samples = len(samples)
        self._reference = self._run(np.zeros(len(self.sites), dtype=bool), len(self._feeds))

    def of_layer(self, name: str) -> npt.NDArray[np.bool_]:
        """Switches with one layer in INT8: its weights, and the tensors that it reads and makes."""
        node = next(node for node in self._draft.graph.nodes if node.name == name)
        around = {("tensor", tensor.name) for tensor in (*_before(node), *_behind(node))} | {("weight", name)}
        return np.array([site in around for site in self.sites], dtype=bool)

    def without(self, layers: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Switches with all but some layers in INT8: what none of the others reads is not rounded either."""
        nodes = {node.name: node for node in self._draft.graph.nodes}
        chosen = self._draft.placement.chosen - set(layers)
        on = set(self.sites) - {("weight", name) for name in layers}
        for name in layers:
            for tensor in (*_behind(nodes[name])[::-1], *_before(nodes[name])):
                moved = (out.name for node in tensor.outputs if node.op in MOVING_OPS for out in node.outputs)
                if not any(node.name in chosen for node in tensor.outputs) and on.isdisjoint(
                    ("tensor", m) for m in moved
                ):
                    on.discard(("tensor", tensor.name))
        return np.array([site in on for site in self.sites], dtype=bool)

    def sqnr(self, switches: npt.NDArray[np.bool_], samples: int) -> float:
        """Signal over noise of the worst output on the first samples, decibels."""
        found = self._run(switches, samples)
        return self._heads.worst_db(self._reference[: len(found)], found)

    def _run(self, switches: npt.NDArray[np.bool_], samples: int) -> list[dict[str, Any]]:
        names = [output.name for output in self._session.get_outputs()]
        found = [self._session.run(names, {**feeds, _SWITCHES: switches}) for feeds in self._feeds[:samples]]
        return [dict(zip(names, values, strict=True)) for values in found]

    def _build(self, draft: Draft) -> onnx.ModelProto:
        graph = self._heads.graph.copy()
        switches = gs.Variable(_SWITCHES, dtype=np.bool_)
        nodes = {node.name: node for node in graph.nodes}
        first: list[gs.Node] = []
        behind: dict[int, list[gs.Node]] = {}
        for tensor, grid, ends in rounded_tensors(draft, graph):
            chosen = gs.Variable(f"{tensor.name}/switched", dtype=tensor.dtype, shape=tensor.shape)
            on = gs.Graph(opset=graph.opset)
            on.outputs = [round_tensor(on, tensor, grid)]
            for node in ends:
                node.inputs = [chosen if operand is tensor else operand for operand in node.inputs]
            maker = id(tensor.inputs[0]) if tensor.inputs else None
            place = first if maker is None else behind.setdefault(maker, [])
            place.extend(self._switch(switches, ("tensor", tensor.name), on, _same(tensor, graph.opset), chosen))
        for name, stored in nearest(draft).items():
            if name not in nodes:
                continue
            node, exact = nodes[name], layer_operands(nodes[name])[0]
            chosen = gs.Variable(f"{name}/weight/switched", dtype=exact.dtype, shape=exact.shape)
            both = (gs.Constant(f"{name}/weight/{kind}", np.ascontiguousarray(values)) for kind, values in (
                ("rounded", steady(node, stored.weight, draft.centres.get(name)).astype(exact.dtype)), ("exact", exact)
            ))  # fmt: skip
            on, off = (_same(values, graph.opset) for values in both)
            node.inputs[1] = chosen
            node.attrs.pop("alpha", None)
            first.extend(self._switch(switches, ("weight", name), on, off, chosen))
        switches.shape = (len(self.sites),)
        graph.inputs.append(switches)
        # Put where they belong: sorting does not see what a branch reads.
        graph.nodes = [*first, *(new for node in graph.nodes for new in (node, *behind.get(id(node), ())))]
        return files.export_graph(graph, draft.source)

    def _switch(
        self, switches: gs.Variable, site: tuple[str, str], on: gs.Graph, off: gs.Graph, result: gs.Variable
    ) -> list[gs.Node]:
        number = len(self.sites)
        self.sites.append(site)
        flag = gs.Variable(f"{_SWITCHES}/{number}", dtype=np.bool_, shape=())
        at = gs.Constant(f"{_SWITCHES}/at/{number}", np.asarray(number, np.int64))
        branches = {"then_branch": on, "else_branch": off}
        return [
            gs.Node("Gather", f"{_SWITCHES}/take/{number}", inputs=[switches, at], outputs=[flag]),
            gs.Node("If", f"{_SWITCHES}/on/{number}", attrs=branches, inputs=[flag], outputs=[result]),
        ]


def _same(tensor: gs.Tensor, opset: int) -> gs.Graph:
    """A branch that gives a tensor of the graph around it."""
    same = gs.Variable(f"{tensor.name}/same", dtype=tensor.dtype or np.float32)
    branch = gs.Graph([gs.Node("Identity", same.name, inputs=[tensor], outputs=[same])], opset=opset)
    branch.outputs = [same]
    return branch


def _before(node: gs.Node) -> list[gs.Variable]:
    """What a layer reads, and what that was moved from: a quantiser stands on each of them."""
    found = [node.inputs[0]]
    while (
        found[-1].inputs
        and (maker := found[-1].inputs[0]).op in MOVING_OPS
        and isinstance(maker.inputs[0], gs.Variable)
    ):
        found.append(maker.inputs[0])
    return found


def _behind(node: gs.Node) -> list[gs.Variable]:
    """What a layer makes, and what the ReLU fused with it makes."""
    made = node.outputs[0]
    return [made, *(reader.outputs[0] for reader in made.outputs if reader.op in ("Relu", "Clip"))]
