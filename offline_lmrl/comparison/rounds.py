"""Offline learning in rounds: the trained policy plays, its scored episodes are added to the logs, and it is trained
again.

This is between offline and online learning. Every round costs environment steps (agent turns played) and reward
queries (agent turns scored), which are counted.
"""

import copy
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from offline_lmrl.algorithms import ALGORITHMS
from offline_lmrl.comparison.methods import CollectConfig
from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.errors import require
from offline_lmrl.logs.files import read_object, reading
from offline_lmrl.logs.io import read_trajectories, write_text, write_trajectories
from offline_lmrl.run import RunConfig, train
from offline_lmrl.run_folder import weights_hash
from offline_lmrl.tasks import make_environment


def train_in_rounds(
    config: RunConfig, collect: CollectConfig, environment: Mapping[str, Any], players: Mapping[str, Any] | None = None
) -> Path:
    """Train a policy; then, `collect.rounds` times, play with it and train it again on all logs so far.

    Args:
      config: the settings of the first training, with the logs before the first round; each later training starts from
        the weights of the one before. `args.output_dir` is the run directory of the last one.
      collect: number and size of the rounds, and how they are played.
      environment: `name` and settings of `make_environment`.
      players: further settings of `make_environment` that are objects, such as a partner's policy; None = none.
    Returns: the run directory of the last training. It contains those of the earlier ones, round-0, round-1, and so
      on, each with the logs.jsonl that the next training learnt from. Its complete.json counts the play of all rounds.
    Raises: InputError if the algorithm learns by playing, there are no data, or `data.preference` is given.
    """
    algorithm, data, args = config.algorithm, config.data, config.args
    require(
        data.train is not None and not ALGORITHMS[algorithm].plays,
        f"collect: found it for {algorithm} with data.train {data.train!r}, expected an algorithm that learns from "
        "data, and a value of data.train",
    )
    require(
        data.preference is None,
        "collect: found it beside data.preference, expected only one of them: the played episodes have rewards of "
        "their own",
    )
    DecodingConfig.from_dict(collect.decoding)  # a mistake shows before anything is trained
    world, played = make_environment(**environment, **(players or {})), Counter()
    for number in range(collect.rounds):
        before = copy.copy(args)
        before.output_dir = str(Path(args.output_dir) / f"round-{number}")
        run = train(replace(config, args=before))
        played += _collected(run, world, config, collect, number)
        model = replace(config.model, path=str(run), scratch=None, tokenizer=None, lora=None)
        config = replace(config, model=model, data=replace(config.data, train=str(run / "logs.jsonl"), reward=None))
    settings = {"environment": dict(environment), "collect": asdict(collect)}
    return train(config, settings=settings, costs=played)


def _collected(run: Path, world: Any, config: RunConfig, collect: CollectConfig, number: int) -> Counter[str]:
    """Play one round with a trained run, unless these weights have played it already with the same settings.

    Args:
      run: the run directory. logs.jsonl (the logs so far and then the new episodes) and collected.json (the costs) are
        written into it.
      world: the environment, as `make_environment` returns it.
      config: the settings of the run, with the logs so far; its seed and device are used.
      collect: how a round is played.
      number: index of the round, from 0.
    Returns: the costs of the new episodes: numbers of `episodes`, `environment_steps`, `reward_queries` and
      `generated_tokens`.
    """
    report, advice = (
        run / "collected.json",
        "the costs of a round of play; if it is removed, the round is played again",
    )
    made = {"weights": weights_hash(str(run)), "collect": asdict(collect)}
    found = read_object(report, advice) if report.exists() else {}
    # The file of an earlier version has no `collect`, or neither.
    if not found or any(found.get(name, value) != value for name, value in made.items()):
        # Different training seeds and rounds get different episode seeds.
        first = collect.first_seed + (config.args.seed * collect.rounds + number) * collect.episodes
        policy = LanguagePolicy.load(run, device=config.args.device, **collect.decoding)
        episodes = rollout(policy, world, range(first, first + collect.episodes))
        turns = [turn for t in episodes for turn in t.turns if turn.is_trainable]
        logs = read_trajectories(config.data.train, reward=config.data.reward)
        write_trajectories(run / "logs.jsonl", [*logs, *episodes])
        found = {
            "episodes": len(episodes),
            "environment_steps": len(turns),
            "reward_queries": sum(turn.reward is not None for turn in turns),
            "generated_tokens": sum(len(turn.token_ids) for turn in turns),
        }
        write_text(report, json.dumps(found | made) + "\n")
    with reading(report, advice):
        if not all(isinstance(count, int) for name, count in found.items() if name not in made):
            raise TypeError("costs that are not whole numbers")
    return Counter({name: count for name, count in found.items() if name not in made})
