"""A network run in stages, so that its activations are never all in memory at once.

To be looked at, a tensor has to be an output, and the runtime keeps outputs to the end of a run: 280 tensors of a
detector are 80 MB a sample, those of a large segmentation network are gigabytes. So the network is cut, in the order of
its nodes, into models of a bounded size of outputs; each hands on what later ones need. A small network is one stage.
What a node computes does not depend on where the cuts are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from calib.graph import activations, uses
from calib.model import empty_like
from calib.session import Session

# Outputs of one stage, as measured on the first batch. One tensor larger than that is a stage of its own.
STAGE_BYTES = 1 << 28
# What Python can hand from one session to the next: tensors of numpy's own types.
_TYPES = {
    "tensor(float)": TensorProto.FLOAT, "tensor(float16)": TensorProto.FLOAT16, "tensor(double)": TensorProto.DOUBLE,
    "tensor(int64)": TensorProto.INT64, "tensor(int32)": TensorProto.INT32, "tensor(int16)": TensorProto.INT16,
    "tensor(int8)": TensorProto.INT8, "tensor(uint64)": TensorProto.UINT64, "tensor(uint32)": TensorProto.UINT32,
    "tensor(uint16)": TensorProto.UINT16, "tensor(uint8)": TensorProto.UINT8, "tensor(bool)": TensorProto.BOOL,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Stage:
    """Part of a network.

    Attributes:
        session: Runs it.
        reads: What it is fed.
        measured: Outputs to look at, in the network's order.
        hands_on: Outputs that later stages read.
        done_with: What no later stage reads.
    """

    session: Session
    reads: tuple[str, ...]
    measured: tuple[str, ...]
    hands_on: tuple[str, ...]
    done_with: frozenset[str]


class Stages:
    """A network of which some tensors are looked at.

    Args:
        model: The whole network.
        measured: Tensors to look at, made by nodes.
        sizes: Bytes of each, on the first batch.
        types: Of all activations, as the runtime calls them.
        threads: Of the runtime, for each stage.
        weights: What the network only names, see :mod:`calib.weights`.
        shapes: Of what nodes make, as the runtime inferred them. With these it may choose the layout of tensors, see
            :class:`calib.session.Session`; it does so by what it knows of them, which has to be the same wherever the
            network is cut. None: the network runs as it is written.
        aside: Tensors that are made of others for nothing but an output.

    Raises:
        CalibrationError: the runtime cannot load it.
    """

    def __init__(
        self, model: onnx.ModelProto, measured: Iterable[str], sizes: Mapping[str, int], types: Mapping[str, str],
        *, threads: int | None, weights: Mapping[str, onnx.TensorProto] | None = None,
        shapes: Mapping[str, Sequence[Any]] | None = None, aside: Container[str] = (),
    ) -> None:  # fmt: skip
        wanted = set(measured)
        nodes = list(model.graph.node)
        parts = _cut(model, nodes, {name: sizes[name] for name in wanted}, types)
        read = [frozenset(name for index in part for name in uses(nodes[index])) for part in parts]
        self._stages: list[_Stage] = []
        for place, part in enumerate(parts):
            made = dict.fromkeys(name for index in part for name in nodes[index].output if name)
            later = frozenset().union(*read[place + 1 :])
            reads = tuple(name for name in types if name in read[place] and name not in made)
            hands_on = tuple(name for name in made if name in later)
            looked_at = tuple(name for name in made if name in wanted)
            inputs = [_declared(model, name, types[name], (shapes or {}).get(name)) for name in reads]
            chosen = _first_made_last(_with_constants(model, nodes, part), aside)
            cut = _part(model, chosen, inputs, (*looked_at, *hands_on))
            session = Session(cut, threads=threads, optimise=shapes is not None, weights=weights)
            self._stages.append(_Stage(session, reads, looked_at, hands_on, frozenset(types) - later))

    def __len__(self) -> int:
        return len(self._stages)

    def run(self, feeds: Mapping[str, NDArray[Any]], what: str) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield each measured tensor with its values, in the network's order.

        Raises:
            CalibrationError: an operator failed; names it, and ``what`` was fed.
        """
        values = dict(feeds)
        for stage in self._stages:
            names = list(dict.fromkeys((*stage.measured, *stage.hands_on)))
            if not names:
                continue
            found = dict(zip(names, stage.session.run(names, {n: values[n] for n in stage.reads}, what), strict=True))
            values |= {name: found[name] for name in stage.hands_on}
            for name in stage.measured:
                yield name, found.pop(name) if name not in values else found[name]
            values = {name: value for name, value in values.items() if name not in stage.done_with}


def _cut(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], sizes: Mapping[str, int], types: Mapping[str, str]
) -> list[list[int]]:
    """Places of the nodes that compute with data, in stages of ``STAGE_BYTES`` of measured outputs."""
    live = set(activations(model))
    computing = [index for index, node in enumerate(nodes) if not live.isdisjoint(node.output)]
    last_use = {name: index for index in computing for name in uses(nodes[index])}
    parts: list[list[int]] = [[]]
    size, crossing = 0, set[str]()
    for index in computing:
        needed = sum(sizes.get(name, 0) for name in nodes[index].output)
        if size and needed and size + needed > STAGE_BYTES and all(types.get(name) in _TYPES for name in crossing):
            parts.append([])
            size = 0
        parts[-1].append(index)
        size += needed
        crossing.update(name for name in nodes[index].output if last_use.get(name, -1) > index)
        crossing.difference_update([name for name in uses(nodes[index]) if last_use[name] == index])
    return parts


def _first_made_last(nodes: list[onnx.NodeProto], aside: Container[str]) -> list[onnx.NodeProto]:
    """Put what makes such tensors behind all others (but for what they end in), run by run, the first run last.

    When the runtime optimises, it goes back from the last node to what that needs, and makes its own nodes in that
    order, in which they are run: so a tensor is reduced right after it was made, while it is in the cache, and freed.
    """
    runs: list[list[onnx.NodeProto]] = []
    others: list[onnx.NodeProto] = []
    for is_aside, run in itertools.groupby(nodes, lambda node: bool(node.output) and node.output[0] in aside):
        if is_aside:
            runs.insert(0, list(run))
        else:
            others += run
    ends = [any(name in aside for name in node.input) for node in others]
    before = [node for node, is_end in zip(others, ends, strict=True) if not is_end]
    return [*before, *itertools.chain(*runs), *itertools.compress(others, ends)]


def _declared(model: onnx.ModelProto, name: str, kind: str, shape: Sequence[Any] | None) -> onnx.ValueInfoProto:
    """A stage's input: one of the network's as it is there, or a tensor with what is known of its shape."""
    given = (value for value in model.graph.input if value.name == name)
    return next(given, None) or onnx.helper.make_tensor_value_info(name, _TYPES[kind], shape or None)


def _part(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: Iterable[str]
) -> onnx.ModelProto:
    """A model of some nodes. The types of outputs are left for the runtime to infer."""
    part = empty_like(model)
    part.graph.node.extend(nodes)
    part.graph.input.extend(inputs)
    used = {name for node in nodes for name in uses(node)}
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in used)
    part.graph.sparse_initializer.extend(s for s in model.graph.sparse_initializer if s.values.name in used)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(outputs))
    return part


def _with_constants(model: onnx.ModelProto, nodes: list[onnx.NodeProto], part: list[int]) -> list[onnx.NodeProto]:
    """The nodes of a part and those that compute constants for them, in the network's order."""
    live = set(activations(model))
    chosen = set(part)
    needed = {name for index in part for name in uses(nodes[index])}
    for index in range(len(nodes) - 1, -1, -1):
        if live.isdisjoint(nodes[index].output) and not needed.isdisjoint(nodes[index].output):
            chosen.add(index)
            needed.update(uses(nodes[index]))
    return [nodes[index] for index in sorted(chosen)]
