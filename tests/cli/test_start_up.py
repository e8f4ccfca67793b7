from __future__ import annotations

import subprocess
import sys

from relu_deploy.cli import COMMANDS

# Each takes 0.1 s or more to import, most of it for nothing when only help or a usage error is printed.
HEAVY = ("numpy", "onnx", "onnxruntime", "onnx_graphsurgeon", "torch", "tensorrt_rtx")


def test_help_imports_nothing_heavy() -> None:
    code = f"""import sys
from click.testing import CliRunner
from relu_deploy.cli import main
for call in ([], *([name] for name in {COMMANDS!r})):
    result = CliRunner().invoke(main, [*call, "--help"])
    print(result.exit_code, "Usage" in result.output)
print(sorted(set({HEAVY!r}) & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["0 True"] * (1 + len(COMMANDS)) + ["[]"], done.stderr
