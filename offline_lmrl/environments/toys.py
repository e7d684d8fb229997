"""Small tasks with known answers: each has logs, an environment and its exact optimum.

Corridor asks for stitching: no logged episode from a start earns anything, and yet the logs hold the whole way.
Gamble asks for the mean: luck in the logs must not be taken for skill.
TalkTrap asks for looking ahead: what pays at once costs more than it pays.
Walk asks for the shortest way through a graph that only random walks have shown.
Count, Count1 and Talk ask for obedience to an asked return, HiddenRule for following a demonstration.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from offline_lmrl.data.protocols import StepResult
from offline_lmrl.data.trajectory import Trajectory, Turn
from offline_lmrl.environments.scripted import check_episodes, scripted_episode
from offline_lmrl.environments.toys_conditioned import LETTERS, AskPlayer, Count, Count1, HiddenRule, Talk

__all__ = ["AskPlayer", "Corridor", "Count", "Count1", "Gamble", "HiddenRule", "Talk", "TalkTrap", "Walk"]

STARTS = 16
CHOICES = 3
BAD = "bad"
NODES = tuple("abcdefghijklmnopqrstu")
GOAL = NODES[0]
LONGEST_WALK = 10


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
    """Two turns: "bait" pays .3 at once and spoils the second turn; "patient" pays nothing and opens it.

    The environment greets with one of w to z. After "patient" it replies with another of them, which the greeting
    decides, and one of the letters a to h, which the reply decides, pays 1. After "bait", or any other text, it
    replies "bad", and nothing pays any more. The behaviour says "bait" with probability .7 and "patient" with .1,
    else a letter, and then any letter: patience earns it .125, so its own values choose the bait. Implements
    Environment.
    """

    bait = 0.3
    replies = {"w": "y", "x": "w", "y": "z", "z": "x"}  # to patience, by greeting
    right = {"w": "c", "x": "h", "y": "a", "z": "f"}  # what pays, by reply
    words = ("bait", "patient", *LETTERS)  # what the behaviour may say first

    def reset(self, seed: int) -> Sequence[Turn]:
        """Greeting seed % 4."""
        return self._enter(tuple(self.replies)[seed % len(self.replies)])

    def step(self, text: str) -> StepResult:
        """Take the word of the first turn, then the letter of the second (white space around them is ignored)."""
        word = text.strip()
        if self.reply is None:
            self.invalid += word not in self.words
            reward, self.reply = self._first(self.greeting, word)
            return StepResult((Turn("user", self.reply),), reward, False, False)
        self.invalid += word not in LETTERS
        return StepResult((), self._second(self.reply, word), True, False)

    def labels(self) -> dict[str, object]:
        """Whether patience opened the second turn, and the number of texts that the behaviour never says."""
        return {"patient": self.reply != BAD, "invalid": self.invalid}

    def optimum(self) -> float:
        """The best return, mean over greetings: backwards, the letter after each reply, then the first word."""
        later = {reply: max(self._second(reply, letter) for letter in LETTERS) for reply in (BAD, *self.right)}
        outcomes = {greeting: [self._first(greeting, word) for word in self.words] for greeting in self.replies}
        best = [max(reward + later[reply] for reward, reply in choices) for choices in outcomes.values()]
        return sum(best) / len(best)

    def logs(self, episodes: int, seed: int) -> list[Trajectory]:
        """Episodes of the behaviour."""
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
        """Reward and reply."""
        if word == "patient":
            return 0.0, self.replies[greeting]
        return self.bait * (word == "bait"), BAD

    def _second(self, reply: str, letter: str) -> float:
        return float(letter == self.right.get(reply))


class Walk:
    """The way to the goal a through a directed graph of 21 nodes, a to u, whose edges are not told.

    The player is told the node it is at and names the next one; a step costs 1, the last one too. A text that is no
    edge from there ends the walk and costs 10, as much as a whole one, so that giving up never pays. After 10 steps a
    walk is cut, which is no end of the game: it is `truncated` and never `terminated`. One turn of context makes the
    game Markov. Implements Environment.

    Args:
      graph_seed: draws the graph; logs and play must agree on it. Each edge is there with probability .1, none leaves
        the goal, and what is drawn is rejected until the goal can be reached from everywhere.
    """

    def __init__(self, graph_seed: int = 0):
        self.edges, self.distances = _graph(graph_seed)

    def reset(self, seed: int) -> Sequence[Turn]:
        """Enter at one of the 20 nodes other than the goal: 1 + seed % 20."""
        return self._enter(NODES[1 + seed % (len(NODES) - 1)])

    def step(self, text: str) -> StepResult:
        """Go to a node (white space around it is ignored); the last step's observation is kept."""
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
        """Where the walk began, the fewest steps from there, whether it arrived, and the number of missing edges."""
        return {
            "start": self.start,
            "shortest": self.distances[self.start],
            "arrived": self.node == GOAL,
            "invalid": self.invalid,
        }

    def optimum(self) -> float:
        """The best return, mean over starts: V(node, n steps left) = max(−10, max over edges of V(next, n−1) − 1)."""
        value = dict.fromkeys(NODES, 0.0)
        for _ in range(LONGEST_WALK):
            value = {GOAL: 0.0} | {
                node: max(-LONGEST_WALK, *(value[next_node] - 1 for next_node in self.edges[node]))
                for node in NODES[1:]
            }
        return sum(value.values()) / (len(NODES) - 1)

    def logs(self, episodes: int, seed: int) -> list[Trajectory]:
        """Random walks: from any start along any of the edges, all alike."""
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
    """The nodes that edges lead to, and the fewest steps to the goal, for each node."""
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
    """Fewest steps to the goal from every node that it can be reached from, by breadth-first search."""
    found, frontier = {GOAL: 0}, [GOAL]
    for node in frontier:  # grows while it is read
        for before in NODES:
            if node in edges[before] and before not in found:
                found[before] = found[node] + 1
                frontier.append(before)
    return found
