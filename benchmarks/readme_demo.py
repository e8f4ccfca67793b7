"""Run the demo as the README does and put what it prints, and the machine, into the README.

python benchmarks/readme_demo.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- demo output: ).*?( -->\n```text\n).*?(```\n<!-- end of demo output -->)", re.DOTALL)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "relu_deploy", "demo", "-o", "demo-run", "--json", "report.json"]
        printed = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
        machine = json.loads((Path(folder) / "report.json").read_text())["machine"]
    shown = f"{machine['cpu']}, {machine['logical_cpus']} processors, Python {machine['python']}"
    lines = "\n".join(line.rstrip() for line in printed.splitlines()) + "\n"
    text, found = BLOCK.subn(lambda match: match[1] + shown + match[2] + lines + match[3], README.read_text())
    if found != 1:
        raise SystemExit(f"{README} holds {found} blocks for the demo's output, not one")
    README.write_text(text)


if __name__ == "__main__":
    main()
