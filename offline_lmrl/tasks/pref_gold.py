"""A task whose true reward is known but hidden from the learner, to measure exactly what preferences teach.

The true reward is called gold reward. That of a reply is a sum of terms for its letters and pairs of adjacent letters.
Simulated people compare replies by gold reward with noise, reversals and ties, so a reward model that learns from them
can be wrong. All 4,096 replies to each of four prompts can be enumerated, so optimum, expectations and divergences are
exact sums, not estimates from samples.
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from offline_lmrl.environments.scripted import Play, Toy
from offline_lmrl.errors import require
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Turn

CUES = tuple("wxyz")  # the prompts
LETTERS = tuple("abcdefgh")
LENGTH = 4
REPLIES = tuple(" ".join(letters) for letters in itertools.product(LETTERS, repeat=LENGTH))  # columns of the table


class PrefGold(Toy):
    """One prompt, w to z, and one reply of four letters a to h, such as "c a a g", which earns its gold reward.

    gold reward = Σ_t u[y_t] + v[y_{t−1}, y_t], where y_0 is the prompt and u and v are normal random numbers, then
    shifted and scaled to mean 0 and standard deviation 1 over all prompts and replies. Any other text earns the lowest
    gold reward of all prompts and replies. The behaviour policy draws each letter independently, with unequal
    probabilities that do not depend on the gold reward. Implements Environment.

    Args:
      gold_seed: random seed of u, v and the behaviour policy, which must be the same for logs and play.

    Attributes:
      table: (4, 4096) gold rewards, prompts CUES × replies REPLIES.
      letter_shares: (8,) the behaviour policy's probabilities of LETTERS.
    """

    name = "pref_gold"

    def __init__(self, gold_seed: int = 0):
        self.table, self.letter_shares = _hidden(gold_seed)

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode with prompt seed % 4."""
        self.prompt, self.invalid = CUES[seed % len(CUES)], 0
        return (Turn("user", self.prompt),)

    def step(self, text: str) -> StepResult:
        """Take the reply, with any white space between the letters; the episode ends."""
        self.invalid = int(" ".join(text.split()) not in _PLACES)
        return StepResult((), self.gold(self.prompt, text), True, False)

    def labels(self) -> dict[str, object]:
        """Return `prompt`, and `invalid`: 1 if the reply is not four letters a to h, else 0."""
        return {"prompt": self.prompt, "invalid": self.invalid}

    def gold(self, prompt: str, text: str) -> float:
        """Return the gold reward of a reply to a prompt; for text that is no valid reply, the lowest of the table."""
        place = _PLACES.get(" ".join(text.split()))
        return float(self.table.min() if place is None else self.table[CUES.index(prompt), place])

    def optimum(self) -> float:
        """Return the best expected return: the mean over prompts of the best reply's gold reward."""
        return float(self.table.max(axis=1).mean())

    def behave(self, rng: np.random.Generator, number: int) -> Play:
        """Start an episode of the behaviour policy; preference methods must not use its gold reward."""
        return self.reset(int(rng.integers(len(CUES)))), lambda: REPLIES[self._draw(rng)]

    def comparisons(
        self, n: int, seed: int, *, options: int = 2, temperature: float = 0.5, flips: float = 0.1, tie: float = 0.1
    ) -> list[Comparison]:
        """Simulate human comparisons of different replies, drawn by the behaviour policy, to one prompt.

        Replies are ranked by gold / temperature plus Gumbel noise, where gold is the gold reward g:
        P(i is better than j) = σ((g_i − g_j)/temperature) for two, Plackett–Luce for more (Yellott 1977). Then some
        rankings are reversed, and ties are made. Each comparison is in a group of its own; `labels["options"]` holds
        {"gold": g} for each reply.

        Args:
          n: number of comparisons, at least 1.
          seed: of the random numbers.
          options: replies per comparison, at least 2.
          temperature: of the noise, above 0, in units of the gold reward.
          flips: probability that a ranking is reversed, in [0, 1].
          tie: neighbours in a ranking are tied if their gold rewards differ by at most this.
        Raises: InputError for settings out of range.
        """
        require(
            n >= 1 and options >= 2 and temperature > 0 and 0 <= flips <= 1 and tie >= 0,
            f"comparisons: found n {n}, options {options}, temperature {temperature}, flips {flips}, tie {tie}, "
            "expected n from 1, options from 2, temperature above 0, flips in [0, 1], tie from 0",
        )
        rng = np.random.default_rng(seed)
        return [self._compared(rng, options, temperature, flips, tie, f"pref_gold-{seed}-{i}") for i in range(n)]

    def _compared(
        self, rng: np.random.Generator, options: int, temperature: float, flips: float, tie: float, group: str
    ) -> Comparison:
        prompt = int(rng.integers(len(CUES)))
        drawn: dict[int, None] = {}
        while len(drawn) < options:
            drawn[self._draw(rng)] = None
        gold = self.table[prompt, list(drawn)]
        order = np.argsort(-(gold / temperature + rng.gumbel(size=options)))
        if rng.random() < flips:
            order = order[::-1]
        falls = (
            np.flatnonzero(np.abs(np.diff(gold[order])) > tie) + 1
        )  # where the next reply is not tied with the last
        ranking = [tied.tolist() for tied in np.split(order, falls)]
        best = ranking[0]
        replies = tuple((Turn("assistant", REPLIES[place]),) for place in drawn)
        return Comparison(
            (Turn("user", CUES[prompt]),),
            replies,
            tuple((i in best) / len(best) for i in range(options)),
            tuple(map(tuple, ranking)),
            group=group,
            source="scripted",
            labels={"options": [{"gold": float(value)} for value in gold]},
        )

    def _draw(self, rng: np.random.Generator) -> int:
        """Draw a reply of the behaviour policy; return its index in REPLIES."""
        return int(rng.choice(len(LETTERS), size=LENGTH, p=self.letter_shares) @ _STRIDES)

    def behaviour(self) -> np.ndarray:
        """Return the behaviour policy's probability of each reply, (4096,); it is the same for all prompts."""
        return functools.reduce(np.multiply.outer, [self.letter_shares] * LENGTH).ravel()


_PLACES = {text: place for place, text in enumerate(REPLIES)}
_STRIDES = len(LETTERS) ** np.arange(LENGTH)[::-1]


@functools.cache
def _hidden(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw gold rewards (4, 4096), prompts × replies, and the behaviour policy's probabilities of the letters (8,)."""
    rng = np.random.default_rng(seed)
    alone, pairs = rng.normal(size=len(LETTERS)), rng.normal(size=(len(CUES) + len(LETTERS), len(LETTERS)))
    table = np.zeros((len(CUES), *[len(LETTERS)] * LENGTH))
    for prompt, letters in itertools.product(range(len(CUES)), np.ndindex(table.shape[1:])):
        before = (prompt, *(len(CUES) + letter for letter in letters[:-1]))
        table[prompt][letters] = alone[list(letters)].sum() + pairs[list(before), list(letters)].sum()
    table = table.reshape(len(CUES), -1)
    shares = np.exp(0.7 * rng.normal(size=len(LETTERS)))
    return (table - table.mean()) / table.std(), shares / shares.sum()
