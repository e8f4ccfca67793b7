"""What a step changed, what it refused to change, and why.

Every step of the flow returns one of these; ``to_json`` is what ``--json`` writes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Skip:
    """Something a step looked at and left alone.

    Attributes:
        name: Node or tensor.
        reason: One phrase that a deployment engineer understands.
    """

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class PassReport:
    """What one graph pass did.

    Attributes:
        name: The pass.
        changed: Names of the nodes it rewrote.
        skipped: What it refused to rewrite, with reasons.
        notes: Per changed node, what was shown about it (a certificate, a bound); keys are names in ``changed``.
    """

    name: str
    changed: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()
    notes: dict[str, str] = dataclasses.field(default_factory=dict)


def to_json(value: Any) -> Any:
    """Turn reports (dataclasses, numpy values, paths, tuples) into what ``json.dumps`` takes.

    >>> to_json(PassReport("p", ("a",), (Skip("b", "why"),)))
    {'name': 'p', 'changed': ['a'], 'skipped': [{'name': 'b', 'reason': 'why'}], 'notes': {}}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    return value
