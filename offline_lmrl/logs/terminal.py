"""Text of logs, models and files made safe to print on a terminal, and progress bars there."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Control characters except line feed and tab, characters that reverse the direction of text, line separators other
# than line feed, and halves of surrogate pairs, which cannot be printed.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Escape control characters in text as JSON does: `\u001b[2J` is printed and does not clear the screen."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@contextmanager
def progress_bar(title: str, total: int, console: "Console | None" = None) -> Iterator[Callable[[int, int], None]]:
    """Context manager: show a progress bar, if the console is a terminal, and remove the bar at the end.

    Args:
      title: text before the bar.
      total: number of items in all.
      console: the terminal; None = stderr.
    Yields: a function that updates the bar, called with the numbers of items (done, in all).
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done, in_all: bar.update(task, completed=done, total=in_all)
