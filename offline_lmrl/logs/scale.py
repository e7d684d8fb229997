"""The linear transform from logged rewards to the units of Q and V, shared by trainer, sampler and evaluator."""

from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from offline_lmrl.errors import require
from offline_lmrl.logs.trajectory import Trajectory


@dataclass(frozen=True)
class RewardScale:
    """The transform (reward − shift) / scale, applied to every scored turn; Q and V are learnt in the resulting units.

    Logged units are the units of the rewards in the data. A scored turn is a turn whose reward is not None.

    The scale is the range of the training returns, so that 10·r and r give the same policy. A shift is safe only if it
    changes all returns by the same constant. This requires that nothing is discounted (otherwise the shift would count
    for less the later a turn is scored) and that every finished episode has the same number of scored turns (otherwise
    the shift would reward longer or shorter episodes). If the shift is safe, it is the mean reward, so that r − 1 and
    r give the same policy. If not, it would change the task, so it is 0.

    Attributes:
      shift: in logged units.
      scale: in logged units, above 0.
      scored_turns: number of scored turns in every finished episode if the shift is safe; else 0.
    """

    shift: float = 0.0
    scale: float = 1.0
    scored_turns: int = 0

    def __post_init__(self) -> None:
        require(self.scale > 0, f"reward_scale: found {self.scale}, expected a number above 0")

    @classmethod
    def fit(cls, trajectories: Iterable[Trajectory], scale: float | None = None, *, discounted: bool) -> "RewardScale":
        """Fit shift and scale to the training split.

        Args:
          trajectories: the training split.
          scale: the scale to use, in logged units; None = fit it.
          discounted: True if any step's discount is below 1 (`StepRule.discounted` in tokens/episodes.py).
        """
        # By `terminated`: the numbers of scored turns, and the returns.
        counts: dict[bool, set[int]] = {True: set(), False: set()}
        returns, rewards = {True: array("d"), False: array("d")}, array("d")
        for trajectory in trajectories:
            episode = [turn.reward for turn in trajectory.turns if turn.reward is not None]
            rewards.extend(episode)
            counts[trajectory.terminated].add(len(episode))
            returns[trajectory.terminated].append(sum(episode))
        finished = counts[True]
        fixed = not discounted and len(finished) == 1 and max(finished | counts[False]) == max(finished)
        shift = sum(rewards) / len(rewards) if fixed and rewards else 0.0
        if scale is None:
            compared = returns[True] or returns[False]
            scale = max(compared, default=0.0) - min(compared, default=0.0) or 1.0
        return cls(shift, scale, max(finished) if fixed else 0)

    def apply(self, reward: float | None) -> float:
        """Return the scaled reward of a turn; a turn that is not scored (None) has the scaled reward 0."""
        return 0.0 if reward is None else (reward - self.shift) / self.scale

    def apply_to_return(self, total: float) -> float:
        """Return the scaled return of a whole, finished episode from its return in logged units."""
        return (total - self.scored_turns * self.shift) / self.scale

    def invert_return(self, total: float, scored_before: int = 0) -> float:
        """Convert a scaled return-to-go to logged units.

        Args:
          total: the scaled return-to-go, the sum of scaled rewards from the present turn on.
          scored_before: number of scored turns before the present turn. Their rewards are not part of the
            return-to-go, so the shift is undone for the remaining scored turns only.
        """
        return total * self.scale + (self.scored_turns - scored_before) * self.shift

    def to_dict(self) -> dict[str, float]:
        """Return plain values for JSON; `RewardScale(**values)` is the inverse."""
        return asdict(self)
