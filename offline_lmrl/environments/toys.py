"""Two small tasks with known answers: each has logs, an environment and its exact optimum.

Corridor asks for stitching: no logged episode from a start earns anything, and yet the logs hold the whole way.
Gamble asks for the mean: luck in the logs must not be taken for skill.
"""

from collections.abc import Sequence

import numpy as np

from offline_lmrl.data.errors import InputError
from offline_lmrl.data.protocols import StepResult
from offline_lmrl.data.trajectory import Trajectory, Turn

STARTS = 16
CHOICES = 3


class Corridor:
    """Three binary choices from one of 16 starts, then one at the junction that all of them share.

    Each start has its own secret code of three choices. It leads to the junction; any other ends the episode with 0.
    At the junction "1" ends with reward 1 and "0" with 0; so does any other text, anywhere. The observation is the
    start and the choices so far, or the junction: one turn of context makes the game Markov. Implements Environment.

    Args:
      code_seed: draws the 16 codes; logs and play must agree on it.
    """

    def __init__(self, code_seed: int = 0):
        self.code_seed = code_seed
        bits = np.random.default_rng(code_seed).integers(2, size=(STARTS, CHOICES))
        self.codes = ["".join(map(str, row)) for row in bits]

    def reset(self, seed: int) -> Sequence[Turn]:
        """Enter at start seed % 16."""
        return self._enter(seed % STARTS)

    def step(self, text: str) -> StepResult:
        """Take the choice "0" or "1" (white space around it is ignored)."""
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
        """The start, whether the junction was reached, and the number of texts that were no choice."""
        return {"start": self.start, "reached": self.at_junction, "invalid": self.invalid}

    def optimum(self) -> float:
        """The best return, from every start: the code, then "1"."""
        return 1.0

    def logs(self, episodes: int, seed: int) -> list[Trajectory]:
        """Half of the episodes start at the junction and take "1"; half choose at random from a random start.

        Those that find the code take "0" at the junction, so that no episode from a start has a return above 0.
        """
        _check_episodes(episodes)
        rng = np.random.default_rng(seed)
        trajectories = []
        for episode in range(episodes):
            from_junction = episode % 2 == 0
            turns = list(self._enter(0 if from_junction else int(rng.integers(STARTS)), at_junction=from_junction))
            ended = False
            while not ended:
                choice = str(int(from_junction)) if self.at_junction else str(rng.integers(2))
                result = self.step(choice)
                turns += [Turn("assistant", choice, reward=result.reward), *result.turns]
                ended = result.terminated
            trajectory = Trajectory(tuple(turns), group=f"corridor-{seed}-{episode}", task="corridor",
                                    source="scripted", labels={"from_junction": from_junction})
            assert from_junction or trajectory.total_return == 0, "a logged episode from a start earns a reward"
            trajectories.append(trajectory)
        return trajectories

    def _enter(self, start: int, at_junction: bool = False) -> Sequence[Turn]:
        self.start, self.path, self.at_junction, self.invalid = start, "", at_junction, 0
        return self._observe()

    def _observe(self) -> Sequence[Turn]:
        text = "junction" if self.at_junction else " ".join(["start", str(self.start), *self.path])
        return (Turn("user", text),)


class Gamble:
    """One choice: "safe" pays 5, "gamble" pays 10 with probability .1 and else 0. Any other text pays 0.

    Implements Environment.
    """

    chance, prize, safe = 0.1, 10.0, 5.0

    def reset(self, seed: int) -> Sequence[Turn]:
        """The question; the seed decides whether a gamble would be lucky."""
        return self._enter(np.random.default_rng(seed))

    def step(self, text: str) -> StepResult:
        """Take the choice (white space around it is ignored); the episode ends."""
        self.choice = text.strip()
        reward = {"safe": self.safe, "gamble": self.prize * self.lucky}.get(self.choice, 0.0)
        return StepResult((), reward, True, False)

    def labels(self) -> dict[str, object]:
        """What was chosen, and whether it was neither of the two."""
        return {"choice": self.choice, "invalid": int(self.choice not in ("safe", "gamble"))}

    def optimum(self) -> float:
        """The best expected return: the larger of 5 and .1 · 10."""
        return max(self.safe, self.chance * self.prize)

    def logs(self, episodes: int, seed: int) -> list[Trajectory]:
        """Both choices equally often."""
        _check_episodes(episodes)
        rng = np.random.default_rng(seed)
        trajectories = []
        for episode in range(episodes):
            question = self._enter(rng)
            choice = ("safe", "gamble")[rng.integers(2)]
            turns = (*question, Turn("assistant", choice, reward=self.step(choice).reward))
            trajectories.append(Trajectory(turns, group=f"gamble-{seed}-{episode}", task="gamble", source="scripted"))
        return trajectories

    def _enter(self, rng: np.random.Generator) -> Sequence[Turn]:
        self.lucky = bool(rng.random() < self.chance)
        return (Turn("user", "safe or gamble?"),)


def _check_episodes(episodes: int) -> None:
    if episodes < 1:
        raise InputError(f"episodes: found {episodes}, expected at least 1")
