"""From preference to reward and back: values by hand, constants that undo, and rewards that stay where they are."""

import math
from collections import Counter

import numpy as np
import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import read_trajectories, write_trajectories
from offline_lmrl.logs.preferences import (
    binarised,
    fit_scores,
    score_rows,
    to_comparisons,
    to_trajectories,
)
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.tokens.batching import WindowDataset, encode_trajectories
from offline_lmrl.tokens.episodes import EpisodeEncoder, StepRule
from offline_lmrl.tokens.windows import WindowRule
from tests.comparisons import RENDERER

CONTEXT = (Turn("user", "hello"), Turn("assistant", "earlier"), Turn("user", "and?"))
A, B, C, D = ((Turn("assistant", text),) for text in "abcd")


def compare(options, target, ranking=None, context=CONTEXT, **fields):
    return Comparison(context, options, target, ranking, **fields)


def rewards(rows, **settings):
    return [row.total_return for row in to_trajectories(rows, **settings)]


class Lengths:
    """A scorer: the number of characters of a reply."""

    def score(self, context, options):
        return np.array([sum(len(turn.content) for turn in option) for option in options])


PAIR, TIE, SOFT = (compare((A, B), target, group="g") for target in ((1.0, 0.0), (0.5, 0.5), (0.25, 0.75)))
FOUR = compare((A, B, C, D), (0.5, 0.0, 0.5, 0.0), ((0, 2), (1,), (3,)), group="h", labels={"strength": 2})


def test_ratings_of_the_options_are_rewards_and_comparisons_without_them_are_counted():
    rated = compare((A, B), (1.0, 0.0), group="g", labels={"options": [{"rating": 4}, {"rating": 1.5}]})
    half = compare((A, B), (1.0, 0.0), labels={"options": [{"rating": 4}, {}]})
    counts = Counter()
    assert rewards([rated, half, PAIR], reward="rating", normalise="none", counts=counts) == [4.0, 1.5]
    assert counts == {"dropped: an option without a rating in the labels": 2}
    assert rewards([rated], reward="rating") == [1.25, -1.25]  # less the group's mean
    wrong = compare((A, B), (1.0, 0.0), labels={"options": [{"rating": "N/A"}, {"rating": 1}]})
    with pytest.raises(InputError, match="rating: found 'N/A'"):
        rewards([wrong], reward="rating")


def test_signs_probabilities_and_ranks_by_hand():
    assert rewards([PAIR, TIE, SOFT]) == [1, -1, 0, 0, -1, 1]
    assert rewards([PAIR, TIE, SOFT], reward="prob") == [1, -1, 0, 0, -0.5, 0.5]
    # a beats b and d and ties with c: w = (1 + 1 + 1/2) / 3, so 2w - 1 = 2/3; b beats only d: w = 1/3
    for kind in ("prob", "rank"):
        assert rewards([FOUR], reward=kind) == pytest.approx([2 / 3, -1 / 3, 2 / 3, -1])
    assert rewards([FOUR]) == [1, -1, 1, -1]
    assert rewards([compare((A, B, C), (0.0, 1.0, 0.0), ((1,), (0,), (2,)))], reward="rank") == [0, 1, -1]


def test_strength_multiplies_and_rows_without_one_are_dropped_and_counted():
    counts = Counter()
    assert rewards([FOUR, PAIR], reward="strength", counts=counts) == pytest.approx([4 / 3, -2 / 3, 4 / 3, -2])
    assert counts == {"dropped: no strength in the labels": 1}
    with pytest.raises(InputError, match="found none to score"):
        to_trajectories([PAIR], reward="strength")


def test_latent_scores_solve_their_equations():
    rows = [
        compare((A, B), (1.0, 0.0)),
        compare((B, C), (0.75, 0.25), weight=2.0),
        compare((D, A, B), (0.2, 0.5, 0.3)),
    ]
    scores = fit_scores(rows)
    s = {text: scores[rows[0].context, option] for text, option in zip("abcd", (A, B, C, D), strict=True)}
    # d/ds of sum weight * P * log sigma - s^2/2 = 0, each pair of the triple counting 1/2
    triple = {("a", "d"): 5 / 7, ("a", "b"): 5 / 8, ("b", "d"): 3 / 5}
    games = [("a", "b", 1.0, 1.0), ("b", "c", 0.75, 2.0), *((i, j, p, 0.5) for (i, j), p in triple.items())]
    slope = dict.fromkeys("abcd", 0.0)
    for i, j, p, weight in games:
        expected = 1 / (1 + math.exp(s[j] - s[i]))
        slope[i] += weight * (p - expected)
        slope[j] -= weight * (p - expected)
    assert all(slope[text] == pytest.approx(s[text], abs=1e-8) for text in "abcd")
    assert sum(s.values()) == pytest.approx(0, abs=1e-9)
    assert s["a"] > s["b"] > s["c"]


def test_latent_scores_are_fitted_per_group_and_tell_what_pairs_do_not():
    rows = [
        compare((A, B), (1.0, 0.0), group="g"),
        compare((B, C), (1.0, 0.0), group="g"),
        compare((A, B), (0.0, 1.0), group="other"),
    ]
    first, second, other = (rewards(rows, reward="bt")[i : i + 2] for i in (0, 2, 4))
    assert first[0] > first[1] == second[0] > second[1]
    assert other[0] == -other[1] < 0
    assert first[1] == pytest.approx(0, abs=1e-9)


def test_a_scorer_is_asked_for_every_option_and_centred_by_group():
    long = (Turn("assistant", "four"),)
    rows = [
        compare((A, long), (1.0, 0.0), group="g"),
        compare((B, long), (1.0, 0.0), group="h"),
        compare((C, D), (1.0, 0.0), group="h"),
    ]
    assert rewards(rows, reward=Lengths(), normalise="none") == [1, 4, 1, 4, 1, 1]
    assert rewards(rows, reward=Lengths()) == [-1.5, 1.5, -0.75, 2.25, -0.75, -0.75]
    assert rewards(rows, reward=Lengths(), normalise="rank") == [0, 1, 1 / 3, 1, 1 / 3, 1 / 3]
    whole = rewards(rows, reward=Lengths(), normalise="global")
    assert np.mean(whole) == pytest.approx(0) and np.std(whole) == pytest.approx(1)


@pytest.mark.parametrize("normalise", ["none", "global", "group"])
def test_the_constants_in_the_labels_give_the_raw_reward_back(tmp_path, normalise):
    rows = [PAIR, SOFT, compare((A, C), (1.0, 0.0), group="x")]
    write_trajectories(tmp_path / "a.jsonl", to_trajectories(rows, reward=Lengths(), normalise=normalise))
    for row in read_trajectories(tmp_path / "a.jsonl"):
        how = row.labels["preference"]
        assert row.total_return * how["scale"] + how["shift"] == pytest.approx(how["raw"]) == 1
        assert (how["reward"], how["place"], how["normalise"]) == ("Lengths", "terminal", normalise)


def test_only_the_option_is_trained_and_the_reward_is_where_it_was_asked_for():
    long = (Turn("assistant", "call"), Turn("tool", "42"), Turn("assistant", "so 42"))
    row = compare((long, A), (1.0, 0.0), group="g", source="s", labels={"who": 1, "options": ["x", "y"]})
    terminal, _ = to_trajectories([row])
    assert [(turn.is_trainable, turn.reward) for turn in terminal.turns] == [
        (False, None),
        (False, None),
        (False, None),
        (True, None),
        (False, None),
        (True, 1.0),
    ]
    turn, other = to_trajectories([row], reward_at="turn")
    assert [turn.reward for turn in turn.turns] == [None, None, None, 0.5, None, 0.5]
    assert (turn.group, turn.source, turn.terminated) == ("g", "s", True)
    assert (turn.labels["who"], turn.labels["option"], other.labels["option"]) == (1, "x", "y")
    assert turn.labels["preference"]["option"] == 0 and other.labels["preference"]["target"] == 0.0


def test_both_sides_of_a_comparison_without_a_group_share_one():
    (first, second), (third, _) = (to_trajectories([compare(options, (1.0, 0.0))]) for options in ((A, B), (A, C)))
    assert first.group == second.group != third.group and first.group


def test_an_empty_reply_is_left_out_and_counted():
    counts = Counter()
    rows = to_trajectories([compare((A, (Turn("assistant", ""),)), (0.0, 1.0))], counts=counts)
    assert [row.turns[-1].content for row in rows] == ["a"]
    assert counts == {"dropped: empty reply": 1}


@pytest.mark.parametrize(
    "settings, expected",
    [
        (
            {"reward": "signs"},
            "reward: found 'signs', expected one of sign, prob, strength, rank, bt, rating or a scorer",
        ),
        (
            {"reward_at": "token"},
            "reward_at: found 'token', expected end or turn (a label of a whole reply gives no rewards",
        ),
        ({"normalise": "z"}, "normalise: found 'z', expected one of none, global, group, rank"),
    ],
)
def test_settings_that_are_none_are_refused(settings, expected):
    with pytest.raises(InputError) as error:
        to_trajectories([PAIR], **settings)
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("max_length", range(4, 40))
def test_truncation_keeps_a_reward_on_the_token_that_closes_its_reply_or_drops_both(max_length):
    counts = Counter()
    encoder = EpisodeEncoder(RENDERER, WindowRule(max_length=max_length), StepRule(), RewardScale())
    paid = []
    for row in to_trajectories([compare(((Turn("assistant", "fine, how are you"),), A), (1.0, 0.0))]):
        try:
            encoded = encode_trajectories([row], encoder, counts)
        except InputError:
            continue  # the reply does not fit, and says so
        steps = WindowDataset(encoded, 0, next_rows=False, end_rows=False).batch([0])["steps"]
        assert steps["reward"][steps["closes_turn"]].tolist() == [row.total_return]
        assert not steps["reward"][~steps["closes_turn"]].any()
        paid.append(row.total_return)
    assert len(paid) + counts["trajectories without an agent turn that fits into max_length"] == 2


def test_returns_rank_the_replies_to_one_context_again():
    rows = [PAIR, FOUR, compare((A, B, C), (0.0, 1.0, 0.0), ((1,), (0, 2)), context=(Turn("user", "x"),))]
    for row in rows:
        (again,) = to_comparisons(to_trajectories([row], reward="rank"))
        assert (again.context, again.options, again.ranks) == (row.context, row.options, row.ranks)
        assert again.target == row.target
    counts = Counter()
    assert to_comparisons([Trajectory((*CONTEXT, *A))], counts) == []
    assert counts == {"dropped: no other reply to the same context": 1}


def test_binarising_compares_each_reply_with_itself_and_keeps_the_group():
    made = list(binarised([PAIR, TIE, SOFT], "+", "-"))
    assert [[option[0].content + option[1].content for option in row.options] for row in made] == [
        ["+a", "-a"],
        ["-b", "+b"],
        ["+b", "-b"],
        ["-a", "+a"],
    ]
    assert all(row.target == (1.0, 0.0) and row.group == "g" and row.context == PAIR.context for row in made)
    assert len(list(binarised([FOUR]))) == 10  # six pairs, one of them a tie


def test_many_rows_are_scored_at_once_where_the_scorer_can():
    class Batched(Lengths):
        def score_each(self, rows):
            calls.append(len(rows))
            return [self.score(*row) for row in rows]

    calls = []
    rows = [(CONTEXT, (A, B)), (CONTEXT, (C,))]
    found = [scores.tolist() for scores in score_rows(rows, Batched())]
    assert found == [scores.tolist() for scores in score_rows(rows, Lengths())] == [[1.0, 1.0], [1.0]]
    assert calls == [2]
    assert to_trajectories([PAIR, SOFT], Batched()) and calls == [2, 2]
