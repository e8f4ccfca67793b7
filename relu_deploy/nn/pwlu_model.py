"""Every PWLU of a model at once: phases of the realignment, how aligned the units are, fast and static forms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar, get_args

import torch
from torch import Tensor, nn

from relu_deploy.errors import TrainingError
from relu_deploy.nn.pwlu import PWLU, Kernel, StaticPWLU
from relu_deploy.nn.pwlu_kernel import library

_Module = TypeVar("_Module", bound=nn.Module)


def collect_statistics(model: nn.Module) -> list[str]:
    """Start phase I of every PWLU that is not in it and return their names.

    Units that collect already keep what they have.
    """
    return _each(model, lambda unit: not unit.collecting, PWLU.collect)


def realign(model: nn.Module) -> list[str]:
    """Start phase II of every PWLU that collects and return their names; every process must call it."""
    return _each(model, lambda unit: unit.collecting, PWLU.realign)


def alignment(model: nn.Module, statistics: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> dict[str, float]:
    """Mean over channels of the IoU of each PWLU's boundaries with ``mean -+ 3 std`` of its inputs.

    Args:
        model: Holds any number of units.
        statistics: Mean and std of the inputs by the name of the unit, (C,) each, as :func:`input_statistics` measures
            them; without it, those that phase I collected.

    Returns:
        Name to mean IoU in [0, 1], in the order of the model; NaN for a unit that has seen no batch.

    Raises:
        TrainingError: ``statistics`` lacks a unit.

    Source: PWLU, eq. 7.
    """
    found = {}
    for name, unit in _units(model):
        if statistics is None:
            seen = unit.batches > 0
            iou = unit.iou()[seen]
        elif name in statistics:
            iou = unit.iou(*statistics[name])
        else:
            raise TrainingError(f"no statistics of {name or 'the model'}", hint="measure them with input_statistics")
        found[name] = float(iou.mean())
    return found


def input_statistics(model: nn.Module, run: Callable[[], object]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and population std, (C,) each in float64, of what reaches each PWLU while ``run()`` runs the model.

    For the alignment of a trained model, whose collected statistics are those of phase I. Batches that are not finite
    count too, as NaN. A unit that nothing reaches is left out.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str, unit: PWLU) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().to(torch.float64)
            flat = x.reshape(1, -1) if unit.channels is None else x.movedim(unit.channel_axis, 0).flatten(1)
            if not flat.numel():
                return
            count, mean, squares = flat.shape[1], flat.mean(1), flat.var(1, correction=0) * flat.shape[1]
            new = torch.stack((torch.full_like(mean, count), mean, squares))
            sums[name] = _merged(sums[name], new) if name in sums else new

        return hook

    handles = [unit.register_forward_pre_hook(watch(name, unit)) for name, unit in _units(model)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: (mean, (squares / count).sqrt()) for name, (count, mean, squares) in sums.items()}


def to_static(model: _Module) -> _Module | StaticPWLU:
    """A copy with a :class:`StaticPWLU` in the place of every PWLU; it computes the same and trains no shape any more.

    A model that is itself a PWLU comes back as its static form. A unit in two places stays one unit in two places.
    """
    if isinstance(model, PWLU):
        return model.to_static().train(model.training)
    made = copy.deepcopy(model)
    static = {id(unit): unit.to_static().train(unit.training) for _, unit in _units(made)}
    for module in list(made.modules()):
        # named_children() would leave out the second name of a unit.
        for name, child in list(module._modules.items()):  # noqa: SLF001
            if isinstance(child, PWLU):
                setattr(module, name, static[id(child)])
    return made


def use_kernel(model: nn.Module, kernel: Kernel) -> int:
    """Choose how every PWLU and StaticPWLU of a model is computed on a CPU, and return how many there are.

    ``"blocks"``, the default, is made of torch's operators. ``"compiled"`` is C++ that this call compiles (seconds,
    once a process). Outputs and input gradients are bit-identical; gradients of the parameters differ by the
    rounding of another order of summation, so choose before training and resume with the same choice. Compilers,
    exporters, GPUs and float64 use neither or ``"blocks"``.

    Raises:
        TrainingError: there is no such kernel.
        BackendUnavailableError: there is no C++ compiler; the model is as it was.
    """
    if kernel not in get_args(Kernel):
        raise TrainingError(f"no PWLU kernel {kernel!r}", hint=f"one of {', '.join(get_args(Kernel))}")
    if kernel == "compiled":
        library()
    units = [module for module in model.modules() if isinstance(module, PWLU | StaticPWLU)]
    for unit in units:
        unit.kernel = kernel
    return len(units)


def _units(model: nn.Module) -> list[tuple[str, PWLU]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PWLU)]


def _each(model: nn.Module, wanted: Callable[[PWLU], bool], change: Callable[[PWLU], None]) -> list[str]:
    chosen = [(name, unit) for name, unit in _units(model) if wanted(unit)]
    for _, unit in chosen:
        change(unit)
    return [name for name, _ in chosen]


def _merged(a: Tensor, b: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of two sets together (Chan et al. 1979)."""
    count = a[0] + b[0]
    delta = b[1] - a[1]
    return torch.stack((count, a[1] + delta * b[0] / count, a[2] + b[2] + delta**2 * a[0] * b[0] / count))
