"""What a placement of INT8 is, and the words and questions that all rules of placement share."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
RECURRENT_OPS = ("LSTM", "GRU", "RNN")
# Move or select values and do not compute: input and output share one scale, so no requantisation is left.
MOVING_OPS = (
    "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Identity",
    "Resize", "DepthToSpace", "SpaceToDepth", "Expand", "Tile",
)  # fmt: skip
# What stands for an activation that will be a table of codes; no file ever holds one.
STAND_IN = "Table"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear layer and what becomes of it.

    Attributes:
        name: Node.
        op: Conv, ConvTranspose, Gemm or MatMul.
        int8: Whether it is given INT8 inputs.
        reason: Why it stays float; empty when it does not.
        live: It is a product of two tensors that are computed at run time, and so has no weights to store.
    """

    name: str
    op: str
    int8: bool
    reason: str = ""
    live: bool = False


@dataclasses.dataclass(frozen=True)
class Placement:
    """The plan that :mod:`relu_deploy.int8.write` carries out.

    Attributes:
        uses: Tensor name -> names of the nodes that read its INT8 form; ``None`` means every reader.
        groups: Sets of tensor names that share one scale; only sets of two and more.
        layers: Every linear layer of the graph.
        constants: Names of nodes whose constant operand is quantised like an activation.
        coded: ``ort``: names of the tensors that integer kernels make, so that no float of them exists.
    """

    uses: dict[str, frozenset[str] | None]
    groups: tuple[frozenset[str], ...]
    layers: tuple[Layer, ...]
    constants: frozenset[str] = frozenset()
    coded: frozenset[str] = frozenset()

    @property
    def chosen(self) -> frozenset[str]:
        """Names of the linear layers with weights that become INT8."""
        return frozenset(layer.name for layer in self.layers if layer.int8 and not layer.live)

    def takes_codes(self, node: gs.Node) -> bool:
        """``ort``: whether a node reads the codes of what it reads, and not a float."""
        if any(layer.name == node.name for layer in self.layers):
            return node.name in self.chosen
        # A ReLU behind an integer operator is the clipping of its quantiser.
        clipped = [reader.outputs[0] for tensor in node.outputs for reader in tensor.outputs if is_clipping(reader)]
        made = [tensor.name for tensor in (*node.outputs, *clipped) if tensor.name in self.uses]
        return bool(made) and (node.op in MOVING_OPS or node.op == "Concat" or any(n in self.coded for n in made))


def fused_relu(tensor: gs.Variable, graph: gs.Graph) -> gs.Node | None:
    """The ReLU or Clip(0, .) that is the only reader of a tensor, so that both become one quantised output."""
    if len(tensor.outputs) != 1 or any(tensor is output for output in graph.outputs):
        return None
    if not tensor.inputs or tensor.inputs[0].op in MOVING_OPS:  # its codes are its input's: it has no quantiser to clip
        return None
    reader = tensor.outputs[0]
    return reader if is_clipping(reader) and reader.inputs[0] is tensor else None


def is_clipping(node: gs.Node) -> bool:
    """Whether a node is Relu, or Clip with lower bound 0: what an unsigned quantiser does by itself."""
    return node.op == "Relu" or (node.op == "Clip" and clip_bounds(node)[0] == 0)


def clip_bounds(node: gs.Node) -> tuple[float | None, float | None]:
    """Constant bounds of a Clip; ``-inf``/``inf`` where absent, None where computed at run time."""
    bounds: list[float | None] = []
    for index, (attribute, default) in enumerate((("min", -np.inf), ("max", np.inf)), start=1):
        operand = node.inputs[index] if len(node.inputs) > index else None
        if operand is None or (isinstance(operand, gs.Variable) and operand.is_empty()):
            bounds.append(float(node.attrs.get(attribute, default)))
        else:
            bounds.append(float(operand.values) if isinstance(operand, gs.Constant) else None)
    return bounds[0], bounds[1]
