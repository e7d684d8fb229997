"""Rollouts: a policy plays many episodes of an environment at once, and each becomes a trajectory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.protocols import Environment, Policy, Reply, StepResult, VectorEnvironment, is_vector, optional
from offline_lmrl.logs.trajectory import Trajectory, Turn, finite

MAX_TURNS = 1000  # so that an evaluation ends even if the environment never does


@dataclass(frozen=True)
class PlaySettings:
    """How a set of episodes is played: the further arguments of `rollout`.

    batch_size: number of episodes that are played at once.
    max_turns: number of agent turns after which an episode is cut; None = no limit.
    few_shot: maps the seed of an episode to the few-shot demonstrations that the policy reads before it, or to None
      for no demonstrations (`few_shot_of_task` in tokens/few_shot.py makes such a function). None = the policy reads
      the demonstrations that it was made with, if any, in all episodes.
    progress: called with (number of episodes that have ended, number of all episodes) whenever some have ended; None =
      not called.
    """

    batch_size: int = 1024
    max_turns: int | None = MAX_TURNS
    few_shot: Callable[[int], Sequence[Trajectory] | None] | None = None
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        require(
            self.max_turns is None or self.max_turns >= 1,
            f"max_turns: found {self.max_turns}, expected at least 1, or null",
        )
        require(self.batch_size >= 1, f"batch_size: found {self.batch_size}, expected at least 1")


class SideBySide:
    """A vector environment made of one Environment per episode, stepped one after the other.

    Implements VectorEnvironment.

    Args:
      factory: function without arguments that makes a new Environment, such as a class.
    """

    def __init__(self, factory: Callable[[], Environment]):
        self.factory = factory

    def reset(self, seeds: Sequence[int]) -> list[Sequence[Turn]]:
        self.environments = [self.factory() for _ in seeds]
        return [environment.reset(seed) for environment, seed in zip(self.environments, seeds, strict=True)]

    def step(self, rows: Sequence[int], texts: Sequence[str]) -> list[StepResult]:
        return [StepResult(*self.environments[row].step(text)) for row, text in zip(rows, texts, strict=True)]

    def labels(self, row: int) -> dict[str, Any]:
        return optional(self.environments[row], "labels")()

    def options(self, row: int) -> list[str] | None:
        return optional(self.environments[row], "options")()


def rollout(
    policy: Policy,
    environment: VectorEnvironment | Callable[[], Environment],
    seeds: Sequence[int],
    **settings: Any,
) -> list[Trajectory]:
    """Play one episode per seed; no episode depends on the others.

    Agent turns hold their reward and, if the policy gives them, token_ids and behaviour_log_prob. An episode that was
    cut, by the environment or by max_turns, is not `terminated` and keeps its last observation. `labels` holds the
    environment's labels, labels that the policy adds (such as the requested return), and:

      "seed": the seed.
      "tokenizer": fingerprint of the tokenizer and chat format to which the token_ids belong. This label and the next
        two are stored only if the policy has a tokenizer.
      "policy_log_prob": one list per agent turn, with one number per token: log π at the sampling temperature, without
        filters such as top-p and without guidance by Q and V.
      "options": index of a turn, as text -> the texts to which the environment restricted this turn. Only stored if
        the environment restricted a turn.

    Args:
      policy: the player.
      environment: a VectorEnvironment, or a function without arguments that makes an Environment, such as a class;
        `make_environment` returns one of these.
      seeds: the seed of each episode, for the environment and for the policy.
      settings: fields of `PlaySettings`: batch_size, max_turns, few_shot and progress.
    Returns: one trajectory per seed, in the order of the seeds.
    Raises: InputError if the environment gives a reward that is not a finite number.
    """
    play, vector = PlaySettings(**settings), _as_vector(environment)
    trajectories: list[Trajectory] = []
    for start in range(0, len(seeds), play.batch_size):
        batch = _Batch(policy, vector, seeds[start : start + play.batch_size], play)
        while batch.live:
            before = len(batch.live)
            batch.play_turn()
            if play.progress is not None and len(batch.live) < before:
                play.progress(start + len(batch.episodes) - len(batch.live), len(seeds))
        trajectories += batch.trajectories()
    return trajectories


def _as_vector(environment: Any) -> VectorEnvironment:
    if not callable(environment):
        if not is_vector(environment):
            name = type(environment).__name__
            raise InputError(f"environment: found a {name}, expected a factory of it, such as the class {name}")
        return environment
    made = environment()
    return made if is_vector(made) else SideBySide(environment)


@dataclass
class _Episode:
    """One episode so far.

    seed: its seed.
    turns: its turns.
    terminated: True if the environment ended it.
    policy_log_prob: per agent turn, log π of each token.
    options: index of a turn, as text -> the only texts that the environment allowed there.
    """

    seed: int
    turns: list[Turn]
    terminated: bool = False
    policy_log_prob: list[list[float]] = field(default_factory=list)
    options: dict[str, list[str]] = field(default_factory=dict)

    def add(self, allowed: list[str] | None, reply: Reply, result: StepResult) -> None:
        """Add an agent turn and the environment's answer to it.

        Args:
          allowed: the texts to which the environment restricted the turn; None = any text.
          reply: the policy's reply.
          result: the environment's answer.
        """
        if allowed is not None:
            self.options[str(len(self.turns))] = allowed
        ids, reward = reply.token_ids, self._reward(result.reward)
        agent = Turn("assistant", reply.text, None, reward, ids, None if ids is None else reply.log_prob)
        self.turns += [agent, *result.turns]
        self.policy_log_prob.append(list(reply.policy_log_prob or ()))
        self.terminated = bool(result.terminated)

    def _reward(self, found: Any) -> float:
        try:
            return finite("reward", float(found))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"environment: found the reward {shown(found)} in the episode of seed {self.seed}, expected a finite "
                "number"
            ) from error


class _Batch:
    """A batch of episodes from reset to end; row i is the episode of the i-th seed.

    Attributes:
      episodes: the episodes.
      live: rows whose episode has not ended.
    """

    def __init__(self, policy: Policy, environment: VectorEnvironment, seeds: Sequence[int], play: PlaySettings):
        self.environment, self.left = environment, play.max_turns
        seeds = list(seeds)
        shown_first = {} if play.few_shot is None else {"few_shot": [play.few_shot(seed) for seed in seeds]}
        self.session = policy.start(seeds, **shown_first)
        self.episodes = [
            _Episode(seed, list(turns)) for seed, turns in zip(seeds, environment.reset(seeds), strict=True)
        ]
        self.live = list(range(len(seeds)))

    def play_turn(self) -> None:
        """Play one agent turn in every live episode, and add the environment's answer."""
        options = [optional(self.environment, "options")(row) for row in self.live]
        replies = self.session.reply(self.live, [self.episodes[row].turns for row in self.live], options)
        results = self.environment.step(self.live, [reply.text for reply in replies])
        self.left = self.left and self.left - 1
        going_on = []
        for row, allowed, reply, result in zip(self.live, options, replies, results, strict=True):
            self.episodes[row].add(allowed, reply, result)
            if not (result.terminated or result.truncated or self.left == 0):
                going_on.append(row)
        self.live = going_on

    def trajectories(self) -> list[Trajectory]:
        return [
            Trajectory(tuple(episode.turns), terminated=episode.terminated, labels=self._labels(row))
            for row, episode in enumerate(self.episodes)
        ]

    def _labels(self, row: int) -> dict[str, Any]:
        episode, fingerprint = self.episodes[row], optional(self.session, "fingerprint")
        labels = {**optional(self.environment, "labels")(row), "seed": episode.seed}
        if fingerprint is not None:  # scripted players have none
            labels |= {"tokenizer": fingerprint, "policy_log_prob": episode.policy_log_prob}
            if episode.options:
                labels["options"] = episode.options
        return labels | optional(self.session, "labels")(row)
