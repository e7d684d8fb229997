"""Work spread over processes, in the order of what it is done to."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_held: list[Callable[[Any], Any]] = []  # in a child: what it applies


def map_in_order(function: Callable[[Any], Any], items: Iterable[Any], processes: int) -> Iterator[Any]:
    """`map(function, items)` by so many processes; 1 is this one.

    Items are taken only as they are needed, unlike by `Pool.imap`, so memory holds a few. They and the results travel
    by pickle; the children inherit the function with all that it holds, rows and tokenizers, which is never copied.
    """
    if processes == 1:
        yield from map(function, items)
        return
    with multiprocessing.get_context("fork").Pool(processes, _held.append, (function,)) as pool:
        running: deque = deque()
        for item in items:
            running.append(pool.apply_async(_apply, (item,)))
            if len(running) > 2 * processes:
                yield running.popleft().get()
        while running:
            yield running.popleft().get()


def _apply(item: Any) -> Any:
    return _held[-1](item)
