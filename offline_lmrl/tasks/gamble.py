"""A task that tests whether a method learns mean returns: a high return by luck must not count as a good choice."""

from collections.abc import Sequence

import numpy as np

from offline_lmrl.environments.scripted import Play, Toy
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Turn


class Gamble(Toy):
    """A game of one choice: "safe" pays 5; "gamble" pays 10 with probability .1, else 0; any other text pays 0.

    Implements Environment.
    """

    name = "gamble"
    chance, prize, safe = 0.1, 10.0, 5.0

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode and return its question; the seed decides whether a gamble would win."""
        return self._enter(np.random.default_rng(seed))

    def step(self, text: str) -> StepResult:
        """Take the choice and end the episode; white space around the text is ignored."""
        self.choice = text.strip()
        self.invalid = int(self.choice not in ("safe", "gamble"))
        reward = {"safe": self.safe, "gamble": self.prize * self.lucky}.get(self.choice, 0.0)
        return StepResult((), reward, True, False)

    def labels(self) -> dict[str, object]:
        """Return `choice`, the agent's text, and `invalid`: 1 if it is neither "safe" nor "gamble", else 0."""
        return {"choice": self.choice, "invalid": self.invalid}

    def optimum(self) -> float:
        """Return the best expected return: the larger of 5 and .1 · 10."""
        return max(self.safe, self.chance * self.prize)

    def behave(self, rng: np.random.Generator, number: int) -> Play:
        """Start an episode of a behaviour policy that makes both choices with equal probability."""
        return self._enter(rng), lambda: ("safe", "gamble")[rng.integers(2)]

    def _enter(self, rng: np.random.Generator) -> Sequence[Turn]:
        self.lucky = bool(rng.random() < self.chance)
        return (Turn("user", "safe or gamble?"),)
