"""Offline learning in rounds: the trained policy plays, its scored episodes are added to the logs, and it is trained
again.

This is between offline and online learning. Every round costs environment steps and reward queries, which are counted.
"""

import copy
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from offline_lmrl.algorithms import load_algorithm
from offline_lmrl.comparison.config import CollectConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.errors import InputError
from offline_lmrl.logs.files import read_object, reading
from offline_lmrl.logs.io import read_trajectories, write_text, write_trajectories
from offline_lmrl.run import DataConfig, ModelConfig, train, weights_hash
from offline_lmrl.tasks import make_environment
from offline_lmrl.training.config import BaseConfig


def train_in_rounds(
    algorithm: str,
    model: ModelConfig,
    data: DataConfig,
    args: BaseConfig,
    environment: Mapping[str, Any],
    collect: CollectConfig,
    players: Mapping[str, Any] | None = None,
) -> Path:
    """Train an algorithm that learns from data, and `collect.rounds` times play with it and train it again on all logs
    so far.

    Args:
      algorithm: as in `train`.
      model: as in `train`; the later trainings start from the run before them.
      data: as in `train`; the logs before the first round.
      args: as in `train`.
      environment: `name` and settings of `make_environment`.
      collect: the rounds of play.
      players: further settings of `make_environment` that are not plain values, such as a partner's policy.
    Returns: the run directory of the last training. It contains those of the earlier ones, round-0, round-1, ..., each
      with the logs.jsonl that the next training learnt from. complete.json counts the play of all rounds.
    Raises: InputError if the algorithm plays itself, there are no data, or `data.preference` is given.
    """
    if load_algorithm(algorithm)[1].plays or data.train is None:
        raise InputError(
            f"collect: found it for {algorithm} with data.train {data.train!r}, expected an algorithm "
            "that learns from data, and a value of data.train"
        )
    if data.preference is not None:
        raise InputError(
            "collect: found it beside data.preference, expected only one of them: the played episodes "
            "have rewards of their own"
        )
    DecodingConfig.from_dict(collect.decoding)  # a mistake shows before anything is trained
    world, played = make_environment(**environment, **(players or {})), Counter()
    for number in range(collect.rounds):
        before = copy.copy(args)
        before.output_dir = str(Path(args.output_dir) / f"round-{number}")
        run = train(algorithm, model, data, before)
        logs, costs = _collected(run, world, data, args, collect, number)
        played += costs
        model = replace(model, path=str(run), scratch=None, tokenizer=None, lora=None)
        data = replace(data, train=str(logs), reward=None)
    settings = {"environment": dict(environment), "collect": asdict(collect)}
    return train(algorithm, model, data, args, settings=settings, costs=played)


def _collected(
    run: Path, world: Any, data: DataConfig, args: BaseConfig, collect: CollectConfig, number: int
) -> tuple[Path, Counter[str]]:
    """Play a round with a run, unless these weights have played it already.

    Args:
      run: the run directory, which receives logs.jsonl and collected.json.
      data: the logs so far.
      number: index of the round.
    Returns: path of logs.jsonl, the logs so far followed by the new episodes; and the costs of the new episodes.
    """
    logs, report, weights = run / "logs.jsonl", run / "collected.json", weights_hash(str(run))
    if not report.exists() or _read_costs(report).pop("weights", weights) != weights:  # the run was extended since
        # No two training seeds or rounds share an episode seed.
        first = collect.first_seed + (args.seed * collect.rounds + number) * collect.episodes
        policy = LanguagePolicy.load(run, device=args.device, **collect.decoding)
        episodes = rollout(policy, world, range(first, first + collect.episodes))
        turns = [turn for t in episodes for turn in t.turns if turn.is_trainable]
        write_trajectories(logs, [*read_trajectories(data.train, reward=data.reward), *episodes])
        costs = {
            "episodes": len(episodes),
            "environment_steps": len(turns),
            "reward_queries": sum(turn.reward is not None for turn in turns),
            "generated_tokens": sum(len(turn.token_ids) for turn in turns),
        }
        write_text(report, json.dumps({**costs, "weights": weights}) + "\n")
    costs = _read_costs(report)
    costs.pop("weights", None)
    return logs, Counter(costs)


def _read_costs(report: Path) -> dict[str, Any]:
    advice = "the costs of a round of play; if it is removed, the round is played again"
    found = read_object(report, advice)
    with reading(report, advice):
        if not all(isinstance(count, int) for name, count in found.items() if name != "weights"):
            raise TypeError("costs that are not whole numbers")
    return found
