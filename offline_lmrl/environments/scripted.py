"""Scripted play: the logs of small tasks with a known behaviour policy, and policies that choose texts by a rule."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from offline_lmrl.errors import require
from offline_lmrl.logs.protocols import Environment, Policy, Reply, Session
from offline_lmrl.logs.trajectory import Trajectory, Turn

Play = tuple[Sequence[Turn], Callable[[], str]]  # the opening of an episode, and what returns each text of the agent


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
    require(episodes >= 1, f"episodes: found {episodes}, expected at least 1")


class Toy:
    """The base class of toy tasks: environments with a known behaviour policy, whose logs they make themselves.

    A subclass implements Environment, sets `name` and `invalid`, and defines `behave`.

    Attributes:
      name: the task's name, with which the group of every logged episode begins.
      invalid: number of texts of this episode that the game does not know.
    """

    name = ""
    invalid = 0

    def behave(self, rng: np.random.Generator, number: int) -> Play:
        """Start an episode of the behaviour policy.

        Args:
          rng: source of all random numbers, also those of the texts.
          number: index of the episode in its logs.
        Returns: the turns before the agent's first, and the function that returns each text of the agent.
        """
        raise TypeError(f"{type(self).__name__} does not define `behave`")

    @property
    def task_name(self) -> str:
        """The name of the task that the present episode plays, by which few-shot demonstrations are chosen."""
        return self.name

    def logs(self, episodes: int, seed: int) -> list[Trajectory]:
        """Return this many episodes of the behaviour policy, each in a group of its own."""
        check_episodes(episodes)
        rng = np.random.default_rng(seed)
        return [
            scripted_episode(
                self, *self.behave(rng, number), group=f"{self.name}-{seed}-{number}", task=self.task_name
            )
            for number in range(episodes)
        ]

    def labels(self) -> dict[str, object]:
        """Return `invalid`."""
        return {"invalid": self.invalid}


def distances_to(goal: Hashable, neighbours: Callable[[Any], Iterable[Hashable]]) -> dict[Hashable, int]:
    """Return the fewest steps to the goal from every place that can reach it, by breadth-first search.

    Args:
      goal: the goal.
      neighbours: maps a place to the places from which one step leads there.
    """
    found, frontier = {goal: 0}, [goal]
    for place in frontier:  # the list grows during the loop
        for before in neighbours(place):
            if before not in found:
                found[before] = found[place] + 1
                frontier.append(before)
    return found


class ScriptedPolicy:
    """The base class of policies whose next text is a function of the dialogue and of random numbers.

    Implements Policy. A subclass defines `write`.
    """

    def write(self, history: Sequence[Turn], rng: np.random.Generator) -> str:
        """Return the agent's next text, given all turns of the episode so far."""
        raise TypeError(f"{type(self).__name__} does not define `write`")

    def start(self, seeds: Sequence[int]) -> Session:
        """Start a batch of episodes; row i of the session draws its texts with seed seeds[i]."""
        return _ScriptedSession(self, seeds)


class _ScriptedSession:
    def __init__(self, policy: ScriptedPolicy, seeds: Sequence[int]):
        self.policy, self.rngs = policy, [np.random.default_rng(seed) for seed in seeds]

    def reply(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Reply]:
        return [
            Reply(self.policy.write(history, self.rngs[row])) for row, history in zip(rows, histories, strict=True)
        ]


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
