"""INT8 accuracy of this package and of its peers: same networks, same samples, real metrics.

Each peer runs in a virtual environment that this script makes. What is finished is kept in the work folder, so that a
second run goes on where the first one stopped, and does again only what a change of tool, data or script concerns.

    python -m benchmarks.accuracy.run --work accuracy-run --output docs/accuracy-peers.md
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cells import cell
from benchmarks.accuracy.page import Row, page
from benchmarks.accuracy.peers.tools import Tool, python_of, tools
from benchmarks.accuracy.tasks import TASKS, load_task
from calib.files import write_text


def main() -> None:
    """Fill the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder; what is there is kept")
    parser.add_argument("--only", type=_names, default=tuple(TASKS), help=f"tasks, of {','.join(TASKS)}")
    parser.add_argument("--tools", type=_names, default=(), help="tools whose name begins with one of these")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--kept", action="store_true", help="run nothing: the page of what is finished")
    parser.add_argument("--output", type=Path, help="also write the page here")
    given = parser.parse_args()
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    chosen = [tool for name, tool in tools().items() if not given.tools or name.startswith(given.tools)]
    work = given.work.resolve()
    rows = list(fill(given.only, chosen, work, given.jobs, kept=given.kept))
    text = page(rows)
    print(text)
    if given.output is not None:
        write_text(given.output, text)


def fill(names: Iterable[str], chosen: list[Tool], work: Path, jobs: int, *, kept: bool) -> Iterable[Row]:
    """All cells, in the order of the table."""
    for environment in {tool.environment for tool in chosen}:
        python_of(environment, work / "venvs")
    for name in names:
        task = load_task(name, work)
        fitting = [tool for tool in chosen if not tool.only or name in tool.only]

        def one(tool: Tool, task: Any = task) -> Row:
            row = Row(task.plan, tool, cell(task, tool, work, kept=kept))
            print(f"{task.name:12} {tool.name:45} {row.line()}", flush=True)
            return row

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(one, fitting)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


if __name__ == "__main__":
    main()
