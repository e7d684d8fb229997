"""Work spread over processes: its order, what it holds, and how far ahead it reads."""

import errno
import multiprocessing
import os
from concurrent.futures.process import BrokenProcessPool

import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.logs.parallel import map_in_order


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order_and_items_are_taken_as_they_are_needed(processes):
    taken, here = [], os.getpid()

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    results = map_in_order(lambda i: (i * i, os.getpid()), items(), processes)  # a function that pickle refuses
    first = next(results)
    assert first[0] == 0 and len(taken) <= 2 * processes + 1
    rest = list(results)
    assert [value for value, _ in rest] == [i * i for i in range(1, 50)]
    assert (here in {where for _, where in [first, *rest]}) == (processes == 1)


def test_an_error_in_a_child_comes_out():
    with pytest.raises(ZeroDivisionError):
        list(map_in_order(lambda i: 1 / i, [1, 0], 2))


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_the_source_comes_after_the_results_before_it(processes):
    def items():
        yield from [1, 2, 0, 3]
        raise KeyError("the source")

    results = map_in_order(lambda i: i or 1 / i, items(), processes)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(KeyError, match="the source"):
        list(map_in_order(abs, (1 / 0 if i else {}["the source"] for i in [0]), processes))


def test_a_fork_that_fails_is_one_line_and_leaves_no_child(monkeypatch):
    fork, calls = os.fork, []

    def second_fails():
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return fork()

    monkeypatch.setattr(os, "fork", second_fails)
    with pytest.raises(InputError, match="processes: found Cannot allocate memory, expected fewer processes"):
        list(map_in_order(abs, [1], 2))
    for child in multiprocessing.active_children():
        child.join(10)
    assert len(calls) == 2 and not multiprocessing.active_children()


def test_a_child_that_dies_ends_it_all():
    with pytest.raises(BrokenProcessPool):
        list(map_in_order(lambda i: os._exit(1) if i == 3 else i, range(8), 2))


@pytest.mark.parametrize("processes", [0, -1])
def test_there_is_at_least_one_process(processes):
    with pytest.raises(InputError, match=f"processes: found {processes}, expected at least 1"):
        list(map_in_order(abs, [-1], processes))


def test_a_system_that_does_not_fork_has_one_process(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert list(map_in_order(abs, [-1], 1)) == [1]
    with pytest.raises(InputError, match="processes: found 2, expected 1"):
        list(map_in_order(abs, [-1], 2))
