"""Wordle as a text game (Snell et al. 2022, ILQL; Abdulhai et al. 2023, LMRL-Gym), re-implemented from its rules.

A secret word of five letters, six tries. Each guess costs 1, the one that finds the secret nothing, so a return is
−(guesses − 1) or, lost, −6; both are ends of the game. Guesses and colours are spelled in pieces with spaces between:
`c r a n e` is answered by `b y b b g`, black for a letter that is not there, yellow for one elsewhere, green for one
in its place.

Two rules for letters that occur more than once. "real": a letter of the secret colours one letter of the guess, greens
first, then yellows from the left. "simplified", the rule of the published systems: every letter of the guess that
occurs in the secret is yellow at least, so `eerie` against `crane` has three yellows that are black under "real".

Deviations: a secret is drawn once and kept, where the published code draws it anew from the consistent words at every
guess, which gives the same distribution of games; a guess has to be in the list, as in LMRL-Gym (the ILQL code takes
any five letters), and one that is not costs a try and tells nothing.

Published for the list of 431 words, simplified rule, over 4,096 games: −4.12 on average for the logged player (a
consistent word with probability .34, else any word; s.d. 1.59, 4.82 turns, success .70) and −1.935 for the greatest
expected information. That list is not shipped here; with it, `offline-lmrl prepare wordle --words FILE --duplicates
simplified --episodes 4096 --logs optimal --output DIR` reports −1.943 (s.d. .63), and `--logs random_mixture` −4.102
(s.d. 1.59, 4.80 turns, success .70).
"""

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from offline_lmrl.data.errors import InputError, shown
from offline_lmrl.data.protocols import StepResult
from offline_lmrl.data.trajectory import Turn

LETTERS = 5
TRIES = 6
# Ours to ship, chosen by hand: 833 ordinary words, and 40 made of 13 first and 8 second pieces.
LISTS = {name: Path(__file__).parent / "words" / f"{name}.txt" for name in ("common", "forty")}
SPELLINGS = {"letters": (1, 1, 1, 1, 1), "halves": (2, 3)}  # lengths of the pieces
COLOURS = tuple(map("".join, itertools.product("byg", repeat=LETTERS)))  # by code: base 3, the first letter leads
CODES = {text: code for code, text in enumerate(COLOURS)}
OPENING = "Wordle:"
UNKNOWN = "unknown word"

Duplicates = Literal["real", "simplified"]
WordSet = int  # bit j says whether word j is in it


def read_words(source: str, counts: Counter | None = None) -> tuple[str, ...]:
    """The words of a list of ours, by its name, or of a text file with white space between words; sorted, each once.

    counts: gets {reason: n} for what is left out.
    Raises InputError for a file that cannot be read or that leaves fewer than two words.
    """
    path = LISTS.get(source, Path(source))
    try:
        found = path.read_text(encoding="utf-8").lower().split()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "not UTF-8")
        raise InputError(
            f"words: found {shown(source)} ({why}), expected {', '.join(LISTS)} or a text file"
        ) from error
    usable = [word for word in found if len(word) == LETTERS and word.isascii() and word.isalpha()]
    words = tuple(sorted(set(usable)))
    if len(words) < 2:
        raise InputError(f"words: found {len(words)} words of five letters in {source}, expected at least 2")
    left_out = {"not five letters a-z": len(found) - len(usable), "said before": len(usable) - len(words)}
    if counts is not None:
        counts.update({reason: n for reason, n in left_out.items() if n})
    return words


def colour_codes(guess: np.ndarray, secrets: np.ndarray, duplicates: Duplicates) -> np.ndarray:
    """What each secret answers to a guess, as index into COLOURS.

    Args:
      guess: (5,) letters as numbers. secrets: (n, 5).
    Returns: (n,) uint8.
    """
    green = secrets == guess
    code = np.zeros(len(secrets), int)
    for place in range(LETTERS):
        same = secrets == guess[place]  # (n, 5): where the secrets have this letter
        if duplicates == "real":
            claimed = (~green[:, :place] & (guess[:place] == guess[place])).sum(1)
            yellow = (same & ~green).sum(1) > claimed  # copies that no green has taken, beyond those to the left
        else:
            yellow = same.any(1)
        code = 3 * code + np.where(green[:, place], 2, yellow)
    return code.astype(np.uint8)


class Lexicon:
    """The words of a game, the colours of all their pairs, and sets of words as bits of one number.

    Such sets are intersected with `&`, counted with `bit_count` and looked up in dictionaries, in a microsecond.

    Attributes:
      words: n of them, sorted; a word is spoken of by its place here. index: word -> place.
      table: (n, n) uint8, the code of guess i where j is the secret.
      everything: the set of all words.
      order: (n,) the secrets of the episode seeds 0 .. n − 1, a fixed shuffle.
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
        """The secrets that answer `guess` with this code."""
        return int.from_bytes(np.packbits(self.table[guess] == code, bitorder="little").tobytes(), "little")

    def members(self, words: WordSet) -> np.ndarray:
        """The places of the words in a set, ascending; (k,) int."""
        size = len(self.words)
        bits = np.frombuffer(words.to_bytes(-(-size // 8), "little"), np.uint8)
        return np.flatnonzero(np.unpackbits(bits, count=size, bitorder="little"))

    def information(self, guess: int, secrets: np.ndarray) -> float:
        """Expected information, in bits, of a guess about a secret among `secrets` (k,): its answers' entropy."""
        share = np.bincount(self.table[guess, secrets]) / len(secrets)
        share = share[share > 0]
        return -float((share * np.log2(share)).sum())

    def most_informative(self, words: WordSet) -> int:
        """The word of a set that tells most about which of them is the secret; the first of equals."""
        if words not in self._informative:
            members = self.members(words)
            bits = [round(self.information(guess, members), 9) for guess in members]  # rounded, so that equals are
            self._informative[words] = int(members[np.argmax(bits)])
        return self._informative[words]

    @functools.cached_property
    def by_information(self) -> list[str]:
        """All words, those first that tell most as a first guess."""
        everything = np.arange(len(self.words))
        bits = [round(self.information(guess, everything), 9) for guess in everything]
        return [self.words[guess] for guess in np.argsort(np.negative(bits), stable=True)]


@functools.cache
def lexicon(words: str, duplicates: Duplicates) -> Lexicon:
    """The lexicon of a list, made once in a process."""
    return Lexicon(read_words(words), duplicates)


class Wordle:
    """One game; implements Environment.

    Args:
      words: a list of ours ("common", "forty") or a text file of words: guesses and secrets.
      duplicates: "real" or "simplified", the rule for letters that occur more than once.
      spelling: "letters" (`c r a n e`) or "halves" (`cr ane`), of guesses and colours.
      secret: of every game; None takes a fixed shuffle of the list, so that as many seeds in a row as there are words
        play each word once.
    """

    def __init__(
        self,
        words: str = "common",
        duplicates: Duplicates = "real",
        spelling: Literal["letters", "halves"] = "letters",
        secret: str | None = None,
    ):
        if duplicates not in ("real", "simplified"):
            raise InputError(f"duplicates: found {shown(duplicates)}, expected 'real' or 'simplified'")
        if spelling not in SPELLINGS:
            raise InputError(f"spelling: found {shown(spelling)}, expected 'letters' or 'halves'")
        self.lexicon = lexicon(words, duplicates)
        if secret is not None and secret not in self.lexicon.index:
            raise InputError(f"secret: found {shown(secret)}, expected a word of {words}")
        self.pieces, self.fixed = SPELLINGS[spelling], secret

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start a game; the opening tells nothing."""
        words = self.lexicon
        self.secret = self.fixed or words.words[words.order[seed % len(words.words)]]
        self.tries = self.invalid = 0
        self.won = False
        return (Turn("user", OPENING),)

    def step(self, text: str) -> StepResult:
        """Guess a word; white space is ignored wherever it stands. The last guess is not answered."""
        guess, words = "".join(text.split()), self.lexicon
        known = guess in words.index
        self.tries += 1
        self.invalid += not known
        self.won = guess == self.secret
        if self.won or self.tries == TRIES:
            return StepResult((), 0.0 if self.won else -1.0, True, False)
        told = self.spell(COLOURS[words.table[words.index[guess], words.index[self.secret]]]) if known else UNKNOWN
        return StepResult((Turn("user", told),), -1.0, False, False)

    def labels(self) -> dict[str, object]:
        """The secret, whether it was found, and the number of texts that were no word of the list."""
        return {"secret": self.secret, "won": self.won, "invalid": self.invalid}

    def spell(self, text: str) -> str:
        """A word or its colours in pieces."""
        ends = list(itertools.accumulate(self.pieces, initial=0))
        return " ".join(text[start:end] for start, end in itertools.pairwise(ends))
