"""A task that tests stitching, the combination of parts of different episodes.

No logged episode that begins at a start earns a reward, but together the episodes contain the path from a start to the
reward.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from offline_lmrl.environments.scripted import Play, Toy
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Trajectory, Turn

STARTS = 16
CHOICES = 3


class Corridor(Toy):
    """Three binary choices from one of 16 starts, then one more at a junction that all starts share.

    Each start has its own secret code of three choices, which leads to the junction; any other three choices end the
    episode with reward 0. At the junction, "1" ends the episode with reward 1, and "0" with 0. A text other than "0"
    and "1" ends the episode with 0 anywhere. The last observation is the state: it names the start and the choices so
    far, or the junction. Implements Environment.

    Args:
      code_seed: seed of the 16 codes, which must be the same for logs and play.
    """

    name = "corridor"

    def __init__(self, code_seed: int = 0):
        bits = np.random.default_rng(code_seed).integers(2, size=(STARTS, CHOICES))
        self.codes = ["".join(map(str, row)) for row in bits]

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode at start seed % 16."""
        return self._enter(seed % STARTS)

    def step(self, text: str) -> StepResult:
        """Take the choice "0" or "1"; white space around it is ignored."""
        choice = text.strip()
        if choice not in ("0", "1"):
            self.invalid += 1
            return StepResult((), 0.0, True, False)
        if self.at_junction:
            return StepResult((), float(choice), True, False)
        self.path += choice
        if len(self.path) == CHOICES:
            self.at_junction = self.path == self.codes[self.start]
            if not self.at_junction:
                return StepResult((), 0.0, True, False)
        return StepResult(self._observe(), 0.0, False, False)

    def labels(self) -> dict[str, object]:
        """Return `start` (0 to 15), `reached` (whether the junction was) and `invalid`, the number of wrong texts."""
        return {"start": self.start, "reached": self.at_junction, "invalid": self.invalid}

    def optimum(self) -> float:
        """Return the best return, which is the same from every start: the code, then "1"."""
        return 1.0

    def behave(self, rng: np.random.Generator, number: int) -> Play:
        """Start a logged episode: every second one begins at the junction, and the others at a random start.

        Episodes that begin at the junction choose "1" there. The others choose at random, and "0" if they reach the
        junction, so their returns are 0.
        """
        from_junction = number % 2 == 0
        opening = self._enter(0 if from_junction else int(rng.integers(STARTS)), at_junction=from_junction)

        def choose() -> str:
            return str(int(from_junction) if self.at_junction else rng.integers(2))

        return opening, choose

    def logs(self, episodes: int, seed: int) -> list[Trajectory]:
        """Return this many episodes of the behaviour policy, with the label `from_junction`."""
        logs = super().logs(episodes, seed)
        # The logs must hold the way from a start to the reward, but never within one episode.
        assert not any(log.total_return for log in logs[1::2]), "a logged episode from a start earns a reward"
        return [replace(log, labels={"from_junction": number % 2 == 0}) for number, log in enumerate(logs)]

    def _enter(self, start: int, at_junction: bool = False) -> Sequence[Turn]:
        self.start, self.path, self.at_junction, self.invalid = start, "", at_junction, 0
        return self._observe()

    def _observe(self) -> Sequence[Turn]:
        text = "junction" if self.at_junction else " ".join(["start", str(self.start), *self.path])
        return (Turn("user", text),)
