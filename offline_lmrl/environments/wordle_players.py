"""Scripted players of Wordle (those of the ILQL code, Snell et al. 2022): makers of logs and marks to compare with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.protocols import Reply, Session
from offline_lmrl.data.trajectory import Turn
from offline_lmrl.environments.wordle import CODES, COLOURS, TRIES, UNKNOWN, Lexicon, Wordle, WordSet

OPENINGS = 28  # as many as the published list of opening words has


@dataclass(frozen=True)
class Knowledge:
    """What a player knows before a guess.

    lexicon: the words of the game. consistent: those that fit all colours. tries: (guess, colours) so far; the colours
    of a guess that is not in the list are "".
    """

    lexicon: Lexicon
    consistent: WordSet
    tries: tuple[tuple[str, str], ...] = ()

    def after(self, guess: str, colours: str) -> "Knowledge":
        """With one more answer."""
        words, consistent = self.lexicon, self.consistent
        if colours:
            consistent &= words.consistent(words.index[guess], CODES[colours])
        return Knowledge(words, consistent, (*self.tries, (guess, colours)))

    def draw(self, words: WordSet, rng: np.random.Generator) -> str:
        """A word of a set, uniformly."""
        members = self.lexicon.members(words)
        return self.lexicon.words[members[rng.integers(len(members))]]


class Player(Protocol):
    """Chooses a guess."""

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        """The next word."""


@dataclass(frozen=True)
class Uniform:
    """Any word of the list."""

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        return known.draw(known.lexicon.everything, rng)


@dataclass(frozen=True)
class Consistent:
    """A word that fits all colours."""

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        return known.draw(known.consistent, rng)


@dataclass(frozen=True)
class Wrong:
    """A word that contradicts the colours; any word while none does."""

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        everything = known.lexicon.everything
        return known.draw(everything & ~known.consistent or everything, rng)


@dataclass(frozen=True)
class Optimal:
    """The consistent word with the greatest expected information about the secret: myopic, so not quite the best."""

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        return known.lexicon.words[known.lexicon.most_informative(known.consistent)]


@dataclass(frozen=True)
class StartWord:
    """One of the 28 most informative openings, then another player's words.

    The published list of openings is fixed; this one follows from the words in play, so it fits any list.
    """

    then: Player = Consistent()

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        if known.tries:
            return self.then.choose(known, rng)
        openings = known.lexicon.by_information[:OPENINGS]
        return openings[rng.integers(len(openings))]


@dataclass(frozen=True)
class Repeat:
    """Repeats its first `first_n` words, which are another player's: lost unless one of them is the secret."""

    first: Player = Optimal()
    first_n: int = 2

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        if len(known.tries) < self.first_n:
            return self.first.choose(known, rng)
        return known.tries[rng.integers(self.first_n)][0]


@dataclass(frozen=True)
class Mixture:
    """Before every guess `share` is the probability of the first player, else the second one chooses."""

    share: float
    first: Player
    second: Player

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        return (self.first if rng.random() < self.share else self.second).choose(known, rng)


@dataclass(frozen=True)
class MonteCarlo:
    """The consistent word with the best mean return over `samples` games played on in thought by another player.

    candidates: at most so many words, drawn among the consistent ones, are tried.
    """

    player: Player = Consistent()
    samples: int = 8
    candidates: int = 16

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        members = known.lexicon.members(known.consistent)
        if len(members) > self.candidates:
            members = rng.choice(members, self.candidates, replace=False)
        returns = [sum(self._imagined(known, guess, rng) for _ in range(self.samples)) for guess in members]
        return known.lexicon.words[members[np.argmax(returns)]]

    def _imagined(self, known: Knowledge, guess: int, rng: np.random.Generator) -> int:
        """Return-to-go of a game in which a consistent word is the secret and `guess` comes next."""
        words, before = known.lexicon, len(known.tries)
        secret = words.index[known.draw(known.consistent, rng)]
        while guess != secret:
            known = known.after(words.words[guess], COLOURS[words.table[guess, secret]])
            if len(known.tries) == TRIES:
                break
            guess = words.index[self.player.choose(known, rng)]
        return before - len(known.tries)


@dataclass(frozen=True)
class User:
    """A person at the keyboard, who may say anything."""

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        if known.tries:
            guess, colours = known.tries[-1]
            print(f"{guess}  {colours or UNKNOWN}  ({known.consistent.bit_count()} words left)")
        try:
            return input(f"guess {len(known.tries) + 1} of {TRIES}: ").strip().lower()
        except EOFError as error:
            raise InputError("standard input: found its end, expected a guess") from error


PLAYERS: dict[str, Player] = {
    "optimal": Optimal(),
    "start_word": StartWord(),
    "repeat": Repeat(),
    "random_mixture": Mixture(0.34, Consistent(), Uniform()),  # the published logs of LMRL-Gym
    "consistent": Consistent(),
    "uniform": Uniform(),
    "wrong": Wrong(),
    "monte_carlo": MonteCarlo(),
    "user": User(),
}


class Scripted:
    """A player at a game's words and spelling; implements Policy. It reads the past alone, whoever played it."""

    def __init__(self, player: Player, game: Wordle):
        self.player, self.game = player, game

    def start(self, seeds: Sequence[int]) -> Session:
        """A session with one row, and one source of chance, per seed."""
        return _ScriptedSession(self, seeds)


class _ScriptedSession:
    def __init__(self, policy: Scripted, seeds: Sequence[int]):
        self.player, self.game = policy.player, policy.game
        self.rngs = [np.random.default_rng(seed) for seed in seeds]

    def reply(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Reply]:
        words = [
            self.player.choose(self._known(history), self.rngs[row])
            for row, history in zip(rows, histories, strict=True)
        ]
        return [Reply(self.game.spell(word) if word in self.game.lexicon.index else word) for word in words]

    def _known(self, history: Sequence[Turn]) -> Knowledge:
        known = Knowledge(self.game.lexicon, self.game.lexicon.everything)
        for said, told in zip(history[1::2], history[2::2], strict=True):
            colours = "" if told.content == UNKNOWN else "".join(told.content.split())
            known = known.after("".join(said.content.split()), colours)
        return known
