"""Scripted play: episodes of a fixed behaviour, and policies whose first turns are given."""

from collections.abc import Callable, Sequence
from typing import Any

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.protocols import Environment, Policy, Reply, Session
from offline_lmrl.data.trajectory import Trajectory, Turn


def scripted_episode(
    environment: Environment, opening: Sequence[Turn], choose: Callable[[], str], **fields: Any
) -> Trajectory:
    """Play an episode that has begun with `opening` to its end; a cut one keeps its last observation.

    Args:
      choose: gives the agent's next text.
      fields: those of the trajectory beyond turns, terminated and source.
    """
    turns, ended = list(opening), False
    while not ended:
        text = choose()
        result = environment.step(text)
        turns += [Turn("assistant", text, reward=result.reward), *result.turns]
        ended = result.terminated or result.truncated
    return Trajectory(tuple(turns), terminated=result.terminated, source="scripted", **fields)


def check_episodes(episodes: int) -> None:
    """Raises InputError for fewer than one episode."""
    if episodes < 1:
        raise InputError(f"episodes: found {episodes}, expected at least 1")


class Forced:
    """Says the given texts in its first turns and leaves the others to a policy; implements Policy.

    It shows what a policy makes of a past that it did not choose, such as rewards that were earned for it.
    """

    def __init__(self, policy: Policy, texts: Sequence[str]):
        self.policy, self.texts = policy, texts

    def start(self, seeds: Sequence[int]) -> Session:
        """A session with one row per seed."""
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
        said = sum(turn.is_trainable for turn in histories[0])  # rows of a rollout are at the same turn
        if said < len(self.texts):
            return [Reply(self.texts[said]) for _ in rows]
        return self.session.reply(rows, histories, options)
