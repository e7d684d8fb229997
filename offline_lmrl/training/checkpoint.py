"""The folder of a run during training: checkpoints that are complete or absent, rows of metrics, and stopping.

A run is one training, with all its files in one folder. A checkpoint is a subfolder checkpoint-STEP; it is complete if
it holds everything that training needs to resume bit for bit. Checkpoints are added and removed by a rename, so a
killed process leaves no half-written checkpoint: its unfinished files are in the folder `.saving` (STAGING).
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

from offline_lmrl.errors import Stopped
from offline_lmrl.logs.files import reading, staging, sync, sync_entry, writing
from offline_lmrl.logs.io import write_text

STAGING = ".saving"
METRICS = "metrics.jsonl"
CLOSING = "train_runtime"  # a key of the last row only
DAMAGED = "a complete checkpoint; remove its folder to continue from the one before it, or from the beginning"

log = logging.getLogger(__name__)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints in a run's folder, complete or not, in the order of their steps."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def last_complete(folder: str | Path, lacking: Callable[[Path], Sequence[str]]) -> Path | None:
    """Return the newest complete checkpoint, and log why newer ones are not used; None if none is complete.

    Args:
      folder: folder of the run.
      lacking: maps a checkpoint to the names of files that resuming needs and the checkpoint does not have.
    """
    refused = ""
    for checkpoint in reversed(checkpoints(folder)):
        names = lacking(checkpoint)
        if not names:
            if refused:
                log.warning("%s; training continues from %s", refused, checkpoint.name)
            return checkpoint
        refused = refused or f"{checkpoint}: found no {', '.join(names)}, which exact resuming needs"
    if refused:
        log.warning("%s; no checkpoint is complete, so training starts from the beginning", refused)
    return None


def missing(checkpoint: Path, patterns: Sequence[str]) -> list[str]:
    """Return the glob patterns that match no file in the checkpoint, and the names of missing shards of weights.

    Raises: InputError if an index of shards is damaged.
    """
    found = [pattern for pattern in patterns if not any(checkpoint.glob(pattern))]
    for index in checkpoint.glob("*.safetensors.index.json"):
        with reading(index, DAMAGED):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        found += sorted(name for name in shards if not (checkpoint / name).exists())
    return found


@contextmanager
def filling(folder: Path, target: Path) -> Iterator[None]:
    """A context manager in whose body files are written into a staging folder.

    An error in writing becomes an InputError that names `target`, the final path. After any error the staging folder
    is removed, because the disk may be full.
    """
    try:
        with writing(target):
            yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def publish(written: Path, checkpoint: Path) -> None:
    """Rename the written folder to `checkpoint`, after its files are on the disk; replace an existing checkpoint."""
    with writing(checkpoint):
        sync(written)
        if checkpoint.exists():
            remove(checkpoint)
        os.replace(written, checkpoint)
        sync_entry(checkpoint.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, renaming it first, so that a kill while files are deleted leaves no partial checkpoint."""
    with staging(checkpoint) as folder:
        os.replace(checkpoint, folder / checkpoint.name)


def rotate(folder: str | Path, newest: int, limit: int | None, best: str | None = None) -> None:
    """Remove the oldest checkpoints of steps up to `newest`, so that at most `limit` of them are left.

    Checkpoints of later steps are neither counted nor removed: they are from before training resumed at an earlier
    step.

    Args:
      folder: folder of the run.
      newest: the current step. The newest checkpoint up to it is always kept.
      limit: number of checkpoints to keep; None or 0 = all.
      best: path of the best checkpoint, which counts towards `limit` and is always kept; None = there is none.
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
    """Return the rows of a run's metrics.jsonl as dicts, without an unfinished last row.

    Raises: InputError if the file cannot be read or a row is damaged.
    """
    path, rows = Path(folder) / METRICS, []
    with reading(path, "a JSON object of metrics on each line; remove this file, or the run"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):  # else a kill cut the row
            with reading(f"{path}:{number}", "a JSON object of metrics; remove this row, or the run"):
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict):
                    raise TypeError("not a JSON object")
    return rows


def keep_metrics_until(folder: str | Path, step: int) -> None:
    """Drop the rows of metrics.jsonl that a run resumed at `step` writes again; at step 0 these are all rows.

    They are the rows of later steps, and the last row of a finished run.
    """
    path = Path(folder) / METRICS
    if path.exists():
        rows = read_metrics(folder) if step > 0 else []
        with reading(path, "metrics with a step on each line; remove this file, or the run"):
            kept = [row for row in rows if row["step"] <= step and CLOSING not in row]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


# Stopping.


class Signals:
    """A record of the last SIGTERM or SIGINT that arrived; a second SIGINT raises KeyboardInterrupt at once.

    Attributes:
      number: number of that signal; None = none has arrived.
    """

    number: int | None = None

    def __init__(self):
        self.group: Any = None

    def note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT == self.number:
            raise KeyboardInterrupt
        self.number = number

    def agreed(self, processes: int) -> int | None:
        """Return the number of a signal that any of the processes got, or None; all processes get the same answer.

        All processes must call this at the same steps.

        Args:
          processes: number of processes that train together.
        """
        if processes == 1:
            return self.number
        if self.group is None:
            self.group = torch.distributed.new_group(backend="gloo")  # on the CPU, to wait for no accelerator
        number = torch.tensor(self.number or 0)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group)
        return int(number) or None


@contextmanager
def noted_signals() -> Iterator[Signals]:
    """A context manager in whose body SIGTERM and SIGINT are only recorded, so that training decides when to stop.

    Nothing is recorded in a thread other than the main one, because such a thread gets no signals.
    """
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
    """Return the exception that ends training at a signal, after a checkpoint is written.

    Args:
      number: number of the signal.
      folder: folder of the run.
      step: the current step.
      steps: number of steps of the whole run.
    """
    by = signal.Signals(number).name
    return Stopped(
        f"{folder}: stopped by {by} at step {step} of {steps}; the same command continues from there", number
    )
