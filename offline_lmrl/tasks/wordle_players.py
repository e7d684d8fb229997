"""Scripted players of Wordle, as in the ILQL code (Snell et al. 2022): they make logs and serve as baselines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from offline_lmrl.errors import InputError
from offline_lmrl.logs.protocols import Reply, Session
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tasks.wordle import CODES, COLOURS, TRIES, UNKNOWN, Lexicon, Wordle, WordSet

OPENINGS = 28  # the length of the published list of opening words


@dataclass(frozen=True)
class Knowledge:
    """A player's knowledge before a guess.

    Args:
      lexicon: the words of the game.
      consistent: the words that fit all colours so far.
      tries: (guess, colours) so far; the colours of a guess that is not in the list are "".
    """

    lexicon: Lexicon
    consistent: WordSet
    tries: tuple[tuple[str, str], ...] = ()

    def after(self, guess: str, colours: str) -> "Knowledge":
        """Return the knowledge after one more guess and its colours."""
        words, consistent = self.lexicon, self.consistent
        if colours:
            consistent &= words.consistent(words.index[guess], CODES[colours])
        return Knowledge(words, consistent, (*self.tries, (guess, colours)))

    def draw(self, words: WordSet, rng: np.random.Generator) -> str:
        """Draw a word of a set, uniformly."""
        members = self.lexicon.members(words)
        return self.lexicon.words[members[rng.integers(len(members))]]


class Player(Protocol):
    """A player, which chooses each guess."""

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        """Return the next guess."""


@dataclass(frozen=True)
class Uniform:
    """A player that guesses any word of the list, uniformly."""

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        return known.draw(known.lexicon.everything, rng)


@dataclass(frozen=True)
class Consistent:
    """A player that guesses a word that fits all colours, uniformly."""

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        return known.draw(known.consistent, rng)


@dataclass(frozen=True)
class Wrong:
    """A player that guesses a word that contradicts the colours, or any word if none does (before the first guess)."""

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        everything = known.lexicon.everything
        return known.draw(everything & ~known.consistent or everything, rng)


@dataclass(frozen=True)
class Optimal:
    """A player that guesses the consistent word with the greatest expected information about the secret.

    It looks only one guess ahead, so it is not quite optimal.
    """

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        return known.lexicon.words[known.lexicon.most_informative(known.consistent)]


@dataclass(frozen=True)
class StartWord:
    """A player that opens with one of the 28 most informative words, and then plays as another player.

    The published list of openings is fixed; this one is computed from the words of the game, so it fits any list.
    """

    then: Player = Consistent()

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        if known.tries:
            return self.then.choose(known, rng)
        openings = known.lexicon.by_information[:OPENINGS]
        return openings[rng.integers(len(openings))]


@dataclass(frozen=True)
class Repeat:
    """A player whose first `first_n` words are another player's, and which then repeats these words at random.

    It loses unless one of them is the secret.
    """

    first: Player = Optimal()
    first_n: int = 2

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        if len(known.tries) < self.first_n:
            return self.first.choose(known, rng)
        return known.tries[rng.integers(self.first_n)][0]


@dataclass(frozen=True)
class Mixture:
    """A player that plays each guess as `first` with probability `share`, else as `second`."""

    share: float
    first: Player
    second: Player

    def choose(self, known: Knowledge, rng: np.random.Generator) -> str:
        return (self.first if rng.random() < self.share else self.second).choose(known, rng)


@dataclass(frozen=True)
class MonteCarlo:
    """A player that guesses the consistent word with the best mean return over simulated games.

    Args:
      player: plays the simulated games after the guess.
      samples: simulated games per word.
      candidates: most words to try; they are drawn from the consistent ones.
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
        """Simulate a game with a random consistent secret and `guess` as next guess; return its return-to-go."""
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
    """A person at the keyboard, who may enter any text."""

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
    """A policy that plays as a Wordle player, with the words and spelling of a game; implements Policy.

    It depends on the history alone, whoever made the guesses in it.
    """

    def __init__(self, player: Player, game: Wordle):
        self.player, self.game = player, game

    def start(self, seeds: Sequence[int]) -> Session:
        """Start a session with one row, and one random generator, per seed."""
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
