"""Work in threads: reading and decoding overlap with running the network, and runs overlap with each other."""

from __future__ import annotations

import collections
import concurrent.futures
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
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


class Workers(Generic[T, R]):
    """Applies a function to items, several at a time; results come in the order of the items.

    So does an error: in the place of the item that failed, whichever fails first.

    Args:
        function: Is called in several threads at once, with more than one worker.
        count: How many.
    """

    def __init__(self, function: Callable[[T], R], count: int) -> None:
        self._function, self._count = function, count
        self._pool = concurrent.futures.ThreadPoolExecutor(count, "calib") if count > 1 else None
        self._pending: collections.deque[concurrent.futures.Future[R]] = collections.deque()

    def map(self, items: Iterable[T]) -> Iterator[R]:
        """Yield the results. An error of ``items`` itself comes after the results of those before it."""
        try:
            yield from self._started(items)
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)

    def _started(self, items: Iterable[T]) -> Iterator[R]:
        """Start work on items, and yield results as more are pending than there are workers."""
        rest, failed = iter(items), None
        while True:
            try:
                item = next(rest)
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001 - raised again, after what may have failed before it
                failed = error
                break
            if self._pool is None:
                yield self._function(item)
                continue
            self._pending.append(self._pool.submit(self._function, item))
            if len(self._pending) > self._count:
                yield self._pending.popleft().result()
        while self._pending:
            yield self._pending.popleft().result()
        if failed is not None:
            raise failed

    def settle(self) -> bool:
        """Wait until no item is being worked at; tell whether none failed. An error is still raised in its place."""
        concurrent.futures.wait(self._pending)
        return not any(future.exception() for future in self._pending)
