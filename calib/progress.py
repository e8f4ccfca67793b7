"""How a long step tells how far it is: one callable, so that libraries need no terminal."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with what is being done, how many units are done, and how many there are (None: not known)."""

    def __call__(self, what: str, done: int, total: int | None) -> None: ...  # noqa: D102


def silent(what: str, done: int, total: int | None) -> None:
    """Say nothing; the default of every function that takes a ``Progress``."""
