"""Generate logs of a toy's behaviour policy, for configs that start from a model trained to imitate it."""

from dataclasses import MISSING, dataclass

from data_prep.source import VALIDATION_SHARE, Report, Source, write_trajectories
from offline_lmrl.environments.scripted import Toy
from offline_lmrl.errors import require, shown
from offline_lmrl.settings import setting
from offline_lmrl.tasks import make_environment


@dataclass(frozen=True, kw_only=True)
class Toys(Source):
    """Write train.jsonl, validation.jsonl (a tenth as many further episodes) and report.json."""

    task: str = setting(MISSING, "corridor, gamble, count, count1, talk, talk_trap, hidden_rule or walk")
    episodes: int = setting(500, "number of training episodes")

    def make(self) -> Report:
        """Play the episodes; those of validation have the next seed."""
        made = make_environment(self.task)
        environment = made() if callable(made) else made
        require(
            isinstance(environment, Toy),
            f"task: found {shown(self.task)}, expected a task that has logs, such as count",
        )
        rows = environment.logs(self.episodes, self.seed)
        held_out = environment.logs(max(1, round(VALIDATION_SHARE * self.episodes)), self.seed + 1)
        report = {"episodes": len(rows), "mean_return": sum(row.total_return for row in rows) / len(rows)}
        return write_trajectories(self.output, {"train": rows, "validation": held_out}, report)
