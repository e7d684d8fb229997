"""Work spread over processes: its order, what it holds, and how far ahead it reads."""

import multiprocessing
import os
from concurrent.futures.process import BrokenProcessPool

import pytest

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.parallel import map_in_order


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
