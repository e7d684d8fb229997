"""Text of logs, models and files made safe to print on a terminal, and progress bars there."""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Item = TypeVar("Item")
SLOW = 2.0  # seconds

# Control characters except line feed and tab, characters that reverse the direction of text, line separators other
# than line feed, and halves of surrogate pairs, which cannot be printed.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Escape control characters in text as JSON does: `\u001b[2J` is printed and does not clear the screen."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


_live: "list[Progress]" = []  # the progress that is on the terminal, if any


@contextmanager
def progress_bar(title: str, total: int, console: "Console | None" = None) -> Iterator[Callable[[int, int], None]]:
    """Context manager: show a progress bar, if the console is a terminal, and remove the bar at the end.

    Inside another progress bar, the new one is printed below it. Of several processes, only the first shows bars.

    Args:
      title: text before the bar.
      total: number of items in all.
      console: the terminal; None = stderr.
    Yields: a function that updates the bar, called with the numbers of items (done, in all).
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = console or Console(stderr=True)
    hidden = not console.is_terminal or os.environ.get("RANK", "0") != "0"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ExitStack() as opened:
        if _live:
            bar = _live[0]
        else:
            bar = opened.enter_context(Progress(*columns, console=console, transient=True, disable=hidden))
            if not hidden:
                _live.append(bar)
                opened.callback(_live.clear)
        task = bar.add_task(title, total=total)
        opened.callback(bar.remove_task, task)
        yield lambda done, in_all: bar.update(task, completed=done, total=in_all)


def tracked(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield the items, and show a progress bar after SLOW seconds.

    Args:
      title: text before the bar.
      total: number of items.
    """
    started, progress = time.monotonic(), None
    with ExitStack() as opened:
        for done, item in enumerate(items, 1):
            yield item
            if progress is None and time.monotonic() - started > SLOW:
                progress = opened.enter_context(progress_bar(title, total))
            if progress is not None:
                progress(done, total)
