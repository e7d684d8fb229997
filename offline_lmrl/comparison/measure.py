"""From a run and the settings of an evaluation to rows of results: what `compare` and `evaluate play` have in common.

A setting is a way of decoding together with the way in which β, the weight of value guidance, was chosen; each setting
of an entry gives one row, whose fields report.py describes. Value-guided methods are measured at up to two values of
β: one chosen from held-out logs alone (evaluation/choice_rule.py), and one chosen by its score on other episodes. β is
never chosen on the reported episodes.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from offline_lmrl.comparison.config import EvaluationConfig
from offline_lmrl.comparison.rows import Row
from offline_lmrl.comparison.runs import PLANNED, Entry
from offline_lmrl.decoding.planner import Planner
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.evaluation.choices import PROMPTS
from offline_lmrl.evaluation.offline_report import OfflineReport, evaluate_offline
from offline_lmrl.evaluation.play import EvaluationResult, evaluate_policy
from offline_lmrl.logs.io import write_text
from offline_lmrl.logs.terminal import progress_bar, visible
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.run_folder import COMPLETE, read_report, runs_before
from offline_lmrl.tasks import make_environment
from offline_lmrl.training.metrics import read_metrics

SAMPLES = 10
CURVE = ("environment_steps", "reward_queries", "score", "kl")  # metrics of a run that played, copied into its rows
CURVE_POINTS = 50
TEMPERATURES = {"sampled": {}, "greedy": {"temperature": 0.0}}
PLAYED = {"environment_steps": "environment_steps", "reward_queries": "reward_queries"}
PLAYED["generated_tokens"] = "played_tokens"  # cost in a report of training -> its name in a row


@dataclass(frozen=True)
class Setting:
    """A way of decoding, with the way in which β, the weight of value guidance, is chosen.

    decode: "sampled", "greedy" or "planned".
    chosen: "offline", β is chosen from held-out logs; "returns", by playing other episodes; "given", it is that of
      the run or of the user; None, no value guidance.
    """

    decode: str
    chosen: str | None


@dataclass(frozen=True)
class Arena:
    """Where and how all entries of a comparison are measured.

    environment: `name` and settings of `make_environment`.
    evaluation: the settings.
    players: function that returns settings of the environment that are objects, such as a partner's policy.
    validation: function that returns the held-out logs on which β is chosen.
    console: receives the progress bars.
    """

    environment: Mapping[str, Any]
    evaluation: EvaluationConfig
    players: Callable[[], Mapping[str, Any]]
    validation: Callable[[], Sequence[Trajectory]]
    console: Console

    def play(self, policy: LanguagePolicy | Planner, title: str, selecting: bool = False) -> EvaluationResult:
        """Play the episodes on which every method is measured, with a progress bar.

        Args:
          policy: the player.
          title: label of the progress bar.
          selecting: True: play the episodes for choosing β (`evaluation.selection`) instead.
        """
        settings, environment, seeds = self.evaluation, self.environment, self.evaluation.seeds
        if selecting:
            environment = {**environment, **settings.selection.environment}
            seeds = range(settings.selection.first_seed, settings.selection.first_seed + settings.selection.episodes)
        # Greedy play is a function of the episode seed: a second decoding seed would repeat it word for word.
        repeats = 1 if selecting or policy.decoding.temperature == 0 else settings.repeats
        with progress_bar(title, len(seeds) * repeats, self.console) as progress:
            return evaluate_policy(
                policy,
                make_environment(**environment, **self.players()),
                seeds,
                repeats=repeats,
                cluster=settings.cluster,
                batch_size=settings.batch_size,
                progress=progress,
            )


@dataclass(frozen=True)
class Played:
    """The episodes that an entry played in one setting, and how β was chosen for it.

    setting: the setting.
    beta: the weight of value guidance.
    result: the episodes.
    temperature: that of the play.
    tried: the candidates for β with what is known of each; None = there was no choice.
    selection_tokens: tokens generated to choose β.
    calibration: Q against realised returns on held-out logs, if β was chosen on them.
    """

    setting: Setting
    beta: float
    result: EvaluationResult
    temperature: float
    tried: list[Row] | None = None
    selection_tokens: int = 0
    calibration: list[Row] | None = None


class Measurement:
    """An entry of a comparison, loaded to be measured in several settings.

    The model is loaded once, the held-out logs are evaluated once, and play with the same decoding and β is not
    repeated.

    Args:
      arena: where and how it is measured.
      entry: the entry; its runs are complete.
    """

    def __init__(self, arena: Arena, entry: Entry):
        self.arena, self.entry = arena, entry
        self._results: dict[tuple[str, float], EvaluationResult] = {}
        self.policy = LanguagePolicy.load(entry.run.folder, **{**entry.decoding, "beta": 0.0})

    def player(self, decode: str, beta: float) -> LanguagePolicy | Planner:
        if decode == PLANNED:  # proposals are sampled at β 0, which the loaded policy has
            return self.entry.planner.planner(self.policy)
        return self.policy.with_decoding(**TEMPERATURES[decode], beta=beta)

    @cached_property
    def logged(self) -> OfflineReport:
        """The evaluation on held-out logs, the same ones for every method: at most `evaluation.offline_rows`."""
        settings, logs = self.arena.evaluation, self.arena.validation()
        logs = random.Random(0).sample(logs, min(settings.offline_rows, len(logs)))
        policy = self.player("sampled", 0.0)
        with progress_bar(f"{self._title('sampled')}: choosing β offline", PROMPTS, self.arena.console) as progress:
            return evaluate_offline(policy, logs, progress=progress, betas=self.entry.betas, asks=())

    def by_returns(self, decode: str) -> tuple[list[Row], int]:
        """Play the episodes for choosing β at each candidate.

        Args:
          decode: "sampled" or "greedy".
        Returns: one mapping per candidate with `beta`, `score` (mean), `interval` and `kl`; and the number of tokens
          generated in all of this play.
        """
        tried, tokens = [], 0
        for beta in self.entry.betas:
            title = f"{self._title(decode)}: trying β {beta:g}"
            result = self.arena.play(self.player(decode, beta), title, selecting=True)
            score, kl = result.score(), sampling_kl(decode, self.policy.decoding.temperature, result)
            tried.append({"beta": beta, "score": score.mean, "interval": score.interval, "kl": kl})
            tokens += sum(row["tokens"] for row in result.episodes)
        return tried, tokens

    def play(self, setting: Setting) -> Played:
        """Choose β, and play the reported episodes in a setting."""
        beta, tried, tokens, calibration = 0.0, None, 0, None
        if setting.chosen == "offline":
            logged = self.logged
            tried, calibration = logged.tried(), logged.calibration
            beta = 0.0 if logged.chosen is None else logged.chosen.beta
        elif setting.chosen == "returns":
            tried, tokens = self.by_returns(setting.decode)
            beta = max(tried, key=lambda entry: (entry["score"], -entry["beta"]))["beta"]  # ties: the smaller β
        if (setting.decode, beta) not in self._results:
            player = self.player(setting.decode, beta)
            self._results[setting.decode, beta] = self.arena.play(player, self._title(setting.decode))
        result = self._results[setting.decode, beta]
        return Played(setting, beta, result, self.policy.decoding.temperature, tried, tokens, calibration)

    def _title(self, decode: str) -> str:
        return f"{self.entry.method} seed {self.entry.seeds[0]} {decode}"


def result_row(output: Path, evaluation: EvaluationConfig, entry: Entry, played: Played) -> dict[str, Any]:
    """Return the row of results of an entry in one setting, and write its files in episodes/ and samples/.

    Args:
      output: folder of the results.
      evaluation: the settings of the evaluation.
      entry: the entry.
      played: what it played.
    Returns: the row, with the first of the entry's seeds, without `config` and `made`.
    """
    setting, beta, result, run = played.setting, played.beta, played.result, Path(entry.run.folder)
    stem = f"{entry.method}-{entry.seeds[0]}-{setting.decode}" + (f"-beta{beta:g}" if setting.chosen else "")
    write_text(output / "episodes" / f"{stem}.jsonl", "".join(json.dumps(row) + "\n" for row in result.episodes))
    samples = dialogues(result, evaluation.seeds)
    write_text(output / "samples" / f"{stem}.txt", transcripts(samples))
    scale, score = evaluation.score, result.score()
    metrics = read_metrics(run) if (run / COMPLETE).exists() else []
    return {
        "kind": "run",
        "method": entry.method,
        "algorithm": entry.algorithm,
        "seed": entry.seeds[0],
        "decode": setting.decode,
        "beta": beta,
        "beta_chosen": setting.chosen,
        "betas_tried": played.tried,
        "score": score.mean,
        "interval": score.interval,
        **result.summary(),
        "normalised": scale and scale.normalise(score.mean),
        "kl": sampling_kl(setting.decode, played.temperature, result),
        "calibration": played.calibration,
        "regime": entry.regime,
        **({} if entry.run.cost is None else {"declared": True}),
        "cost": {
            **entry_cost(entry, setting.decode),
            "generated_tokens": sum(row["labels"].get("planned_tokens", row["tokens"]) for row in result.episodes),
            "selection_tokens": played.selection_tokens,
            "evaluation_seconds": result.seconds,
        },
        **divergence(metrics),
        "run": str(run),
        "episodes": f"episodes/{stem}.jsonl",
        "cells": result.cells(),
        "scores": result.scores(),
        "curve": learning_curve(metrics) if setting.decode == "sampled" else [],
        "training": training_curve(metrics) if setting.decode == "sampled" else [],
        "samples": [{name: sample[name] for name in ("seed", "score", "turns")} for sample in samples],
    }


def sampling_kl(decode: str, temperature: float, result: EvaluationResult) -> float | None:
    """Return KL(sampling distribution ‖ policy) of sampled play in nats per episode (`EvaluationResult.kl`).

    It is None for greedy and planned play, because there the stored log-probabilities do not describe the
    distribution of the choice.
    """
    return result.kl() if decode == "sampled" and temperature > 0 else None


def divergence(metrics: Sequence[Row]) -> dict[str, float]:
    """Return how far a PPO run moved from its start policy; empty for a run of another algorithm.

    Args:
      metrics: the rows of its metrics.jsonl.
    Returns: `training_kl`, KL(policy ‖ start policy) in nats per episode, over the episodes of the last iteration; and
      `ratio_max`, the largest ratio of the new to the old probability of a token in any update.
    """
    rows = [row for row in metrics if "ratio_max" in row]
    return {"training_kl": rows[-1]["kl"], "ratio_max": max(row["ratio_max"] for row in rows)} if rows else {}


def training_cost(run: str | Path, *helpers: str | Path) -> dict[str, float]:
    """Return the cost of training a run.

    Args:
      run: the run directory.
      helpers: directories of the runs that rate its plans or give its requested return.
    Returns: `training_tokens`, the tokens that training read, each counted as often as it was read, including the runs
      that this one starts or learns from, and the helpers; `training_seconds`, the wall time of its last training
      process; and, if it played to learn, `environment_steps` (agent turns), `reward_queries` (scored replies) and
      `played_tokens` (sampled tokens).
    """
    report = read_report(run)
    seconds = [row["train_runtime"] for row in read_metrics(run) if "train_runtime" in row]
    tokens = sum(runs_before(str(run), *map(str, helpers)).values())
    played = {title: report[name] for name, title in PLAYED.items() if name in report}
    return {"training_tokens": tokens, "training_seconds": seconds[-1] if seconds else 0.0, **played}


def entry_cost(entry: Entry, decode: str) -> dict[str, float]:
    """Return the cost of what an entry plays with in one way of decoding: measured here, or as declared."""
    run, helpers = entry.run, [entry.asks, entry.scorer if decode == PLANNED else None]
    used = {other.folder: other for first in (run, *helpers) if first is not None for other in first.with_needs()}
    measured = [helper.folder for helper in helpers if helper is not None and helper.cost is None]
    if run.cost is None:
        cost = training_cost(run.folder, *measured)
    else:
        declared = {title: asdict(run.cost).get(name) for name, title in PLAYED.items()}
        cost = {title: count for title, count in declared.items() if count is not None}
        if run.cost.training_tokens is None:
            return cost
        cost["training_tokens"] = sum(runs_before(*measured).values())
    declared_tokens = [other.cost.training_tokens for other in used.values() if other.cost is not None]
    cost["training_tokens"] += sum(filter(None, declared_tokens))
    return cost


def learning_curve(metrics: Sequence[Row]) -> list[Row]:
    """Return the metrics of each training iteration of a run that played to learn; empty for other runs.

    Args:
      metrics: the rows of its metrics.jsonl. Of a long run, only every k-th one is kept, at most CURVE_POINTS.
    Returns: one mapping per iteration: `environment_steps` and `reward_queries` so far; `score`, the mean over the
      iteration's episodes; and `kl`, their KL(policy ‖ start policy) in nats per episode.
    """
    return _thinned([{name: row[name] for name in CURVE} for row in metrics if "environment_steps" in row])


def _thinned(rows: list[Row]) -> list[Row]:
    """Return every k-th row, with k = ⌈len / CURVE_POINTS⌉, or 1 if there are no rows."""
    return rows[:: -(-len(rows) // CURVE_POINTS) or 1]


def training_curve(metrics: Sequence[Row]) -> list[Row]:
    """Return the loss per agent token of a run that learnt from logs, against its steps; empty for other runs.

    Args:
      metrics: the rows of its metrics.jsonl. Of a long run, only every k-th one is kept, at most CURVE_POINTS.
    Returns: one mapping per row: `step`; and −log π in nats, in training as `loss` or of held-out data as `held_out`.
    """
    names = {"loss/policy": "loss", "eval_loss/policy": "held_out"}
    if not any("loss/policy" in row for row in metrics):
        names = {"loss": "loss", "eval_loss": "held_out"}  # the loss has one part
    return _thinned(
        [
            {"step": row["step"], title: row[name]}
            for row in metrics
            for name, title in names.items()
            if name in row and "environment_steps" not in row
        ]
    )


def dialogues(result: EvaluationResult, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return ten episodes of a result in the form that is stored in results.jsonl.

    They are drawn from the episode seeds only, so they are the same for every method. With fewer than ten seeds, there
    is one episode per seed.

    Args:
      result: the episodes of one setting.
      seeds: all episode seeds.
    Returns: one mapping per episode: `seed`, `score`, `labels` and `turns`, a list of (role, text).
    """
    chosen = set(random.Random(0).sample(list(seeds), min(SAMPLES, len(seeds))))
    return [
        {name: row[name] for name in ("seed", "score", "labels")}
        | {"turns": [(turn.role, turn.content) for turn in trajectory.turns]}
        for row, trajectory in zip(result.episodes, result.trajectories, strict=True)
        if row["seed"] in chosen and row["repeat"] == 0
    ]


def transcripts(samples: Sequence[Row]) -> str:
    """Return `dialogues` as text."""
    blocks = []
    for row in samples:
        head = f"episode {row['seed']}, score {row['score']:g}, {json.dumps(row['labels'], ensure_ascii=False)}"
        blocks.append("\n".join([head, *(f"{role}: {text}" for role, text in row["turns"]), ""]))
    return visible("\n".join(blocks))
