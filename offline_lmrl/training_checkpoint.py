"""The folder of a run while it is trained: checkpoints that are whole or absent, rows of metrics, and stopping.

A checkpoint is complete when everything is in it that resuming to the same bits reads. Checkpoints come and go by a
rename, so a kill leaves none in part; what it leaves lies in `.saving`.
"""

import json
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from offline_lmrl.data.errors import Stopped
from offline_lmrl.data.files import reading, staging, sync, sync_entry, writing
from offline_lmrl.data.io import write_text

STAGING = ".saving"
METRICS = "metrics.jsonl"
CLOSING = "train_runtime"  # of all rows the last one alone has it
DAMAGED = "a whole checkpoint: remove its folder to go on from the one before, or from the beginning"

log = logging.getLogger(__name__)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: str | Path) -> list[Path]:
    """Those in a run's folder, complete or not, by their steps."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def last_complete(folder: str | Path, lacking: Callable[[Path], Sequence[str]]) -> Path | None:
    """The newest complete checkpoint; a line says why newer ones are not taken.

    lacking: the names of what a checkpoint does not hold of what resuming reads.
    """
    refused = ""
    for checkpoint in reversed(checkpoints(folder)):
        names = lacking(checkpoint)
        if not names:
            if refused:
                log.warning("%s; training goes on from %s", refused, checkpoint.name)
            return checkpoint
        refused = refused or f"{checkpoint}: found no {', '.join(names)}, which going on exactly needs"
    if refused:
        log.warning("%s; no checkpoint is complete, so training starts from the beginning", refused)
    return None


def missing(checkpoint: Path, patterns: Sequence[str]) -> list[str]:
    """The patterns that no file of the checkpoint fits, and the shards of its weights that are not there."""
    found = [pattern for pattern in patterns if not any(checkpoint.glob(pattern))]
    for index in checkpoint.glob("*.safetensors.index.json"):
        with reading(index, DAMAGED):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        found += sorted(name for name in shards if not (checkpoint / name).exists())
    return found


@contextmanager
def filling(folder: Path, target: Path) -> Iterator[None]:
    """Around what fills a staging folder: an error is one about `target`, and leaves nothing on what may be full."""
    try:
        with writing(target):
            yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def publish(written: Path, checkpoint: Path) -> None:
    """Give a written checkpoint its name; one that has it already goes."""
    with writing(checkpoint):
        sync(written)
        if checkpoint.exists():
            remove(checkpoint)
        os.replace(written, checkpoint)
        sync_entry(checkpoint.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint at once: a kill while its files go leaves none in part."""
    with staging(checkpoint) as folder:
        os.replace(checkpoint, folder / checkpoint.name)


def rotate(folder: str | Path, newest: int, limit: int | None, best: str | None = None) -> None:
    """Remove the oldest checkpoints up to the step `newest`, so that `limit` are left; the best one stays.

    A checkpoint of a later step is one that was not taken when training went on from an earlier one.
    """
    mine = [path for path in checkpoints(folder) if step_of(path) <= newest]
    if limit is None or limit < 1 or not mine:
        return
    kept = {mine[-1], *(path for path in mine if best is not None and path.name == Path(best).name)}
    older = [path for path in reversed(mine) if path not in kept]
    for checkpoint in older[max(0, limit - len(kept)) :]:
        remove(checkpoint)


# Metrics.


def append_metrics(folder: str | Path, row: Mapping[str, Any]) -> None:
    path = Path(folder) / METRICS
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, less one that a kill cut. Raises: InputError where a row is damaged."""
    path, rows = Path(folder) / METRICS, []
    with reading(path, "a row of metrics as JSON per line; remove it, or the run"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            with reading(f"{path}:{number}", "a row of metrics as JSON; remove the row, or the run"):
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict):
                    raise TypeError("no object of JSON")
    return rows


def keep_metrics_until(folder: str | Path, step: int) -> None:
    """Drop the rows that a run which goes on from this step writes again; all of them at step 0."""
    path = Path(folder) / METRICS
    if path.exists():
        rows = read_metrics(folder) if step > 0 else []
        with reading(path, "a row of metrics with its step per line; remove it, or the run"):
            kept = [row for row in rows if row["step"] <= step and CLOSING not in row]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


# Stopping.


class Signals:
    """What arrived of SIGTERM and SIGINT; a second SIGINT interrupts at once."""

    number: int | None = None

    def __init__(self):
        self.group: Any = None

    def note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT == self.number:
            raise KeyboardInterrupt
        self.number = number

    def agreed(self, processes: int) -> int | None:
        """The signal that any process got, the same in all of them, which have to ask at the same steps."""
        if processes == 1:
            return self.number
        if self.group is None:
            self.group = torch.distributed.new_group(backend="gloo")  # so that no accelerator is waited for
        number = torch.tensor(self.number or 0)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group)
        return int(number) or None


@contextmanager
def noted_signals() -> Iterator[Signals]:
    """Leave it to training when to stop at a signal. In a thread, which gets no signals, there are none."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(number: int, folder: str | Path, step: int, steps: int) -> Stopped:
    """What ends training at a signal, once a checkpoint is written."""
    by = signal.Signals(number).name
    return Stopped(f"{folder}: stopped by {by} at step {step} of {steps}; the same command goes on from there", number)
