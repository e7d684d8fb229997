"""Acceptance gates of planning: looking ahead finds what pays later, a step at a time does not, and what is imagined
is what the environment says. `pytest -m gates`."""

import pytest

from offline_lmrl.algorithms.return_conditioned import ReturnConditionedConfig, ReturnConditionedTrainer
from offline_lmrl.decoding.planner import Planner
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.evaluation.metrics import mean_interval
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tasks.talk_trap import TalkTrap
from offline_lmrl.tasks.walk import GOAL, Walk
from tests.gates.small import fitted

pytestmark = pytest.mark.gates


def mean_return(policy, episodes):
    return sum(t.total_return for t in rollout(policy, TalkTrap, range(episodes))) / episodes


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_turns_of_looking_ahead_leave_the_bait(tmp_path, seed):
    logs = TalkTrap().logs(12_000, seed)  # one in 320 shows what pays after a greeting
    run = fitted(
        ReturnConditionedConfig,
        ReturnConditionedTrainer,
        tmp_path,
        logs,
        seed,
        3000,
        condition_dropout=1.0,
        return_weight=1.0,
        environment_weight=1.0,
    )
    policy = LanguagePolicy(run.model, run.renderer, DecodingConfig(max_new_tokens=4, ask=None), max_length=96)
    assert mean_return(policy, 400) <= 0.5
    assert mean_return(Planner(policy, width=16, expand=64, depth=1), 64) < 0.5
    assert mean_return(Planner(policy, width=16, expand=64, depth=2), 64) >= 0.95 * TalkTrap().optimum()


def imagined_right(planner):
    """Share of the graph's edges of which the planner imagines the next node; the goal ends the walk instead."""
    policy, edges = planner.policy, [(a, b) for a, ends in Walk().edges.items() for b in ends if b != GOAL]
    windows = [policy.null_reply_window([Turn("user", a), Turn("assistant", b)], "user", 4) for a, b in edges]
    said = planner.environment("user").sample(windows, [0] * len(windows))
    texts = [policy.renderer.decode(reply.token_ids[: len(reply.token_ids) - reply.closed]) for reply in said]
    return sum(text == b for text, (_, b) in zip(texts, edges, strict=True)) / len(edges)


# Numbers were chosen on seed 100.
@pytest.mark.parametrize(("seed", "environment_weight"), [(0, 1.0), (1, 1.0), (0, 0.0)])
def test_with_one_turn_in_view_a_walk_is_imagined_node_by_node(tmp_path, seed, environment_weight):
    logs, episodes = Walk().logs(1000, seed), range(100)
    run = fitted(
        ReturnConditionedConfig,
        ReturnConditionedTrainer,
        tmp_path,
        logs,
        seed,
        600,
        condition_dropout=1.0,
        return_weight=1.0,
        environment_weight=environment_weight,
        context=1,
        max_length=32,
        reward_scale=10,
        per_device_train_batch_size=128,
    )
    decoding = DecodingConfig(max_new_tokens=4, support=0.02, ask=None)
    policy = LanguagePolicy(run.model, run.renderer, decoding, context=1, max_length=32)
    # Of the six edges at one node a plan must not miss the one to the goal: hence so many proposals.
    near, far = (Planner(policy, width=8, expand=32, depth=depth) for depth in (1, 3))
    returns = [[t.total_return for t in rollout(planner, Walk, episodes)] for planner in (near, far)]
    gain = mean_interval([b - a for a, b in zip(*returns, strict=True)], [seed % 20 for seed in episodes])
    print(
        f"seed {seed}: imagined right {imagined_right(far):.3f}, depth 1 {mean_interval(returns[0])}, "
        f"depth 3 {mean_interval(returns[1])}, gain {gain}"
    )
    learnt = environment_weight > 0
    assert (imagined_right(far) >= 0.99) == learnt
    assert (gain.high >= 0) == learnt  # on what nobody learnt to imagine no plan can be built
