"""A task that tests whether a policy follows demonstrations: it can only guess a rule that was not demonstrated."""

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from offline_lmrl.environments.scripted import Play, Toy, scripted_episode
from offline_lmrl.errors import require
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Trajectory, Turn

LETTERS = tuple("abcdefgh")
CUES = tuple("wxyz")
ORDERS = tuple(itertools.permutations(CUES))
HELD_OUT = 336  # a fifth of the 1,680 rules


class HiddenRule(Toy):
    """A game of four cues, w to z, in random order, each with one right answer, a to h, which pays 1.

    The task of an episode is a rule, which gives each of the four cues a different right answer; there are 1,680
    rules. The texts do not show which answers earned a reward, so without a demonstration of the same rule the player
    can only guess: over all rules, one answer in eight is right. Implements Environment.

    With n rules, seeds 0..24n−1 are every rule with every order of the cues; seeds that differ by n have the same
    rule.

    Args:
      held_out: True: play the 336 rules that are kept for tests. False: play the 1,344 rules for training.
      split_seed: seed of the division into these two sets, which must be the same for training and test.
    """

    name = "hidden_rule"

    def __init__(self, held_out: bool = False, split_seed: int = 0):
        training, kept = _split_rules(split_seed)
        self.rules = kept if held_out else training

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode of rule seed % n and return its first cue."""
        number, again = seed % len(self.rules), seed // len(self.rules)
        return self._enter(self.rules[number], ORDERS[(number + again) % len(ORDERS)])

    def step(self, text: str) -> StepResult:
        """Take an answer and return the next cue; white space around the answer is ignored."""
        answer = text.strip()
        self.invalid += answer not in LETTERS
        reward = float(answer == self._right_answer())
        self.cues = self.cues[1:]
        return StepResult(self._observe(), reward, not self.cues, False)

    def labels(self) -> dict[str, object]:
        """Return `task`, the task name of the rule, and `invalid`, the number of texts that were none of LETTERS."""
        return {"task": task_name(self.rule), "invalid": self.invalid}

    def optimum(self) -> float:
        """Return the best return, that of a player who knows the rule: one right answer for every cue."""
        return float(len(CUES))

    def task(self, seed: int) -> str:
        """Return the task name of this seed's episode; demonstrations for it have the same task."""
        return task_name(self.rules[seed % len(self.rules)])

    def behave(self, rng: np.random.Generator, number: int) -> Play:
        """Start an episode of a random rule; an answer is right with probability .7, else a random wrong letter."""

        def answer() -> str:
            right = self._right_answer()
            return right if rng.random() < 0.7 else str(rng.choice([a for a in LETTERS if a != right]))

        return self._open(self.rules[rng.integers(len(self.rules))], rng), answer

    @property
    def task_name(self) -> str:
        return task_name(self.rule)

    def demonstrations(self, per_rule: int, seed: int) -> list[Trajectory]:
        """Return `per_rule` episodes of each rule with all four answers right, sorted by rule, as the seeds are."""
        require(per_rule >= 1, f"per_rule: found {per_rule}, expected at least 1")
        rng = np.random.default_rng(seed)
        return [
            scripted_episode(
                self,
                self._open(rule, rng),
                self._right_answer,
                group=f"hidden_rule-shown-{seed}-{rule}-{number}",
                task=task_name(rule),
            )
            for rule in self.rules
            for number in range(per_rule)
        ]

    def _open(self, rule: str, rng: np.random.Generator) -> Sequence[Turn]:
        return self._enter(rule, ORDERS[rng.integers(len(ORDERS))])

    def _enter(self, rule: str, cues: Sequence[str]) -> Sequence[Turn]:
        self.rule, self.cues, self.invalid = rule, cues, 0
        return self._observe()

    def _observe(self) -> Sequence[Turn]:
        return (Turn("user", self.cues[0]),) if self.cues else ()

    def _right_answer(self) -> str:
        return self.rule[CUES.index(self.cues[0])]


def task_name(rule: str) -> str:
    """Return the task name of a rule: in "hidden_rule-cafe", the answers to w, x, y and z are c, a, f and e."""
    return f"hidden_rule-{rule}"


@functools.cache
def _split_rules(seed: int) -> tuple[list[str], list[str]]:
    """Return the rules (texts such as "cafe") for training and those for tests, each list in random order."""
    rules = ["".join(answers) for answers in itertools.permutations(LETTERS, len(CUES))]
    shuffled = [rules[i] for i in np.random.default_rng(seed).permutation(len(rules))]
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]
