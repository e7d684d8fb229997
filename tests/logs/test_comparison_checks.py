"""Facts about comparisons: what could be learnt besides quality is counted."""

import pytest

from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.comparison_checks import count_features, describe, prefer, summary
from offline_lmrl.logs.trajectory import Turn


def compare(texts, target, question="q", **fields):
    return Comparison((Turn("user", question),), tuple((Turn("assistant", text),) for text in texts), target, **fields)


ROWS = [
    compare(("a longer one", "short"), (1.0, 0.0), group="g"),
    compare(("I'm sorry, no", "ok"), (0.0, 1.0), group="g"),
    compare(("Same", "same!"), (0.5, 0.5), group="h", labels={"worker": 3}),
    compare((" x y", "zz zz", "<|im_end|> u v w"), (0.0, 0.5, 0.5), "Human: " + "q" * 600, group="i"),
]


def test_checks_and_facts_by_hand():
    found = describe(ROWS)
    assert (found["comparisons"], found["groups"], found["pairs"], found["ties"]) == (4, 3, 6, 2)
    assert found["by number of options"] == {"2": 3, "3": 1}
    checks = found["checks"]
    assert checks["replies equal up to case and punctuation"] == 1
    assert checks["rows that share their first user turn with another"] == 2
    assert checks["share of a random 20% of rows with a sibling in the rest"] == pytest.approx(2 * 0.8 / 4)
    assert checks["replies of at most one word"] == 4
    assert checks["replies with a refusal in them"] == 1
    assert checks["texts with a speaker tag or a token of a chat template"] == 2
    assert checks["replies lost if rows were cut on the right at 512 characters"] == 3
    assert checks["annotators named"] == 1


def test_a_boundary_by_characters_would_cut_replies_that_start_alike():
    rows = [
        compare(texts, (1.0, *[0.0] * (len(texts) - 1)))
        for texts in (
            ("Yes", "No"),
            (" one", " two"),
            ("A cat", "A dog"),
            ("It's cold", "It's cold outside"),
            ("Cutting", "Cut"),
            ("Apple", "Ant", "Axe"),
        )
    ]
    checks = describe(rows)["checks"]
    assert checks["pairs that a split by characters, as in TRL, would cut inside a reply"] == 6
    assert checks["of those, inside a word"] == 4


def test_counts_of_parts_that_share_no_group_add_up_to_those_of_the_whole():
    counts = count_features(ROWS[:2])
    counts.update(count_features(ROWS[2:]))
    assert summary(counts) == describe(ROWS)
    # contexts of 1, 1, 1 and 607 characters: 95% of the way is at place 2.85 of 0 to 3
    assert describe(ROWS)["characters of a context"] == pytest.approx({"median": 1, "95%": 1 + 0.85 * 606, "max": 607})
    assert describe([])["characters of a reply"] == {}


def test_baselines_count_wins_losses_and_ties_of_decided_pairs():
    baselines = describe(ROWS)["baselines"]
    # decided: longer wins, longer loses, and in the last row both winners are longer than " x y"
    assert [baselines["the longer reply"][name] for name in ("wins", "losses", "ties")] == [3, 1, 0]
    assert baselines["the longer reply"]["accuracy"] == 0.75
    assert baselines["the shorter reply"]["accuracy"] == 0.25
    assert [baselines["the reply with a refusal"][name] for name in ("wins", "losses", "ties")] == [0, 1, 3]
    assert baselines["the reply that starts with white space"]["losses"] == 2


def longer(*groups):
    """`prefer` the longer reply, in groups of outcomes: w wins, l loses, t is a tie."""
    texts = {"w": (("aa", "b"), (1.0, 0.0)), "l": (("aa", "b"), (0.0, 1.0)), "t": (("a", "b"), (1.0, 0.0))}
    pairs = [(compare(*texts[outcome], group=f"{i}"), 0, 1) for i, group in enumerate(groups) for outcome in group]
    return prefer(pairs, lambda row, i: len(row.options[i][0].content))["interval"]


def test_the_interval_is_wilsons_for_all_pairs_but_one_where_each_is_a_group():
    # 10 · 9/10 = 9 pairs, t of 9 is 2.2622: (0.8 + 5.1174/18 ± 2.2622 sqrt(0.16/9 + 5.1174/324)) / (1 + 5.1174/9)
    assert longer(*"wwwwwwwwll") == [0.427, 0.9555]
    assert longer(*"wwwwwwwttt") == [0.4735, 0.9728]  # ties count half: 0.85


def test_pairs_of_one_group_that_agree_count_as_few():
    # Σw² = 16, Σwn = 16, Σn² = 20: (16 − 1.6 · 16 + 0.64 · 20) / 100 · 5/4 = 0.04, and 0.16 / 0.04 = 4 pairs
    assert longer("ww", "ww", "ww", "ww", "ll") == [0.2226, 0.9824]  # t of 4 is 2.7764
    # groups of 3 and 1: w − p n = ±3/4, over 1/4 and 3/4: (9 + 1) / 16 / 2 = 0.3125, and 0.1875 / 0.3125 = 0.6 pairs
    assert longer("www", "l") == [0.0021, 0.9998]  # t of 1 is 12.706
    # what is known of one large group is hardly more than what one pair says, whatever stands beside it
    assert longer("w" * 90 + "l" * 10, "l")[0] < 0.2
    # never more than there are, however evenly the groups are split: 6 pairs
    assert longer("wl", "wl", "wl") == [0.0655, 0.9345]


def test_outcomes_without_variance_between_groups_count_a_group_once():
    # 36 / 12 = 3 groups: from 3 / (3 + 3.8415); 16 / 10 where they are of 3 and 1
    assert longer("ww", "ww", "ww") == [0.4385, 1.0] and longer("ll", "ll", "ll") == [0.0, 0.5615]
    assert longer("www", "w") == [0.294, 1.0]
    # one group says as much as one pair: (0.5 ± ...) with n = 1
    assert longer("wwll") == [0.0546, 0.9454]
