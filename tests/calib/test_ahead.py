from __future__ import annotations

import threading
import time

import pytest

from calib.ahead import Workers, ahead


def test_items_come_in_order():
    assert list(ahead(range(100))) == list(range(100))
    assert list(ahead([])) == []


def test_items_are_made_in_advance_but_not_all_of_them():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    line = ahead(items(), depth=2)
    assert next(line) == 0
    limit = time.monotonic() + 30
    while len(made) < 4 and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4  # one taken, two in the queue, one that waits for room
    line.close()


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        raise KeyError("two")

    line = ahead(items())
    assert next(line) == 1
    with pytest.raises(KeyError, match="two"):
        next(line)


def test_the_thread_ends_when_nobody_wants_more():
    before = set(threading.enumerate())
    line = ahead(iter(int, 1))
    next(line)
    (thread,) = set(threading.enumerate()) - before
    line.close()
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_the_order_of_items(count):
    def slow_at_first(i):
        time.sleep(0.02 if i % 3 == 0 else 0)
        return i * i

    assert list(Workers(slow_at_first, count).map(range(20))) == [i * i for i in range(20)]


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_item_that_fails_is_told_though_a_later_one_fails_sooner(count):
    def fail(i):
        if i == 4:
            time.sleep(0.2)
        if i >= 4:
            raise ValueError(i)
        return i

    seen = []
    with pytest.raises(ValueError, match="4"):
        seen.extend(Workers(fail, count).map(range(50)))
    assert threading.active_count() < 50


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_of_the_items_comes_after_one_of_an_item_before(count):
    def items():
        yield from range(4)
        raise KeyError("items")

    def fail(i):
        time.sleep(0.05)
        if i == 3:
            raise ValueError("work")
        return i

    with pytest.raises(ValueError, match="work"):
        list(Workers(fail, count).map(items()))
    with pytest.raises(KeyError, match="items"):
        list(Workers(lambda i: i, count).map(items()))


def test_no_more_items_are_taken_than_there_are_workers_for():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    results = Workers(lambda i: i, 2).map(items())
    next(results)
    assert len(taken) == 3
    results.close()


def test_settling_waits_and_tells_of_failures():
    gate = threading.Event()

    def work(i):
        gate.wait(30)
        if i == 2:
            raise ValueError(i)
        return i

    workers = Workers(work, 2)
    results = workers.map(range(3))
    threading.Timer(0.1, gate.set).start()
    assert next(results) == 0
    assert not workers.settle()
    assert next(results) == 1
    with pytest.raises(ValueError, match="2"):
        next(results)
    fine = Workers(lambda i: i, 2)
    going = fine.map(range(9))
    next(going)
    assert fine.settle()
    assert list(going) == list(range(1, 9))


def test_one_worker_is_the_thread_that_asks():
    assert list(Workers(lambda _: threading.current_thread(), 1).map([0])) == [threading.current_thread()]
