"""A task that tests looking ahead: one choice pays a small reward at once, and thereby loses a larger one later."""

from collections.abc import Sequence

import numpy as np

from offline_lmrl.environments.scripted import Play, Toy
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Turn

LETTERS = tuple("abcdefgh")
BAD = "bad"


class TalkTrap(Toy):
    """A game of two turns, in which "bait" pays .3 at once but loses the 1 that the second turn can pay.

    The environment greets with one of w to z. After "patient", which pays nothing, it replies with another of these
    letters, determined by the greeting; one of the letters a to h, determined by this reply, then pays 1. After
    "bait", or any other text, it replies "bad", and no letter pays. In the first turn, the behaviour policy writes
    "bait" with probability .7, "patient" with .1, or else a random letter; in the second, a random letter. After
    "patient" it earns .125 on average, so for the values of the behaviour policy "bait" is better. Implements
    Environment.
    """

    name = "talk_trap"
    bait = 0.3
    replies = {"w": "y", "x": "w", "y": "z", "z": "x"}  # greeting -> reply to "patient"
    right = {"w": "c", "x": "h", "y": "a", "z": "f"}  # reply -> the letter that pays
    words = ("bait", "patient", *LETTERS)  # first texts of the behaviour policy

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode with greeting seed % 4."""
        self.greeting, self.reply, self.invalid = tuple(self.replies)[seed % len(self.replies)], None, 0
        return (Turn("user", self.greeting),)

    def step(self, text: str) -> StepResult:
        """Take the word of the first turn, or the letter of the second; white space around the text is ignored."""
        word = text.strip()
        if self.reply is None:
            self.invalid += word not in self.words
            reward, self.reply = self._first(self.greeting, word)
            return StepResult((Turn("user", self.reply),), reward, False, False)
        self.invalid += word not in LETTERS
        return StepResult((), self._second(self.reply, word), True, False)

    def labels(self) -> dict[str, object]:
        """Return `patient`, whether that was the first text, and `invalid`.

        `invalid` is the number of texts that the behaviour policy never writes in that turn.
        """
        return {"patient": self.reply != BAD, "invalid": self.invalid}

    def optimum(self) -> float:
        """Return the best return, averaged over greetings, computed backwards from the best letter at the end."""
        later = {reply: max(self._second(reply, letter) for letter in LETTERS) for reply in (BAD, *self.right)}
        outcomes = {greeting: [self._first(greeting, word) for word in self.words] for greeting in self.replies}
        best = [max(reward + later[reply] for reward, reply in choices) for choices in outcomes.values()]
        return sum(best) / len(best)

    def behave(self, rng: np.random.Generator, number: int) -> Play:
        """Start an episode of the behaviour policy."""
        shares = [0.7, 0.1, *[0.2 / len(LETTERS)] * len(LETTERS)]

        def choose() -> str:
            return str(rng.choice(self.words, p=shares) if self.reply is None else rng.choice(LETTERS))

        return self.reset(int(rng.integers(len(self.replies)))), choose

    def _first(self, greeting: str, word: str) -> tuple[float, str]:
        """Return the reward of the first word, and the environment's reply to it."""
        if word == "patient":
            return 0.0, self.replies[greeting]
        return self.bait * (word == "bait"), BAD

    def _second(self, reply: str, letter: str) -> float:
        return float(letter == self.right.get(reply))
