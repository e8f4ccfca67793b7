"""What each recipe puts in the place of the activations, and how far that is at each step."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from relu_deploy.distill.config import DistillConfig
from relu_deploy.errors import TrainingError
from relu_deploy.nn.blend import Blend, StochasticBlend
from relu_deploy.nn.pwlu import PWLU
from relu_deploy.nn.pwlu_model import collect_statistics, realign, use_kernel
from relu_deploy.nn.schedule import group_gamma, pea_alpha, sat_gamma, statistics_end
from relu_deploy.nn.swap import PerSite, SwapReport, channelwise, relu, replace_activations


@dataclasses.dataclass(frozen=True)
class Student:
    """A student before its first step.

    Attributes:
        model: What is trained.
        swap: What was replaced; None for recipe B, which replaces nothing.
    """

    model: nn.Module
    swap: SwapReport | None


def make_student(
    teacher: nn.Module, config: DistillConfig, *, example: Any, fresh: Callable[[], nn.Module] | None = None
) -> Student:
    """Copy the teacher (or make a new network) with the units of the recipe in the places of its activations.

    Args:
        teacher: Left as it is.
        config: Recipe, seed, transition, keep and include.
        example: One input of the network; its run tells activations from gates and gives the channels of PWLU.
        fresh: Makes the network with random weights, for students that start from them. Without it the weights of a
            copy are drawn anew by its modules' own ``reset_parameters``.

    Raises:
        TrainingError: nothing was replaced, or the weights cannot be drawn anew.
        BackendUnavailableError: PWLU's compiled kernel is wanted, and there is no C++ compiler.
    """
    model = _random(teacher, config.seed, fresh) if config.from_random else teacher
    if config.recipe == "B":
        return Student(copy.deepcopy(model), None)
    student, report = replace_activations(
        model, _unit(config), keep=config.keep, include=config.include, example=example
    )
    if not report.replaced:
        first = "; ".join(f"{skip.name or 'the model'}: {skip.reason}" for skip in report.left[:3])
        raise TrainingError(
            f"{type(teacher).__name__} has no smooth activation to replace" + (f" ({first})" if first else ""),
            hint="include= replaces gates and heads too",
        )
    use_kernel(student, config.transition.kernel)
    return Student(student, report)


def set_progress(model: nn.Module, config: DistillConfig, sites: Sequence[str], step: int, total: int) -> float | None:
    """Bring the units to where they are when ``step`` of ``total`` optimiser steps were taken; idempotent.

    Args:
        model: The student, not wrapped.
        config: Recipe and transition.
        sites: Names of the replaced places in order of execution.
        step: Steps taken.
        total: Steps of the training.

    Returns:
        Share of the smooth activation that is left (the mean over groups); None where nothing changes with the steps.
    """
    t = config.transition
    if config.recipe == "B+KD-SAT":
        return _set_all(model, sat_gamma(step, total, pure=t.pure, levels=None if t.continuous else 10))
    if config.recipe in {"PEA-W", "PEA-S"}:
        return _set_all(model, 1.0 - pea_alpha(step, total, initial=t.initial, pure=t.pure))
    if config.recipe == "iterative":
        groups = group_sites(sites, t.groups)
        gammas = [group_gamma(step, total, group=i, groups=len(groups)) for i in range(len(groups))]
        for gamma, names in zip(gammas, groups, strict=True):
            for name in names:
                _set_all(model.get_submodule(name), gamma)
        return sum(gammas) / len(gammas)
    if config.recipe == "PWLU":
        _set_phase(model, config, step, total)
    return None


def group_sites(sites: Sequence[str], groups: int) -> list[list[str]]:
    """Cut places, in order of execution, into groups of nearly equal size; never more groups than places.

    >>> group_sites(["a", "b", "c"], 2)
    [['a'], ['b', 'c']]
    """
    count = min(groups, len(sites))
    edges = [i * len(sites) // count for i in range(count + 1)]
    return [list(sites[a:b]) for a, b in itertools.pairwise(edges)]


def _unit(config: DistillConfig) -> Callable[[nn.Module], nn.Module] | PerSite:
    t = config.transition
    if config.recipe in {"B+KD-SAT", "PEA-W", "iterative"}:
        return Blend
    if config.recipe == "PEA-S":
        return StochasticBlend
    if config.recipe == "PWLU":
        return channelwise(lambda c, axis: PWLU(c, intervals=t.intervals, bound=t.bound, channel_axis=axis))
    return relu


def _set_all(model: nn.Module, gamma: float) -> float:
    for module in model.modules():
        if isinstance(module, Blend):
            module.set_gamma(gamma)
    return gamma


def _set_phase(model: nn.Module, config: DistillConfig, step: int, total: int) -> None:
    if not config.transition.realign:
        return
    end = statistics_end(total, statistics=config.transition.statistics)
    if step == 0 < end:
        collect_statistics(model)
    elif step >= end:
        realign(model)


def _random(teacher: nn.Module, seed: int, fresh: Callable[[], nn.Module] | None) -> nn.Module:
    """The teacher's network with new weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if fresh is not None:
            return fresh()
        model = copy.deepcopy(teacher)
        drawn: set[nn.Parameter] = set()
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
                drawn.update(module.parameters())
        left = [name for name, parameter in model.named_parameters() if parameter not in drawn]
        if left:
            raise TrainingError(
                f"{', '.join(left[:3])} of {type(teacher).__name__} cannot be drawn anew: its module has no "
                "reset_parameters",
                hint="give fresh=, a function that makes the network with random weights",
            )
        return model
