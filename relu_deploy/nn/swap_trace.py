"""One run of a model on an example: in which order its activations run, on what, and what becomes of their results."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from relu_deploy.errors import TrainingError
from relu_deploy.nn.swap_known import SMOOTH_CALLS

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]

# Their result holds the same activations: what was said about the input is true of the output.
_SAME: Final = frozenset(
    [
        "dropout",
        "dropout1d",
        "dropout2d",
        "feature_dropout",
        "reshape",
        "view",
        "flatten",
        "permute",
        "transpose",
        "contiguous",
        "to",
        "float",
        "chunk",
        "split",
        "squeeze",
        "unsqueeze",
        "__getitem__",
        "clone",
        "detach",
        "type_as",
        "half",
        "bfloat16",
        "unbind",
        "swapaxes",
        "movedim",
        "alpha_dropout",
    ]
)
_BOUNDED: Final = frozenset(["sigmoid", "hardsigmoid", "tanh", "softmax", "hardtanh"])
_POOLS: Final = frozenset(
    [
        "mean",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool2d",
        "amax",
        "avg_pool2d",
    ]
)
_MULTIPLY: Final = frozenset(["mul", "__mul__", "__rmul__", "multiply", "mul_", "__imul__"])


@dataclasses.dataclass
class Visit:
    """What one place of an activation did in the run.

    Attributes:
        shapes: Shape of its input at each call.
        axes: Channel axis of its input at each call.
        gate: Its result was multiplied with another live tensor of the same size.
        squeeze: It works on a pooled vector that ends as a factor of a larger tensor.
        head: Its result is an output of the model.
    """

    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    axes: list[int] = dataclasses.field(default_factory=list)
    gate: bool = False
    squeeze: bool = False
    head: bool = False


@dataclasses.dataclass
class _Facts:
    """About one tensor: the activations it is the result of, the pooled ones it depends on, where it comes from."""

    results: frozenset[str] = frozenset()
    pooled_sites: frozenset[str] = frozenset()
    pooled: bool = False
    bounded: bool = False
    from_input: bool = False
    from_weights: bool = False
    axis: int | None = None


class Probe(nn.Module):
    """Stands in for an activation during the run, computes it, and tells the watcher."""

    def __init__(self, act: nn.Module, name: str, watcher: Watcher) -> None:
        super().__init__()
        self.act, self.site = act, name
        self.watch = [watcher]  # in a list, for it is no part of the module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The activation itself."""
        return self.watch[0].at_site(self.site, self.act, x, *args, **kwargs)


class Watcher(TorchFunctionMode):
    """Follows tensors through torch functions; ``visits`` is in order of execution."""

    def __init__(self) -> None:
        super().__init__()
        self.visits: dict[str, Visit] = {}
        self._facts: dict[int, tuple[Tensor, _Facts]] = {}  # the tensor is held, so that its id stays its own
        self._inside = False

    def start(self, value: object) -> None:
        """Mark the tensors of the example as inputs."""
        for tensor in _tensors(value):
            self._set(tensor, _Facts(from_input=True))

    def finish(self, output: object) -> None:
        """Mark the activations whose results are outputs."""
        for tensor in _tensors(output):
            for name in self._get(tensor).results:
                self.visits[name].head = True

    def at_site(self, name: str, act: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run an activation and note its input."""
        facts = self._get(x)
        visit = self.visits.setdefault(name, Visit())
        visit.shapes.append(tuple(x.shape))
        visit.axes.append(_axis(x, facts))
        self._inside = True
        try:
            y: Tensor = act(x, *args, **kwargs)
        finally:
            self._inside = False
        tiny = facts.pooled and (x.dim() < 4 or all(size == 1 for size in x.shape[2:]))  # N, C, H, W
        sites = facts.pooled_sites | ({name} if tiny else set())
        self._set(y, dataclasses.replace(facts, results=frozenset({name}), pooled_sites=sites, bounded=False))
        return y

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function and follow its tensors."""
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            name = getattr(func, "__name__", "")
            inputs = list(_tensors((args, kwargs or {})))
            if name in _MULTIPLY:
                self._multiplied(inputs)
            facts = self._derived(name, inputs)
            for tensor in _tensors(result):
                pools = name in _POOLS and (len(inputs) == 1) and _is_pooled(tensor, inputs[0])
                self._set(tensor, dataclasses.replace(facts, pooled=True) if pools else facts)
        return result

    def _multiplied(self, inputs: list[Tensor]) -> None:
        if len(inputs) != 2 or inputs[0] is inputs[1]:  # a product has two factors
            return
        for one, other in (inputs, inputs[::-1]):
            mine, its = self._get(one), self._get(other)
            live = its.from_input and its.from_weights
            if live and other.shape == one.shape and not its.bounded and not its.pooled_sites:
                for name in mine.results:
                    self.visits[name].gate = True
            if live and mine.pooled and not its.pooled:
                for name in mine.pooled_sites:
                    self.visits[name].squeeze = True

    def _derived(self, name: str, inputs: list[Tensor]) -> _Facts:
        all_facts = [self._get(tensor) for tensor in inputs]
        data = [f for t, f in zip(inputs, all_facts, strict=True) if f.from_input]
        same = name in _SAME
        return _Facts(
            results=frozenset().union(*(f.results for f in data)) if same else frozenset(),
            pooled_sites=frozenset().union(*(f.pooled_sites for f in data if f.pooled)),
            pooled=bool(data) and all(f.pooled for f in data),
            bounded=name in _BOUNDED or (same and any(f.bounded for f in data)),
            from_input=bool(data),
            from_weights=any(f.from_weights or isinstance(t, nn.Parameter)
                             for t, f in zip(inputs, all_facts, strict=True)),
            axis=_made_axis(name, data),
        )  # fmt: skip

    def _get(self, tensor: Tensor) -> _Facts:
        return self._facts.get(id(tensor), (tensor, _Facts()))[1]

    def _set(self, tensor: Tensor, facts: _Facts) -> None:
        self._facts[id(tensor)] = (tensor, facts)


class SmoothCalls(TorchFunctionMode):
    """Lists smooth functions that run outside the new modules: ``(function, file:line, module)`` of each."""

    def __init__(self, model: nn.Module, new: list[nn.Module]) -> None:
        super().__init__()
        self.found: dict[tuple[str, str, str], None] = {}
        self._model, self._new = model, {id(module) for module in new}
        self._stack: list[tuple[str, bool]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The mode, with hooks that know which module runs."""
        handles = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entered(name, id(module) in self._new)))
            handles.append(module.register_forward_hook(lambda *_: self._left(), always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function and note a smooth one."""
        name = getattr(func, "__name__", "").rstrip("_") or str(func)
        inside = any(new for _, new in self._stack)
        if (name in SMOOTH_CALLS or getattr(func, "__name__", "") in SMOOTH_CALLS) and not inside:
            owner = self._stack[-1][0] if self._stack else ""
            self.found[(name, _user_frame(), owner)] = None
        return func(*args, **(kwargs or {}))

    def _entered(self, name: str, new: bool) -> Callable[..., None]:
        return lambda *_: self._stack.append((name, new))

    def _left(self) -> None:
        self._stack.pop()


def run(model: nn.Module, example: Example) -> Any:
    """Call a model with an example (tensor, tuple of arguments, dict of keywords); evaluation mode, no gradients.

    Raises:
        TrainingError: the model does not take the example.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if isinstance(example, Mapping):
                return model(**example)
            return model(*example) if isinstance(example, tuple) else model(example)
    except (TypeError, RuntimeError, ValueError, KeyError, IndexError) as error:
        raise TrainingError(
            f"{type(model).__name__} does not run on the example: {error}",
            hint="a tensor, a tuple of arguments, or a dict of keyword arguments, as the model is called",
        ) from error
    finally:
        for module, training in modes:
            module.training = training


def largest_difference(one: object, other: object) -> float:
    """Largest absolute difference of the floating outputs, relative to the largest value; inf for other shapes."""
    pairs = [list(_tensors(value)) for value in (one, other)]
    if [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
        return float("inf")
    worst = 0.0
    for a, b in zip(*pairs, strict=True):
        if a.numel() and a.is_floating_point():
            scale = max(1.0, float(a.detach().abs().max()))
            worst = max(worst, float((a.detach().double() - b.detach().double()).abs().max()) / scale)
    return worst


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(list(vars(value).values()))


def _axis(x: Tensor, facts: _Facts) -> int:
    if facts.axis is not None and x.dim() > 2:  # (N, C) has one answer
        return facts.axis
    return 1 if x.dim() >= 4 else -1  # images are (N, C, H, W), tokens (N, T, C)


def _made_axis(name: str, data: list[_Facts]) -> int | None:
    if name.startswith(("conv", "batch_norm", "group_norm", "instance_norm", "max_pool", "avg_pool")):
        return 1
    if name in {"linear", "layer_norm", "rms_norm", "matmul", "addmm"}:
        return -1
    if name in {"permute", "transpose", "reshape", "view", "flatten", "movedim", "swapaxes"}:
        return None
    return data[0].axis if data else None


def _is_pooled(tensor: Tensor, source: Tensor) -> bool:
    if tensor.dim() < source.dim():
        return True
    return tensor.dim() > 2 and all(size == 1 for size in tensor.shape[2:])  # after N and C


def _user_frame() -> str:
    """``file:line`` of the innermost caller outside torch and this file."""
    frame: types.FrameType | None = sys._getframe(1)  # noqa: SLF001  # walking the stack has no public name
    root = str(Path(torch.__file__).parent)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith(root):
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
