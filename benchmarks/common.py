"""What several benchmarks print and where they work."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from relu_deploy.bench.stats import Ratio
from relu_deploy.machine import describe_machine, lacks_vnni


@contextlib.contextmanager
def working_folder(keep: Path | None) -> Iterator[Path]:
    """The folder that was asked for, or one that is gone afterwards."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def print_machine() -> None:
    """The CPU, how many of it, and whether it has VNNI."""
    machine = describe_machine()
    print(f"{machine.cpu}, {machine.logical_cpus} CPUs, {'without' if lacks_vnni(machine.flags) else 'with'} VNNI")


def latency_ratio(ratio: Ratio) -> str:
    """How many times slower than the original, with its interval."""
    interval = f" [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]" if ratio.high and ratio.low else ""
    return f"latency {1 / ratio.value:.2f} x{interval}"


def put_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(marks[0])
    _, _, after = rest.partition(marks[1])
    page.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{after}", encoding="utf-8")
