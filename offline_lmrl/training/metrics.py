"""What training logs: averages of metrics over all processes (ranks), and rows of metrics.jsonl."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback

from offline_lmrl.logs.files import reading, writing
from offline_lmrl.logs.io import write_text

METRICS = "metrics.jsonl"
FEW = 10  # batches
CLOSING = "train_runtime"  # a key of the last row only


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


class Averages:
    """Running sums of logged values.

    Attributes:
      sums: name -> sum of the values and their number, (2,), of this process since the last call of `take`.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, logged: Mapping[str, Tensor], count: bool = True) -> None:
        """Add the values of each metric, and their number, to the running sums.

        Args:
          logged: name -> values, a tensor of one axis.
          count: False: add 0 to both sums. The entries then exist, as they must on every rank when sums are reduced.
        """
        for name, values in logged.items():
            # A rank that does not count adds an empty slice: all ranks must have the same entries to reduce.
            values = values.detach().float()[: None if count else 0]
            pair = torch.stack([values.sum(), values.new_tensor(float(values.numel()))])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def take(self, accelerator: Accelerator, prefix: str = "") -> dict[str, float]:
        """Return the mean of every metric over all ranks since the last call, with `prefix` before each name."""
        if not self.sums:
            return {}
        total = accelerator.reduce(torch.stack(list(self.sums.values())), "sum")
        names, self.sums = list(self.sums), {}
        # A metric with a count of 0 has no average and is left out: no window had values for it.
        rows = zip(names, total.tolist(), strict=True)
        return {prefix + name: added / count for name, (added, count) in rows if count}


def batch_moments(per_item: Tensor) -> Tensor:
    """Return (6,) 1, s, c, s², s·c and c² of a batch with c items whose losses, (c,), have the sum s."""
    total = per_item.detach().float().sum()
    count = torch.full_like(total, len(per_item))
    return torch.stack([torch.ones_like(total), total, count, total**2, total * count, count**2])


def ratio_interval(n: float, s: float, c: float, ss: float, sc: float, cc: float) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean loss s / c; None with fewer than FEW batches.

    It is the normal interval of a ratio of means over independent batches, because tokens of a batch are dependent.

    Args:
      n, s, c, ss, sc, cc: the sums of `batch_moments` over all batches.
    """
    if n < FEW:
        return None
    mean = s / c
    half = 1.96 * math.sqrt(max(0.0, n / (n - 1) * (ss - 2 * mean * sc + mean**2 * cc))) / c
    return mean - half, mean + half


class MetricsFile(TrainerCallback):
    """A callback that appends every logged row to metrics.jsonl in the run directory."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero:
            append_metrics(args.output_dir, {"step": state.global_step, **(logs or {})})


class LastStep(TrainerCallback):
    """A callback by which the last step gets a row of metrics, so that short runs have one."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
