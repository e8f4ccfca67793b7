"""``MatMul`` with constant weights and the ``Add`` of its bias, as one ``Gemm``.

A product of more axes is brought to rows and back, ``(B, T, K) -> (B T, K)``, only where that is asked for: quantising
for ONNX Runtime needs it, and nothing else gains. TensorRT-RTX fuses the Add into the product in either spelling; the
Reshapes cost it nothing in a BERT and one or two kernels in a feed-forward network, in float and in INT8.
``benchmarks/gemm_forms.py`` builds both and prints kernels and bytes; rerun it for a newer compiler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.dead import drop_detached
from relu_deploy.passes.edit import Names, detach, dims, float_values, is_standard, pinned_names, set_input
from relu_deploy.passes.linear import bias_behind
from relu_deploy.report import PassReport, Skip


def matmul_add_to_gemm(graph: gs.Graph, *, rows: bool = False) -> PassReport:
    """Join the product of two matrices and the addition of its bias.

    Args:
        graph: Ranks known where they can be. Edited in place.
        rows: Take products of more than two axes too, between two Reshapes.

    Returns:
        Changed: the MatMul nodes that became Gemm, under their names. Skipped: products with a bias that stay.
    """
    return products_to_gemm(graph, rows=rows).report


@dataclasses.dataclass(frozen=True)
class Gemms:
    """What became of the products of a graph.

    Attributes:
        report: Changed and skipped products.
        aliases: New tensor -> tensor of the graph as it was that holds the same values.
    """

    report: PassReport
    aliases: dict[str, str]


def products_to_gemm(graph: gs.Graph, *, rows: bool) -> Gemms:
    """As :func:`matmul_add_to_gemm`; ``rows`` takes products of more than two axes too.

    A ReLU behind the bias comes to stand before the second Reshape, so that it still fuses with the Gemm. Where more
    than one leading axis is open there is no such Reshape.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    maker = _Rows(graph)
    for node in list(graph.nodes):  # Reshapes are put behind all of them
        if (add := bias_behind(node, maker.pinned)) is None:
            continue
        shape = dims(node.inputs[0]) or ()
        if reason := _reason_to_stay(shape, rows=rows):
            skipped.append(Skip(node.name, reason))
            continue
        maker.join(node, add, shape)
        changed.append(node.name)
    drop_detached(graph)
    if maker.aliases:
        graph.toposort(mode="nodes")
    return Gemms(PassReport("matmul_add_to_gemm", tuple(changed), tuple(skipped)), maker.aliases)


def _reason_to_stay(shape: Sequence[int | None], *, rows: bool) -> str:
    """Why a product of this input stays; empty where it can become a Gemm."""
    if not shape:
        return "the rank of its input is not known"
    if len(shape) == 2:
        return ""
    if len(shape) < 2 or not rows:
        return f"its input has {len(shape)} axes: as a Gemm between two Reshapes it would not be faster"
    if sum(size is None for size in shape[:-1]) > 1 or 0 in shape[:-1]:
        return "more than one leading axis of its input is open, or one is empty"
    return ""


class _Rows:
    """Writes the new nodes of one graph."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph, self.names, self.pinned = graph, Names(graph), pinned_names(graph)
        self.aliases: dict[str, str] = {}

    def join(self, node: gs.Node, add: gs.Node, shape: Sequence[int | None]) -> None:
        """Make the MatMul a Gemm, between two Reshapes where its input has more than two axes."""
        weight, output = node.inputs[1], add.outputs[0]
        bias = float_values(next(t for t in add.inputs if t is not node.outputs[0]))
        assert bias is not None  # noqa: S101 - bias_behind has looked
        detach(add)
        if len(shape) > 2:
            set_input(node, 0, self._rows_of(node.name, node.inputs[0], weight.shape[0]))
            output = self._made_from_rows(node.name, output, (*shape[:-1], weight.shape[1]))
        set_input(node, 2, self.names.constant(f"{node.name}/C", bias.reshape(-1)))
        node.op = "Gemm"
        node.outputs.clear()
        node.outputs.append(output)

    def _rows_of(self, name: str, data: gs.Tensor, width: int) -> gs.Variable:
        rows = gs.Variable(self.names.new(f"{name}/rows"), dtype=data.dtype, shape=[None, width])
        self._reshape(f"{name}/rows", data, rows, [-1, width])
        self.aliases[rows.name] = data.name
        return rows

    def _made_from_rows(self, name: str, output: gs.Tensor, shape: Sequence[int | None]) -> gs.Variable:
        """Rows that ``output`` is the Reshape of; or, where a ReLU takes it, those that the ReLU then takes."""
        last = made = gs.Variable(self.names.new(f"{name}/columns"), dtype=output.dtype, shape=[None, shape[-1]])
        self.aliases[last.name] = output.name
        relu = output.outputs[0] if len(output.outputs) == 1 and output.name not in self.pinned else None
        if relu is not None and _is_clipping(relu, output):
            clipped = relu.outputs[0]
            made = gs.Variable(self.names.new(f"{relu.name}/columns"), dtype=clipped.dtype, shape=[None, shape[-1]])
            self.aliases[made.name] = clipped.name
            set_input(relu, 0, last)
            relu.outputs.clear()
            relu.outputs.append(made)
            output = clipped
        self._reshape(f"{name}/back", made, output, [-1 if size is None else size for size in shape])
        return last

    def _reshape(self, name: str, data: gs.Tensor, output: gs.Tensor, shape: Sequence[int]) -> None:
        target = self.names.constant(f"{name}/shape", np.asarray(shape, np.int64))
        self.graph.nodes.append(gs.Node("Reshape", f"{name}/Reshape", inputs=[data, target], outputs=[output]))


def _is_clipping(node: gs.Node, data: gs.Tensor) -> bool:
    """Whether a node is Relu, or Clip with constant bounds: it does the same to rows."""
    if not is_standard(node, "Relu", "Clip") or node.inputs[0] is not data:
        return False
    return all(tensor.is_empty() or isinstance(tensor, gs.Constant) for tensor in node.inputs[1:])
