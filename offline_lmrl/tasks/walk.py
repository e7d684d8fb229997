"""A task of finding the shortest path through a graph from logs of random walks."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from offline_lmrl.environments.scripted import Play, Toy, distances_to
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.trajectory import Turn

NODES = tuple("abcdefghijklmnopqrstu")
GOAL = NODES[0]
LONGEST_WALK = 10


class Walk(Toy):
    """A walk to the goal, node a, through a directed graph of 21 nodes, a to u, whose edges are not shown.

    The observation is the current node, which is the state, and the player names the next node. Each step costs 1, the
    last one too. A text that is not a node to which an edge leads ends the walk and costs 10, as much as the longest
    walk, so that giving up never pays. After 10 steps a walk is cut: it is then `truncated` and not `terminated`.
    Implements Environment.

    Args:
      graph_seed: seed of the graph, which must be the same for logs and play. Each edge exists with probability .1,
        except from the goal; graphs are drawn until the goal can be reached from every node.
    """

    name = "walk"

    def __init__(self, graph_seed: int = 0):
        self.edges, self.distances = _graph(graph_seed)

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode at one of the 20 nodes other than the goal: number 1 + seed % 20."""
        self.start = self.node = NODES[1 + seed % (len(NODES) - 1)]
        self.steps = self.invalid = 0
        return self._observe()

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
        """Return facts about the walk.

        Returns:
          start: the first node.
          shortest: the fewest steps from there to the goal.
          arrived: whether the walk ended at the goal.
          invalid: the number of texts that were not a node to which an edge leads.
        """
        return {
            "start": self.start,
            "shortest": self.distances[self.start],
            "arrived": self.node == GOAL,
            "invalid": self.invalid,
        }

    def optimum(self) -> float:
        """Return the best return, averaged over starts.

        V(node, n steps left) = max(−10, max over edges of V(next node, n−1) − 1).
        """
        value = dict.fromkeys(NODES, 0.0)
        for _ in range(LONGEST_WALK):
            value = {GOAL: 0.0} | {
                node: max(-LONGEST_WALK, *(value[next_node] - 1 for next_node in self.edges[node]))
                for node in NODES[1:]
            }
        return sum(value.values()) / (len(NODES) - 1)

    def behave(self, rng: np.random.Generator, number: int) -> Play:
        """Start a random walk, in which the start and each edge are drawn uniformly."""
        opening = self.reset(int(rng.integers(len(NODES) - 1)))
        return opening, lambda: str(rng.choice(self.edges[self.node]))

    def _observe(self) -> Sequence[Turn]:
        return (Turn("user", self.node),)


@functools.cache
def _graph(seed: int) -> tuple[Mapping[str, Sequence[str]], Mapping[str, int]]:
    """Draw the graph; return {node: nodes to which its edges lead} and {node: fewest steps to the goal}."""
    rng = np.random.default_rng(seed)
    distances: dict[str, int] = {}
    while len(distances) < len(NODES):
        joined = rng.random((len(NODES), len(NODES))) < 0.1
        joined[0] = False
        np.fill_diagonal(joined, False)
        edges = {node: [NODES[i] for i in np.flatnonzero(row)] for node, row in zip(NODES, joined, strict=True)}
        distances = distances_to(GOAL, functools.partial(_nodes_before, edges))
    return edges, distances


def _nodes_before(edges: Mapping[str, Sequence[str]], node: str) -> list[str]:
    return [before for before in NODES if node in edges[before]]
