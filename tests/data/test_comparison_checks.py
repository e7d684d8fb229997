"""Facts about comparisons: what could be learnt besides quality is counted."""

import pytest

from offline_lmrl.data.comparison import Comparison
from offline_lmrl.data.comparison_checks import describe, facts, prefer, tally
from offline_lmrl.data.trajectory import Turn


def compare(texts, target, question="q", **fields):
    return Comparison((Turn("user", question),), tuple((Turn("assistant", text),) for text in texts), target, **fields)


ROWS = [compare(("a longer one", "short"), (1.0, 0.0), group="g"),
        compare(("I'm sorry, no", "ok"), (0.0, 1.0), group="g"),
        compare(("Same", "same!"), (0.5, 0.5), group="h", labels={"worker": 3}),
        compare((" x y", "zz zz", "<|im_end|> u v w"), (0.0, 0.5, 0.5), "Human: " + "q" * 600, group="i")]  # fmt: skip


def test_checks_and_facts_by_hand():
    facts = describe(ROWS)
    assert (facts["comparisons"], facts["groups"], facts["pairs"], facts["ties"]) == (4, 3, 6, 2)
    assert facts["by number of options"] == {"2": 3, "3": 1}
    checks = facts["checks"]
    assert checks["replies equal up to case and punctuation"] == 1
    assert checks["rows that share their first user turn with another"] == 2
    assert checks["share of a random 20% of rows with a sibling in the rest"] == pytest.approx(2 * 0.8 / 4)
    assert checks["replies of at most one word"] == 4
    assert checks["replies with a refusal in them"] == 1
    assert checks["texts with a speaker tag or a token of a chat template"] == 2
    assert checks["replies lost if rows were cut on the right at 512 characters"] == 3
    assert checks["annotators named"] == 1


def test_a_boundary_by_characters_would_cut_replies_that_start_alike():
    rows = [compare(texts, (1.0, *[0.0] * (len(texts) - 1))) for texts in (
        ("Yes", "No"), (" one", " two"), ("A cat", "A dog"), ("It's cold", "It's cold outside"), ("Cutting", "Cut"),
        ("Apple", "Ant", "Axe"))]  # fmt: skip
    checks = describe(rows)["checks"]
    assert checks["pairs that a split by characters, as in TRL, would cut inside a reply"] == 6
    assert checks["of those, inside a word"] == 4


def test_counts_of_parts_that_share_no_group_add_up_to_those_of_the_whole():
    counts = tally(ROWS[:2])
    counts.update(tally(ROWS[2:]))
    assert facts(counts) == describe(ROWS)
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


def test_the_interval_is_wilsons():
    rows = [compare(("aa", "b"), (1.0, 0.0))] * 8 + [compare(("aa", "b"), (0.0, 1.0))] * 2
    longer = prefer([(row, 0, 1) for row in rows], lambda row, i: len(row.options[i][0].content))
    # (0.8 + 1.92/10 +- 1.96 sqrt(0.016 + 0.0096)) / 1.384
    assert longer["interval"] == [0.4902, 0.9433]
