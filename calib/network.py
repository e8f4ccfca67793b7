"""A network whose activations are looked at, by the quickest way that gives them.

Where extremes are enough and the runtime can keep activations in blocks of channels, it runs with its optimisations
on: convolutions are a quarter quicker, and the extremes of what lies in blocks are taken there. Everything else runs as
it is written, and so does a batch in which something is wrong, since then nodes have their names. Which way is taken is
a matter of network and method, never of the batch: kernels in blocks add up in another order, so last bits differ.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import onnx
from numpy.typing import NDArray

from calib.discover import Found
from calib.errors import CalibrationError
from calib.pooled import with_pooling
from calib.stages import Stages
from calib.weights import apart

_FLOAT_BYTES = 4
_Values = Iterator[tuple[str, NDArray[Any]]]


class Network:
    """A network of which some tensors are looked at; several threads may run it.

    Args:
        model: The network.
        found: What it holds.
        measured: Tensors to look at, made by nodes.
        pool: Their extremes are enough, where the runtime takes them more cheaply.
        threads: Of the runtime.

    Attributes:
        pooled: Number of channels of the tensors of which there are only extremes, in the order that they have in
            the tensor ``extremes``; see :mod:`calib.pooled`.
        extremes: The name of that tensor.

    Raises:
        CalibrationError: the runtime cannot load the network.
    """

    def __init__(
        self, model: onnx.ModelProto, found: Found, measured: Collection[str], *, pool: bool, threads: int
    ) -> None:
        self._found, self._measured, self._threads = found, measured, threads
        self._model, self._weights = apart(model)
        self.pooled: Mapping[str, int] = {}
        self.extremes = ""
        self._stages = (self._quick() if pool else None) or self._plain

    def run(self, feeds: Mapping[str, NDArray[Any]], what: str) -> _Values:
        """Yield the tensors to look at, and the extremes of those that are pooled.

        Raises:
            CalibrationError: an operator failed; names it, and ``what`` was fed.
        """
        try:
            yield from self._stages.run(feeds, what)
        except CalibrationError:
            if self._stages is not self._plain:
                for _ in self.run_plainly(feeds, what):  # fails at a node of the user's
                    pass
            raise

    def run_plainly(self, feeds: Mapping[str, NDArray[Any]], what: str) -> _Values:
        """Yield every tensor to look at, in the network's order, as the network is written. Raises: as :meth:`run`."""
        return self._plain.run(feeds, what)

    def _quick(self) -> Stages | None:
        """The network with the runtime's optimisations; None where they are of no use, or fail."""
        found = self._found
        pooling = with_pooling(self._model, found.blocks, found.planes)
        if pooling is None:
            return None
        *steps, extremes = pooling.made
        measured = set(self._measured).difference(found.blocks) | {extremes}
        sizes = {**found.sizes, extremes: 3 * sum(pooling.channels.values()) * _FLOAT_BYTES}
        types = {**found.types, **dict.fromkeys(pooling.made, "tensor(float)")}
        try:
            stages = Stages(
                pooling.model, measured, sizes, types, weights=self._weights, threads=self._threads,
                shapes=found.shapes, aside=set(steps),
            )  # fmt: skip
        except CalibrationError:  # what is wrong with the network itself, loading it plainly tells
            return None
        self.pooled, self.extremes = pooling.channels, extremes
        return stages

    @functools.cached_property
    def _plain(self) -> Stages:
        """The network as it is written."""
        return Stages(
            self._model, self._measured, self._found.sizes, self._found.types, weights=self._weights,
            threads=self._threads,
        )  # fmt: skip
