"""Map a function over items with several processes, in order."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import Any

from offline_lmrl.errors import InputError, require

_held: list[Callable[[Any], Any]] = []  # in a child: the function that it applies


def map_in_order(function: Callable[[Any], Any], items: Iterable[Any], processes: int) -> Iterator[Any]:
    """Yield `map(function, items)`, computed by several processes, in order.

    Unlike `Pool.imap`, this takes items only as they are needed, so memory holds few of them. Items and results are
    pickled. The function is not: the forked children inherit it with everything it holds, such as rows and tokenizers.
    If a child dies, BrokenProcessPool is raised. An error of `items` or `function` is raised where `map` would raise
    it: after all earlier results.

    Args:
      processes: number of processes; 1 = no child processes.

    Raises: InputError for fewer than one process, for several on a system that does not fork, and if a fork fails.
    """
    require(processes >= 1, f"processes: found {processes}, expected at least 1")
    require(
        processes <= 1 or "fork" in multiprocessing.get_all_start_methods(),
        f"processes: found {processes}, expected 1 on a system that does not fork",
    )
    if processes == 1:
        yield from map(function, items)
        return
    pool = _forked(function, processes)
    running: deque = deque()
    source, failure = iter(items), None
    try:
        while failure is None:
            try:
                item = next(source)
            except Exception as error:
                failure = error
            else:
                running.append(pool.submit(_apply, item))
                if len(running) > 2 * processes:  # enough to keep all processes busy
                    yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
    if not isinstance(failure, StopIteration):
        raise failure


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield the items in lists of `size` (the last may be shorter); items are taken only as they are needed."""
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


def _forked(function: Callable[[Any], Any], processes: int) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin, (function,))
    before = set(multiprocessing.active_children())
    try:
        pool.submit(len, ())  # the first call forks all
    except OSError as error:  # the pool does not stop the children that it forked before the failure
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise InputError(f"processes: found {error.strerror}, expected fewer processes") from error
    return pool


def _begin(function: Callable[[Any], Any]) -> None:
    end_with_parent()
    _held.append(function)


def end_with_parent() -> None:
    """Make this child process exit when its parent ends, even if that is killed by signal 9."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _apply(item: Any) -> Any:
    return _held[-1](item)
