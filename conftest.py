"""Which doctests can be collected here. Tests skip by themselves; a doctest's module is imported before it could."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

HERE = Path(__file__).parent
_IMPORTS_TORCH = re.compile(r"^(import|from) torch\b", re.MULTILINE)
_WITHOUT_TORCH = importlib.util.find_spec("torch") is None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the modules of the package that need torch, where it is missing."""
    if not _WITHOUT_TORCH or collection_path.suffix != ".py" or HERE / "tests" in collection_path.parents:
        return None
    return True if _IMPORTS_TORCH.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_report_header() -> list[str]:
    """Say so: what is left out is no skip that a summary would show."""
    if not _WITHOUT_TORCH:
        return []
    return ["torch is not installed (pip install 'relu-deploy[torch]'): doctests of modules that need it are left out"]
