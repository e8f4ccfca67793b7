"""Replace an ``If`` whose condition is known by the branch that is taken."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from relu_deploy.passes.edit import Names, RefusedError, array_values, is_standard, pinned_names, redirect
from relu_deploy.report import PassReport, Skip


def inline_branches(graph: gs.Graph) -> PassReport:
    """Take the nodes of the branch out of every ``If`` with a constant condition; the other branch goes.

    Tensors of the branch are renamed after the ``If``, since branches of several may use the same names. What it hands
    on without having made it, an Identity hands on.

    Args:
        graph: Sorted topologically, conditions folded to constants. Edited in place.

    Returns:
        Changed: the If nodes that were replaced. Skipped: those with a constant condition that stay, with reasons.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    inliner = _Inliner(graph)
    waiting, done = list(reversed(graph.nodes)), []
    while waiting:
        node = waiting.pop()
        condition = array_values(node.inputs[0]) if is_standard(node, "If") else None
        try:
            inner = [] if condition is None else inliner.inline(node, taken=bool(condition.reshape(-1)[0]))
        except RefusedError as error:
            skipped.append(Skip(node.name, str(error)))
            condition = None
        if condition is None:
            done.append(node)
            continue
        waiting.extend(reversed(inner))  # there may be an If among them
        changed.append(node.name)
    if changed:
        graph.nodes[:] = done
    return PassReport("inline_branches", tuple(changed), tuple(skipped))


class _Inliner:
    """Knows the tensors of one graph, the inlined ones too."""

    def __init__(self, graph: gs.Graph) -> None:
        self._names = Names(graph)
        self._known = {tensor.name: tensor for tensor in (*graph.inputs, *graph.tensors().values())}
        self._around = {id(tensor) for tensor in self._known.values()}

    def inline(self, node: gs.Node, *, taken: bool) -> list[gs.Node]:
        """Nodes that do what the taken branch does; the If and its other branch are cut off."""
        branch, other = (node.attrs[name] for name in ("then_branch", "else_branch")[:: 1 if taken else -1])
        sources = [self._source(tensor) for tensor in branch.outputs]
        own = {id(t): t for t in _own_tensors(branch) if id(t) not in self._around}
        if {t.name for t in own.values()} & {name for inner in branch.subgraphs() for name in pinned_names(inner)}:
            raise RefusedError("a graph inside the taken branch hands a tensor of the branch on by its name")
        for tensor in own.values():
            _own_values(tensor)
            tensor.name = self._names.new(f"{node.name}/{tensor.name}")
            self._known[tensor.name] = tensor
            self._around.add(id(tensor))
        _forget(other)
        targets = list(node.outputs)
        node.inputs.clear()
        node.outputs.clear()
        identities = []
        for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
            if id(source) in own and source.inputs and sum(other is source for other in sources) == 1:
                _take_over(source, target)
            else:  # an initializer, a tensor of the graph around it, or one that is handed on twice
                identities.append(gs.Node("Identity", f"{node.name}/{number}", inputs=[source], outputs=[target]))
        return [*branch.nodes, *identities]

    def _source(self, output: gs.Tensor) -> gs.Tensor:
        """What makes an output of a branch: a node of it, its own initializer, or the graph around it by that name."""
        if output.inputs or isinstance(output, gs.Constant):
            return output
        if output.name not in self._known:
            raise RefusedError(f"nothing makes the output {output.name} of the taken branch")
        return self._known[output.name]


def _take_over(source: gs.Tensor, target: gs.Tensor) -> None:
    """Let the node that makes ``source`` make ``target``, and readers of the one read the other."""
    producer = source.inputs[0]
    producer.outputs[next(i for i, tensor in enumerate(producer.outputs) if tensor is source)] = target
    redirect(source, target)


def _own_tensors(branch: gs.Graph) -> list[gs.Tensor]:
    """Tensors that are made in a branch, and initializers that it reads; not those of graphs inside it."""
    tensors = [t for node in branch.nodes for t in node.outputs]
    tensors += [t for t in branch.tensors().values() if isinstance(t, gs.Constant)]
    return [t for t in {id(t): t for t in tensors}.values() if not t.is_empty()]


def _own_values(tensor: gs.Tensor) -> None:
    """Part an initializer from the file's own, which graphsurgeon would rename along with it when it writes."""
    if isinstance(tensor, gs.Constant) and type(tensor._values) is LazyValues:  # noqa: SLF001 - there is no other way in
        copied = onnx.TensorProto()
        copied.CopyFrom(tensor._values.tensor)  # noqa: SLF001
        tensor._values = LazyValues(copied)  # noqa: SLF001


def _forget(branch: gs.Graph) -> None:
    """Nothing in a branch reads the graph around it any more."""
    for inner in (branch, *branch.subgraphs(recursive=True)):
        for node in inner.nodes:
            node.inputs.clear()
