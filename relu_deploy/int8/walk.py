"""A network computed piece by piece, while its later layers may still change: each node runs once for each sample.

What is learned of a layer depends on the layers before it, as they were decided. Running the network from its inputs
for every layer would cost the square of its depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from calib.graph import uses
from calib.model import empty_like
from calib.session import open_session
from relu_deploy.errors import QuantizationError

Array = npt.NDArray[Any]


class Walk:
    """A network and samples, on the way from its inputs to its outputs.

    Args:
        model: Checked, sorted topologically. Not changed.
        feeds: Arrays by input name, for each sample.
    """

    def __init__(self, model: onnx.ModelProto, feeds: Sequence[Mapping[str, Array]]) -> None:
        self._model = model
        self._nodes = list(model.graph.node)
        self._reads = [frozenset(name for name in uses(node) if name) for node in self._nodes]
        self._maker = {name: at for at, node in enumerate(self._nodes) for name in node.output if name}
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._sparse = {sparse.values.name: sparse for sparse in model.graph.sparse_initializer}
        self._outputs = {value.name for value in model.graph.output}
        self._done: set[int] = set()
        self._values: dict[str, list[Array]] = {
            value.name: [feed[value.name] for feed in feeds] for value in model.graph.input if value.name in feeds[0]
        }
        self._count = len(feeds)

    @property
    def held(self) -> int:
        """Bytes of the values that are kept for what is still to come."""
        return sum(value.nbytes for values in self._values.values() for value in values)

    def replace(self, name: str, values: Array) -> None:
        """Change an initializer that nothing computed so far has read; it keeps its type.

        Raises:
            KeyError: there is no such initializer.
        """
        if name not in self._stored:
            raise KeyError(name)
        if any(name in self._reads[at] for at in self._done):
            raise QuantizationError(f"{name} was read already")
        kind = onnx.helper.tensor_dtype_to_np_dtype(self._stored[name].data_type)
        self._stored[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(values, kind), name)

    def fetch(self, name: str) -> list[Array]:
        """Values of a tensor, one array a sample; computes what it depends on and was not computed yet.

        Raises:
            RUNTIME_ERRORS: the network does not run.
            QuantizationError: the walk would have to carry something else than a tensor.
        """
        if name not in self._values:
            self._advance(name)
        return self._values[name]

    def _advance(self, name: str) -> None:
        """Run what a tensor depends on, and forget what nothing will read any more."""
        part = self._needed(name)
        made = {output for at in part for output in self._nodes[at].output if output}
        self._done |= set(part)
        left = [at for at in range(len(self._nodes)) if at not in self._done]
        wanted = {name, *self._outputs}.union(*(self._reads[at] for at in left))
        kept = sorted(made & wanted)
        inputs = sorted(set().union(*(self._reads[at] for at in part)) & self._values.keys())
        session = open_session(self._part(part, inputs, kept))
        found: list[list[Array]] = [
            session.run(kept, {given: self._values[given][at] for given in inputs}) for at in range(self._count)
        ]
        for at, new in enumerate(kept):
            self._values[new] = [values[at] for values in found]
            if not all(isinstance(value, np.ndarray) for value in self._values[new]):
                raise QuantizationError(f"{new} is not a tensor")
        self._values = {old: values for old, values in self._values.items() if old in wanted}

    def _needed(self, name: str) -> list[int]:
        """Places of the nodes that a tensor still waits for, in the network's order."""
        found: set[int] = set()
        queue = [name]
        while queue:
            at = self._maker.get(queue.pop())
            if at is not None and at not in found and at not in self._done:
                found.add(at)
                queue.extend(read for read in self._reads[at] if read not in self._values)
        return sorted(found)

    def _part(self, places: Iterable[int], inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
        """A model of some nodes. The types of outputs are left for the runtime to infer."""
        part = empty_like(self._model)
        part.graph.node.extend(self._nodes[at] for at in places)
        for name in inputs:
            kind = onnx.helper.np_dtype_to_tensor_dtype(self._values[name][0].dtype)
            part.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
        read = set().union(*(self._reads[at] for at in places))
        part.graph.initializer.extend(self._stored[name] for name in sorted(read & self._stored.keys()))
        part.graph.sparse_initializer.extend(self._sparse[name] for name in sorted(read & self._sparse.keys()))
        part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        return part
