"""Walk: graphs, costs, cuts and the optimum."""

import itertools

import numpy as np
import pytest

from offline_lmrl.tasks.walk import NODES, Walk
from tests.tasks.playing import play


def test_steps_towards_the_goal_earn_the_optimum():
    walk = Walk(graph_seed=4)
    returns = []
    for seed in range(20):
        walk.reset(seed)
        total, result = 0, None
        while result is None or not result.terminated:
            result = walk.step(min(walk.edges[walk.node], key=walk.distances.get))
            total += result.reward
        assert walk.labels() == {"start": NODES[1 + seed], "shortest": -total, "arrived": True, "invalid": 0}
        returns.append(total)
    assert np.mean(returns) == pytest.approx(walk.optimum())


def test_no_random_walk_beats_the_fewest_steps():
    walk = Walk(graph_seed=4)
    logs = walk.logs(500, seed=0)
    assert all(log.total_return <= -walk.distances[log.turns[0].content] for log in logs)
    steps = {(here.content, there.content) for log in logs for here, there in itertools.pairwise(log.turns)}
    assert {(here, there) for here, there in steps if here != there} == {
        (node, after) for node in NODES for after in walk.edges[node]
    }


def test_optimum_of_graphs_drawn_by_hand():
    walk = Walk()
    walk.edges = {node: ["a"] for node in NODES} | {"b": ["c"]}
    assert walk.optimum() == pytest.approx(-(19 * 1 + 2) / 20)
    # A chain u → t → … → b → a: 1 to 10 steps from b to k, and the other ten are cut after 10.
    walk.edges = {"a": []} | {node: [before] for before, node in itertools.pairwise(NODES)}
    assert walk.optimum() == pytest.approx(-(55 + 10 * 10) / 20)


def test_walk_ends_at_the_goal_at_a_missing_edge_and_after_ten_steps():
    walk = Walk()
    walk.edges = {"b": ["c", "a"], "c": ["b"]}
    first, (there, back, arrival) = play(walk, 0, ["c", "b\n", "a"])
    assert [first[0].content, there.turns[0].content, back.turns[0].content] == ["b", "c", "b"]
    assert (there.reward, there.terminated, there.truncated) == (-1, False, False)
    assert arrival == ((), -1.0, True, False)
    missing = play(walk, 0, ["c", "a"])[1][1]
    assert missing == ((), -10.0, True, False)
    assert (walk.labels()["arrived"], walk.labels()["invalid"]) == (False, 1)
    results = play(walk, 0, ["c", "b"] * 5)[1]
    assert [result.truncated for result in results] == [False] * 9 + [True]
    assert results[-1].turns[0].content == "b" and not results[-1].terminated


def test_graphs_belong_to_their_seed_and_lead_to_the_goal_from_everywhere():
    assert Walk(1).edges == Walk(1).edges != Walk(2).edges
    for seed in range(8):
        walk = Walk(seed)
        assert set(walk.distances) == set(NODES) and walk.edges["a"] == []
        assert not any(node in walk.edges[node] for node in NODES)
        assert 0 < sum(map(len, walk.edges.values())) < 80  # 40 expected of 400
