"""Rollouts: a policy plays many episodes of an environment at once, and each becomes a trajectory."""

from collections.abc import Callable, Sequence
from typing import Any

from offline_lmrl.errors import InputError
from offline_lmrl.logs.protocols import Environment, Policy, Reply, StepResult, VectorEnvironment, is_vector
from offline_lmrl.logs.trajectory import Trajectory, Turn, finite, shown

MAX_TURNS = 1000  # so that an evaluation ends even if the environment never does


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
        environment = self.environments[row]
        return environment.labels() if hasattr(environment, "labels") else {}

    def options(self, row: int) -> list[str] | None:
        environment = self.environments[row]
        return environment.options() if hasattr(environment, "options") else None


def rollout(
    policy: Policy,
    environment: VectorEnvironment | Callable[[], Environment],
    seeds: Sequence[int],
    *,
    batch_size: int = 1024,
    max_turns: int | None = MAX_TURNS,
    few_shot: Callable[[int], Sequence[Trajectory] | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
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
      batch_size: number of episodes that are played at once.
      max_turns: number of agent turns after which an episode is cut; None = no limit.
      few_shot: maps the seed of an episode to the few-shot demonstrations that the policy reads before it, or to None
        for no demonstrations (`few_shot_of_task` in tokens/few_shot.py makes such a function). None = the policy reads
        the demonstrations that it was made with, if any, in all episodes.
      progress: called with (number of episodes that have ended, number of all episodes) whenever some have ended.
    Returns: one trajectory per seed, in the order of the seeds.
    Raises: InputError if the environment gives a reward that is not a finite number.
    """
    if max_turns is not None and max_turns < 1:
        raise InputError(f"max_turns: found {max_turns}, expected at least 1, or null")
    if batch_size < 1:
        raise InputError(f"batch_size: found {batch_size}, expected at least 1")
    vector = _as_vector(environment)
    trajectories: list[Trajectory] = []
    for start in range(0, len(seeds), batch_size):
        batch = _Episodes(policy, vector, seeds[start : start + batch_size], few_shot)
        while batch.live:
            batch.play_turn(max_turns)
            if progress is not None and batch.ended:
                progress(start + len(batch.seeds) - len(batch.live), len(seeds))
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


class _Episodes:
    """A batch of episodes from reset to end; row i is the episode of the i-th seed.

    Attributes:
      live: rows whose episode has not ended.
      ended: rows whose episode ended in the last call of `play_turn`.
    """

    def __init__(
        self,
        policy: Policy,
        environment: VectorEnvironment,
        seeds: Sequence[int],
        few_shot: Callable[[int], Sequence[Trajectory] | None] | None,
    ):
        self.environment, self.seeds = environment, list(seeds)
        read = {} if few_shot is None else {"few_shot": [few_shot(seed) for seed in self.seeds]}
        self.session = policy.start(self.seeds, **read)
        self.turns = [list(turns) for turns in environment.reset(self.seeds)]
        self.terminated = [False] * len(self.seeds)
        self.policy_log_prob: list[list[list[float]]] = [[] for _ in self.seeds]
        self.options: list[dict[str, list[str]]] = [{} for _ in self.seeds]
        self.live = list(range(len(self.seeds)))
        self.ended: list[int] = []
        self.turns_played = 0

    def play_turn(self, max_turns: int | None) -> None:
        """Play one agent turn in every live episode, and add the environment's answer."""
        options = None
        if hasattr(self.environment, "options"):
            options = [self.environment.options(row) for row in self.live]
        replies = self.session.reply(self.live, [self.turns[row] for row in self.live], options)
        results = self.environment.step(self.live, [reply.text for reply in replies])
        self.turns_played += 1
        self.ended = []
        for row, texts in zip(self.live, options or (), strict=options is not None):
            if texts is not None:
                self.options[row][str(len(self.turns[row]))] = texts
        for row, reply, result in zip(self.live, replies, results, strict=True):
            self.turns[row] += [_agent_turn(reply, self._paid(row, result.reward)), *result.turns]
            self.policy_log_prob[row].append(list(reply.policy_log_prob or ()))
            self.terminated[row] = bool(result.terminated)
            if result.terminated or result.truncated or self.turns_played == max_turns:
                self.ended.append(row)
        self.live = [row for row in self.live if row not in set(self.ended)]

    def _paid(self, row: int, reward: Any) -> float:
        try:
            return finite("reward", float(reward))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"environment: found the reward {shown(reward)} in the episode of seed "
                f"{self.seeds[row]}, expected a finite number"
            ) from error

    def trajectories(self) -> list[Trajectory]:
        return [
            Trajectory(tuple(self.turns[row]), terminated=self.terminated[row], labels=self._labels(row))
            for row in range(len(self.seeds))
        ]

    def _labels(self, row: int) -> dict[str, Any]:
        labels = dict(self.environment.labels(row)) if hasattr(self.environment, "labels") else {}
        labels["seed"] = self.seeds[row]
        fingerprint = getattr(self.session, "fingerprint", None)  # scripted players have none
        if fingerprint is not None:
            labels |= {"tokenizer": fingerprint, "policy_log_prob": self.policy_log_prob[row]}
            if self.options[row]:
                labels["options"] = self.options[row]
        if hasattr(self.session, "labels"):
            labels |= self.session.labels(row)
        return labels


def _agent_turn(reply: Reply, reward: float) -> Turn:
    ids = reply.token_ids
    return Turn("assistant", reply.text, None, reward, ids, None if ids is None else reply.log_prob)
