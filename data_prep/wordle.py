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
from typing import Literal

from data_prep.source import Report, Source, write_shares
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.environments.scripted import Forced, check_episodes
from offline_lmrl.errors import InputError, shown
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.settings import setting
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

COPIES = 5  # games of each kind per expert game in the adversarial set
SHARED_TURNS = 2
BRANCH_SEEDS = 2**32  # seeds of branches start at multiples of this, far from the seeds of games


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordleLogs(Source):
    """Play scripted players and write train.jsonl, validation.jsonl (10% of the games) and report.json."""

    logs: str = setting(
        "random_mixture",
        "optimal, start_word, repeat, random_mixture (the published logs), consistent, uniform, wrong, monte_carlo, "
        "user (you, at the keyboard), adversarial or branching",
    )
    words: str = setting("common", "common (833 words), forty, or a text file of words")
    duplicates: Literal["real", "simplified"] = setting(
        "real", "rule for letters that occur more than once: real or simplified (as in the published systems)"
    )
    spelling: Literal["letters", "halves"] = setting("letters", "letters (`c r a n e`) or halves (`cr ane`)")
    episodes: int = setting(
        20_000,
        "number of games; for adversarial and branching, number of expert games. The published logs have a million",
    )

    def check(self) -> None:
        """Check the settings."""
        check_episodes(self.episodes)

    def make(self) -> Report:
        """Play and write the games."""
        counts: Counter[str] = Counter()
        known = read_words(self.words, counts)
        game = functools.partial(Wordle, self.words, self.duplicates, self.spelling)
        seeds = range(self.seed * self.episodes, (self.seed + 1) * self.episodes)
        if self.logs in PLAYERS:
            trajectories = _games(self.logs, PLAYERS[self.logs], game, seeds)
        elif self.logs in BRANCHING:
            experts = _games("optimal", optimal, game, seeds)
            trajectories = [trajectory for expert in experts for trajectory in BRANCHING[self.logs](expert, game)]
        else:
            raise InputError(f"logs: found {shown(self.logs)}, expected one of {', '.join([*PLAYERS, *BRANCHING])}")
        left_out = {f"words left out, {why}": n for why, n in counts.items()}
        return write_shares(
            self.output, trajectories, self.seed, {"words": len(known), **left_out, **_report(trajectories)}
        )


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
