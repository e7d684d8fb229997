"""One reward transform for trainer, sampler and evaluator."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.trajectory import Trajectory


@dataclass(frozen=True)
class RewardScale:
    """(reward − shift) / scale, applied to every scored turn; Q and V are learnt in these units.

    The scale is the range of the training returns, so 10·r and r give the same policy. A shift is safe only where it
    moves all returns by one constant: nothing is discounted (else it counts for less the later a turn is scored) and
    every finished episode has the same number of scored turns (else it pays for longer or shorter episodes). There it
    is the mean reward, so that r − 1 and r give the same policy; elsewhere, where it would change the task, it is 0.

    scored_turns: of every finished episode, where the shift is safe; else 0.
    """

    shift: float = 0.0
    scale: float = 1.0
    scored_turns: int = 0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise InputError(f"reward_scale: found {self.scale}, expected a number above 0")

    @classmethod
    def fit(cls, trajectories: Sequence[Trajectory], scale: float | None = None, *, discounted: bool) -> "RewardScale":
        """From the training split.

        Args:
          scale: overrides the fitted range (in the units of the logged rewards).
          discounted: whether any step's discount is below 1 (`StepRule.discounted`).
        """
        scored = [[turn.reward for turn in t.turns if turn.reward is not None] for t in trajectories]
        counts = {len(rewards) for rewards, t in zip(scored, trajectories, strict=True) if t.terminated}
        fixed = not discounted and len(counts) == 1 and all(len(rewards) <= max(counts) for rewards in scored)
        rewards = [reward for episode in scored for reward in episode]
        shift = sum(rewards) / len(rewards) if fixed and rewards else 0.0
        if scale is None:
            returns = [sum(episode) for episode, t in zip(scored, trajectories, strict=True) if t.terminated] or [
                sum(episode) for episode in scored
            ]
            scale = max(returns, default=0.0) - min(returns, default=0.0) or 1.0
        return cls(shift, scale, max(counts) if fixed else 0)

    def apply(self, reward: float | None) -> float:
        """Scaled reward of a turn; an unscored turn (None) pays 0 in either unit."""
        return 0.0 if reward is None else (reward - self.shift) / self.scale

    def apply_to_return(self, total: float) -> float:
        """Scaled return of a whole episode, in which every scored turn was shifted."""
        return (total - self.scored_turns * self.shift) / self.scale

    def invert_return(self, total: float, scored_before: int = 0) -> float:
        """The return in logged units of a scaled return-to-go from a turn before which `scored_before` turns of the
        episode were scored; what lies ahead has the other scored turns in it, each shifted."""
        return total * self.scale + (self.scored_turns - scored_before) * self.shift

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON; `RewardScale(**block)` reads them back."""
        return asdict(self)
