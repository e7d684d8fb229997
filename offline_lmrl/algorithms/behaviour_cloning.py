"""Behaviour cloning and filtered behaviour cloning.

    L = −log π(a|s), averaged over the agent's action tokens of the trajectories that are kept.

BC keeps all trajectories. Filtered BC (%BC: Chen et al. 2021, Decision Transformer; Snell et al. 2022) keeps the best
by total return: a share of all trajectories, or of each group (trajectories from one root prompt or conversation), and
of these the trajectories at or above a threshold. It is the baseline to beat. If the best episodes alone do not cover
every situation, start filtered BC from a run of BC.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from offline_lmrl.errors import InputError, require
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.settings import setting
from offline_lmrl.training.config import OfflineConfig
from offline_lmrl.training.trainer import Logs, OfflineTrainer


@dataclass
class BCConfig(OfflineConfig):
    """The settings of behaviour cloning."""

    keep_share: float = setting(
        1.0,
        "Share of trajectories to keep, best total returns first, in (0, 1]; 1 = plain BC.",
    )
    keep_above: float | None = setting(
        None,
        "Least total return of a trajectory to keep, in the units of the logged rewards; null = no threshold.",
    )
    per_group: bool = setting(False, "Take keep_share within each group instead of over all data.")

    def __post_init__(self) -> None:
        require(0 < self.keep_share <= 1, f"keep_share: found {self.keep_share}, expected above 0 and at most 1")
        super().__post_init__()


def keep_best(
    trajectories: Sequence[Trajectory], share: float = 1.0, above: float | None = None, per_group: bool = False
) -> list[Trajectory]:
    """Return the trajectories with the highest total return, in their original order.

    The total return is the sum of the logged rewards, even if the episode was cut off. Of trajectories with equal
    returns, the earlier ones are kept.

    Args:
      trajectories: the trajectories to choose from.
      share: share to keep, in (0, 1]. At least one trajectory per group (or overall) is kept, before `above` applies.
      above: least total return to keep, in reward units; None = no threshold.
      per_group: True: keep the share of each group; False: keep the share of all trajectories.
    Raises: InputError if no trajectory is left.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, trajectory in enumerate(trajectories):
        groups[trajectory.group if per_group else ""].append(index)
    kept = set()
    for members in groups.values():
        best = sorted(members, key=lambda index: -trajectories[index].total_return)
        # Rounded before ceil, because .07 · 100 in floating point is a hair above 7.
        kept.update(best[: math.ceil(round(share * len(members), 9))])
    chosen = [t for i, t in enumerate(trajectories) if i in kept and (above is None or t.total_return >= above)]
    if not chosen:
        best_return = max(t.total_return for t in trajectories)
        raise InputError(f"keep_above: found {above}, expected at most the best return in the data, {best_return:g}")
    return chosen


class BCTrainer(OfflineTrainer):
    """The trainer that fits a plain policy (no value heads) by behaviour cloning.

    It takes the arguments of `OfflineTrainer`: model, settings, training data, held-out data, tokenizer, peft config.
    """

    algorithm = "bc"

    def choose(self, logs: Logs) -> Logs:
        args = self.args
        return logs._replace(train=keep_best(logs.train, args.keep_share, args.keep_above, args.per_group))

    def losses(self, outputs, batch):
        loss = -outputs["log_prob"]
        return loss, {"loss/policy": loss}
