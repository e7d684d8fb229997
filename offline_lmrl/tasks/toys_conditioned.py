"""Tasks for policies that are conditioned on a requested return or on a demonstration.

Count, Count1 and Talk have logs with every possible return, so a policy trained on them can be given each as a
request. HiddenRule can only be played after a demonstration of its rule.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from offline_lmrl.environments.scripted import check_episodes, scripted_episode
from offline_lmrl.errors import InputError
from offline_lmrl.logs.protocols import Reply, StepResult
from offline_lmrl.logs.trajectory import Trajectory, Turn

LETTERS = tuple("abcdefgh")
PAID = "g"
UNPAID = tuple(letter for letter in LETTERS if letter != PAID)
NEXT = Turn("user", "next")
CUES = tuple("wxyz")
ORDERS = tuple(itertools.permutations(CUES))
HELD_OUT = 336  # a fifth of the 1,680 rules


class Count:
    """A game of eight turns of one letter, a to h: "g" pays 1; any other letter or text pays nothing.

    The behaviour policy draws p ~ U(0, 1) for the episode and then, in each turn, says "g" with probability p, else
    one of the other letters, drawn uniformly. Its returns are uniform on 0..8. All episodes have the same length, so
    length does not reveal the return. Implements Environment.
    """

    name, turns, letters = "count", 8, 1

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode; all seeds give the same one."""
        self.left, self.invalid = self.turns, 0
        return (NEXT,)

    def step(self, text: str) -> StepResult:
        """Take the letters of one turn, separated by white space; a wrong number or other letters pay nothing."""
        said = text.split()
        valid = len(said) == self.letters and set(said) <= set(LETTERS)
        reward = float(said.count(PAID)) if valid else 0.0
        self.invalid += not valid
        self.left -= 1
        return StepResult((NEXT,) if self.left else (), reward, not self.left, False)

    def labels(self) -> dict[str, object]:
        """Return `invalid`, the number of turns with a wrong number of letters or with other letters."""
        return {"invalid": self.invalid}

    def optimum(self) -> float:
        """Return the best return, computed backwards: V(n letters left) = max over letters of pay + V(n − 1)."""
        value = 0.0
        for _ in range(self.turns * self.letters):
            value = max((letter == PAID) + value for letter in LETTERS)
        return value

    def logs(self, episodes: int, seed: int) -> list[Trajectory]:
        """Return episodes of the behaviour policy."""
        check_episodes(episodes)
        rng = np.random.default_rng(seed)
        trajectories = []
        for episode in range(episodes):
            texts = (" ".join(_letter(rng, share) for _ in range(self.letters)) for share in self._shares(rng))
            trajectories.append(
                scripted_episode(
                    self, self.reset(0), texts.__next__, group=f"{self.name}-{seed}-{episode}", task=self.name
                )
            )
        return trajectories

    def _shares(self, rng: np.random.Generator) -> Iterable[float]:
        """Draw the probability p of "g" for each turn; here it is the same in all turns."""
        return itertools.repeat(rng.random(), self.turns)


class Count1(Count):
    """A Count with one turn of eight letters, such as "a g g b h g c g", which pays 1 for each g."""

    name, turns, letters = "count1", 1, 8


class Talk(Count):
    """Two turns of Count1; the behaviour policy draws p for each turn anew, so the turns are independent."""

    name, turns, letters = "talk", 2, 8

    def _shares(self, rng: np.random.Generator) -> Iterable[float]:
        return rng.random(self.turns)


class AskPlayer:
    """A player of Count, Count1 or Talk that earns a requested return; implements Policy.

    It says "g" with probability r/m, where r is the return still to be earned with m letters left. It earns every
    whole number from 0 to 8 (16 in Talk) exactly. In Count and Count1 it is the behaviour policy conditioned on its
    return: under p ~ U(0, 1), all orders of r paid and m − r unpaid letters are equally likely. In Talk, where p is
    drawn anew, this holds in the last turn only.

    Args:
      toy: Count, Count1 or Talk.
      ask: the requested return.
      update: subtract the rewards of earlier turns from the request; False keeps the request constant, to measure how
        much this update matters.
    """

    def __init__(self, toy: type[Count], ask: float, update: bool = True):
        self.toy, self.ask, self.update = toy, ask, update

    def start(self, seeds: Sequence[int]) -> "_AskSession":
        """Start a session with one row per seed."""
        return _AskSession(self, seeds)


class _AskSession:
    def __init__(self, player: AskPlayer, seeds: Sequence[int]):
        self.player, self.rngs = player, [np.random.default_rng(seed) for seed in seeds]

    def reply(
        self,
        rows: Sequence[int],
        histories: Sequence[Sequence[Turn]],
        options: Sequence[Sequence[str] | None] | None = None,
    ) -> list[Reply]:
        return [Reply(self._text(self.rngs[row], history)) for row, history in zip(rows, histories, strict=True)]

    def _text(self, rng: np.random.Generator, history: Sequence[Turn]) -> str:
        toy, asked = self.player.toy, self.player.ask
        past = [turn.reward or 0.0 for turn in history if turn.is_trainable]
        if self.player.update:
            asked -= sum(past)
        left = (toy.turns - len(past)) * toy.letters
        said = []
        for m in range(left, left - toy.letters, -1):
            said.append(_letter(rng, asked / m))
            asked -= said[-1] == PAID
        return " ".join(said)


class HiddenRule:
    """A game of four cues, w to z, in random order, each with one right answer, a to h, which pays 1.

    The task is a rule: a different right answer for each cue, which gives 1,680 rules. The texts do not show which
    answers earned a reward, so without a demonstration of the same rule the player can only guess: over all rules, one
    answer in eight is right. Implements Environment.

    With n rules, seeds 0..24n−1 are every rule with every order of the cues; seeds that differ by n have the same
    rule.

    Args:
      held_out: play the 336 rules that are held out from training, instead of the 1,344 others.
      split_seed: seed of this split, which must be the same for training and test.
    """

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
        reward = _right(self.rule, self.cues[0], answer)
        self.cues = self.cues[1:]
        return StepResult(self._observe(), reward, not self.cues, False)

    def labels(self) -> dict[str, object]:
        """Return the task name, as in trajectories of the same rule, and the number of texts that were no answer."""
        return {"task": task_name(self.rule), "invalid": self.invalid}

    def optimum(self) -> float:
        """Return the best return of a player who knows the rule, mean over rules: the best answer to every cue."""
        best = [max(_right(rule, cue, answer) for answer in LETTERS) for rule in self.rules for cue in CUES]
        return sum(best) / len(self.rules)

    def task(self, seed: int) -> str:
        """Return the task name of this seed's episode; demonstrations for it have the same task."""
        return task_name(self.rules[seed % len(self.rules)])

    def logs(self, episodes: int, seed: int) -> list[Trajectory]:
        """Return episodes of random rules; an answer is right with probability .7, else any of the seven others."""
        check_episodes(episodes)
        rng = np.random.default_rng(seed)

        def answer() -> str:
            right = self._right_answer()
            return right if rng.random() < 0.7 else str(rng.choice([a for a in LETTERS if a != right]))

        return [
            self._episode(self.rules[rng.integers(len(self.rules))], rng, answer, f"{seed}-{episode}")
            for episode in range(episodes)
        ]

    def demonstrations(self, per_rule: int, seed: int) -> list[Trajectory]:
        """Return `per_rule` episodes of each rule with all four answers right; rules are in the order of the seeds."""
        if per_rule < 1:
            raise InputError(f"per_rule: found {per_rule}, expected at least 1")
        rng = np.random.default_rng(seed)
        return [
            self._episode(rule, rng, self._right_answer, f"shown-{seed}-{rule}-{number}")
            for rule in self.rules
            for number in range(per_rule)
        ]

    def _episode(self, rule: str, rng: np.random.Generator, choose: Callable[[], str], group: str) -> Trajectory:
        opening = self._enter(rule, ORDERS[rng.integers(len(ORDERS))])
        return scripted_episode(self, opening, choose, group=f"hidden_rule-{group}", task=task_name(rule))

    def _enter(self, rule: str, cues: Sequence[str]) -> Sequence[Turn]:
        self.rule, self.cues, self.invalid = rule, cues, 0
        return self._observe()

    def _observe(self) -> Sequence[Turn]:
        return (Turn("user", self.cues[0]),) if self.cues else ()

    def _right_answer(self) -> str:
        return self.rule[CUES.index(self.cues[0])]


def task_name(rule: str) -> str:
    """Return the task name of a rule, such as "hidden_rule-cafe", with the answers to w, x, y and z."""
    return f"hidden_rule-{rule}"


@functools.cache
def _split_rules(seed: int) -> tuple[list[str], list[str]]:
    """Return the rules for training and the held-out rules, each list in random order."""
    rules = ["".join(answers) for answers in itertools.permutations(LETTERS, len(CUES))]
    shuffled = [rules[i] for i in np.random.default_rng(seed).permutation(len(rules))]
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


def _right(rule: str, cue: str, answer: str) -> float:
    return float(answer == rule[CUES.index(cue)])


def _letter(rng: np.random.Generator, share: float) -> str:
    """Draw the paid letter with probability `share`, else one of the other letters, uniformly."""
    return PAID if rng.random() < share else UNPAID[rng.integers(len(UNPAID))]
