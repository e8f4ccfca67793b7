"""The places of a model where an activation stands, and how another module is put there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from relu_deploy.nn import swap_known
from relu_deploy.nn.swap_calls import Call, find_calls, plan_of, rewritten_class
from relu_deploy.report import Skip


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an activation stands: valid for every copy of the model.

    Attributes:
        name: ``parent.child``; unique in the model.
        parent: Name of the module that holds it; ``"model"`` is the root.
        child: Submodule, attribute, or the submodule to be made for a call.
        how: ``module``, ``attribute``, ``item`` (of a dict or list in an attribute) or ``call``.
        kind: Name of the function or class.
        make: An equivalent module; None where a module stands already.
        key: Of an item.
        call: Of a call.
    """

    name: str
    parent: str
    child: str
    how: str
    kind: str
    make: Callable[[], nn.Module] | None = None
    key: Any = None
    call: Call | None = None

    @property
    def where(self) -> str:
        """``file:line`` of a call."""
        return self.call.where if self.call else ""

    def old(self, root: nn.Module) -> nn.Module:
        """The module that stands here, or one that computes the same."""
        if self.make is not None:
            return self.make()
        return root.get_submodule(self.parent)._modules[self.child]  # type: ignore[return-value]  # noqa: SLF001


def find_places(
    root: nn.Module, kinds: Sequence[type[nn.Module]], reason: Callable[[nn.Module, str], str | None]
) -> tuple[list[Place], list[Skip]]:
    """Every place of a smooth activation under ``root`` (whose only child is ``model``), and what is left at sight.

    Args:
        root: Of a copy.
        kinds: Classes to replace.
        reason: For a module: None to take it, a reason to leave it, empty if it is no activation.
    """
    places: list[Place] = []
    left: list[Skip] = []
    inside: set[nn.Module] = set()  # activations' own parts are no places
    for parent_name, parent in list(root.named_modules()):
        if parent in inside:
            continue
        # named_children would show a module that stands in two places only once.
        for child_name, child in list(parent._modules.items()):  # noqa: SLF001
            why = "" if child is None else reason(child, short(f"{parent_name}.{child_name}"))
            if child is None or why == "":
                continue
            inside.update(child.modules())
            name = short(f"{parent_name}.{child_name}")
            if why is not None:
                left.append(Skip(name, why))
            else:
                places.append(Place(name, parent_name, child_name, "module", type(child).__name__))
        if parent is not root:
            found = (*_attributes(parent_name, parent), *_calls(parent_name, parent, left))
            places += [place for place in found if place.make and isinstance(place.make(), tuple(kinds))]
    return places, left


def short(name: str) -> str:
    """The name without the root's."""
    return name.removeprefix(".").removeprefix("model").removeprefix(".")


def install(root: nn.Module, modules: Sequence[tuple[Place, nn.Module]]) -> None:
    """Put modules in their places; a function becomes a submodule, a call is redirected to one."""
    edits: dict[str, list[tuple[Call, str]]] = {}
    for place, module in modules:
        parent = root.get_submodule(place.parent)
        if place.how == "attribute":
            vars(parent).pop(place.child, None)
        if place.how == "item":
            _install_item(parent, place, module)
        elif place.how == "module":
            parent._modules[place.child] = module  # noqa: SLF001
        else:
            parent.add_module(place.child, module)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Its fast path trusts this flag and would go on computing the old function in evaluation.
            parent.activation_relu_or_gelu = int(type(module) is nn.ReLU)
        if place.call is not None:
            edits.setdefault(place.parent, []).append((place.call, place.child))
    for name, calls in edits.items():
        parent = root.get_submodule(name)
        parent.__class__ = rewritten_class(type(parent), plan_of(calls))


def _install_item(parent: nn.Module, place: Place, module: nn.Module) -> None:
    attribute, key = place.key
    old = vars(parent)[attribute]
    new = dict(old) if isinstance(old, dict) else list(old)
    new[key] = module
    vars(parent)[attribute] = new if isinstance(old, (dict, list)) else tuple(new)
    parent.add_module(place.child, module)


def _attributes(parent_name: str, parent: nn.Module) -> Iterator[Place]:
    """Functions in attributes (``self.act = F.gelu``) and in dicts and lists there."""
    for attribute, value in vars(parent).items():
        if attribute.startswith("_") or attribute == "forward":
            continue
        known = swap_known.recognise_function(value)
        if known is not None:
            yield Place(
                short(f"{parent_name}.{attribute}"), parent_name, attribute, "attribute", known.name, known.make
            )
        items = value.items() if type(value) is dict else enumerate(value) if isinstance(value, (list, tuple)) else ()
        for key, item in items:
            known = swap_known.recognise_function(item)
            if known is not None:
                child = re.sub(r"\W", "_", f"{attribute}_{key}")
                yield Place(short(f"{parent_name}.{child}"), parent_name, child, "item", known.name, known.make,
                            key=(attribute, key))  # fmt: skip


def _calls(parent_name: str, parent: nn.Module, left: list[Skip]) -> Iterator[Place]:
    if isinstance(parent, torch.jit.ScriptModule):
        return
    calls, refusals = find_calls(parent)
    left += [Skip(short(f"{parent_name}.{refusal.method}"), refusal.reason) for refusal in refusals]
    counts: dict[str, int] = {}
    for call in calls:
        number = counts.get(call.method, 0)
        counts[call.method] = number + 1
        child = f"{call.method.strip('_')}_act{number}"
        while hasattr(parent, child):
            child += "_"
        if any(other.method == call.method and other.owner is not call.owner for other in calls):
            child = f"{call.owner.__name__}_{child}"
        yield Place(short(f"{parent_name}.{child}"), parent_name, child, "call", call.known.name, call.known.make,
                    call=call)  # fmt: skip
