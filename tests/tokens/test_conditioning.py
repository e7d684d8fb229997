"""Returns, their bins and the return_ids that tell them, by hand."""

import json

import numpy as np
import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.tokens.conditioning import ReturnScale, ReturnTokens, check_ask, distinct, fit_edges, returns_to_go
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer


def episode(*rewards, task="", **labels):
    turns = [turn for r in rewards for turn in (Turn("user", "go"), Turn("assistant", "on", reward=r))]
    return Trajectory(tuple(turns), task=task, labels=labels)


THREE = [episode(1.0, 0.0, 2.0), episode(None, 4.0), episode(-1.0)]  # returns 3 2 2, 4 4, −1


def return_ids(scale, vocabulary=100, **block):
    block = {"condition": "embedding", "bins": scale.bins, "discount_per_turn": 1.0, "scale": scale.to_dict()} | block
    return ReturnTokens.from_block(block, vocabulary, None)


def test_returns_to_go_of_three_trajectories():
    assert [returns_to_go(t) for t in THREE] == [[3.0, 2.0, 2.0], [4.0, 4.0], [-1.0]]
    # 1 + .5 · (0 + .5 · 2) = 1.5
    assert returns_to_go(THREE[0], discount_per_turn=0.5) == [1.5, 1.0, 2.0]


def test_relabelled_returns_take_the_place_of_the_logged_ones():
    assert returns_to_go(episode(1.0, 1.0, return_to_go=[7, 0.5])) == [7.0, 0.5]
    for wrong in ([7.0], [7.0, float("nan")]):
        with pytest.raises(InputError, match="labels.return_to_go: found .* one finite number for each of 2"):
            returns_to_go(episode(1.0, 1.0, return_to_go=wrong))


def test_unique_bins_of_three_trajectories():
    scale = ReturnScale.fit(THREE, bins=4)
    # distinct −1 2 3 4: edges half-way between
    assert (scale.kind, scale.bins, scale.table().edges) == ("unique", 4, (0.5, 2.5, 3.5))
    assert scale.table().counts == (1, 2, 1, 2)
    assert [[scale.bin_of(r) for r in returns_to_go(t)] for t in THREE] == [[2, 1, 1], [3, 3], [0]]
    assert return_ids(scale).of_log(THREE[0]) == [(103,), (102,), (102,), (100,)]  # null behind the end
    assert return_ids(scale).nulls(THREE[1]) == [(100,)] * 3


def test_linear_bins_are_equally_wide_and_auto_takes_them_for_many_values():
    scale = ReturnScale.fit(THREE, bins=2)
    # cut at 1.5, which no return is near: half-way from −1 to 2
    assert (scale.kind, scale.table().edges, scale.table().counts) == ("linear", (0.5,), (1, 5))
    many = [episode(float(i)) for i in range(11)]
    scale = ReturnScale.fit(many, "linear", bins=5)
    # cuts at 2 4 6 8, each of which belongs to the bin above; both ends count, so the last bin has 8 9 10
    assert scale.table().edges == (1.5, 3.5, 5.5, 7.5)
    assert scale.table().counts == (2, 2, 2, 2, 3)
    assert [scale.bin_of(r) for r in (-50.0, 0.0, 1.49, 1.51, 10.0, 50.0)] == [0, 0, 0, 1, 4, 4]


def test_linear_bins_that_would_hold_no_return_are_left_out():
    # cuts at 2.5 5 7.5: no return lies between the first two
    scale = ReturnScale.fit([episode(r) for r in (0.0, 1.0, 2.0, 6.0, 9.0, 10.0)], "linear", bins=4)
    assert (scale.table().edges, scale.table().counts) == ((4.0, 7.5), (3, 1, 2))


@pytest.mark.parametrize("kind", ["linear", "quantile"])
def test_the_ends_are_in_the_first_and_the_last_bin_whatever_their_last_digits(kind):
    least, most = 0.3 - 0.1, 0.1 + 0.2  # 0.19999999999999998 and 0.30000000000000004
    data = [episode(r) for r in (least, 0.2, 0.25, 0.3, most)]
    scale = ReturnScale.fit(data, kind, bins=8)
    assert scale.table().edges == pytest.approx((0.225, 0.275)) and scale.table().counts == (2, 1, 2)


def test_quantile_bins_are_equally_full_and_merge_where_values_repeat():
    scale = ReturnScale.fit([episode(float(i)) for i in range(12)], "quantile", bins=3)
    assert scale.table().counts == (4, 4, 4)
    sparse = ReturnScale.fit([episode(0.0)] * 9 + [episode(1.0)], "quantile", bins=4)
    assert sparse.table().counts == (9, 1)
    # .25 .5 .75 of ten returns are all 0: what is above has the one other bin
    sparse = ReturnScale.fit([episode(0.0)] * 9 + [episode(1.0, 1.0)], "quantile", bins=4)
    assert (sparse.table().edges, sparse.table().counts) == ((0.5,), (9, 2))


def test_equal_sums_of_rewards_in_another_order_share_a_bin():
    scale = ReturnScale.fit([episode(0.1, 0.2, 0.3), episode(0.3, 0.2, 0.1), episode(1.0)], "unique", bins=9)
    # at turn starts: .6 .5 .3, .6 .3 .1, 1
    assert scale.table().counts == (1, 2, 1, 2, 1)
    with pytest.raises(InputError, match="found the same return, 0.6, at every agent turn"):
        ReturnScale.fit([episode(0.7 - 0.1), episode(0.6)])


def test_numbers_are_told_apart_at_any_distance_from_zero():
    # rounding of sums at a thousand million is 1e-7; a tenth is a difference there, and 1e-5 beside 1 is one too
    for values in ([1e9, 1e9 + 0.1], [1.0, 1.00001], [-1e-3, 1e-3], [0.0, 1e-12]):
        assert [x.tolist() for x in distinct(np.array(values))] == [values, values]
    first, last = distinct(np.array([0.6, 1e6 + 0.1 - 1e6, 0.7 - 0.1, 0.1]))
    assert first.tolist() == [1e6 + 0.1 - 1e6, 0.7 - 0.1] and last.tolist() == [0.1, 0.6]


def test_labels_of_preference_are_two_bins():
    scale = ReturnScale.fit([episode(1.0), episode(-1.0)])
    assert (scale.bins, scale.bin_of(-1.0), scale.bin_of(1.0)) == (2, 0, 1)


def test_bins_per_task_are_fitted_on_their_own_returns():
    data = [episode(r, task=t) for t, rewards in (("a", (0.0, 1.0)), ("b", (10.0, 20.0, 30.0))) for r in rewards]
    scale = ReturnScale.fit(data, per="task")
    assert (scale.bin_of(1.0, "a"), scale.bin_of(1.0, "b"), scale.bins) == (1, 0, 3)
    with pytest.raises(InputError, match="task: found 'c', expected a task of the training data.*'a', 'b'"):
        scale.bin_of(1.0, "c")
    with pytest.raises(InputError, match="the same return, 5, at every agent turn of task 'c'.*per: global"):
        ReturnScale.fit([*data, episode(5.0, task="c")], per="task")
    assert ReturnScale.fit(data).bin_of(1.0, "anything") == 1


def test_asks_are_named_after_the_returns_of_whole_trajectories():
    # later turns have smaller returns, which nobody can ask for at the start: 0..10 in steps of 1
    scale = ReturnScale.fit([episode(float(i), 0.0) for i in range(11)])
    assert (scale.named_ask("max"), scale.named_ask("p90"), scale.named_ask("p0")) == (10.0, 9.0, 0.0)
    alone = ReturnScale.fit([episode(1.0, 2.0)])  # of one log every percentile is its return
    assert {alone.named_ask(name) for name in ("p0", "p90", "max")} == {3.0}
    for wrong in ("p101", "best", "auto", "expert:2", "p-1"):
        with pytest.raises(InputError, match="ask: found"):
            scale.named_ask(wrong)


@pytest.mark.parametrize(
    "wins, name, asked",
    [
        (2, "p90", None),  # of eleven logs the second best is p90
        (1, "p90", 0.0),  # 0 like the median, though one log earned 1
        (1, "p93", 0.3),  # between both: its bin is still that of 0
        (1, "p50", None),
        (1, "p10", None),
        (1, "max", None),  # no more than the usual is meant, or the best is
        (8, "p90", None),  # the usual return is the best one
    ],
)
def test_a_percentile_that_asks_for_the_usual_is_named(wins, name, asked):
    scale = ReturnScale.fit([episode(0.0)] * (11 - wins) + [episode(1.0)] * wins)
    line = scale.asks_for_the_usual(name)
    if asked is None:
        assert line is None
    else:
        assert line == (
            f"ask: found {name}, the return {asked:g}, which is in the same bin as the median of the training data, "
            "expected a return in a higher bin; the best return is 1 (ask: max)"
        )
    with pytest.raises(InputError, match="ask: found 'auto'"):
        scale.asks_for_the_usual("auto")


def test_what_lies_outside_the_data_is_clipped():
    scale = ReturnScale.fit(THREE)
    assert [scale.clipped(r) for r in (-1.1, -1.0, 0.0, 4.0, 4.1)] == [True, False, False, False, True]
    with pytest.raises(InputError, match="ask: found nan, expected a number"):
        scale.bin_of(float("nan"))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), True, "most", "p200", "expert", "expert:-1"])
def test_an_ask_that_means_nothing_is_refused(wrong):
    with pytest.raises(InputError, match="ask: found .*, expected a finite number, max"):
        check_ask(wrong)


@pytest.mark.parametrize(
    "data, message",
    [
        ([episode(None), episode(None)], "found no rewards.*score the data"),
        ([episode(2.0), episode(2.0)], "found the same return, 2, at every agent turn.*not conditioned on returns"),
    ],
)
def test_data_that_cannot_be_conditioned_on_says_what_to_do(data, message):
    with pytest.raises(InputError, match=message):
        ReturnScale.fit(data)


def test_settings_that_do_not_fit_are_refused():
    for settings, message in (
        ({"bins": 1}, "bins: found 1"),
        ({"kind": "log"}, "binning: found 'log'"),
        ({"per": "row"}, "per: found 'row'"),
        ({"kind": "unique", "bins": 3}, "found unique with 4 distinct"),
    ):
        with pytest.raises(InputError, match=message):
            ReturnScale.fit(THREE, **settings)


def test_a_scale_survives_json():
    scale = ReturnScale.fit(THREE)
    assert ReturnScale.from_dict(json.loads(json.dumps(scale.to_dict()))) == scale


def test_bins_saved_with_edges_on_returns_stay_as_they_were_trained():
    table = {"edges": [2.0, 4.0], "least": 0.0, "most": 4.0, "quantiles": [0.0] * 101, "counts": [2, 0, 3]}
    scale = ReturnScale.from_dict({"kind": "linear", "per": "global", "tables": {"": table}})
    assert scale.bins == 3 and [scale.bin_of(r) for r in (1.0, 2.0, 4.0)] == [0, 1, 2]


def test_what_remains_of_an_ask_goes_down_with_rewards_and_up_with_the_discount():
    scale = ReturnScale.fit(THREE)
    assert return_ids(scale).remaining(5.0, [1.0, None, 3.0]) == [5.0, 4.0, 4.0, 1.0]
    # (5 − 1) / .5 = 8, (8 − 3) / .5 = 10
    assert return_ids(scale, discount_per_turn=0.5).remaining(5.0, [1.0, 3.0]) == [5.0, 8.0, 10.0]
    assert return_ids(scale, discount_per_turn=0.5).backwards(10.0, [1.0, 3.0]) == [5.0, 8.0]


def test_returns_as_text_need_a_tokenizer_that_tells_them_apart():
    renderer = Renderer(train_tokenizer(["quality: 1/4 2/4 3/4 4/4\n"], 300))
    block = {"condition": "text", "bins": 4, "discount_per_turn": 1.0, "scale": ReturnScale.fit(THREE).to_dict()}
    written = ReturnTokens.from_block(block | {"text": "quality: {bin}/{bins}\n"}, 100, renderer)
    assert [renderer.decode(ids) for ids in written.bins] == [f"quality: {b}/4\n" for b in (1, 2, 3, 4)]
    assert written.null == ()
    with pytest.raises(InputError, match="text: found texts, such as 'good'"):
        ReturnTokens.from_block(block | {"text": "good"}, 100, renderer)


def test_dense_returns_are_not_one_number():
    # Steps between a million floats are as small as rounding, and what they add up to is not.
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    edges = fit_edges(values, "quantile", 32)
    share = np.bincount(np.searchsorted(edges, values, side="right")) / len(values)
    assert len(share) == 32 and share.max() < 0.05
    first, last = distinct(np.append(values[:2000], np.float32(1e4)))
    assert len(first) > 50 and (last - first).max() <= 64 * 1.2e-7 * 1e4
