"""Spell a DY-ReLU as ONNX Runtime computes it best: each line one BatchNormalization, its coefficients one product.

There, every operator is a pass over memory. ``a_k x + b_k`` with an a and b for each sample and channel is what a
BatchNormalization of ``(1, N C, positions)`` computes in one pass, mean 0 and variance 1, where Mul and Add take two;
and all lines read one flattened x, so that it is dequantised once and not for every reader. Coefficients that are
slices of one vector, each with its own range and start (``1 + 1.0 (2 s - 1)``, ``0.5 (2 s - 1)``), are scaled and
shifted before they are sliced. What it buys is measured by ``benchmarks/dyrelu.py``; TensorRT-RTX fuses the usual
spelling into one kernel by itself.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from relu_deploy.passes.coefficients import Affine, affine_of
from relu_deploy.passes.dyrelu import DyReluSite, find_dyrelu
from relu_deploy.passes.edit import Names, RefusedError
from relu_deploy.passes.region import onnx_type
from relu_deploy.report import PassReport, Skip


def spell_dyrelu(graph: gs.Graph) -> PassReport:
    """Rewrite every DY-ReLU with its channels on axis 1; equal up to rounding.

    Args:
        graph: Sorted topologically, with types and shapes. Edited in place; nodes that nobody needs any more are left
            for ``cleanup``, and new ones are at the end: sort it.

    Returns:
        Changed: the nodes that make the output of a unit; notes say what it is now. Skipped: units of another layout or
        spelling.
    """
    names = Names(graph)
    decided = [(site, _decide(graph, site, names)) for site in find_dyrelu(graph)]
    notes = {
        site.name: f"DY-ReLU-{site.variant}, each of its {site.pieces} lines one BatchNormalization"
        for site, skip in decided
        if skip is None
    }
    return PassReport("spell_dyrelu", tuple(notes), tuple(skip for _, skip in decided if skip is not None), notes)


def _decide(graph: gs.Graph, site: DyReluSite, names: Names) -> Skip | None:
    try:
        unit = _Unit(graph, site, names)
        unit.check()
    except RefusedError as error:
        return Skip(site.name, f"DY-ReLU-{site.variant} keeps its spelling: {error}")
    unit.write()
    return None


@dataclasses.dataclass
class _Unit:
    """One DY-ReLU, read and written."""

    graph: gs.Graph
    site: DyReluSite
    names: Names

    def check(self) -> None:
        """Refuse what has no such form."""
        x = self.site.input
        if onnx_type(x) != TensorProto.FLOAT:
            raise RefusedError("it is not float32")
        if x.shape is None or len(x.shape) < 3 or not isinstance(x.shape[1], int):
            raise RefusedError("its input is not known to have channels and positions")
        for tensor in self.coefficients():
            if tensor is None or tensor.shape is None or len(tensor.shape) != len(x.shape):
                raise RefusedError("its lines are not spelled as a_k x + b_k")
            if tensor.shape[1] not in (1, x.shape[1]) or any(size != 1 for size in tensor.shape[2:]):
                raise RefusedError("its channels are not on axis 1")
        if len({tensor.shape[1] for tensor in self.coefficients() if tensor is not None}) > 1:
            raise RefusedError("some of its coefficients are one a channel and others one a sample")

    def coefficients(self) -> list[gs.Tensor | None]:
        """Slopes, then offsets."""
        return [*self.site.slopes, *self.site.offsets]

    @property
    def groups(self) -> int:
        """Functions of a sample: the channels, or 1."""
        return int(self.site.slopes[0].shape[1])  # type: ignore[union-attr]  # checked before

    def write(self) -> None:
        """Put the new nodes in place of the maximum."""
        old = self.site.output.inputs[0]
        if self.site.attention is not None:
            old = next(t for t in old.inputs if t is not self.site.attention).inputs[0]
        (result,) = old.outputs
        vectors = self._vectors()
        zeros, ones = self._moments(vectors[0])
        rows = self._rows()
        pieces = self.site.pieces
        lines = [
            self._add(
                "BatchNormalization", f"line_{k}", [rows, vectors[k], vectors[pieces + k], zeros, ones], epsilon=0.0
            )
            for k in range(pieces)
        ]
        largest = self._add("Max", "largest", lines)
        old.outputs.clear()
        node = gs.Node("Reshape", f"{self.site.name}/shaped", inputs=[largest, self._shape()], outputs=[result])
        self.graph.nodes.append(node)

    def _vectors(self) -> list[gs.Tensor]:
        """Every coefficient as (N groups,)."""
        parts = [tensor for tensor in self.coefficients() if tensor is not None]
        common = self._common([affine_of(tensor) for tensor in parts])
        parts = common or [_before_layout(tensor) for tensor in parts]
        return [self._add("Reshape", f"vector_{i}", [part, self._ints("flat", -1)]) for i, part in enumerate(parts)]

    def _common(self, found: list[Affine | None]) -> list[gs.Tensor] | None:
        """Slices (N, groups) of one scaled and shifted vector; None where the coefficients are not that."""
        known = [part for part in found if part is not None]
        if len(known) < len(found) or any(part.source is not known[0].source for part in known):
            return None
        scale, shift, places = (
            np.concatenate([getattr(part, name).reshape(-1) for part in known]) for name in ("scale", "shift", "places")
        )
        if not np.array_equal(places, np.arange(known[0].length)):
            return None
        scaled = self._add("Mul", "scaled", [known[0].source, self._floats("scale", scale)])
        shifted = self._add("Add", "shifted", [scaled, self._floats("shift", shift)])
        outputs = [gs.Variable(self.names.new(f"{self.site.name}/part_{i}"), np.float32) for i in range(len(known))]
        sizes = [self.groups] * len(known)
        inputs: list[gs.Tensor] = [shifted]
        attributes: dict[str, object] = {"axis": 1}
        if self.graph.opset >= 13:
            inputs.append(self._ints("sizes", *sizes))
        else:
            attributes["split"] = sizes
        self.graph.nodes.append(gs.Node("Split", f"{self.site.name}/parts", attributes, inputs, outputs))
        return outputs

    def _moments(self, like: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
        """Mean 0 and variance 1, as many as there are rows."""
        batch = self.site.input.shape[0]
        if isinstance(batch, int):
            count = batch * self.groups
            return self._floats("zeros", np.zeros(count)), self._floats("ones", np.ones(count))
        zeros = self._add("Sub", "zeros", [like, like])
        return zeros, self._add("Exp", "ones", [zeros])

    def _rows(self) -> gs.Tensor:
        """X as (1, N groups, the rest)."""
        x, axis = self.site.input, 2 if self.groups > 1 or self.site.input.shape[1] == 1 else 1
        flat = self._add("Flatten", "flat_rows", [x], axis=axis)
        if self.graph.opset >= 13:
            return self._add("Unsqueeze", "rows", [flat, self._ints("front", 0)])
        return self._add("Unsqueeze", "rows", [flat], axes=[0])

    def _shape(self) -> gs.Tensor:
        """The shape of x: a constant where one axis at most is open."""
        x = self.site.input
        if sum(not isinstance(size, int) for size in x.shape) <= 1:
            return self._ints("shape", *(size if isinstance(size, int) else -1 for size in x.shape))
        return self._add("Shape", "shape", [x], dtype=np.int64)

    def _add(self, op: str, name: str, inputs: list[gs.Tensor], dtype: type = np.float32, **attrs: object) -> gs.Tensor:
        output = gs.Variable(self.names.new(f"{self.site.name}/{name}/out"), dtype=dtype)
        self.graph.nodes.append(gs.Node(op, f"{self.site.name}/{name}", attrs, inputs, [output]))
        return output

    def _ints(self, name: str, *values: int) -> gs.Constant:
        return self.names.constant(f"{self.site.name}/{name}", np.array(values, np.int64))

    def _floats(self, name: str, values: np.ndarray) -> gs.Constant:
        return self.names.constant(f"{self.site.name}/{name}", values.astype(np.float32))


def _before_layout(tensor: gs.Tensor) -> gs.Tensor:
    """What a coefficient was before it was given the axes of x: its elements are the same, in the same order."""
    while len(tensor.inputs) == 1 and tensor.inputs[0].op in ("Reshape", "Unsqueeze"):
        tensor = tensor.inputs[0].inputs[0]
    return tensor
