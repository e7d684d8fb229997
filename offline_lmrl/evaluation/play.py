"""Play of a policy on an environment, with the outcome of each episode."""

import json
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.errors import InputError, shown
from offline_lmrl.evaluation.metrics import BOOKKEEPING_LABELS, Cells, Estimate, label_means
from offline_lmrl.logs.protocols import Environment, Policy, Session, VectorEnvironment
from offline_lmrl.logs.trajectory import Trajectory

REPEAT_STRIDE = 1_000_003  # larger than any range of episode seeds, so no two (seed, repeat) share a decoding seed


@dataclass(frozen=True)
class EvaluationResult:
    """The episodes that one policy played.

    episodes: one mapping per episode:
      `seed`, the episode seed; `repeat`, number from 0 of the repetition of that seed with other decoding seeds;
      `cluster`, id that episodes share if they depend on each other; `score`, the undiscounted return; `turns` and
      `tokens`, numbers of the agent's turns and tokens; `invalid`, the environment's label of that name, a number of
      refused texts, else 0; `truncated`, True if the episode was cut before its end; `labels`, further facts from
      environment and policy, name -> value.
    trajectories: the same episodes in full, in the same order.
    seconds: wall time of the play.
    """

    episodes: list[dict[str, Any]]
    trajectories: list[Trajectory]
    seconds: float

    def cells(self) -> list[tuple[Hashable, float, int]]:
        """Return (cluster, sum of scores, number of episodes) of each cluster, in the order of first appearance."""
        cells = Cells.of((0, row["cluster"], row["score"]) for row in self.episodes)
        return list(zip(cells.clusters, cells.total[0].tolist(), cells.count[0].astype(int).tolist(), strict=True))

    def scores(self) -> list[list[float]]:
        """Return one list of episode scores per cluster, in the order of `cells`.

        Two methods that played the same episodes can be compared by these, episode by episode.
        """
        by_cluster: dict[Hashable, list[float]] = {}
        for row in self.episodes:
            by_cluster.setdefault(row["cluster"], []).append(row["score"])
        return list(by_cluster.values())

    def score(self) -> Estimate:
        """Return the mean score with its 95% interval, computed over clusters of episodes."""
        return Cells.of((0, row["cluster"], row["score"]) for row in self.episodes).estimate()

    def kl(self) -> float | None:
        """Return an estimate of KL(sampling distribution ‖ π), in nats per episode.

        π has the same temperature, but no filters or guidance. The estimate is the mean over episodes of
        Σ_t (log_prob − policy_log_prob) over the agent's tokens, with log_prob under the sampling distribution and
        policy_log_prob under π. It is unbiased and may be negative (the estimator called k1). It is meaningless for
        greedy play, where the stored log_prob is not that of the choice, 0.

        Returns: the estimate; None if the policy stored no log-probabilities.
        """
        sums = []
        for trajectory in self.trajectories:
            sampled = [turn.behaviour_log_prob for turn in trajectory.turns if turn.is_trainable]
            if "policy_log_prob" not in trajectory.labels or None in sampled:
                return None
            sums.append(sum(map(sum, sampled)) - sum(map(sum, trajectory.labels["policy_log_prob"])))
        return sum(sums) / len(sums)

    def summary(self) -> dict[str, Any]:
        """Average the columns of `episodes`.

        Returns: `n`, the number of episodes; `turns` and `tokens` of the agent per episode; `invalid_rate` per agent
          turn; `truncated_rate` per episode; and `labels`, the mean of each numeric label, name -> mean.
        """
        n = len(self.episodes)
        turns = sum(row["turns"] for row in self.episodes)
        means = label_means(row["labels"] for row in self.episodes)
        return {
            "n": n,
            "turns": turns / n,
            "tokens": sum(row["tokens"] for row in self.episodes) / n,
            "invalid_rate": sum(row["invalid"] for row in self.episodes) / max(turns, 1),
            "truncated_rate": sum(row["truncated"] for row in self.episodes) / n,
            # These two labels have columns of their own.
            "labels": {name: mean for name, mean in means.items() if name not in ("invalid", "score")},
        }


@dataclass(frozen=True)
class _Redrawn:
    """A policy that decodes with other random numbers, while the environment keeps the episode seeds.

    policy: the policy that plays.
    repeat: number of the repetition; each gives other decoding seeds.
    """

    policy: Policy
    repeat: int

    def start(self, seeds: Sequence[int], **few_shot: Any) -> Session:
        return self.policy.start([seed + self.repeat * REPEAT_STRIDE for seed in seeds], **few_shot)


def evaluate_policy(
    policy: Policy,
    environment: VectorEnvironment | Callable[[], Environment],
    seeds: Sequence[int],
    *,
    repeats: int = 1,
    cluster: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> EvaluationResult:
    """Play every episode seed `repeats` times.

    Args:
      policy: the player.
      environment: a VectorEnvironment, or a function that makes a new Environment (such as its class).
      seeds: episode seeds, which fix the environment's randomness.
      repeats: number of times that each episode seed is played, each with another seed for decoding.
      cluster: name of the label whose value is equal in episodes that depend on each other, for intervals; None =
        every episode seed is a cluster.
      progress: called with (episodes done, episodes in all); None = not called.
      settings: further fields of `PlaySettings` (environments/rollouts.py): batch_size, max_turns and few_shot.
    Raises: InputError if an episode has no label `cluster`.
    """
    started = time.monotonic()
    rows, trajectories = [], []
    for repeat in range(repeats):
        player = policy if repeat == 0 else _Redrawn(policy, repeat)
        before = len(trajectories)
        show = progress and (lambda done, _, before=before: progress(before + done, repeats * len(seeds)))
        played = rollout(player, environment, seeds, progress=show, **settings)
        rows += [_row(seed, repeat, t, cluster) for seed, t in zip(seeds, played, strict=True)]
        trajectories += played
    return EvaluationResult(rows, trajectories, time.monotonic() - started)


def _row(seed: int, repeat: int, trajectory: Trajectory, cluster: str | None) -> dict[str, Any]:
    agent = [turn for turn in trajectory.turns if turn.is_trainable]
    return {
        "seed": seed,
        "repeat": repeat,
        "cluster": seed if cluster is None else _key(trajectory.labels, cluster),
        "score": trajectory.total_return,
        "turns": len(agent),
        "tokens": sum(len(turn.token_ids or ()) for turn in agent),
        "invalid": int(trajectory.labels.get("invalid", 0)),
        "truncated": not trajectory.terminated,
        "labels": {name: value for name, value in trajectory.labels.items() if name not in BOOKKEEPING_LABELS},
    }


def _key(labels: Mapping[str, Any], name: str) -> Hashable:
    if name not in labels:
        known = ", ".join(sorted(labels)) or "none"
        raise InputError(f"cluster: found {shown(name)}, expected a label of the environment: {known}")
    value = labels[name]
    return value if isinstance(value, str | int) else json.dumps(value)
