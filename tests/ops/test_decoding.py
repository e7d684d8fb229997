"""Warpers, guidance and draws against tables worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.ops.decoding import (
    condition_shift,
    guide,
    reduce_q,
    sample_from,
    support_filter,
    uniform,
    warp_log_probs,
)

PROB = torch.tensor([[0.5, 0.25, 0.125, 0.1, 0.025]])
LOGITS = PROB.log() + 3.0  # unnormalised: the constant must not matter


def warped(**options):
    return warp_log_probs(LOGITS, **options).exp()


def test_no_warper_gives_the_policy():
    assert_close(warped(), PROB)


def test_temperature_two_takes_the_square_root():
    root = [0.70711, 0.5, 0.35355, 0.31623, 0.15811]  # square roots; their sum is 2.03500
    assert_close(warped(temperature=2.0), torch.tensor([[x / 2.03500 for x in root]]), atol=1e-4, rtol=0)


def test_temperature_zero_is_taken_as_one():
    assert_close(warped(temperature=0.0), PROB)


def test_top_k_keeps_k_and_renormalises():
    assert_close(warped(top_k=2), torch.tensor([[2 / 3, 1 / 3, 0, 0, 0]]))
    assert_close(warped(top_k=99), PROB)


@pytest.mark.parametrize("top_p, kept", [(0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (1e-9, 1), (1.0, 5)])
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(top_p, kept):
    # cumulative mass: .5 .75 .875 .975 1
    assert (warped(top_p=top_p) > 0).sum() == kept


def test_top_p_does_not_depend_on_the_order_of_tokens():
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = warp_log_probs(LOGITS[:, order], top_p=0.8).exp()
    assert_close(shuffled, warped(top_p=0.8)[:, order])


def test_min_p_is_a_share_of_the_best_after_temperature():
    # shares of the best: 1 .5 .25 .2 .05; at temperature ½ they are squared: 1 .25 .0625 .04 .0025
    assert_close(warped(min_p=0.22), torch.tensor([[4 / 7, 2 / 7, 1 / 7, 0, 0]]))
    assert (warped(min_p=0.22, temperature=0.5) > 0).sum() == 2


def test_support_is_a_share_of_the_best_before_temperature():
    assert (warped(support=0.22) > 0).sum() == 3
    assert (warped(support=0.22, temperature=0.5) > 0).sum() == 3
    assert (warped(support=1.0) > 0).sum() == 1


def test_support_filter_leaves_the_survivors_as_they_are():
    kept = support_filter(LOGITS, 0.3)
    assert_close(kept, torch.tensor([[3 + math.log(0.5), 3 + math.log(0.25), -math.inf, -math.inf, -math.inf]]))


def test_filters_apply_after_one_another():
    # top-k 3 renormalises to 4/7 2/7 1/7; top-p .8 of that keeps two (.571 .857)
    assert_close(warped(top_k=3, top_p=0.8), torch.tensor([[2 / 3, 1 / 3, 0, 0, 0]]))


def test_forbidden_tokens_stay_forbidden():
    logits = LOGITS.clone()
    logits[0, 0] = -math.inf
    assert_close(warp_log_probs(logits, top_k=2).exp(), torch.tensor([[0, 2 / 3, 1 / 3, 0, 0]]))


Q = torch.tensor([[[1.0, 4.0, 2.0]], [[3.0, 0.0, 2.0]]])  # (H 2, B 1, V 3)


@pytest.mark.parametrize("how, expected", [("min", [1, 0, 2]), ("mean", [2, 2, 2]), ("first", [1, 4, 2])])
def test_q_heads_are_reduced(how, expected):
    assert_close(reduce_q(Q, how), torch.tensor([expected], dtype=torch.float32))


def test_unknown_reduction_names_the_choices():
    with pytest.raises(ValueError, match="max.*min, mean, first"):
        reduce_q(Q, "max")


def test_guidance_adds_beta_times_the_advantage():
    log_prob = torch.tensor([[-1.0, -2.0, -math.inf]])
    # min Q = 1 0 2; V = .5: advantage .5 -.5 1.5
    assert_close(guide(log_prob, Q, torch.tensor([0.5]), beta=2.0), torch.tensor([[0.0, -3.0, -math.inf]]))
    assert_close(guide(log_prob, Q, beta=2.0), torch.tensor([[1.0, -2.0, -math.inf]]))


def test_clip_zero_only_punishes():
    log_prob = torch.zeros(1, 3)
    # min Q − V = .5 -.5 1.5, capped at 0: 0 -.5 0
    assert_close(guide(log_prob, Q, torch.tensor([0.5]), beta=2.0, clip=0.0), torch.tensor([[0.0, -1.0, 0.0]]))
    with pytest.raises(ValueError, match="v is None"):
        guide(log_prob, Q, beta=2.0, clip=0.0)


def test_beta_may_differ_per_row():
    q = Q.expand(2, 2, 3)
    scores = guide(torch.zeros(2, 3), q, beta=torch.tensor([[0.0], [1.0]]), q_reduce="first")
    assert_close(scores, torch.tensor([[0.0, 0.0, 0.0], [1.0, 4.0, 2.0]]))


def test_a_condition_is_amplified_away_from_null():
    told, null = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    # w = 1: .6² / .2, .3² / .3, .1² / .5 are 1.8, .3, .02
    expected = torch.tensor([1.8, 0.3, 0.02]) / 2.12
    assert_close((null + condition_shift(told + 5, null - 2, 1.0)).softmax(-1), expected)
    assert_close(null + condition_shift(told, null, 0.0), told)
    # at temperature 1/2, w = 0: the square of what the condition gives
    cold = (2 * null + condition_shift(told, null, 0.0, 0.5)).softmax(-1)
    assert_close(cold, torch.tensor([0.36, 0.09, 0.01]) / 0.46)
    assert_close(condition_shift(told, null, 1.0, 0.0), condition_shift(told, null, 1.0))


def test_inverse_cdf_draws_the_token_whose_interval_holds_u():
    scores = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).log() - 7.0  # cdf .25 .25 .75 1 1
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53], dtype=torch.float64)
    assert sample_from(scores.expand(6, 5), u).tolist() == [0, 0, 2, 2, 3, 3]


def test_uniform_is_a_function_of_seed_and_counter_alone():
    seeds = torch.tensor([7, 7, 8, -3, 2**62])
    counters = torch.tensor([0, 1, 0, 5, 9])
    together = uniform(seeds, counters)
    alone = torch.cat([uniform(seeds[i : i + 1], counters[i : i + 1]) for i in range(5)])
    assert torch.equal(together, alone)
    assert together.unique().numel() == 5


def test_uniform_matches_splitmix64_on_python_integers():
    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, counter in ((0, 0), (1, 2), (123456789, 987654321)):
        bits = mix((mix((seed + golden) % 2**64) + counter * golden) % 2**64)
        assert uniform(torch.tensor([seed]), torch.tensor([counter])).item() == (bits >> 11) / 2**53


def test_uniform_fills_the_interval_over_seeds_and_over_counters():
    index = torch.arange(100_000)
    for u in (uniform(index, index * 0), uniform(index * 0, index)):
        counts = torch.histc(u.float(), bins=10, min=0, max=1)
        chi_square = ((counts - 10_000) ** 2 / 10_000).sum()
        assert chi_square < 27.88  # 9 degrees of freedom, p = .001
        assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.015
