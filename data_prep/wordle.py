"""Generate logs of scripted Wordle players, modelled on those of the published systems.

Most logs are games of one of the PLAYERS in tasks/wordle.py. Two further sets are made from games of the expert, the
player that guesses the word with the greatest expected information:
- adversarial (ILQL, section 5): every expert game; and, for every expert game of at least 3 turns, 5 games that begin
  with its first two words and then repeat them, and 5 games with the same secret by a player whose guesses are
  consistent with the colours with probability ½, else random. The best opening therefore looks bad on average. This
  misleads values that look one step ahead, but not values that bootstrap.
- branching: every expert game; and, from every state of it, one game that continues with words that contradict the
  colours.
"""

import dataclasses
import functools
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from data_prep.reports import prepared, write_json
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.environments.scripted import Forced, check_episodes
from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.io import REPORT, split_by_group, write_trajectories
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.tasks.wordle import (
    PLAYERS,
    Player,
    Scripted,
    Wordle,
    consistent,
    mixture,
    optimal,
    read_words,
    repeat,
    uniform,
    user,
    wrong,
)

VALIDATION_SHARE = 0.1
COPIES = 5  # games of each kind per expert game in the adversarial set
SHARED_TURNS = 2
BRANCH_SEEDS = 2**32  # seeds of branches start at multiples of this, far from the seeds of games


def prepare(
    output: str | Path,
    *,
    logs: str = "random_mixture",
    words: str = "common",
    duplicates: Literal["real", "simplified"] = "real",
    spelling: Literal["letters", "halves"] = "letters",
    episodes: int = 20_000,
    seed: int = 0,
) -> dict[str, float]:
    """Play scripted players and write train.jsonl, validation.jsonl (10% of the games) and report.json.

    Args:
      output: folder to write to; created if needed.
      logs: optimal, start_word, repeat, random_mixture (the published logs), consistent, uniform, wrong, monte_carlo,
        user (you, at the keyboard), adversarial or branching.
      words: common (833 words), forty, or a text file of words.
      duplicates: rule for letters that occur more than once: real or simplified (as in the published systems).
      spelling: letters (`c r a n e`) or halves (`cr ane`).
      episodes: number of games; for adversarial and branching, number of expert games. The published logs have a
        million.
      seed: random seed of the players and of the split.
    Returns: counts and means of the logs, the content of report.json.
    Raises: InputError for fewer than one episode, unknown logs, words that cannot be read, or an output that cannot be
      written.
    """
    check_episodes(episodes)
    counts: Counter[str] = Counter()
    known = read_words(words, counts)
    game = functools.partial(Wordle, words, duplicates, spelling)
    seeds = range(seed * episodes, (seed + 1) * episodes)
    if logs in PLAYERS:
        trajectories = _games(logs, PLAYERS[logs], game, seeds)
    elif logs in BRANCHING:
        experts = _games("optimal", optimal, game, seeds)
        trajectories = [trajectory for expert in experts for trajectory in BRANCHING[logs](expert, game)]
    else:
        raise InputError(f"logs: found {shown(logs)}, expected one of {', '.join([*PLAYERS, *BRANCHING])}")
    shares = {"train": 1 - VALIDATION_SHARE, "validation": VALIDATION_SHARE}
    left_out = {f"words left out, {why}": n for why, n in counts.items()}
    report = {"words": len(known), **left_out, **_report(trajectories)}
    with prepared(output) as folder:
        for name, rows in split_by_group(trajectories, shares, seed).items():
            if rows:  # with few games a split may be empty
                write_trajectories(folder / f"{name}.jsonl", rows)
        write_json(folder / REPORT, report)
    return report


def _games(name: str, player: Player, game: functools.partial, seeds: range) -> list[Trajectory]:
    at_once = 1 if player is user else 1024  # a person finishes a game before the next
    played = rollout(Scripted(player, game()), game, seeds, batch_size=at_once)
    return [_logged(trajectory, name, f"wordle-{seed}") for trajectory, seed in zip(played, seeds, strict=True)]


def _logged(trajectory: Trajectory, player: str, group: str) -> Trajectory:
    labels = {**trajectory.labels, "player": player}
    return dataclasses.replace(trajectory, group=group, task="wordle", source="scripted", labels=labels)


def _adversarial(expert: Trajectory, game: functools.partial) -> Iterator[Trajectory]:
    opening, first = _guesses(expert), _first_branch_seed(expert)
    yield expert
    if len(opening) > SHARED_TURNS:
        failing, others = range(first, first + COPIES), range(first + COPIES, first + 2 * COPIES)
        yield from _branches("repeat", repeat, opening[:SHARED_TURNS], expert, game, failing)
        yield from _branches("mixture", mixture(0.5, consistent, uniform), [], expert, game, others)


def _branching(expert: Trajectory, game: functools.partial) -> Iterator[Trajectory]:
    opening, first = _guesses(expert), _first_branch_seed(expert)
    yield expert
    for turn in range(len(opening)):
        yield from _branches("wrong", wrong, opening[:turn], expert, game, [first + turn])


BRANCHING = {"adversarial": _adversarial, "branching": _branching}


def _branches(
    name: str,
    player: Player,
    opening: Sequence[str],
    expert: Trajectory,
    game: functools.partial,
    seeds: Sequence[int],
) -> Iterator[Trajectory]:
    """Yield games with the expert's secret, and in the expert's group, that begin with fixed guesses.

    Args:
      name: the player's name, for the labels.
      player: chooses the guesses after the opening.
      opening: the texts of the first guesses.
      expert: a game of the expert.
      game: makes a Wordle game.
      seeds: the seed of each game.
    """
    same = functools.partial(game, secret=expert.labels["secret"])
    policy = Forced(Scripted(player, same()), opening)
    for trajectory in rollout(policy, same, seeds):
        yield _logged(trajectory, name, expert.group)


def _first_branch_seed(expert: Trajectory) -> int:
    return (expert.labels["seed"] + 1) * BRANCH_SEEDS


def _guesses(trajectory: Trajectory) -> list[str]:
    return [turn.content for turn in trajectory.turns if turn.is_trainable]


def _report(trajectories: list[Trajectory]) -> dict[str, float]:
    returns = [trajectory.total_return for trajectory in trajectories]
    turns = sum(len(_guesses(trajectory)) for trajectory in trajectories)
    return {
        "episodes": len(trajectories),
        "turns": turns,
        "won": sum(trajectory.labels["won"] for trajectory in trajectories),
        "mean_return": statistics.fmean(returns),
        "sd_return": statistics.pstdev(returns),
        "mean_length": turns / len(trajectories),
    }
