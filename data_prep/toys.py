"""Generate logs of a toy's behaviour policy, for configs that start from a model trained to imitate it."""

from pathlib import Path

from data_prep.reports import prepared, write_json
from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.io import REPORT, write_trajectories
from offline_lmrl.tasks import make_environment

VALIDATION_SHARE = 0.1


def prepare(output: str | Path, *, task: str, episodes: int = 500, seed: int = 0) -> dict[str, float]:
    """Write train.jsonl, validation.jsonl (a tenth as many further episodes) and report.json.

    Args:
      output: folder to write to; created if needed.
      task: corridor, gamble, count, count1, talk, talk_trap, hidden_rule or walk.
      episodes: number of training episodes.
      seed: random seed of the training episodes; the validation episodes have the next one.
    Returns: the number of episodes and their mean return.
    Raises: InputError for a task without logs, fewer than one episode, or an output that cannot be written.
    """
    made = make_environment(task)
    environment = made() if callable(made) else made
    if not hasattr(environment, "logs"):
        raise InputError(f"task: found {shown(task)}, expected a task that has logs, such as count")
    rows = environment.logs(episodes, seed)
    held_out = environment.logs(max(1, round(VALIDATION_SHARE * episodes)), seed + 1)
    report = {"episodes": len(rows), "mean_return": sum(row.total_return for row in rows) / len(rows)}
    with prepared(output) as folder:
        write_trajectories(folder / "train.jsonl", rows)
        write_trajectories(folder / "validation.jsonl", held_out)
        write_json(folder / REPORT, report)
    return report
