"""Counts of faults in replies against cases worked by hand."""

import pytest

from offline_lmrl.logs.protocols import Reply
from offline_lmrl.logs.replies import distinct, is_broken, least_likely, repeats


def test_a_repetition_is_one_sequence_of_four_tokens_four_times():
    assert repeats([1, 2, 3, 4] * 4) and not repeats([1, 2, 3, 4] * 3)
    assert repeats([7] * 7) and not repeats([7] * 6)  # overlaps count
    assert not repeats([]) and not repeats([1, 2, 3])


def test_distinct_counts_sequences_over_all_replies():
    assert distinct([[1, 2, 1], [1, 2]], 1) == 2 / 5
    assert distinct([[1, 2, 1], [1, 2]], 2) == 2 / 3  # (1 2) (2 1) (1 2): none crosses from one reply to the next
    assert distinct([[1]], 2) == 1.0


def test_the_limit_is_the_first_percentile():
    assert least_likely([float(i) for i in range(101)]) == 1.0


@pytest.mark.parametrize(
    ("reply", "tokens", "log_prob", "broken"),
    [
        (Reply("a b"), [1, 2, 9], -1.0, False),
        (Reply(" \n"), [9], -1.0, True),
        (Reply("a b", closed=False), [1, 2], -1.0, True),
        (Reply("a" * 9), [1] * 9, -1.0, True),
        (Reply("a b"), [1, 2, 9], -3.1, True),
    ],
    ids=["whole", "empty", "unfinished", "repetitive", "unlikely"],
)
def test_each_fault_breaks_a_reply(reply, tokens, log_prob, broken):
    assert is_broken(reply, tokens, log_prob, limit=-3.0) is broken
