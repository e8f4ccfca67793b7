"""What comes of several versions of a network, each compared with the float network on the same samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import onnx

from calib.session import open_session
from relu_deploy.int8.heads import Heads

Array = npt.NDArray[Any]
# Bytes of inputs and outputs that are held.
_HELD = 1 << 28


class Outcome:
    """The outputs of a float network on samples.

    Args:
        heads: Names them.
        exact: The float network.
        feeds: Arrays by input name, for each sample; the first of them, as many as memory is given for.
        least: Look at so many of them whatever they take.

    Raises:
        RUNTIME_ERRORS: it does not run.
    """

    def __init__(self, heads: Heads, exact: onnx.ModelProto, feeds: Iterable[Mapping[str, Array]], least: int) -> None:
        self._heads, self._names = heads, [name for part in heads.parts for name in part]
        self._feeds: list[Mapping[str, Array]] = []
        self._wanted: list[dict[str, Any]] = []
        held, session = 0, open_session(exact)
        for feed in feeds:
            self._feeds.append(feed)
            self._wanted.append(dict(zip(self._names, session.run(self._names, dict(feed)), strict=True)))
            held += sum(value.nbytes for value in (*feed.values(), *self._wanted[-1].values()))
            if held > _HELD and len(self._feeds) >= least:
                break

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return len(self._feeds)

    def worst_db(self, model: onnx.ModelProto) -> float:
        """Signal over noise of the worst output of another version, decibels.

        Raises:
            RUNTIME_ERRORS: it does not run.
        """
        # As it is written: optimised, ONNX Runtime rounds float weights between Q/DQ again, by a scale for each tensor.
        session = open_session(model)
        found: Sequence[dict[str, Any]] = [
            dict(zip(self._names, session.run(self._names, dict(feed)), strict=True)) for feed in self._feeds
        ]
        return self._heads.worst_db(self._wanted, found)
