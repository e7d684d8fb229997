import math

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.ops.policy_gradient import (
    Moments,
    adaptive_kl_weight,
    entropy,
    generalized_advantage,
    kl_exact,
    kl_k1,
    kl_k3,
    kl_shaped_reward,
    penalize_unfinished,
    policy_loss,
    policy_statistics,
    replace_unfinished,
    scale_scores,
    tensorflow_adam_eps,
    value_loss,
    value_statistics,
    whiten,
)
from offline_lmrl.ops.value_learning import td_target
from tests.tokens.test_episodes import agent, batch_of, user


@pytest.mark.parametrize(
    "policy, reference, expected",
    # .7 ln(.7/.3) + .2 ln(.2/.4) + .1 ln(.1/.3) = .5931 - .1386 - .1099;  far apart 2.9160 - .0391 - .0381
    [([0.7, 0.2, 0.1], [0.3, 0.4, 0.3], 0.3446), ([0.98, 0.01, 0.01], [0.05, 0.5, 0.45], 2.8388)],
)
def test_both_estimators_have_the_exact_divergence_as_their_mean(policy, reference, expected):
    prob, log_prob, ref_log_prob = torch.tensor(policy), torch.tensor(policy).log(), torch.tensor(reference).log()
    for estimate in (kl_k1, kl_k3):
        mean = (prob * estimate(log_prob, ref_log_prob)).sum()
        assert_close(mean, torch.tensor(expected), atol=1e-4, rtol=0)


def test_k3_is_never_negative_and_k1_may_be():
    log_prob, ref_log_prob = torch.tensor([-2.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0, -3.0])
    # k1 = -1, 0, 2;  k3 = e - 2, 0, e^-2 + 1
    assert_close(kl_k1(log_prob, ref_log_prob), torch.tensor([-1.0, 0.0, 2.0]))
    assert_close(kl_k3(log_prob, ref_log_prob), torch.tensor([0.7182818, 0.0, 1.1353353]))


def test_the_exact_divergence_by_hand_and_with_tokens_that_are_dropped():
    log_prob = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64).log()
    reference = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]], dtype=torch.float64).log().requires_grad_()
    divergence = kl_exact(log_prob, reference)
    assert_close(divergence, torch.tensor([0.5, 1.0], dtype=torch.float64) * math.log(2))
    divergence.sum().backward()
    assert_close(reference.grad, -log_prob.exp())


def test_entropy_of_uniform_logits_is_the_log_of_the_vocabulary():
    assert_close(entropy(torch.full((2, 3, 7), 4.0)), torch.full((2, 3), math.log(7)))


def test_entropy_by_hand_and_with_forbidden_tokens():
    # ½ ln 2 + 2 · ¼ ln 4 = 1.0397
    logits = torch.tensor([0.5, 0.25, 0.25, 0.0]).log().add(3.0).requires_grad_()
    value = entropy(logits)
    assert_close(value.detach(), torch.tensor(1.0397208))
    value.backward()
    # dH/dl = -p (ln p + H): -½ (-.6931 + 1.0397), -¼ (-1.3863 + 1.0397) twice, nothing for what is forbidden
    assert_close(logits.grad, torch.tensor([-0.1732868, 0.0866434, 0.0866434, 0.0]))


def test_shaped_rewards_of_three_tokens_sum_to_the_score_less_the_divergence():
    log_prob, ref_log_prob = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    reward = torch.tensor([0.0, 0.0, 3.0])
    shaped = kl_shaped_reward(reward, kl_k1(log_prob, ref_log_prob), 0.1)
    # kl = .5, -1, 0
    assert_close(shaped, torch.tensor([-0.05, 0.1, 3.0]))
    assert_close(shaped.sum(), torch.tensor(3 - 0.1 * (0.5 - 1 + 0)))


def test_unfinished_turns_get_a_fixed_score_or_a_penalty():
    score, closed = torch.tensor([4.0, 4.0, -9.0]), torch.tensor([True, False, False])
    assert_close(replace_unfinished(score, closed, -1.0), torch.tensor([4.0, -1.0, -1.0]))
    assert_close(penalize_unfinished(score, closed, 1.5), torch.tensor([4.0, 2.5, -10.5]))


# One terminated episode of three tokens, one cut after two; γ = .9 on the second step of the first, 1 elsewhere.
EPISODE = torch.tensor([0, 0, 0, 1, 1])
REWARD = torch.tensor([0.0, 1.0, 2.0, 0.0, 0.5])
V = torch.tensor([0.5, 1.0, 1.5, 2.0, 1.0])
NEXT_V = torch.tensor([1.0, 1.5, 99.0, 1.0, 4.0])  # V behind a terminal action must not count
BOOTSTRAP = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
DISCOUNT = torch.tensor([1.0, 0.9, 1.0, 1.0, 1.0])


def advantages(gae_lambda):
    target = td_target(REWARD, NEXT_V, BOOTSTRAP, DISCOUNT)
    return generalized_advantage(target, V, DISCOUNT, EPISODE, gae_lambda)


def test_advantages_by_hand_with_a_terminal_and_a_cut_episode():
    # δ = 1 - .5, 1 + 1.35 - 1, 2 - 1.5 | 1 - 2, .5 + 4 - 1  =  .5, 1.35, .5 | -1, 3.5
    # λ = .5:  A2 = .5, A1 = 1.35 + .45 · .5 = 1.575, A0 = .5 + .5 · 1.575 = 1.2875 | A4 = 3.5, A3 = -1 + 1.75
    advantage, returns = advantages(0.5)
    assert_close(advantage, torch.tensor([1.2875, 1.575, 0.5, 0.75, 3.5]))
    assert_close(returns, torch.tensor([1.7875, 2.575, 2.0, 2.75, 4.5]))


def test_lambda_zero_gives_td_errors_and_lambda_one_returns_less_values():
    assert_close(advantages(0.0)[0], torch.tensor([0.5, 1.35, 0.5, -1.0, 3.5]))
    # G2 = 2, G1 = 1 + .9 · 2, G0 = 2.8 | G4 = .5 + 4, G3 = 4.5
    returns = torch.tensor([2.8, 2.8, 2.0, 4.5, 4.5])
    assert_close(advantages(1.0), (returns - V, returns))


def test_a_cut_end_differs_from_a_terminal_one_by_the_discounted_value():
    one, episode, discount = torch.ones(1), torch.zeros(1, dtype=torch.long), 0.8
    cut, terminal = (
        generalized_advantage(td_target(one, 5 * one, bootstrap, discount), one, discount, episode, 0.95)[0]
        for bootstrap in (one, 0 * one)
    )
    assert_close(cut - terminal, torch.tensor([0.8 * 5]))


def test_advantages_equal_the_sum_over_all_pairs_of_steps():
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 7, 33, 2, 20]
    episode = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    target, v = torch.randn(2, 63, generator=generator).double()
    discount = torch.rand(63, generator=generator).double()
    expected = []
    for i in range(63):
        total, factor = 0.0, 1.0
        for j in range(i, 63):
            if episode[j] == episode[i]:
                total += factor * float(target[j] - v[j])
                factor *= 0.9 * float(discount[j])
        expected.append(total)
    advantage, _ = generalized_advantage(target, v, discount, episode, 0.9)
    assert_close(advantage, torch.tensor(expected, dtype=torch.float64))


def advantages_of_dialogue(replies, terminated):
    """Of two agent turns, three tokens and two, with V = .3 times the agent tokens read."""
    turns = (user("a"), agent("xy", 1.0), user(replies[0]), agent("z", 2.0), user(replies[1]))
    batch = batch_of([Trajectory(turns[: 4 if terminated else 5], terminated=terminated)])
    steps = batch["steps"]
    read = 0.3 * batch["action_mask"].cumsum(1)
    v, next_v = read[steps["row"], steps["state"]], read[steps["next_row"], steps["next_state"]]
    target = td_target(steps["reward"], next_v, steps["bootstrap"], steps["discount"])
    return generalized_advantage(target, v, steps["discount"], steps["row"], 0.5)[0]


def test_environment_text_of_any_length_leaves_the_advantages_of_a_dialogue():
    # δ = .3, .3, 1.3, .3, and 2 - 1.2 where the log terminates, 2 + 1.5 - 1.2 where it is cut
    for replies in (("b", "c"), ("bbbbbb", "cccc")):
        # A4 = .8, A3 = .3 + .4, A2 = 1.3 + .35, A1 = .3 + .825, A0 = .3 + .5625
        terminal, cut = advantages_of_dialogue(replies, True), advantages_of_dialogue(replies, False)
        assert_close(terminal, torch.tensor([0.8625, 1.125, 1.65, 0.7, 0.8]))
        assert_close(cut[-1] - terminal[-1], torch.tensor(1.5))


def test_no_gradient_flows_through_advantages_and_returns():
    v = V.clone().requires_grad_()
    advantage, returns = generalized_advantage(REWARD, v, DISCOUNT, EPISODE, 0.5)
    assert not advantage.requires_grad and not returns.requires_grad


def test_whitened_values_have_zero_mean_and_unit_spread():
    # mean 3, population s.d. √(8/3) = 1.63299
    assert_close(whiten(torch.tensor([1.0, 3.0, 5.0])), torch.tensor([-1.2247449, 0.0, 1.2247449]))
    assert_close(whiten(torch.tensor([1.0, 3.0, 5.0]), keep_mean=True), torch.tensor([1.7752551, 3.0, 4.2247449]))
    assert_close(whiten(torch.full((4,), 7.0)), torch.zeros(4))


def test_ratios_are_clipped_only_where_that_lowers_the_objective():
    ratio = torch.tensor([1.3, 1.3, 0.7, 0.7, 1.1])
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0])
    log_prob = ratio.log().requires_grad_()
    loss = policy_loss(log_prob, torch.zeros(5), advantage, 0.2)
    # -2 · 1.2, 2 · 1.3, -2 · .7, 2 · .8, -2 · 1.1
    assert_close(loss.detach(), torch.tensor([-2.4, 2.6, -1.4, 1.6, -2.2]))
    loss.sum().backward()
    # dL/dlogπ = -A ρ where the ratio itself counts, else 0
    assert_close(log_prob.grad, torch.tensor([0.0, 2.6, -1.4, 0.0, -2.2]))


def test_without_clipping_the_policy_loss_is_the_weighted_ratio():
    log_prob = torch.tensor([3.0, -3.0])
    loss = policy_loss(log_prob, torch.zeros(2), torch.tensor([1.0, -1.0]), math.inf)
    assert_close(loss, torch.tensor([-math.exp(3), math.exp(-3)]))


def test_values_are_clipped_to_the_worse_of_both_errors():
    # G = 1, V_b = 0, ε = .2.  V = .9: clipped .2 is worse, ½ · .64, no gradient.  V = -.9: own error is worse,
    # ½ · 3.61.  V = .1: inside, ½ · .81.
    v = torch.tensor([0.9, -0.9, 0.1], requires_grad=True)
    loss = value_loss(v, torch.zeros(3), torch.ones(3), 0.2)
    assert_close(loss.detach(), torch.tensor([0.32, 1.805, 0.405]))
    loss.sum().backward()
    assert_close(v.grad, torch.tensor([0.0, -1.9, -0.9]))
    assert_close(value_loss(v, torch.zeros(3), torch.ones(3), math.inf)[0].item(), 0.5 * 0.01, rtol=1e-4, atol=0)


def test_kl_weight_follows_its_recurrence_and_errors_are_clipped():
    assert adaptive_kl_weight(0.15, kl=12.0, target=6.0, episodes=1000, horizon=10000) == pytest.approx(0.15 * 1.02)
    assert adaptive_kl_weight(0.15, kl=0.0, target=6.0, episodes=1000, horizon=10000) == pytest.approx(0.15 * 0.98)
    assert adaptive_kl_weight(0.15, kl=6.6, target=6.0, episodes=5000, horizon=10000) == pytest.approx(0.15 * 1.05)
    assert adaptive_kl_weight(0.15, kl=6.0, target=6.0, episodes=5000, horizon=10000) == 0.15


def test_running_moments_equal_those_of_everything_seen():
    moments = Moments().updated(torch.tensor([1.0, 2.0])).updated(torch.tensor([6.0]))
    # mean 3, squares 4 + 1 + 9 = 14, population s.d. √(14/3)
    assert moments == pytest.approx((3, 3.0, 14.0))
    assert moments.std == pytest.approx(2.1602469)
    assert Moments().updated(torch.tensor([4.0, 4.0])).std == 1.0


def test_scores_are_clipped_after_scaling():
    assert_close(scale_scores(torch.tensor([8.0, -30.0]), 4.0, 5.0), torch.tensor([2.0, -5.0]))


def test_scaled_scores_give_the_same_first_gradient_whatever_their_unit():
    score, action = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0, 1, 2, 0])
    gradients = []
    for unit in (1.0, 100.0):
        logits = torch.tensor([0.1, 0.2, -0.3], requires_grad=True)
        scaled = scale_scores(unit * score, Moments().updated(unit * score).std, 1.5)
        log_prob = logits.log_softmax(-1)[action]
        policy_loss(log_prob, log_prob.detach(), scaled, 0.2).sum().backward()
        gradients.append(logits.grad)
    assert gradients[0].abs().max() > 0.1
    assert_close(gradients[0], gradients[1])


def test_adam_with_tensorflows_epsilon_follows_tensorflows_formula():
    parameter = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=0.1, betas=(0.9, 0.999))
    value, m, s = 1.0, 0.0, 0.0
    for step, gradient in enumerate([0.02, -0.05, 0.01], start=1):
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.param_groups[0]["eps"] = tensorflow_adam_eps(1e-2, 0.999, step)
        optimizer.step()
        m, s = 0.9 * m + 0.1 * gradient, 0.999 * s + 0.001 * gradient**2
        value -= 0.1 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step) * m / (math.sqrt(s) + 1e-2)
        assert parameter.item() == pytest.approx(value, abs=1e-12)


def test_policy_statistics_by_hand():
    ratio = torch.tensor([1.0, 1.5, 0.9, 0.7])
    statistics = policy_statistics(ratio.log(), torch.zeros(4), 0.2)
    # k3 of old -> new is ρ - 1 - ln ρ: 0, .0945349, .0053605, .0566749
    assert_close(statistics["approx_kl"], torch.tensor(0.0391426))
    assert_close(statistics["clip_fraction"], torch.tensor(0.5))
    assert_close(statistics["ratio_max"], torch.tensor(1.5))


def test_value_statistics_by_hand():
    returns, v = torch.tensor([0.0, 2.0, 4.0]), torch.tensor([0.0, 0.5, 0.1])
    statistics = value_statistics(v, torch.zeros(3), returns, 0.2)
    assert_close(statistics["value_clip_fraction"], torch.tensor(1 / 3))
    assert_close(statistics["explained_variance"], torch.tensor(0.0))
    assert_close(value_statistics(v, returns, returns, 0.2)["explained_variance"], torch.tensor(1.0))
    # G - V = 0, 1, 2 has a quarter of the variance
    assert_close(value_statistics(v, returns / 2, returns, 0.2)["explained_variance"], torch.tensor(0.75))
    assert value_statistics(v, v, torch.ones(3), 0.2)["explained_variance"].isnan()


def distance_to_closed_form(kl_weight):
    """Total variation between the policy that exact gradients of the parts find and ref · exp(R/β) / Z, at β = ½."""
    ref_log_prob = torch.tensor([0.3, -0.4, 0.0, 0.8, -1.0, 0.5, 0.1, -0.2]).log_softmax(-1)
    reward = torch.tensor([1.0, 0.2, -0.5, 0.0, 1.3, -1.0, 0.4, 0.7])
    logits = ref_log_prob.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=4.0)
    for _ in range(120):
        log_prob = logits.log_softmax(-1)
        prob = log_prob.exp().detach()
        shaped = kl_shaped_reward(reward, kl_k1(log_prob, ref_log_prob), kl_weight)
        v = (prob * shaped).sum().expand(8)
        advantage, _ = generalized_advantage(shaped, v, 1.0, torch.arange(8), 0.95)
        optimizer.zero_grad()
        (prob * policy_loss(log_prob, log_prob.detach(), advantage, 0.2)).sum().backward()
        optimizer.step()
    optimum = (ref_log_prob + reward / 0.5).softmax(-1)
    return 0.5 * (logits.detach().softmax(-1) - optimum).abs().sum().item()


def test_the_parts_together_find_the_closed_form_of_a_bandit():
    assert distance_to_closed_form(0.5) < 1e-3
    assert distance_to_closed_form(-0.5) > 0.05


def test_wrong_shapes_are_refused_at_the_door():
    with pytest.raises(ValueError, match="axis n has sizes 2 and 3"):
        policy_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2), 0.2)
    with pytest.raises(ValueError, match="expected axes"):
        whiten(torch.zeros(2, 2))
