"""Whether a report read from a file holds what its class says: a manifest may have been edited, or forged."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any


def check_types(value: Any, *, where: str = "") -> None:
    """Compare every field of a dataclass, and of those inside it, with its annotation.

    Args:
        value: An instance. Annotations may hold plain types, dataclasses, ``Literal``, unions, ``tuple[X, ...]`` and
            ``dict[str, X]``.
        where: Put in front of the field's name in messages.

    Raises:
        ValueError: names the first field that differs.

    >>> from relu_deploy.engines.audit import Activation
    >>> check_types(Activation("act", kind=7))
    Traceback (most recent call last):
    ValueError: kind is 7
    """
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        found, name = getattr(value, field.name), f"{where}{field.name}"
        if not _fits(found, hints[field.name], name):
            raise ValueError(f"{name} is {found!r:.60}")


def _fits(value: Any, hint: Any, name: str) -> bool:
    """Whether a value is of an annotated type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return isinstance(value, str) and value in inner
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option, name) for option in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, inner[0], name) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1], name) for item in value.values())
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast("type", hint)):
            check_types(value, where=f"{name}.")
            return True
        return False
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint
