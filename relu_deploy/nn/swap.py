"""Replace the smooth activations of a model, and say which were replaced and which were left.

Modules, functions in attributes, and calls or formulas in methods are found by the function they compute (see
:mod:`relu_deploy.nn.swap_known`); with an example the model is run, which tells activations from gates and heads.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from relu_deploy.errors import TrainingError
from relu_deploy.nn.swap_config import update_configs
from relu_deploy.nn.swap_known import GATE_CALLS, QuickGELU, recognise_module
from relu_deploy.nn.swap_sites import Place, find_places, install
from relu_deploy.nn.swap_trace import Example, Probe, SmoothCalls, Visit, Watcher, largest_difference, run
from relu_deploy.report import Skip, to_json

# Smooth functions that stand where ReLU could stand: after a linear layer, with an identity-like positive side.
SMOOTH: tuple[type[nn.Module], ...] = (
    nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU, nn.CELU, nn.SELU,
)  # fmt: skip

# What else torch calls an activation, with the reason why it is left where it is.
_LEFT: dict[type[nn.Module], str] = {
    nn.Sigmoid: "a gate or a head, not an activation after a linear layer",
    nn.Hardsigmoid: "a gate or a head, not an activation after a linear layer",
    nn.Tanh: "a gate or a head: bounded on both sides, so ReLU does not stand in for it",
    nn.Hardtanh: "bounded on both sides, so ReLU does not stand in for it",
    nn.GLU: "a gate with two live inputs",
    nn.Softmax: "a normalisation, not elementwise",
    nn.LogSoftmax: "a normalisation, not elementwise",
    nn.LogSigmoid: "a head, not an activation after a linear layer",
    nn.Softplus: "often keeps a quantity positive; name it in kinds to replace it",
    nn.LeakyReLU: "piecewise linear already; name it in kinds to replace it",
    nn.PReLU: "piecewise linear already, with trained slopes; name it in kinds to replace it",
    nn.RReLU: "piecewise linear already; name it in kinds to replace it",
    nn.ReLU6: "a clipped ReLU, which INT8 takes as it is",
    nn.ReLU: "already ReLU",
}


@dataclasses.dataclass(frozen=True)
class Site:
    """What a replacement is told about its place.

    Attributes:
        name: Where it stands.
        kind: The function that stands there: ``GELU``, ``SiLU``, or the class of the module.
        old: The module that stands there, or one that computes the same.
        channels: Size of the channel axis; None without an example, or if calls differ.
        channel_axis: 1 behind a convolution, -1 behind a linear layer; None as above.
        spatial: Sizes of the input besides batch and channels at the first call; None without an example.
    """

    name: str
    kind: str
    old: nn.Module
    channels: int | None = None
    channel_axis: int | None = None
    spatial: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class PerSite:
    """A replacement that needs to know its place; handed to :func:`replace_activations` as ``new``.

    A class of its own, so that a function of one module stays just that, and nothing is guessed from signatures.

    Attributes:
        make: Called once a place with its :class:`Site`.
    """

    make: Callable[[Site], nn.Module]


def channelwise(make: Callable[[int, int], nn.Module]) -> PerSite:
    """Units with parameters a channel: ``make(channels, channel_axis)`` for each place.

    >>> units = channelwise(lambda channels, axis: nn.PReLU(channels))
    >>> net = nn.Sequential(nn.Linear(2, 5), nn.SiLU(), nn.Linear(5, 1))
    >>> replace_activations(net, units, example=torch.zeros(3, 2))[0][1]
    PReLU(num_parameters=5)

    Raises:
        TrainingError: when called for a place whose channels are unknown.
    """

    def made(site: Site) -> nn.Module:
        if site.channels is None or site.channel_axis is None:
            raise TrainingError(
                f"the channels of {site.name!r} are unknown, or differ between its calls",
                hint="give example=, an input of the model; keep= leaves a place",
            )
        return make(site.channels, site.channel_axis)

    return PerSite(made)


@dataclasses.dataclass(frozen=True)
class Replacement:
    """One activation that was replaced.

    Attributes:
        name: Where it stands in the model, as in ``named_modules``; ``""`` is the model itself.
        old: Class or function that stood there.
        new: Class that stands there now.
        how: ``module``, ``attribute`` or ``item`` (a function held by the module) or ``call`` (in a method's source).
        where: ``file:line`` of a call.
    """

    name: str
    old: str
    new: str
    how: str = "module"
    where: str = ""


@dataclasses.dataclass(frozen=True)
class SwapReport:
    """What :func:`replace_activations` did.

    Attributes:
        replaced: Every place where a new activation stands, in order of execution if an example was run.
        left: What was looked at and left, with reasons; with an example also every smooth function that still runs.
        config: Changes of Hugging Face configurations of the copy, and why others were not changed.
        verified: The model was run on an example: with its own functions in the new places it gave its own outputs.
        notes: What was not checked.
    """

    replaced: tuple[Replacement, ...]
    left: tuple[Skip, ...]
    config: tuple[str, ...] = ()
    verified: bool = False
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the replaced places, in order of execution if verified: for ``only`` of a group-wise training."""
        return tuple(item.name for item in self.replaced)

    def to_json(self) -> Any:
        """Dicts, lists and text."""
        return to_json(self)


def replace_activations(
    model: nn.Module,
    new: Callable[[nn.Module], nn.Module] | PerSite,
    *,
    kinds: Sequence[type[nn.Module]] = SMOOTH,
    keep: Sequence[str] = (),
    include: Sequence[str] = (),
    only: Sequence[str] | None = None,
    example: Example | None = None,
) -> tuple[nn.Module, SwapReport]:
    """Copy a model with its smooth activations replaced; the weights of the copy have the same values and names.

    Gates, heads and squeeze-excite are left. With ``example`` the data flow tells which they are; without it only names
    do (a class named ``...SqueezeExcit...`` or ``SE...``, a child named ``gate``), and the report says so.

    Args:
        model: Left as it is.
        new: Called with each activation (of the copy) and returns what takes its place: :func:`relu`, ``Blend``, or any
            function; or a :class:`PerSite` such as :func:`channelwise` makes. One module that stands in several places
            is replaced by one module, as it was shared before, unless the places' channels differ under a ``PerSite``.
        kinds: Classes to replace. A subclass with a ``forward`` of its own counts as the function it computes.
        keep: Shell patterns over names to leave (``"*.se.*"``).
        include: Shell patterns over names to replace though they are gates, heads or squeeze-excite.
        only: Replace just these names (of an earlier report's ``sites``).
        example: A tensor, a tuple of arguments or a dict of keywords; the model's copy runs on it three times, in
            evaluation mode without gradients.

    Returns:
        The copy, in the training mode of ``model``, and the report.

    Raises:
        TrainingError: a pattern or name matches nothing, so it is probably misspelled; ``new`` is a class of torch that
            would take the old activation for one of its options; the model is compiled by TorchScript, or does not run
            on the example; or it computes something else once its own functions stand in the new places.

    >>> student, report = replace_activations(nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Sigmoid()), relu)
    >>> student[1], [skip.name for skip in report.left]
    (ReLU(), ['2'])
    """
    _check_arguments(model, new)
    root = nn.ModuleDict({"model": copy.deepcopy(model)})  # so that the model itself may be the activation
    places, left = find_places(root, kinds, lambda module, name: _reason_to_leave(module, name, kinds))
    _check_names(model, places, keep, include, only)
    visits = None if example is None else _trace(model, places, example)
    chosen: list[Place] = []
    for place in _ordered(places, visits):
        reason = _reason_by_name(place, keep, only) or (
            None if _matches(place.name, include) else _role(place, root, visits)
        )
        if reason is None:
            chosen.append(place)
        else:
            left.append(Skip(place.name, reason))
    made = _make(root, chosen, new, visits)
    old = {place.name: place.old(root) for place in chosen}
    training = {place.name: _training(place, root) for place in chosen}
    for place, module in made:
        module.train(training[place.name])
    install(root, made)
    replaced = tuple(
        Replacement(
            p.name, p.kind if p.how != "module" else type(old[p.name]).__name__, type(m).__name__, p.how, p.where
        )
        for p, m in made
    )
    kept = [skip.name for skip in left if not _is_no_activation(root["model"], skip.name)]
    if example is not None:
        running = _still_running(root["model"], [module for _, module in made], left, example)
        left += [Skip(owner, f"still runs: {function} at {where}") for function, where, owner in running]
        kept += [owner for function, _, owner in running if function not in GATE_CALLS]
    config = update_configs(root["model"], made, kept)
    notes = () if example is not None else ("the model was not run: gates, heads and squeeze-excite only by names",)
    return root["model"], SwapReport(replaced, tuple(left), config, example is not None, notes)


def relu(old: nn.Module) -> nn.ReLU:  # noqa: ARG001
    """A plain ReLU in place of any activation; not in place, since a residual branch may still need its input."""
    return nn.ReLU()


def _check_arguments(model: nn.Module, new: Callable[[nn.Module], nn.Module] | PerSite) -> None:
    if isinstance(new, type) and new.__module__.startswith("torch.nn"):
        # nn.ReLU(old) would take the old module for inplace=True, and nobody would see it.
        raise TrainingError(
            f"{new.__name__} cannot be handed to replace_activations: it would take the old activation for an option",
            hint=f"lambda old: nn.{new.__name__}()",
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TrainingError(
                f"{name or type(model).__name__} is compiled by TorchScript: its activations cannot be replaced",
                hint="swap first, then compile",
            )


def _check_names(
    model: nn.Module, places: list[Place], keep: Sequence[str], include: Sequence[str], only: Sequence[str] | None
) -> None:
    sites = [place.name for place in places]
    names = [name for name, _ in model.named_modules(remove_duplicate=False)] + sites
    for what, patterns in (("keep", keep), ("include", include)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise TrainingError(f"the pattern {pattern!r} of {what} matches no module of {type(model).__name__}")
    for name in only or ():
        if name not in sites:
            raise TrainingError(
                f"{name!r} of only is no activation of {type(model).__name__}", hint="take names from report.sites"
            )


def _trace(model: nn.Module, places: list[Place], example: Example) -> dict[str, Visit]:
    """Run a copy with its own functions in the new places; what it computes must not change."""
    expected = run(copy.deepcopy(model), copy.deepcopy(example))
    root = nn.ModuleDict({"model": copy.deepcopy(model)})
    watcher = Watcher()
    install(root, [(place, Probe(place.old(root), place.name, watcher)) for place in places])
    data = copy.deepcopy(example)
    watcher.start(data)
    with watcher:
        output = run(root["model"], data)
    watcher.finish(output)
    difference = largest_difference(expected, output)
    # Formulas and torch's own functions round differently, a few 1e-7 a layer; a wrong rewrite is off by far more.
    if not difference <= _SAME_OUTPUTS:
        raise TrainingError(
            f"{type(model).__name__} computes something else (relative difference {difference:.2g}) once its own "
            "activations stand in modules: one is changed in place under another name, or draws random numbers",
            hint="keep= leaves the names of the activations that are calls",
        )
    return watcher.visits


_SAME_OUTPUTS = 1e-3


def _ordered(places: list[Place], visits: dict[str, Visit] | None) -> list[Place]:
    order = {name: i for i, name in enumerate(visits or ())}
    return sorted(places, key=lambda place: order.get(place.name, len(order)))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _reason_by_name(place: Place, keep: Sequence[str], only: Sequence[str] | None) -> str | None:
    if _matches(place.name, keep):
        return "named in keep"
    return "not named in only" if only is not None and place.name not in only else None


def _role(place: Place, root: nn.Module, visits: dict[str, Visit] | None) -> str | None:
    """Why a place is no activation after a linear layer; None if it is one."""
    if visits is None:
        owner = type(root.get_submodule(place.parent)).__name__
        if "squeezeexcit" in owner.lower() or owner.startswith("SE"):
            return "squeeze-excite, by the name of its class"
        return "a gate, by its name" if "gate" in place.child else None
    visit = visits.get(place.name)
    if visit is None:
        return "did not run on the example"
    if visit.squeeze:
        return "squeeze-excite: works on a pooled vector that scales the channels"
    if visit.gate:
        return "a gate: its result is multiplied with another tensor"
    return "a head: its result is an output of the model" if visit.head else None


def _site(place: Place, root: nn.Module, visits: dict[str, Visit] | None) -> Site:
    visit = (visits or {}).get(place.name)
    old = place.old(root)
    if visit is None or not visit.shapes[0]:
        return Site(place.name, place.kind, old)
    sizes = {shape[axis] for shape, axis in zip(visit.shapes, visit.axes, strict=True)}
    shape, axis = visit.shapes[0], visit.axes[0]
    spatial = tuple(size for i, size in enumerate(shape) if i not in (0, axis % len(shape)))
    one = len(sizes) == 1 and len(set(visit.axes)) == 1
    return Site(place.name, place.kind, old, sizes.pop() if one else None, axis if one else None, spatial)


def _make(
    root: nn.Module, chosen: list[Place], new: Callable[[nn.Module], nn.Module] | PerSite, visits: Any
) -> list[tuple[Place, nn.Module]]:
    made: dict[tuple[Any, ...], nn.Module] = {}
    held: list[Site] = []  # keeps the old modules alive, so that their ids stay their own
    result = []
    tensor = next(iter(root.parameters()), None)
    for place in chosen:
        site = _site(place, root, visits)
        held.append(site)
        key: tuple[Any, ...] = (id(site.old),)
        if isinstance(new, PerSite):
            key = (id(site.old), site.channels, site.channel_axis)
        if key not in made:
            module = new.make(site) if isinstance(new, PerSite) else new(site.old)
            made[key] = module if tensor is None else module.to(tensor.device)
        result.append((place, made[key]))
    return result


def _training(place: Place, root: nn.Module) -> bool:
    old = place.old(root) if place.how == "module" else root.get_submodule(place.parent)
    return old.training


def _still_running(
    model: nn.Module, new: list[nn.Module], left: list[Skip], example: Example
) -> list[tuple[str, str, str]]:
    """Function, ``file:line`` and module of every smooth function that runs where nothing is said about it yet."""
    watch = SmoothCalls(model, new)
    with watch.watching():
        run(model, copy.deepcopy(example))
    said = {skip.name for skip in left}
    return [found for found in watch.found if found[2] not in said]


def _is_no_activation(model: nn.Module, name: str) -> bool:
    """Whether a gate's or head's function, or a ReLU, stands there: no configuration means these by its activation."""
    try:
        return isinstance(model.get_submodule(name), tuple(_LEFT))
    except AttributeError:  # a call or an attribute
        return False


def _reason_to_leave(module: nn.Module, name: str, kinds: Sequence[type[nn.Module]]) -> str | None:
    """None: replace it. A reason: leave it and say so. Empty: it is no activation."""
    known = None
    for kind in kinds:
        if isinstance(module, kind):
            if type(module).forward is kind.forward or isinstance(module, QuickGELU):
                return None
            known = recognise_module(module)
            same = known is not None and isinstance(known.make(), tuple(kinds))
            return None if same else f"a subclass of {kind.__name__} with a forward of its own"
    reason = next((reason for kind, reason in _LEFT.items() if isinstance(module, kind)), "")
    if reason or name == "":
        return reason
    known = recognise_module(module)
    if known is None:
        return ""
    return None if isinstance(known.make(), tuple(kinds)) else f"{known.name}: not named in kinds"
