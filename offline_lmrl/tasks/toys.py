"""Small tasks with known answers: each has logs, an environment and its exact optimum.

Corridor tests stitching: no logged episode from a start earns anything, but together the logs contain the whole path.
Gamble tests whether a method learns the mean: luck in the logs must not be mistaken for skill.
TalkTrap tests looking ahead: the choice that pays at once loses more later than it pays.
Walk tests finding the shortest path through a graph from logs of random walks.
Count, Count1 and Talk test whether a policy earns the requested return, HiddenRule whether it follows a demonstration.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from offline_lmrl.environments.scripted import check_episodes, scripted_episode
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.tasks.toys_conditioned import LETTERS, AskPlayer, Count, Count1, HiddenRule, Talk

__all__ = ["AskPlayer", "Corridor", "Count", "Count1", "Gamble", "HiddenRule", "Talk", "TalkTrap", "Walk"]

STARTS = 16
CHOICES = 3
BAD = "bad"
NODES = tuple("abcdefghijklmnopqrstu")
GOAL = NODES[0]
LONGEST_WALK = 10


class Corridor:
    """Three binary choices from one of 16 starts, then one more at a junction that all starts share.

    Each start has its own secret code of three choices, which leads to the junction; any other three choices end the
    episode with 0. At the junction, "1" ends the episode with reward 1 and "0" with 0. A text other than "0" and "1"
    ends the episode with 0, anywhere. The observation is the start and the choices so far, or the junction, so one
    turn of context makes the game Markov. Implements Environment.

    Args:
      code_seed: seed of the 16 codes, which must be the same for logs and play.
    """

    def __init__(self, code_seed: int = 0):
        self.code_seed = code_seed
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
        """Return the start, whether the junction was reached, and the number of texts that were no choice."""
        return {"start": self.start, "reached": self.at_junction, "invalid": self.invalid}

    def optimum(self) -> float:
        """Return the best return, which is the same from every start: the code, then "1"."""
        return 1.0

    def logs(self, episodes: int, seed: int) -> list[Trajectory]:
        """Return logs in which half of the episodes start at the junction and half at a random start.

        The first half take "1". The others choose at random, and take "0" if they reach the junction, so that no
        episode from a start has a return above 0.
        """
        check_episodes(episodes)
        rng = np.random.default_rng(seed)
        trajectories = []
        for episode in range(episodes):
            from_junction = episode % 2 == 0
            last = str(int(from_junction))
            opening = self._enter(0 if from_junction else int(rng.integers(STARTS)), at_junction=from_junction)
            trajectory = scripted_episode(
                self,
                opening,
                lambda last=last: last if self.at_junction else str(rng.integers(2)),
                group=f"corridor-{seed}-{episode}",
                task="corridor",
                labels={"from_junction": from_junction},
            )
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
    """A game of one choice: "safe" pays 5; "gamble" pays 10 with probability .1, else 0; any other text pays 0.

    Implements Environment.
    """

    chance, prize, safe = 0.1, 10.0, 5.0

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode and return its question; the seed decides whether a gamble would win."""
        return self._enter(np.random.default_rng(seed))

    def step(self, text: str) -> StepResult:
        """Take the choice and end the episode; white space around the text is ignored."""
        self.choice = text.strip()
        reward = {"safe": self.safe, "gamble": self.prize * self.lucky}.get(self.choice, 0.0)
        return StepResult((), reward, True, False)

    def labels(self) -> dict[str, object]:
        """Return the chosen text, and as `invalid` 1 if it was neither "safe" nor "gamble", else 0."""
        return {"choice": self.choice, "invalid": int(self.choice not in ("safe", "gamble"))}

    def optimum(self) -> float:
        """Return the best expected return: the larger of 5 and .1 · 10."""
        return max(self.safe, self.chance * self.prize)

    def logs(self, episodes: int, seed: int) -> list[Trajectory]:
        """Return logs of a behaviour policy that makes both choices with equal probability."""
        check_episodes(episodes)
        rng = np.random.default_rng(seed)
        return [
            scripted_episode(
                self,
                self._enter(rng),
                lambda: ("safe", "gamble")[rng.integers(2)],
                group=f"gamble-{seed}-{episode}",
                task="gamble",
            )
            for episode in range(episodes)
        ]

    def _enter(self, rng: np.random.Generator) -> Sequence[Turn]:
        self.lucky = bool(rng.random() < self.chance)
        return (Turn("user", "safe or gamble?"),)


class TalkTrap:
    """A game of two turns, in which "bait" pays .3 at once but loses the 1 that the second turn can pay.

    The environment greets with one of w to z. After "patient", which pays nothing, it replies with another of these
    letters, determined by the greeting; one of the letters a to h, determined by this reply, then pays 1. After
    "bait", or any other text, it replies "bad", and no letter pays. The behaviour policy first says "bait" with
    probability .7, "patient" with .1, or else a random letter, and then a random letter. After "patient" it earns .125
    on average, so under its own values "bait" is better. Implements Environment.
    """

    bait = 0.3
    replies = {"w": "y", "x": "w", "y": "z", "z": "x"}  # greeting -> reply to "patient"
    right = {"w": "c", "x": "h", "y": "a", "z": "f"}  # reply -> the letter that pays
    words = ("bait", "patient", *LETTERS)  # first texts of the behaviour policy

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode with greeting seed % 4."""
        return self._enter(tuple(self.replies)[seed % len(self.replies)])

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
        """Return whether the first text was "patient", and the number of texts that the behaviour never says."""
        return {"patient": self.reply != BAD, "invalid": self.invalid}

    def optimum(self) -> float:
        """Return the best return, mean over greetings, computed backwards: best letter first, then best first word."""
        later = {reply: max(self._second(reply, letter) for letter in LETTERS) for reply in (BAD, *self.right)}
        outcomes = {greeting: [self._first(greeting, word) for word in self.words] for greeting in self.replies}
        best = [max(reward + later[reply] for reward, reply in choices) for choices in outcomes.values()]
        return sum(best) / len(best)

    def logs(self, episodes: int, seed: int) -> list[Trajectory]:
        """Return episodes of the behaviour policy."""
        check_episodes(episodes)
        rng = np.random.default_rng(seed)
        shares = [0.7, 0.1, *[0.2 / len(LETTERS)] * len(LETTERS)]

        def choose() -> str:
            return str(rng.choice(self.words, p=shares) if self.reply is None else rng.choice(LETTERS))

        return [
            scripted_episode(
                self,
                self.reset(int(rng.integers(len(self.replies)))),
                choose,
                group=f"talk_trap-{seed}-{episode}",
                task="talk_trap",
            )
            for episode in range(episodes)
        ]

    def _enter(self, greeting: str) -> Sequence[Turn]:
        self.greeting, self.reply, self.invalid = greeting, None, 0
        return (Turn("user", greeting),)

    def _first(self, greeting: str, word: str) -> tuple[float, str]:
        """Return the reward of the first word, and the environment's reply to it."""
        if word == "patient":
            return 0.0, self.replies[greeting]
        return self.bait * (word == "bait"), BAD

    def _second(self, reply: str, letter: str) -> float:
        return float(letter == self.right.get(reply))


class Walk:
    """A walk to the goal, node a, through a directed graph of 21 nodes, a to u, whose edges are not shown.

    The observation is the current node, and the player names the next one. Each step costs 1, the last one too. A text
    that is not a node to which an edge leads ends the walk and costs 10, as much as the longest walk, so that giving
    up never pays. After 10 steps a walk is cut: it is then `truncated` and not `terminated`. One turn of context makes
    the game Markov. Implements Environment.

    Args:
      graph_seed: seed of the graph, which must be the same for logs and play. Each edge exists with probability .1,
        except from the goal; graphs are drawn until the goal can be reached from every node.
    """

    def __init__(self, graph_seed: int = 0):
        self.edges, self.distances = _graph(graph_seed)

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode at one of the 20 nodes other than the goal: number 1 + seed % 20."""
        return self._enter(NODES[1 + seed % (len(NODES) - 1)])

    def step(self, text: str) -> StepResult:
        """Go to a node; white space around its name is ignored.

        A walk that is cut still returns the observation after its last step.
        """
        node = text.strip()
        if node not in self.edges[self.node]:
            self.invalid += 1
            return StepResult((), -float(LONGEST_WALK), True, False)
        self.node = node
        self.steps += 1
        if node == GOAL:
            return StepResult((), -1.0, True, False)
        return StepResult(self._observe(), -1.0, False, self.steps == LONGEST_WALK)

    def labels(self) -> dict[str, object]:
        """Return the start of the walk, the fewest steps from there to the goal, whether it arrived, and `invalid`.

        `invalid` is the number of texts that named no edge.
        """
        return {
            "start": self.start,
            "shortest": self.distances[self.start],
            "arrived": self.node == GOAL,
            "invalid": self.invalid,
        }

    def optimum(self) -> float:
        """Return the best return, mean over starts.

        V(node, n steps left) = max(−10, max over edges of V(next, n−1) − 1).
        """
        value = dict.fromkeys(NODES, 0.0)
        for _ in range(LONGEST_WALK):
            value = {GOAL: 0.0} | {
                node: max(-LONGEST_WALK, *(value[next_node] - 1 for next_node in self.edges[node]))
                for node in NODES[1:]
            }
        return sum(value.values()) / (len(NODES) - 1)

    def logs(self, episodes: int, seed: int) -> list[Trajectory]:
        """Return random walks; start and edges are drawn uniformly."""
        check_episodes(episodes)
        rng = np.random.default_rng(seed)
        return [
            scripted_episode(
                self,
                self.reset(int(rng.integers(len(NODES) - 1))),
                lambda: str(rng.choice(self.edges[self.node])),
                group=f"walk-{seed}-{episode}",
                task="walk",
            )
            for episode in range(episodes)
        ]

    def _enter(self, start: str) -> Sequence[Turn]:
        self.start = self.node = start
        self.steps = self.invalid = 0
        return self._observe()

    def _observe(self) -> Sequence[Turn]:
        return (Turn("user", self.node),)


@functools.cache
def _graph(seed: int) -> tuple[Mapping[str, Sequence[str]], Mapping[str, int]]:
    """Draw the graph; return, for each node, the nodes that its edges lead to, and the fewest steps to the goal."""
    rng = np.random.default_rng(seed)
    distances: dict[str, int] = {}
    while len(distances) < len(NODES):
        joined = rng.random((len(NODES), len(NODES))) < 0.1
        joined[0] = False
        np.fill_diagonal(joined, False)
        edges = {node: [NODES[i] for i in np.flatnonzero(row)] for node, row in zip(NODES, joined, strict=True)}
        distances = _distances(edges)
    return edges, distances


def _distances(edges: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return the fewest steps to the goal from every node that can reach it, by breadth-first search."""
    found, frontier = {GOAL: 0}, [GOAL]
    for node in frontier:  # the list grows during the loop
        for before in NODES:
            if node in edges[before] and before not in found:
                found[before] = found[node] + 1
                frontier.append(before)
    return found
