"""The machine a number was measured on, and how busy others kept it meanwhile. No host name, no user name."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

# What decides the speed of int8 and float kernels. CPUs without any VNNI run int8 at about the speed of float.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "amx_bf16", "asimddp", "i8mm")
# Integer dot products that add into 32 bits; without one, x86 multiplies int8 through a saturating 16-bit sum.
_DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})
PACKAGES = ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13", "tensorrt", "relu-deploy")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What identifies a measurement's machine and software.

    Attributes:
        cpu: Model name, or the architecture where the name is not told.
        logical_cpus: Processors this process may use (affinity), not those of the whole machine.
        flags: Those of ``FLAGS`` that the CPU has.
        memory_gib: Total memory; None where not told.
        system: Operating system and kernel release.
        python: Version.
        packages: Installed runtimes and their versions.
        governor: Frequency governor of the first CPU; None where not told (virtual machines).
        gpu_driver: Version of NVIDIA's kernel module; None without one.
    """

    cpu: str
    logical_cpus: int
    flags: tuple[str, ...]
    memory_gib: float | None
    system: str
    python: str
    packages: dict[str, str]
    governor: str | None
    gpu_driver: str | None


@dataclasses.dataclass(frozen=True)
class CpuTimes:
    """Seconds of processor time the whole machine has spent since it started, and those a hypervisor kept from it.

    Attributes:
        busy: Spent on anything, by anyone.
        stolen: Wanted by this virtual machine and given to another.
    """

    busy: float
    stolen: float


def describe_machine() -> Machine:
    """Read what the system tells; nothing is run or measured."""
    cpuinfo = _read("/proc/cpuinfo")
    flags = set(_field(cpuinfo, "flags").split() or _field(cpuinfo, "Features").split())
    return Machine(
        cpu=_field(cpuinfo, "model name") or platform.machine(),
        logical_cpus=available_cpus(),
        flags=tuple(flag for flag in FLAGS if flag in flags),
        memory_gib=_memory_gib(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        gpu_driver=_read("/sys/module/nvidia/version").strip() or None,
    )


def lacks_vnni(flags: Iterable[str]) -> bool:
    """Whether a CPU is x86 with AVX2 or AVX-512 but without an int8 dot product; False on other architectures.

    Args:
        flags: CPU feature names as Linux tells them.

    >>> lacks_vnni(["avx2"]), lacks_vnni(["avx512f", "avx512_vnni"]), lacks_vnni(["asimddp"])
    (True, False, False)
    """
    has = set(flags)
    return not has.isdisjoint({"avx2", "avx512f"}) and has.isdisjoint(_DOT_PRODUCTS)


def available_cpus() -> int:
    """Processors this process may run on; a container's or ``taskset``'s limit counts."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Processes that wanted to run, averaged over the last minute; None where not told."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def cpu_times() -> CpuTimes | None:
    """The machine's processor time so far, from ``/proc/stat``; None where there is none.

    Source: proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal.
    """
    fields = _read("/proc/stat").partition("\n")[0].split()[1:9]
    if len(fields) < 8 or not all(field.isdigit() for field in fields):
        return None
    user, nice, system, _, _, irq, softirq, stolen = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields)
    return CpuTimes(busy=user + nice + system + irq + softirq, stolen=stolen)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    kib = _field(_read("/proc/meminfo"), "MemTotal").split()
    return round(int(kib[0]) / 2**20, 1) if kib and kib[0].isdigit() else None


def _field(text: str, name: str) -> str:
    """Value of the first ``name : value`` line; empty when there is none."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _read(path: str) -> str:
    """Text of a small system file; empty where it is missing or not readable."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
