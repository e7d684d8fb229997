"""Tasks that test whether a policy earns the requested return: Count, Count1 and Talk.

Their logs contain every possible return, so a policy that is trained on them can be asked for each of these returns.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from offline_lmrl.environments.scripted import Play, ScriptedPolicy, Toy
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Turn

LETTERS = tuple("abcdefgh")
PAID = "g"
UNPAID = tuple(letter for letter in LETTERS if letter != PAID)
NEXT = Turn("user", "next")


class Count(Toy):
    """A game of eight turns of one letter, a to h: "g" pays 1; any other letter or text pays nothing.

    The behaviour policy draws p ~ U(0, 1) for the episode. In each turn it then writes "g" with probability p, or else
    a letter drawn uniformly from the seven others. Its returns are uniform on 0..8. All episodes have the same length,
    so length does not reveal the return. Implements Environment.
    """

    name, turns, letters = "count", 8, 1

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode; all seeds give the same one."""
        self.left, self.invalid = self.turns, 0
        return (NEXT,)

    def step(self, text: str) -> StepResult:
        """Take the letters of one turn, separated by white space.

        A turn with a wrong number of letters, or with any other text, pays nothing.
        """
        letters = text.split()
        valid = len(letters) == self.letters and set(letters) <= set(LETTERS)
        reward = float(letters.count(PAID)) if valid else 0.0
        self.invalid += not valid
        self.left -= 1
        return StepResult((NEXT,) if self.left else (), reward, not self.left, False)

    def optimum(self) -> float:
        """Return the best return: every letter is a paid one."""
        return float(self.turns * self.letters)

    def behave(self, rng: np.random.Generator, number: int) -> Play:
        """Start an episode of the behaviour policy."""
        texts = (" ".join(_letter(rng, share) for _ in range(self.letters)) for share in self._shares(rng))
        return self.reset(0), texts.__next__

    def _shares(self, rng: np.random.Generator) -> Iterable[float]:
        """Draw the probability p of "g" of each turn; in Count it is the same in all turns of an episode."""
        return itertools.repeat(rng.random(), self.turns)


class Count1(Count):
    """A game of one turn of eight letters, such as "a g g b h g c g", which pays 1 for each g; otherwise as Count."""

    name, turns, letters = "count1", 1, 8


class Talk(Count):
    """A game of two turns of eight letters, each played and paid as the turn of Count1: each g pays 1.

    The behaviour policy draws the probability p of "g" anew for each turn.
    """

    name, turns, letters = "talk", 2, 8

    def _shares(self, rng: np.random.Generator) -> Iterable[float]:
        return rng.random(self.turns)


class AskPlayer(ScriptedPolicy):
    """A player of Count, Count1 or Talk that earns a requested return.

    It writes "g" with probability r/m, where r is the return still to be earned with m letters left. It earns every
    requested whole number from 0 to 8 (16 in Talk) exactly. In Count and Count1 it is the behaviour policy conditioned
    on its return: under p ~ U(0, 1), all orders of r paid and m − r unpaid letters are equally likely. In Talk, where
    p is drawn anew for each turn, this holds in the last turn only.

    Args:
      toy: the class of the game: Count, Count1 or Talk.
      ask: the requested return.
      update: True: subtract the rewards of earlier turns from the request. False: keep the request constant, to
        measure how much the subtraction matters.
    """

    def __init__(self, toy: type[Count], ask: float, update: bool = True):
        self.toy, self.ask, self.update = toy, ask, update

    def write(self, history: Sequence[Turn], rng: np.random.Generator) -> str:
        toy, asked = self.toy, self.ask
        past = [turn.reward or 0.0 for turn in history if turn.is_trainable]
        if self.update:
            asked -= sum(past)
        left = (toy.turns - len(past)) * toy.letters
        letters = []
        for m in range(left, left - toy.letters, -1):
            letters.append(_letter(rng, asked / m))
            asked -= letters[-1] == PAID
        return " ".join(letters)


def _letter(rng: np.random.Generator, share: float) -> str:
    """Draw the paid letter with probability `share`, else one of the other letters, uniformly."""
    return PAID if rng.random() < share else UNPAID[rng.integers(len(UNPAID))]
