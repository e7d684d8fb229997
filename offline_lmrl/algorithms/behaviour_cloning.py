"""Behaviour cloning and filtered behaviour cloning.

    L = −log π(a|s), averaged over the agent's action tokens of the trajectories that are kept.

BC keeps all. Filtered BC (%BC: Chen et al. 2021, Decision Transformer; Snell et al. 2022) keeps the best by total
return: a share, or all at or above a threshold; over all data or within each group. It is the baseline to beat: start
it from a BC checkpoint where the best episodes alone do not cover every situation.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.trajectory import Trajectory
from offline_lmrl.models.guided import detach
from offline_lmrl.training import OfflineConfig, OfflineTrainer


@dataclass
class BCConfig(OfflineConfig):
    """Settings of behaviour cloning.

    keep_share: share of trajectories that is kept, best returns first, (0, 1]; 1 = plain BC.
    keep_above: least total return that is kept, in logged units; None = no threshold.
    per_group: take the share within each group instead of over all data.
    """

    keep_share: float = 1.0
    keep_above: float | None = None
    per_group: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep_share <= 1:
            raise InputError(f"keep_share: found {self.keep_share}, expected above 0 and at most 1")
        super().__post_init__()


def keep_best(
    trajectories: Sequence[Trajectory], share: float = 1.0, above: float | None = None, per_group: bool = False
) -> list[Trajectory]:
    """The best trajectories by total return, in their original order; ties at the edge go to the earlier ones.

    A cut trajectory counts with the reward that was logged. At least one per group (or overall) is kept by the share.
    Raises: InputError where the threshold keeps none.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, trajectory in enumerate(trajectories):
        groups[trajectory.group if per_group else ""].append(index)
    kept = set()
    for members in groups.values():
        best = sorted(members, key=lambda index: -trajectories[index].total_return)
        # rounded, since .07 · 100 is a hair above 7
        kept.update(best[: math.ceil(round(share * len(members), 9))])
    chosen = [t for i, t in enumerate(trajectories) if i in kept and (above is None or t.total_return >= above)]
    if not chosen:
        best_return = max(t.total_return for t in trajectories)
        raise InputError(f"keep_above: found {above}, expected at most the best return in the data, {best_return:g}")
    return chosen


class BCTrainer(OfflineTrainer):
    """Trains a plain policy; see `OfflineTrainer` for the arguments."""

    algorithm = "bc"

    def select(self, trajectories, args: BCConfig):
        return keep_best(trajectories, args.keep_share, args.keep_above, args.per_group)

    def prepare_model(self, model, args: BCConfig, windows):
        return detach(super().prepare_model(model, args, windows))  # heads of another policy would be stale

    def loss_terms(self, outputs, steps):
        loss = -outputs["log_prob"]
        return loss, {"loss/policy": loss}
