"""How a scorer is measured on held-out preferences: by hand, in groups, beside length."""

import math
from dataclasses import replace

import pytest
import torch

from offline_lmrl.decoding.scorers import TOO_LONG, FunctionScorer
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.preferences import best_of_n_curve, evaluate_scorer
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.trajectory import Turn


def compare(texts, target, group):
    return Comparison((), tuple((Turn("assistant", text),) for text in texts), target, group=group)


def numbers(context, option):
    """What the reply says before its first dot."""
    return float(option[-1].content.partition(".")[0])


# Pairs: 2 against 1 and 5 against 5 in one group, then soft .25 for 0 against 3, a tie, and 1 against 2, 2
ROWS = [
    compare(("2....", "1."), (1.0, 0.0), "a"),
    compare(("5.", "5."), (1.0, 0.0), "a"),
    compare(("0.", "3.."), (0.25, 0.75), "b"),
    compare(("1.", "9."), (0.5, 0.5), "b"),
    compare(("1.", "2.", "2.."), (1.0, 0.0, 0.0), "c"),
]


def test_accuracy_and_its_baselines_by_hand():
    found = evaluate_scorer(FunctionScorer(numbers), ROWS)
    assert (found["comparisons"], found["pairs"], found["groups"]) == (5, 5, 3)
    # right, half, right, wrong, wrong; longer: right, half, right, half, wrong; shorter is the rest
    # Groups of 2, 1 and 2 pairs with 1.5, 1 and 0 right: without each .333, .375 and .833, a variance of .1026, which
    # .25 / .1026 = 2.44 pairs have; 9² / (4² + 1 + 4²) − 1 = 1.45 degrees of freedom
    assert found["accuracy"] == "0.500 [0.015, 0.985]"
    assert found["baselines"]["the longer reply"].startswith("0.600 [")
    assert found["baselines"]["the shorter reply"].startswith("0.400 [")
    assert found["difference"].startswith("-0.100 [")


def test_what_a_scorer_cannot_read_whole_is_left_out_and_counted():
    class Short(FunctionScorer):
        def fits(self, context, options):
            return all(len(option[-1].content) < 4 for option in options)

    found, known = evaluate_scorer(Short(numbers), ROWS), evaluate_scorer(FunctionScorer(numbers), ROWS[1:])
    assert found == known | {TOO_LONG: 1} and known[TOO_LONG] == 0
    with pytest.raises(InputError, match=r"found none that fits into the scorer's window \(1 left out\)"):
        evaluate_scorer(Short(numbers), ROWS[:1])


def test_who_wrote_a_reply_is_a_baseline_where_it_is_known():
    def by(first, second, target, group):
        labels = {"options": [{"generator": first}, {"generator": second}]}
        return replace(compare(("1.", "2."), target, group), labels=labels)

    rows = [by("x", "y", (1.0, 0.0), "a"), by("y", "x", (0.2, 0.8), "b"), by("x", "y", (0.0, 1.0), "c")]
    found = evaluate_scorer(FunctionScorer(numbers), rows)  # x wins 1.8 of 3
    assert found["baselines"]["the reply of the author that wins more often here"].startswith("0.667 [")
    others = evaluate_scorer(FunctionScorer(numbers), ROWS)["baselines"]
    assert "the reply of the author that wins more often here" not in others


def test_cross_entropy_and_calibration_take_scores_as_log_odds():
    found = evaluate_scorer(FunctionScorer(numbers), ROWS[:3])

    def cost(lead):
        return math.log1p(math.exp(-lead))

    # Δ = 1 and 0 where the first is better, Δ = −3 where it is so with probability .25
    expected = (cost(1) + cost(0) + 0.25 * cost(-3) + 0.75 * cost(3)) / 3
    assert found["cross entropy"] == pytest.approx(expected)
    sigmoid = [1 / (1 + math.exp(-lead)) for lead in (1, -3)]
    apart = [abs(p - q) for p, q in zip(sigmoid, (1, 0.25), strict=True)]
    # Either order of these has a bin of its own; of the pair with σ = .5 both are in one, where 1 and 0 come.
    assert found["calibration error"] == pytest.approx(2 * sum(apart) / 6)
    silent = evaluate_scorer(FunctionScorer(lambda context, option: 0.0), ROWS[:3])
    assert silent["cross entropy"] == pytest.approx(math.log(2)) and silent["accuracy"] == "0.500 [0.005, 0.995]"


def test_which_option_stands_first_changes_nothing():
    turned = [replace(row, options=row.options[::-1], target=row.target[::-1], ranking=None) for row in ROWS]
    found, expected = evaluate_scorer(FunctionScorer(numbers), turned), evaluate_scorer(FunctionScorer(numbers), ROWS)
    assert found.pop("baselines") == expected.pop("baselines") and found == pytest.approx(expected)


def test_the_curve_of_best_of_n_by_hand():
    prob, score = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 1.0, 2.0])
    gold = torch.tensor([0.0, 4.0, 1.0])  # the score takes the last for the best
    one, two, many = best_of_n_curve(prob, score, gold, (1, 2, 64))
    # n = 2: .25, .8² − .5² = .39, 1 − .64 = .36
    assert (one["score"], one["gold"], one["kl"], one["bound"]) == pytest.approx((0.7, 1.4, 0, 0), abs=1e-6)
    assert (two["score"], two["gold"]) == pytest.approx((1.11, 1.92))
    kl = 0.25 * math.log(0.5) + 0.39 * math.log(1.3) + 0.36 * math.log(1.8)
    assert two["kl"] == pytest.approx(kl) and two["bound"] == pytest.approx(math.log(2) - 0.5)
    assert many["gold"] == pytest.approx(1.0, abs=1e-4) and many["score"] == pytest.approx(2.0, abs=1e-4)
    assert many["kl"] == pytest.approx(math.log(5), abs=1e-4) and many["bound"] > 3


def test_ties_alone_are_refused():
    with pytest.raises(InputError, match="found only ties"):
        evaluate_scorer(FunctionScorer(numbers), [ROWS[3]])
