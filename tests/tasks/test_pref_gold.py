"""pref_gold: gold by hand from its definition, the optimum by another way, and labels as noisy as they should be."""

import math

import numpy as np
import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.tasks import make_environment
from offline_lmrl.tasks.pref_gold import CUES, LETTERS, REPLIES, PrefGold

TOY = PrefGold()


def test_gold_is_linear_in_letters_and_pairs_of_letters():
    # In a linear reward, exchanging a letter changes gold by what its neighbours decide, whatever else is said.
    for prompt in CUES:
        first = TOY.gold(prompt, "a b c d") - TOY.gold(prompt, "e b c d")
        assert TOY.gold(prompt, "a b g h") - TOY.gold(prompt, "e b g h") == pytest.approx(first)
        assert TOY.gold(prompt, "a c g h") - TOY.gold(prompt, "e c g h") != pytest.approx(first)
        last = TOY.gold(prompt, "a b c d") - TOY.gold(prompt, "a b c e")
        assert TOY.gold("w", "h g c d") - TOY.gold("w", "h g c e") == pytest.approx(last)  # far from the prompt
    assert TOY.table.mean() == pytest.approx(0) and TOY.table.std() == pytest.approx(1)


def test_the_optimum_is_that_of_dynamic_programming():
    # Backwards: what the last letter can add depends on the third alone, and so on.
    best = []
    for prompt in CUES:
        table = TOY.table[CUES.index(prompt)].reshape([len(LETTERS)] * 4)
        last = table - table[..., :1]  # of the last letter, against "a", given the third
        ends = last[0, 0].max(-1)  # by the third letter alone
        np.testing.assert_allclose(last.max(-1), np.broadcast_to(ends, table.shape[:3]), atol=1e-9)
        best.append((table[..., 0] + ends).max())
    assert TOY.optimum() == pytest.approx(np.mean(best)) and TOY.optimum() > 2


def test_an_episode_pays_gold_and_any_other_text_the_least():
    toy = PrefGold()
    assert [turn.content for turn in toy.reset(6)] == ["y"]
    result = toy.step("c a  a g")
    assert result.reward == TOY.gold("y", "c a a g") and result.terminated
    assert toy.labels() == {"prompt": "y", "invalid": 0}
    toy.reset(0)
    for text in ("", "a b c", "a b c d e", "a b c x", "abcd"):
        assert toy.step(text).reward == TOY.table.min() and toy.labels()["invalid"] == 1
    assert isinstance(make_environment("pref_gold", gold_seed=1)(), PrefGold)


def test_logs_follow_the_behaviour_and_carry_gold():
    logs = TOY.logs(2000, 0)
    said = [row.turns[1].content for row in logs]
    expected = TOY.behaviour() @ np.array([text.count("a") for text in REPLIES])
    assert np.mean([text.count("a") for text in said]) == pytest.approx(expected, abs=0.1)
    assert all(row.total_return == TOY.gold(row.turns[0].content, row.turns[1].content) for row in logs[:50])
    assert TOY.behaviour().sum() == pytest.approx(1)


def shares(rows):
    """How often the reply with more gold wins, and how often nobody does."""
    wins, ties = [], 0
    for row in rows:
        first, second = (option["gold"] for option in row.labels["options"])
        ties += row.preference(0, 1) == 0.5
        if row.preference(0, 1) != 0.5:
            wins.append((row.preference(0, 1) > 0.5) == (first > second))
    return np.mean(wins), ties / len(rows)


def test_labels_have_the_temperature_the_flips_and_the_ties_asked_for():
    right, tied = shares(TOY.comparisons(1500, 0, temperature=0.5, flips=0.0, tie=0.0))
    gaps = [abs(a["gold"] - b["gold"]) for a, b in (row.labels["options"] for row in TOY.comparisons(1500, 0))]
    assert right == pytest.approx(np.mean([1 / (1 + math.exp(-gap / 0.5)) for gap in gaps]), abs=0.04) and tied == 0
    assert shares(TOY.comparisons(1500, 0, temperature=1e-6, flips=0.2, tie=0.0))[0] == pytest.approx(0.8, abs=0.03)
    right, tied = shares(TOY.comparisons(1500, 0, temperature=1e-6, flips=0.0, tie=0.3))
    assert right == 1 and tied == pytest.approx(np.mean([gap <= 0.3 for gap in gaps]))


def test_rankings_of_several_are_whole_and_repeat_with_their_seed():
    rows = TOY.comparisons(20, 3, options=6, temperature=1e-6, flips=0.0)
    for row in rows:
        gold = [option["gold"] for option in row.labels["options"]]
        order = [i for tied in row.ranking for i in tied]
        assert sorted(order) == list(range(6)) and gold[order[0]] == max(gold) and len(set(row.options)) == 6
    assert rows == TOY.comparisons(20, 3, options=6, temperature=1e-6, flips=0.0)
    with pytest.raises(InputError, match="flips 2"):
        TOY.comparisons(1, 0, flips=2)
