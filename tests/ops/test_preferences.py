import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.ops.preferences import (
    Pairs,
    abstention_threshold,
    all_pairs_loss,
    best_of_k_loss,
    best_of_n,
    best_of_n_kl,
    best_of_n_kl_bound,
    bradley_terry_loss,
    calibration_error,
    centring_bias,
    gain_and_bias,
    known_pairs,
    plackett_luce_loss,
    regression_loss,
    rule_adjusted_score,
)

# One comparison of four whose odds are 4 : 2 : 1 : 1; the second and the third option are tied.
SCORE = torch.tensor([4.0, 2.0, 1.0, 1.0]).log()
RANK = torch.tensor([0, 1, 1, 2])
ONE = torch.zeros(4, dtype=torch.long)


def pairs_from_target(target, comparison):
    return known_pairs(target, torch.zeros_like(comparison), comparison)


def pairs_from_rank(rank, comparison):
    """All pairs, a tie at ½, which `known_pairs` leaves out where nobody gave it a target."""
    first, second = torch.combinations(torch.arange(len(rank))).T
    same = comparison[first] == comparison[second]
    first, second = first[same], second[same]
    prob = 0.5 + 0.5 * (rank[second] - rank[first]).sign()
    return Pairs(first, second, prob, comparison[first], int(comparison.max()) + 1)


def test_pair_loss_by_hand_with_a_tie_a_soft_label_and_a_margin():
    lead = torch.full((4,), math.log(3))  # σ = ¾
    prob = torch.tensor([1.0, 0.0, 0.5, 0.7])
    # ln 4/3, ln 4, their mean, .7 ln 4/3 + .3 ln 4
    assert_close(bradley_terry_loss(lead, prob), torch.tensor([0.2876821, 1.3862944, 0.8369882, 0.6172658]))
    assert_close(bradley_terry_loss(lead, prob, margin=math.log(3)), torch.full((4,), math.log(2)))
    assert_close(bradley_terry_loss(lead, prob, margin=2 * lead)[0], torch.tensor(1.3862944))


def test_a_tie_pulls_scores_together_and_rests_where_they_are_equal():
    lead = torch.tensor([0.0, 2.0, -2.0], requires_grad=True)
    bradley_terry_loss(lead, torch.full((3,), 0.5)).sum().backward()
    # σ(Δ) - ½
    assert_close(lead.grad, torch.tensor([0.0, 0.3807971, -0.3807971]))


def test_error_floor_bounds_the_loss_and_lets_go_of_contradicted_labels():
    lead = torch.tensor([-6.0, -60.0, -600.0], requires_grad=True)
    won = torch.ones(3)
    assert_close(bradley_terry_loss(lead, won)[0].detach(), torch.tensor(6.0024757))
    floored = bradley_terry_loss(lead, won, error_rate=0.1)
    # -ln(.9 σ(-6) + .05), then -ln .05
    assert_close(floored.detach(), torch.tensor([2.9521871, 2.9957323, 2.9957323]))
    floored.sum().backward()
    # -.9 σ(-6) σ(6) / .0522254
    assert_close(lead.grad, torch.tensor([-0.0425058, 0.0, 0.0]), atol=1e-6, rtol=1e-4)


def test_floored_soft_labels_are_the_cross_entropy_of_the_floored_probability():
    # P̃ = .8 · ¾ + .1 = .7;  -(.6 ln .7 + .4 ln .3)
    loss = bradley_terry_loss(torch.tensor([math.log(3)]), torch.tensor([0.6]), error_rate=0.2)
    assert_close(loss, torch.tensor([0.6955939]))


def test_all_pairs_of_four_options_with_one_tie_group_by_hand():
    loss = all_pairs_loss(SCORE, pairs_from_rank(RANK, ONE))
    # P of the better: 2/3, 4/5, 4/5, 2/3, 1/2; the tie ½ ln 3/2 + ½ ln 3
    # (.4054651 + .2231436 + .2231436 + .4054651 + .6931472 + .7520387) / 6
    assert_close(loss, torch.tensor([0.4504005]))


def test_a_margin_shifts_the_lead_that_is_asked_for():
    score, comparison = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    pairs = pairs_from_target(torch.tensor([1.0, 0.0, 0.0, 1.0]), comparison)
    loss = all_pairs_loss(score, pairs, margin=torch.tensor([1.0, 0.0, 0.0, 3.0]))
    # -ln σ(1 - 1), -ln σ(1 - 3)
    assert_close(loss, torch.tensor([0.6931472, 2.1269280]))


def test_targets_make_pairs_where_they_say_something():
    target = torch.tensor([0.0, 1.0, 0.0, 0.5, 0.25, 0.25])
    pairs = pairs_from_target(target, torch.tensor([0, 0, 0, 1, 1, 1]))
    # the two losers of the first comparison stay unpaired
    assert pairs.first.tolist() == [0, 1, 3, 3, 4]
    assert pairs.second.tolist() == [1, 2, 4, 5, 5]
    assert pairs.comparison.tolist() == [0, 0, 1, 1, 1]
    assert_close(pairs.prob, torch.tensor([0.0, 1.0, 2 / 3, 2 / 3, 0.5]))


def test_every_comparison_counts_once_however_many_options_it_has():
    score = torch.cat([SCORE, SCORE[:2]])
    rank, comparison = torch.tensor([0, 1, 1, 2, 1, 0]), torch.tensor([0, 0, 0, 0, 1, 1])
    loss = all_pairs_loss(score, pairs_from_rank(rank, comparison))
    # the second: -ln(2/6)
    assert_close(loss, torch.tensor([0.4504005, 1.0986123]))


def test_best_of_four_is_a_softmax_over_the_options():
    assert_close(best_of_k_loss(SCORE, torch.tensor([1.0, 0, 0, 0]), ONE), torch.tensor([math.log(8 / 4)]))
    # a tie for the first place: ½ ln 2 + ½ ln 4
    assert_close(best_of_k_loss(SCORE, torch.tensor([0.5, 0.5, 0, 0]), ONE), torch.tensor([1.0397208]))


def test_regression_is_half_the_squared_error():
    assert_close(regression_loss(torch.tensor([1.0, -2.0]), torch.tensor([3.0, -2.0])), torch.tensor([2.0, 0.0]))


def test_ranking_of_four_options_with_one_tie_group_by_hand():
    # 4 of 8, then 2 and 1 of the 4 that are left, the last is forced: ln 2 + ln 2 + ln 4
    assert_close(plackett_luce_loss(SCORE, RANK, ONE), torch.tensor([2.7725887]))
    # the tie at the end counts once: ln 2 + ln 2 + ½ (ln 2 + ln 2)
    assert_close(plackett_luce_loss(SCORE, torch.tensor([0, 1, 2, 2]), ONE), torch.tensor([2.0794415]))


def test_a_strict_ranking_is_a_chain_of_choices():
    score = torch.tensor([0.3, -1.2, 2.0, 0.9, -0.4])
    order = [3, 0, 4, 2, 1]
    rank = torch.empty(5, dtype=torch.long)
    rank[torch.tensor(order)] = torch.arange(5)
    chances = [
        math.exp(score[best]) / sum(math.exp(score[other]) for other in order[place:])
        for place, best in enumerate(order)
    ]
    loss = plackett_luce_loss(score, rank, torch.zeros(5, dtype=torch.long))
    assert_close(loss, torch.tensor([-math.log(math.prod(chances))]))


def test_two_options_are_bradley_terry_in_every_form():
    lead = torch.tensor([1.7, -0.4, 0.9])
    score = torch.stack([lead + 5, torch.full((3,), 5.0)], dim=1).flatten()
    comparison, rank = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 0, 0, 0])  # won, lost, tied
    target = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.5])
    # ln(1 + e^-1.7), ln(1 + e^-.4), ln(1 + e^-.9) + ½ · .9
    expected = torch.tensor([0.1677860, 0.5130153, 0.7911539])
    assert_close(all_pairs_loss(score, pairs_from_target(target, comparison)), expected)
    assert_close(all_pairs_loss(score, pairs_from_rank(rank, comparison)), expected)
    assert_close(best_of_k_loss(score, target, comparison), expected)
    assert_close(plackett_luce_loss(score, rank, comparison), expected)


def losses(score, target, rank, comparison):
    return torch.stack(
        [
            all_pairs_loss(score, pairs_from_target(target, comparison), error_rate=0.1),
            all_pairs_loss(score, pairs_from_rank(rank, comparison)),
            best_of_k_loss(score, target, comparison),
            plackett_luce_loss(score, rank, comparison),
        ]
    )


def test_order_of_options_and_neighbours_in_the_batch_change_nothing():
    generator = torch.Generator().manual_seed(0)
    comparison = torch.repeat_interleave(torch.arange(4), torch.tensor([2, 5, 3, 1]))
    score = torch.randn(11, generator=generator)
    rank = torch.tensor([1, 0, 2, 0, 1, 1, 2, 0, 0, 0, 0])
    target = torch.tensor([0.2, 0.8, 0.0, 0.5, 0.25, 0.25, 0.0, 0.5, 0.5, 0.0, 1.0])
    together = losses(score, target, rank, comparison)
    order = torch.randperm(11, generator=generator)
    assert_close(losses(score[order], target[order], rank[order], comparison[order]), together)
    for c in range(4):
        own = comparison == c
        alone = losses(score[own], target[own], rank[own], torch.zeros(int(own.sum()), dtype=torch.long))
        assert_close(alone[:, 0], together[:, c])
    assert_close(together[:, 3], torch.zeros(4))  # one option: nothing to learn


def test_losses_read_differences_of_scores_only():
    shifted = SCORE + torch.tensor(300.0)
    target = torch.tensor([0.7, 0.3, 0.0, 0.0])
    assert_close(losses(shifted, target, RANK, ONE), losses(SCORE, target, RANK, ONE), atol=1e-4, rtol=0)


def test_gradients_of_the_listwise_losses_sum_to_zero_and_are_finite_at_extremes():
    for loss_of in (
        lambda score: best_of_k_loss(score, torch.tensor([0.0, 0.0, 0.0, 1.0]), ONE),
        lambda score: plackett_luce_loss(score, torch.tensor([3, 2, 1, 0]), ONE),
    ):
        score = torch.tensor([900.0, 0.0, -900.0, 1.0], requires_grad=True)
        loss_of(score).sum().backward()
        assert score.grad.isfinite().all() and score.grad.abs().max() > 0.5
        assert_close(score.grad.sum(), torch.tensor(0.0))


def test_normalised_scores_have_the_mean_and_spread_asked_for_and_stay():
    score = torch.tensor([2.0, 4.0, 9.0, 5.0])  # mean 5, squares 9 + 1 + 16 + 0, σ = √6.5
    gain, bias = gain_and_bias(score)
    assert (gain, bias) == pytest.approx((0.3922323, -1.9611614))
    normal = gain * score + bias
    assert_close(torch.stack([normal.mean(), normal.std(correction=0)]), torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    assert gain_and_bias(normal) == pytest.approx((1.0, 0.0), abs=1e-6)
    gain, bias = gain_and_bias(score, mean=3.0, std=2.0)
    assert (gain, bias) == pytest.approx((0.7844645, 3 - 5 * 0.7844645))
    with pytest.raises(ValueError, match="found 3 scores with spread 0.0"):
        gain_and_bias(torch.ones(3))


def test_centring_moves_the_references_to_zero():
    assert centring_bias(torch.tensor([1.0, 2.0, 6.0])) == pytest.approx(-3.0)


def test_best_of_two_by_hand_with_distinct_and_equal_scores():
    prob = torch.tensor([0.3, 0.5, 0.2])
    # F = .8, .5, 1:  .64 - .25, .25, 1 - .64
    assert_close(best_of_n(prob, torch.tensor([2.0, 1.0, 3.0]), 2), torch.tensor([0.39, 0.25, 0.36]).double())
    # first and last tied above the second: .75 in the ratio 3 : 2
    assert_close(best_of_n(prob, torch.tensor([7.0, 1.0, 7.0]), 2), torch.tensor([0.45, 0.25, 0.3]).double())


def test_best_of_three_equals_the_enumeration_of_all_draws():
    prob, score = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2]), torch.tensor([1.0, 0.0, 5.0, 1.0, 2.0])
    expected = [0.0] * 5
    for draws in itertools.product(range(5), repeat=3):
        best = max(draws, key=lambda y: score[y])  # the first of the best
        expected[best] += math.prod(prob[y].item() for y in draws)
    assert_close(best_of_n(prob, score, 3), torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)
    assert_close(best_of_n(prob, score, 1), prob.double())


@pytest.mark.parametrize("n, exact, bound", [(1, 0.0, 0.0), (16, 1.3301, 1.8351), (64, 1.3863, 3.1745)])
def test_divergence_of_best_of_n_from_four_equally_likely_answers(n, exact, bound):
    # n = 16: P = .25^16, ..., 1 - .75^16 = .98998, so ln 4 less an entropy of .0562
    divergence = best_of_n_kl(torch.full((4,), 0.25), torch.arange(4.0), n)
    assert divergence.item() == pytest.approx(exact, abs=1e-4)
    assert best_of_n_kl_bound(n) == pytest.approx(bound, abs=1e-4)


def test_best_of_n_keeps_within_its_bounds():
    generator = torch.Generator().manual_seed(0)
    prob, score = torch.rand(50, generator=generator).double(), torch.randn(50, generator=generator)
    score[:10] = score[10:20]
    prob = prob / prob.sum()
    gold = []
    for n in (1, 2, 5, 20, 100):
        best = best_of_n(prob, score, n)
        lead = (score[:, None] - score).sign().double()  # 1 won, 0 tied, -1 lost
        assert best @ (0.5 + 0.5 * lead) @ prob <= n / (n + 1) + 1e-12
        assert best_of_n_kl(prob, score, n) <= best_of_n_kl_bound(n) + 1e-12
        assert_close(best.sum().item(), 1.0)
        gold.append((best @ score.double()).item())
    assert gold == sorted(gold)


def test_rules_and_preference_combine_by_hand():
    preference = torch.tensor([math.log(3), 0.0, 2.0])
    kept = torch.tensor([[0.25, 1.0], [1.0, 1.0], [0.0, 1.0]])
    # ¾ · √.25, ½ · 1, nothing where a rule is surely broken
    assert_close(rule_adjusted_score(preference, 0.0, kept), torch.tensor([0.375, 0.5, 0.0]))
    # a common shift of preference and average changes nothing; a surer rule raises the score
    assert_close(rule_adjusted_score(preference + 7, 7.0, kept), torch.tensor([0.375, 0.5, 0.0]))
    surer = rule_adjusted_score(preference, 0.0, kept + torch.tensor([0.1, 0.0]))
    assert (surer > torch.tensor([0.375, 0.5, 0.0])).all()


def test_calibration_error_by_hand():
    prob, outcome = torch.tensor([0.12, 0.18, 0.95, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    # second bin: |.3 - 1| / 4, last: |1.95 - 2| / 4
    assert_close(calibration_error(prob, outcome), torch.tensor(0.1875))
    assert_close(calibration_error(torch.full((2,), 0.5), torch.tensor([0.0, 1.0])), torch.tensor(0.0))


def test_the_threshold_answers_the_share_asked_for():
    score = torch.arange(1.0, 11.0).flip(0)
    assert abstention_threshold(score, 0.7) == 4.0
    assert abstention_threshold(score, 1.0) == 1.0
    assert abstention_threshold(score, 0.0) == math.inf
    with pytest.raises(ValueError, match="coverage: found 70"):
        abstention_threshold(score, 70)


def test_wrong_shapes_are_refused_at_the_door():
    with pytest.raises(ValueError, match="axis p has sizes 2 and 3"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="expected axes"):
        best_of_k_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.long))


def test_known_pairs_take_the_target_first_and_the_ranking_where_it_is_silent():
    target = torch.tensor([0.75, 0.25, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    rank = torch.tensor([0, 1, 2, 3, 3, 0, 1, 1])  # the second comparison: the best of three, the rest unknown
    pairs = known_pairs(target, rank, torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]))
    found = dict(zip(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True), pairs.prob.tolist(), strict=True))
    assert found == {
        (0, 1): 0.75,
        (0, 2): 1.0,
        (0, 3): 1.0,
        (0, 4): 1.0,
        (1, 2): 1.0,
        (1, 3): 1.0,
        (1, 4): 1.0,
        (2, 3): 1.0,
        (2, 4): 1.0,
        (5, 6): 1.0,
        (5, 7): 1.0,
    }
    assert pairs.comparison.tolist() == [0] * 9 + [1] * 2 and pairs.comparisons == 2


def fitted(x, prob, error_rate):
    """Weights of a linear score by maximum likelihood."""
    weight = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = bradley_terry_loss(x @ weight, prob, error_rate=error_rate).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def test_an_error_floor_beats_none_where_a_tenth_of_the_labels_is_flipped():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        truth = torch.randn(6, generator=generator, dtype=torch.float64) * 3
        x = torch.randn(2400, 6, generator=generator, dtype=torch.float64)
        prob = torch.sigmoid(x @ truth)
        label = (torch.rand(2400, generator=generator, dtype=torch.float64) < prob).double()
        flipped = torch.rand(2400, generator=generator) < 0.1
        noisy = torch.where(flipped, 1 - label, label)
        plain, floored = (
            bradley_terry_loss(x[400:] @ fitted(x[:400], noisy[:400], error_rate), prob[400:]).mean()
            for error_rate in (0.0, 0.1)
        )
        assert floored < plain, seed
