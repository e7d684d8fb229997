"""What a training prints on stderr: a table and a bar on a terminal, one line per row of metrics elsewhere, a summary.

Only the main process prints, and nothing is printed with `disable_tqdm: true`.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from offline_lmrl.logs.terminal import progress_bar, visible
from offline_lmrl.training.metrics import CLOSING, read_metrics

if TYPE_CHECKING:
    from rich.table import Table

HELD_OUT = "eval_"  # prefix of the names of metrics of held-out data
# Metrics that say nothing of what was learnt.
TECHNICAL = (
    "epoch", "grad_norm", "learning_rate", "loss_high", "loss_low", "runtime", "samples_per_second",
    "steps_per_second", "step",
)  # fmt: skip
SHOWN = 300  # characters of a reply
STEP_WIDTH, WIDTH = 9, 7  # characters of the first and of every other column


def commands_after(evaluate: str) -> tuple[str, ...]:
    """Return the commands that follow a finished run of a policy; `evaluate` is the one that measures it."""
    export = "export {run} --to transformers --output FOLDER"
    return ("generate {run} --chat", evaluate, export, "serve {run}", "plot {run}")


def brief(value: float | None) -> str:
    """Return a number in at most 7 characters: two or three digits, with a power of ten if it is small or large."""
    if value is None:
        return ""
    text = f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else re.sub(r"^(-?)0\.", r"\1.", text)


def metrics_of(row: Mapping[str, Any]) -> tuple[bool, dict[str, float]]:
    """Split a row of metrics: (True if they are of held-out data, name without prefix -> what was learnt)."""
    held_out = any(name.startswith(HELD_OUT) for name in row)
    metrics = {name.removeprefix(HELD_OUT): value for name, value in row.items()}
    return held_out, {name: value for name, value in metrics.items() if name not in TECHNICAL}


class TrainingDisplay(TrainerCallback):
    """A callback that shows the progress of a training.

    Trainers that run their own loop call its methods themselves.

    Args:
      shown: False: print nothing, as on all processes but the main one.
    """

    def __init__(self, shown: bool):
        from rich.console import Console

        self.shown = shown
        self.console = Console(stderr=True) if shown else Console(quiet=True, force_terminal=False)
        self.columns: Sequence[str] = ()
        self.widths: Sequence[int] = ()
        self.steps, self.started = 0, 0.0
        self.live = ExitStack()

    def begin(self, step: int, steps: int) -> None:
        """Start the bar at step `step` of `steps`."""
        self.steps, self.started, self.columns = steps, time.monotonic(), ()
        self.advance = self.live.enter_context(self.bar("training", steps))
        self.advance(step, steps)

    @contextmanager
    def training(self, step: int, steps: int) -> Iterator[None]:
        """Context manager: show the bar of a training that starts at step `step` of `steps`."""
        self.begin(step, steps)
        try:
            yield
        finally:
            self.close()

    def bar(self, title: str, total: int) -> AbstractContextManager[Callable[[int, int], None]]:
        """Return the context manager `progress_bar` for a part of the training, below the bar of the training."""
        return progress_bar(title, total, self.console)

    def show(self, step: int, row: Mapping[str, Any]) -> None:
        """Print a row of metrics. The names of the first row, as many as fit, become the columns of the table."""
        held_out, metrics = metrics_of(row)
        if CLOSING in metrics or not metrics:
            return
        if not self.console.is_terminal:
            kind = " (held-out data)" if held_out else ""
            numbers = ", ".join(f"{name} {brief(value)}" for name, value in metrics.items())
            self.console.print(f"step {step} of {self.steps}{kind}: {numbers}", soft_wrap=True, highlight=False)
            return
        if not self.columns:
            self.columns = list(metrics)[: max(1, (self.console.width - STEP_WIDTH - 1) // (WIDTH + 1))]
            widest = [max(WIDTH, *map(len, name.split("/"))) for name in self.columns]
            whole = STEP_WIDTH + 1 + sum(widest) + len(widest) <= self.console.width
            self.widths = widest if whole else [WIDTH] * len(widest)
            titles = (name.partition("/") for name in self.columns)
            self.console.print(self._row("\nstep", (f"{group}\n{name}" for group, _, name in titles), "bold"))
        first = f"{step} eval" if held_out else str(step)
        if set(self.columns) & metrics.keys():
            self.console.print(self._row(first, (brief(metrics.get(name)) for name in self.columns), ""))
        else:
            self.console.print(f"{first}: {', '.join(f'{name} {brief(metrics[name])}' for name in metrics)}")

    def _row(self, first: str, cells: Iterable[str], style: str) -> "Table":
        from rich.table import Table

        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_column(width=STEP_WIDTH, justify="right")
        for width in self.widths:
            row.add_column(width=width, justify="right", overflow="fold")
        row.add_row(first, *cells, style=style)
        return row

    def show_texts(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print rows of texts as a table, on a terminal only; the keys of the first row are the titles."""
        from rich.table import Table
        from rich.text import Text

        if self.console.is_terminal:
            table = Table(*rows[0], show_lines=True)
            for row in rows:
                texts = (visible(str(text)) for text in row.values())
                table.add_row(*(Text(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...") for text in texts))
            self.console.print(table)

    def close(self) -> None:
        """Remove the bar, so that what follows is printed below the table."""
        self.live.close()

    def summarise(self, folder: str | Path) -> None:
        """Print what was learnt: the first and the last value of every metric of the run, also of earlier parts."""
        if not self.shown:
            return

        from rich.table import Table

        rows = [metrics_of(row) for row in read_metrics(folder) if CLOSING not in row]
        seconds = round(time.monotonic() - self.started)
        self._say(f"{folder}: {self.steps} steps, {seconds // 60} min {seconds % 60} s")
        changes: dict[str, dict[bool, str]] = {}  # metric -> first and last value, in training and of held-out data
        for kind in (False, True):
            found = [metrics for held_out, metrics in rows if held_out is kind]
            first, last = (dict(chain(*(part.items() for part in parts))) for parts in (found[::-1], found))
            for name, value in last.items():
                changes.setdefault(name, {})[kind] = f"{brief(first[name])} → {brief(value)}"
        if changes:
            table = Table("", "training", "held-out data", box=None, padding=(0, 2))
            for name, change in changes.items():
                table.add_row(name, change.get(False, ""), change.get(True, ""))
            self.console.print(table)

    def advise(self, folder: str | Path, commands: Iterable[str]) -> None:
        """Print where the model is, and the commands that can be run next."""
        self._say(f"{folder}: the model is saved; next:")
        for command in commands:
            self._say(f"  offline-lmrl {command.format(run=folder)}")

    def _say(self, text: str) -> None:
        self.console.print(visible(text), soft_wrap=True, highlight=False, markup=False)

    # Events of transformers.Trainer.

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.begin(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.advance(state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.show(state.global_step, logs or {})

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.close()
        self.summarise(args.output_dir)
