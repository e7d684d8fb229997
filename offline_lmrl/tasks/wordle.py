"""Wordle as a text game (Snell et al. 2022, ILQL; Abdulhai et al. 2023, LMRL-Gym), re-implemented from its rules.

The player has six tries to find a secret word of five letters. Each guess costs 1, but the guess that finds the secret
costs nothing, so the return of a won game is −(guesses − 1) and that of a lost game −6; both games are `terminated`.
Guesses and the colours that answer them are spelled in pieces with spaces between them: `c r a n e` is answered by
`b y b b g`. A letter of the guess is black if it is not in the secret, yellow if it is at another place of the secret,
and green if it is at the same place.

There are two rules for letters that occur more than once. Under "real", each letter of the secret colours one letter
of the guess: greens first, then yellows from the left. Under "simplified", the rule of the published systems, every
letter of the guess that occurs in the secret is at least yellow. For example, `eerie` against `crane` has two yellows
that are black under "real".

Deviations: the secret is drawn once per game. The published code draws it anew at every guess, from the words
consistent with all colours so far, which gives the same distribution of games. A guess has to be in the word list, as
in LMRL-Gym (the ILQL code takes any five letters); a guess that is not in the list costs a try and gives no
information.

Published results for the list of 431 words, simplified rule, over 4,096 games: mean return −4.12 for the player of the
logs (a consistent word with probability .34, else any word; s.d. 1.59, 4.82 turns, success .70), and −1.935 for the
player that guesses the word with the greatest expected information. That list is not shipped here. With it,
`offline-lmrl prepare wordle --words FILE --duplicates simplified --episodes 4096 --logs optimal --output DIR` reports
−1.943 (s.d. .63), and `--logs random_mixture` −4.102 (s.d. 1.59, 4.80 turns, success .70).
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from offline_lmrl.environments.scripted import ScriptedPolicy
from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Turn

LETTERS = 5
TRIES = 6
# Lists that we may ship, chosen by hand: 833 ordinary words, and 40 words made of 13 first and 8 second pieces.
LISTS = {name: Path(__file__).parent / "words" / f"{name}.txt" for name in ("common", "forty")}
SPELLINGS = {"letters": (1, 1, 1, 1, 1), "halves": (2, 3)}  # lengths of the pieces
# Indexed by code, a number in base 3 whose first digit is the first letter's colour.
COLOURS = tuple(map("".join, itertools.product("byg", repeat=LETTERS)))
CODES = {text: code for code, text in enumerate(COLOURS)}
OPENING = "Wordle:"
UNKNOWN = "unknown word"
OPENINGS = 28  # the length of the published list of opening words
REPEATED = 2  # number of words that the player `repeat` guesses again and again

Duplicates = Literal["real", "simplified"]
WordSet = int  # bit j is 1 if word j is in the set


def read_words(source: str, counts: Counter | None = None) -> tuple[str, ...]:
    """Return the words of a list, sorted, each once.

    Args:
      source: the name of a list that is shipped (LISTS), or a text file with white space between words.
      counts: incremented for each entry that is left out, under a key that gives the reason.
    Raises: InputError if the file cannot be read, or if fewer than two words are left.
    """
    path = LISTS.get(source, Path(source))
    try:
        found = path.read_text(encoding="utf-8").lower().split()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(
            f"words: found {shown(source)} ({why}), expected {', '.join(LISTS)} or a text file"
        ) from error
    usable = [word for word in found if len(word) == LETTERS and word.isascii() and word.isalpha()]
    words = tuple(sorted(set(usable)))
    require(len(words) >= 2, f"words: found {len(words)} words of five letters in {source}, expected at least 2")
    left_out = {"not five letters a-z": len(found) - len(usable), "repeated": len(usable) - len(words)}
    if counts is not None:
        counts.update({reason: n for reason, n in left_out.items() if n})
    return words


def colour_codes(guess: np.ndarray, secrets: np.ndarray, duplicates: Duplicates) -> np.ndarray:
    """Return the colours of a guess for each of n secrets.

    Args:
      guess: (5,) letters as numbers, such as their ASCII codes.
      secrets: (n, 5) letters as the same numbers.
      duplicates: the rule for letters that occur more than once.
    Returns: (n,) uint8, the code of the colours: their index in COLOURS.
    """
    green = secrets == guess
    code = np.zeros(len(secrets), int)
    for place in range(LETTERS):
        same = secrets == guess[place]  # (n, 5): True where a secret has this letter
        if duplicates == "real":
            claimed = (~green[:, :place] & (guess[:place] == guess[place])).sum(1)
            # Greens aside, yellow if the secret has more copies of the letter than the guess has further left.
            yellow = (same & ~green).sum(1) > claimed
        else:
            yellow = same.any(1)
        code = 3 * code + np.where(green[:, place], 2, yellow)  # black 0, yellow 1, green 2
    return code.astype(np.uint8)


class Lexicon:
    """The words of a game, and the colours of all pairs of guess and secret.

    A set of words is an integer, with one bit per word. Such sets are intersected with `&`, counted with `bit_count`
    and looked up in dictionaries, each in a microsecond.

    Args:
      words: n different words, sorted.
      duplicates: the rule for letters that occur more than once.
    Attributes:
      words: the words; the methods take and return words as indices into this tuple.
      index: word -> its index.
      table: (n, n) uint8; [i, j] is the code (index in COLOURS) of the colours of guess i if j is the secret.
      everything: the set of all words.
      order: (n,) indices of the secrets for the episode seeds 0 .. n − 1, a fixed shuffle.
    """

    def __init__(self, words: Sequence[str], duplicates: Duplicates):
        self.words = tuple(words)
        self.index = {word: place for place, word in enumerate(self.words)}
        letters = np.array([list(word.encode()) for word in self.words])
        self.table = np.stack([colour_codes(guess, letters, duplicates) for guess in letters])
        self.everything: WordSet = (1 << len(self.words)) - 1
        self.order = np.random.default_rng(0).permutation(len(self.words))
        self._informative: dict[WordSet, int] = {}

    def consistent(self, guess: int, code: int) -> WordSet:
        """Return the set of secrets for which the colours of `guess` have this code."""
        return int.from_bytes(np.packbits(self.table[guess] == code, bitorder="little").tobytes(), "little")

    def members(self, words: WordSet) -> np.ndarray:
        """Return the indices of the k words in a set, ascending, (k,) int."""
        size = len(self.words)
        bits = np.frombuffer(words.to_bytes(-(-size // 8), "little"), np.uint8)
        return np.flatnonzero(np.unpackbits(bits, count=size, bitorder="little"))

    def information(self, guess: int, secrets: np.ndarray) -> float:
        """Return the expected information of a guess about the secret, in bits: the entropy of its colours.

        Args:
          secrets: (k,) indices of the possible secrets, all equally likely.
        """
        share = np.bincount(self.table[guess, secrets]) / len(secrets)
        share = share[share > 0]
        return -float((share * np.log2(share)).sum())

    def most_informative(self, words: WordSet) -> int:
        """Return the word of a set that, as a guess, has most `information` on a secret in the set; first of ties."""
        if words not in self._informative:
            members = self.members(words)
            bits = [round(self.information(guess, members), 9) for guess in members]  # rounded, so that ties are exact
            self._informative[words] = int(members[np.argmax(bits)])
        return self._informative[words]

    @functools.cached_property
    def by_information(self) -> list[str]:
        """The words, sorted by expected information as a first guess, largest first."""
        everything = np.arange(len(self.words))
        bits = [round(self.information(guess, everything), 9) for guess in everything]
        return [self.words[guess] for guess in np.argsort(np.negative(bits), stable=True)]


@functools.cache
def lexicon(words: str, duplicates: Duplicates) -> Lexicon:
    """Return the lexicon of a word list (see `read_words`); it is made once per process."""
    return Lexicon(read_words(words), duplicates)


class Wordle:
    """A game of Wordle; implements Environment.

    Args:
      words: the list of possible guesses and secrets: "common", "forty", or a text file of words.
      duplicates: "real" or "simplified", the rule for letters that occur more than once.
      spelling: "letters" (`c r a n e`) or "halves" (`cr ane`), for guesses and colours.
      secret: the secret of every game; None = given by the seed, in a fixed shuffle of the n words, so that any n
        consecutive seeds play each word once.
    """

    def __init__(
        self,
        words: str = "common",
        duplicates: Duplicates = "real",
        spelling: Literal["letters", "halves"] = "letters",
        secret: str | None = None,
    ):
        require(
            duplicates in ("real", "simplified"),
            f"duplicates: found {shown(duplicates)}, expected 'real' or 'simplified'",
        )
        require(spelling in SPELLINGS, f"spelling: found {shown(spelling)}, expected 'letters' or 'halves'")
        self.lexicon = lexicon(words, duplicates)
        require(
            secret is None or secret in self.lexicon.index,
            f"secret: found {shown(secret)}, expected a word of the list {words}",
        )
        self.pieces, self.fixed = SPELLINGS[spelling], secret

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start a game and return its opening turn, which is the same in every game."""
        words = self.lexicon
        self.secret = self.fixed or words.words[words.order[seed % len(words.words)]]
        self.tries = self.invalid = 0
        self.won = False
        return (Turn("user", OPENING),)

    def step(self, text: str) -> StepResult:
        """Guess a word; all white space in it is ignored. The guess that ends the game gets no answer."""
        guess, words = "".join(text.split()), self.lexicon
        known = guess in words.index
        self.tries += 1
        self.invalid += not known
        self.won = guess == self.secret
        if self.won or self.tries == TRIES:
            return StepResult((), 0.0 if self.won else -1.0, True, False)
        answer = self.spell(COLOURS[words.table[words.index[guess], words.index[self.secret]]]) if known else UNKNOWN
        return StepResult((Turn("user", answer),), -1.0, False, False)

    def labels(self) -> dict[str, object]:
        """Return `secret`, `won`, and `invalid`, the number of texts that were no word of the list."""
        return {"secret": self.secret, "won": self.won, "invalid": self.invalid}

    def spell(self, text: str) -> str:
        """Return a word, or its colours, as the pieces of this game's spelling with spaces between them."""
        ends = list(itertools.accumulate(self.pieces, initial=0))
        return " ".join(text[start:end] for start, end in itertools.pairwise(ends))


@dataclass(frozen=True)
class Knowledge:
    """A player's knowledge before a guess.

    Attributes:
      lexicon: the words of the game.
      consistent: the set of words that fit all colours so far.
      tries: (guess, colours) of each try so far; the colours of a guess that is not in the list are "".
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
        """Return a word (as text) drawn uniformly from a set of words."""
        members = self.lexicon.members(words)
        return self.lexicon.words[members[rng.integers(len(members))]]


# A way of choosing each guess, a word without spaces.
Player = Callable[[Knowledge, np.random.Generator], str]


def uniform(known: Knowledge, rng: np.random.Generator) -> str:
    """Guess any word of the list, uniformly."""
    return known.draw(known.lexicon.everything, rng)


def consistent(known: Knowledge, rng: np.random.Generator) -> str:
    """Guess a word that fits all colours, uniformly."""
    return known.draw(known.consistent, rng)


def wrong(known: Knowledge, rng: np.random.Generator) -> str:
    """Guess a word that contradicts the colours so far, or any word if none does (at first)."""
    everything = known.lexicon.everything
    return known.draw(everything & ~known.consistent or everything, rng)


def optimal(known: Knowledge, rng: np.random.Generator) -> str:
    """Guess the consistent word with the greatest expected information about the secret.

    This looks only one guess ahead, so it is not quite optimal.
    """
    return known.lexicon.words[known.lexicon.most_informative(known.consistent)]


def start_word(known: Knowledge, rng: np.random.Generator) -> str:
    """Open with one of the 28 most informative words, and then play as `consistent`.

    The published list of openings is fixed; this one is computed from the words of the game, so it fits any list.
    """
    if known.tries:
        return consistent(known, rng)
    openings = known.lexicon.by_information[:OPENINGS]
    return openings[rng.integers(len(openings))]


def repeat(known: Knowledge, rng: np.random.Generator) -> str:
    """Guess two words as `optimal`, and then these words again, at random: lost unless one of them is the secret."""
    if len(known.tries) < REPEATED:
        return optimal(known, rng)
    return known.tries[rng.integers(REPEATED)][0]


def mixture(share: float, first: Player, second: Player) -> Player:
    """Return the player that plays each guess as `first` with probability `share`, else as `second`."""
    return lambda known, rng: (first if rng.random() < share else second)(known, rng)


def monte_carlo(known: Knowledge, rng: np.random.Generator, samples: int = 8, candidates: int = 16) -> str:
    """Guess the consistent word with the best mean return over simulated games, continued by `consistent`.

    Args:
      known: what the player knows.
      rng: source of all random numbers.
      samples: simulated games per word.
      candidates: largest number of words to try; if more are consistent, this many of them are drawn.
    """
    members = known.lexicon.members(known.consistent)
    if len(members) > candidates:
        members = rng.choice(members, candidates, replace=False)
    returns = [sum(imagined_return(known, guess, rng) for _ in range(samples)) for guess in members]
    return known.lexicon.words[members[np.argmax(returns)]]


def imagined_return(known: Knowledge, guess: int, rng: np.random.Generator) -> int:
    """Simulate a game with a random consistent secret and `guess` as next guess; return its return-to-go."""
    words, before = known.lexicon, len(known.tries)
    secret = words.index[known.draw(known.consistent, rng)]
    while guess != secret:
        known = known.after(words.words[guess], COLOURS[words.table[guess, secret]])
        if len(known.tries) == TRIES:
            break
        guess = words.index[consistent(known, rng)]
    return before - len(known.tries)


def user(known: Knowledge, rng: np.random.Generator) -> str:
    """Ask the person at the keyboard, who may enter any text."""
    if known.tries:
        guess, colours = known.tries[-1]
        print(f"{guess}  {colours or UNKNOWN}  ({known.consistent.bit_count()} words left)")
    try:
        return input(f"guess {len(known.tries) + 1} of {TRIES}: ").strip().lower()
    except EOFError as error:
        raise InputError("standard input: found its end, expected a guess") from error


PLAYERS: dict[str, Player] = {
    "optimal": optimal,
    "start_word": start_word,
    "repeat": repeat,
    "random_mixture": mixture(0.34, consistent, uniform),  # the published logs of LMRL-Gym
    "consistent": consistent,
    "uniform": uniform,
    "wrong": wrong,
    "monte_carlo": monte_carlo,
    "user": user,
}


class Scripted(ScriptedPolicy):
    """A policy that plays Wordle as a given `Player`.

    Its guesses depend on the history alone, so the first guesses may have been made by another policy.

    Args:
      player: chooses the guesses.
      game: has the words and the spelling of the guesses.
    """

    def __init__(self, player: Player, game: Wordle):
        self.player, self.game = player, game

    def write(self, history: Sequence[Turn], rng: np.random.Generator) -> str:
        known = Knowledge(self.game.lexicon, self.game.lexicon.everything)
        for guess, answer in zip(history[1::2], history[2::2], strict=True):
            colours = "" if answer.content == UNKNOWN else "".join(answer.content.split())
            known = known.after("".join(guess.content.split()), colours)
        word = self.player(known, rng)
        return self.game.spell(word) if word in self.game.lexicon.index else word
