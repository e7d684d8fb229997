"""Scripted play: episodes whose texts a function chooses, and policies whose first turns are fixed texts."""

from collections.abc import Callable, Sequence
from typing import Any

from offline_lmrl.errors import InputError
from offline_lmrl.logs.protocols import Environment, Policy, Reply, Session
from offline_lmrl.logs.trajectory import Trajectory, Turn


def scripted_episode(
    environment: Environment, opening: Sequence[Turn], choose: Callable[[], str], **fields: Any
) -> Trajectory:
    """Play an episode and return its trajectory; an episode that is cut keeps its last observation.

    Args:
      environment: an environment that was just reset.
      opening: the turns that its `reset` returned.
      choose: function without arguments that returns the agent's next text.
      fields: further fields of the trajectory by name, such as group and task.
    """
    turns, ended = list(opening), False
    while not ended:
        text = choose()
        result = environment.step(text)
        turns += [Turn("assistant", text, reward=result.reward), *result.turns]
        ended = result.terminated or result.truncated
    return Trajectory(tuple(turns), terminated=result.terminated, source="scripted", **fields)


def check_episodes(episodes: int) -> None:
    """Check that there is at least one episode. Raises: InputError if not."""
    if episodes < 1:
        raise InputError(f"episodes: found {episodes}, expected at least 1")


class Forced:
    """A policy whose first turns are fixed texts and whose later turns are another policy's; implements Policy.

    It shows how a policy acts after turns that it did not choose, for example turns that earn known rewards.

    Args:
      policy: the policy that draws the turns after the fixed ones.
      texts: the texts of the first turns, the same in every episode.
    """

    def __init__(self, policy: Policy, texts: Sequence[str]):
        self.policy, self.texts = policy, texts

    def start(self, seeds: Sequence[int]) -> Session:
        """Start a session for a batch of episodes, one row per seed.

        Args:
          seeds: the random seed of each row, with which `policy` draws the turns after the fixed ones.
        """
        return _ForcedSession(self.policy.start(seeds), self.texts)


class _ForcedSession:
    def __init__(self, session: Session, texts: Sequence[str]):
        self.session, self.texts = session, texts

    def reply(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Reply]:
        played = sum(turn.is_trainable for turn in histories[0])  # all rows of a rollout are at the same turn
        if played < len(self.texts):
            return [Reply(self.texts[played]) for _ in rows]
        return self.session.reply(rows, histories, options)
