"""Text from files that strangers wrote, on a terminal: shown as it is, never obeyed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# C0 and C1 control characters but for tab and newline, and the marks that turn the direction of text around.
_OBEYED = [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_SHOWN = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _OBEYED}


def printable(text: str) -> str:
    r"""Spell out what a terminal would obey: a layer may be called ``\x1b[2J``, which clears the screen.

    >>> print(printable("conv\x1b[2J"))
    conv\x1b[2J
    """
    # A lone surrogate (a file name that is not UTF-8) cannot be written at all.
    return text.translate(_SHOWN).encode("utf-8", "backslashreplace").decode()


class SafeConsole(Console):
    """A console that prints names literally: no markup, no emoji codes, no escape sequences but its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments whose text is made printable; what steers the terminal is rich's own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
