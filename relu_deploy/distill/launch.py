"""How many processes train together, and whether that is how many the launcher was asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import torch
from accelerate import PartialState  # type: ignore[import-untyped]

ONE_CPU_PROCESS = (
    "accelerate launch was asked for several processes and started one: on CPUs its --num_processes counts only with "
    "MPI (--mpirun_hostfile). These start two: torchrun --nproc_per_node 2 -m relu_deploy distill ...; "
    "accelerate launch --multi_gpu --num_processes 2 -m relu_deploy distill ... (on CPUs too, in spite of the name)"
)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Those that train together.

    Attributes:
        count: How many, over all machines.
        index: This one's number, from 0.
        device: ``cpu``, ``cuda``, ...
        warning: What the launcher did otherwise than asked; None if nothing.
    """

    count: int
    index: int
    device: str
    warning: str | None = None

    @property
    def first(self) -> bool:
        """This one writes and speaks for all."""
        return self.index == 0

    def __str__(self) -> str:
        return f"{self.count} process{'' if self.count == 1 else 'es'} ({self.device})"


def join() -> Processes:
    """Meet the processes that ``accelerate launch``, ``torchrun`` or ``mpirun`` started beside this one, if any."""
    wanted_more = several_were_asked_for(os.environ)
    state = PartialState(cpu=not torch.accelerator.is_available())
    alone = state.num_processes == 1
    return Processes(
        state.num_processes, state.process_index, state.device.type, ONE_CPU_PROCESS if alone and wanted_more else None
    )


def several_were_asked_for(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's launcher was asked for more than one process, seen from a process that it started.

    It names the first process's address only then (``prepare_simple_launcher_cmd_env`` in accelerate 1.15), also where
    it goes on to start a single one.
    """
    return "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
