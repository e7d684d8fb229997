"""One reward transform for trainer, sampler and evaluator."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.trajectory import Trajectory


@dataclass(frozen=True)
class RewardScale:
    """(reward − shift) / scale, applied to every scored turn; Q and V are learnt in these units.

    The scale is the range of the training returns, so 10·r and r give the same policy. A shift is safe only where
    every finished episode has the same number of scored turns: elsewhere it would pay for longer or shorter episodes,
    that is, change the task. There the shift is 0; where it is safe it is the mean reward, so that r − 1 and r give
    the same policy.
    """

    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise InputError(f"reward_scale: found {self.scale}, expected a number above 0")

    @classmethod
    def fit(cls, trajectories: Sequence[Trajectory], scale: float | None = None) -> "RewardScale":
        """From the training split; `scale` given overrides the fitted range (in the units of the logged rewards)."""
        scored = [[turn.reward for turn in t.turns if turn.reward is not None] for t in trajectories]
        counts = {len(rewards) for rewards, t in zip(scored, trajectories, strict=True) if t.terminated}
        fixed = len(counts) == 1 and all(len(rewards) <= max(counts) for rewards in scored)
        rewards = [reward for episode in scored for reward in episode]
        shift = sum(rewards) / len(rewards) if fixed and rewards else 0.0
        if scale is None:
            returns = [sum(episode) for episode, t in zip(scored, trajectories, strict=True) if t.terminated] or [
                sum(episode) for episode in scored
            ]
            scale = max(returns, default=0.0) - min(returns, default=0.0) or 1.0
        return cls(shift, scale)

    def apply(self, reward: float | None) -> float:
        """Scaled reward of a turn; an unscored turn (None) pays 0 in either unit."""
        return 0.0 if reward is None else (reward - self.shift) / self.scale

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> "RewardScale":
        return cls(**block)
