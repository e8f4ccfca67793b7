"""Items made in a thread of their own, so that reading and decoding overlap with running the network."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_WAIT = 0.1  # seconds between looks at whether anyone still wants items


def ahead(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """Yield the items in order, up to ``depth`` of them made in advance; an error is raised in its place."""
    line = _Line(items, depth)
    try:
        yield from line
    finally:
        line.stopped.set()


class _Line(Generic[T]):
    """A queue and the thread that fills it."""

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self.stopped = threading.Event()
        self._items = items
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        # A daemon, so that an interrupted command does not wait for a slow source.
        threading.Thread(target=self._fill, daemon=True, name="calib-ahead").start()

    def _fill(self) -> None:
        """Make items until there are none, one fails, or nobody wants more."""
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - raised again where the item is asked for
            self._put((None, error))

    def _put(self, item: tuple[T | None, BaseException | None]) -> bool:
        """Put an item into the queue; False where it is no longer wanted."""
        while not self.stopped.is_set():
            try:
                self._queue.put(item, timeout=_WAIT)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[T]:
        while True:
            item, error = self._queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # there is an item where there is no error
