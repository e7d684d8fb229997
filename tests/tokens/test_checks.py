import io
import json
from collections import Counter

import pytest
from rich.console import Console

from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.tokens.checks import check, token_table
from offline_lmrl.tokens.template_check import TemplateCheck
from tests.tiny import OneByOne, one_form


class LetterTokenizer:
    def decode(self, ids):
        return "".join(chr(token) for token in ids)


class LetterRenderer(OneByOne):
    """One id per letter: preamble "^", a turn opens with its role's first letter and closes with "." and a space."""

    preamble = (ord("^"),)
    fingerprint = "letters"
    tokenizer = LetterTokenizer()

    def __init__(self, difference=None):
        self.difference = lambda turns: difference

    def encode_turn(self, turn):
        content = turn.token_ids or tuple(ord(letter) for letter in turn.content + ".")
        return one_form((ord(turn.role[0]), *content, ord(" ")), 1, content)

    first_difference = TemplateCheck.first_difference


def game(*texts, group="", terminated=True, reward=None):
    """Environment and agent take turns, the environment first; the reward is the last agent turn's."""
    turns = [Turn(("environment", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    turns[-1] = Turn("assistant", texts[-1], reward=reward)
    return Trajectory(tuple(turns), terminated=terminated, group=group)


def test_facts_of_a_split_are_counted():
    rows = [
        game("s", "l", "t", "r", group="one", reward=1.0),
        game("s", "r", group="one", reward=0.0),
        game("s", "r", group="two", reward=0.0),
        game("s", "r", group="three", reward=0.0, terminated=False),
    ]
    split = check({"train": rows}).splits["train"]
    assert (split.rows, split.turns, split.agent_turns, split.scored_turns, split.groups) == (4, 10, 5, 4, 3)
    assert split.duplicates == 1  # rows 2 and 3 say the same; row 4 was cut, which is another fact
    assert split.terminated_share == 0.75
    assert (split.mean_return, split.distinct_returns) == (0.25, 2)
    assert split.histogram == [(0.0, 0.0, 3), (1.0, 1.0, 1)]
    assert [split.return_quantiles[name] for name in ("min", "median", "max")] == [0, 0, 1]
    assert [tuple(row) for row in split.longest] == [(1, 4, "one"), (2, 2, "one"), (3, 2, "two"), (4, 2, "three")]
    assert split.tokens is split.agent_token_share is split.truncated is None


def test_many_distinct_returns_are_binned_and_all_rows_are_in_a_bin():
    split = check({"train": [game("s", "a", reward=i) for i in range(21)]}).splits["train"]
    assert len(split.histogram) == 10
    assert split.histogram[0] == (0.0, 2.0, 2) and split.histogram[-1] == (18.0, 20.0, 3)


def test_tokens_and_the_agents_share_come_from_the_renderer():
    split = check({"train": [game("s", "go", reward=1.0)]}, LetterRenderer(), max_length=8).splits["train"]
    assert split.tokens == 10  # "^" + "es. " + "ago. "
    assert split.agent_token_share == 0.3  # "go."
    assert split.truncated == 1
    assert split.longest[0].length == 10


def warnings(rows, **settings):
    return check({"train": rows}, **settings).warnings


HEALTHY = [game("s", "l", reward=0.0), game("s", "r", reward=1.0)]


def test_a_healthy_split_gives_no_warning():
    assert warnings(HEALTHY, renderer=LetterRenderer(), max_length=100) == []


def test_equal_returns_and_absent_rewards_are_warned_of():
    assert warnings([game("s", "l", reward=2.0), game("s", "r", reward=2.0)]) == [
        "train: all returns are equal (2), so the data do not show which replies are better"
    ]
    assert warnings([game("s", "l"), game("s", "r")]) == [
        "train: no turn has a reward, so the data do not show which replies are better"
    ]


def test_rewards_that_the_reader_removed_are_warned_of():
    counts = Counter({"repaired: reward removed from an untrained turn": 3})
    assert warnings(HEALTHY, counts=counts) == [
        "rewards on untrained turns: 3 removed, because nothing learns from them"
    ]


@pytest.mark.parametrize(
    "rows, possible",
    [
        ([("s", "l", "t", "l"), ("u", "l", "t", "r")], True),  # "t" is answered in two ways by two rows
        ([("s", "l", "t", "l"), ("u", "l", "t", "l")], False),  # the same reply
        ([("s", "l", "t", "l"), ("u", "l", "v", "r")], False),  # nothing recurs
        ([("s", "l", "s", "r"), ("u", "l", "v", "r")], False),  # recurs, but within one row only
        ([("s", "l", "s", "r"), ("s", "l", "v", "r")], True),  # row 1 gave "r", row 2 gave "l"
    ],
)
def test_stitching_needs_an_observation_with_two_replies_in_two_rows(rows, possible):
    games = [game(*texts, reward=i) for i, texts in enumerate(rows)]
    assert any("no stitching possible" in text for text in warnings(games)) is not possible


def test_mostly_truncated_rows_and_another_template_are_warned_of():
    found = warnings(HEALTHY, renderer=LetterRenderer("at token 3: 'x', not 'y'"), max_length=4)
    assert found == [
        "train: 2 of 2 rows are longer than 4 tokens and lose their oldest turns",
        "train: 2 of the first 2 rows: the stock chat template prints them differently from the text for training; "
        "row 1: at token 3: 'x', not 'y'",
    ]


def test_groups_in_two_splits_are_counted_and_rows_without_a_group_by_content():
    report = check(
        {
            "train": [*HEALTHY, game("s", "x", group="g", reward=0.5)],
            "test": [HEALTHY[0], game("s", "y", group="g", reward=1.0)],
        }
    )
    assert report.shared_groups == {"train, test": 2}
    assert report.warnings == [
        "train, test: 2 groups are in both splits, so neither is an independent test of a model trained on the other"
    ]


def test_the_report_is_plain_json_and_prints_every_fact():
    report = check(
        {"train": HEALTHY, "test": [game("[b]s[/b]", "l", group="[red]", reward=5.0)]},
        counts={"dropped: message without content": 7},
    )
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["splits"]["train"]["longest"][0] == {"row": 1, "length": 2, "group": ""}
    assert plain["counts"] == {"dropped: message without content": 7}
    console = Console(file=io.StringIO(), width=120)
    report.print(console)
    text = console.file.getvalue()
    for part in (
        "terminated share",
        "return median",
        "test: longest rows",
        "[red]",
        "message without content",
        "warning: test: all returns are equal (5)",
    ):
        assert part in text


def test_token_table_marks_the_agents_text_and_pays_on_its_closing_token():
    turns = (Turn("environment", "s"), Turn("assistant", "go", reward=0.0), Turn("assistant", "n", trainable=False))
    rows = token_table(Trajectory(turns), LetterRenderer())
    assert [(row.text, row.role, row.action, row.reward) for row in rows] == [
        ("^", "", False, None),
        *((letter, "environment", False, None) for letter in "es. "),
        ("a", "assistant", False, None),
        ("g", "assistant", True, None),
        ("o", "assistant", True, None),
        (".", "assistant", True, 0.0),
        (" ", "assistant", False, None),
        *((letter, "assistant", False, None) for letter in "an. "),
    ]
    assert [row.index for row in rows] == list(range(14))


def test_token_table_uses_sampled_ids_of_the_same_renderer_only():
    turn = Turn("assistant", "go", token_ids=(ord("G"), ord(".")))
    own, foreign = (
        token_table(Trajectory((turn,), labels={"tokenizer": name}), LetterRenderer()) for name in ("letters", "words")
    )
    assert "".join(row.text for row in own) == "^aG. "
    assert "".join(row.text for row in foreign) == "^ago. "


def test_all_rows_in_one_group_are_said_and_one_row_or_rows_without_a_group_are_not():
    one, two = game("s", "l", group="g", reward=1.0), game("s", "r", group="g", reward=0.0)
    said = "train: all 2 rows are in one group, 'g', so none of them can be held out for validation"
    assert said in check({"train": [one, two]}).warnings
    for rows in ([one], [game("s", "l"), game("s", "r")], [one, game("s", "r", group="h")]):
        assert not any("one group" in warning for warning in check({"train": rows}).warnings)


def test_columns_that_may_hold_the_score_are_named_where_nothing_is_scored():
    labels = [
        {"user": 7, "time": 1.5, "thumbs": True, "Rating": "4", "note": "good", "session": 1},
        {"user": 7, "time": 2.5, "thumbs": False, "Rating": "3", "note": 5, "session": 2},
    ]
    rows = [Trajectory((Turn("user", "q"), Turn("assistant", "a")), labels=label) for label in labels]
    (warning,) = (text for text in check({"train": rows}).warnings if "no turn has a reward" in text)
    assert warning == (
        "train: no turn has a reward, so the data do not show which replies are better; column 'thumbs' (or 'Rating') "
        "may hold the score: use --data.reward 'thumbs', or --reward 'thumbs' for check and evaluate"
    )
    for label in labels:
        del label["thumbs"], label["Rating"]
    assert any("column 'time' (or 'session') may hold the score" in text for text in check({"train": rows}).warnings)
    scored = Trajectory((Turn("user", "q"), Turn("assistant", "a", reward=1.0)), labels=labels[0])
    assert not any("no turn has" in text for text in check({"train": [*rows, scored]}).warnings)


def test_returns_between_which_floats_are_rare_have_a_histogram():
    rows = [Trajectory((Turn("assistant", f"{i}", reward=1e17 + 16 * (i % 4) + i),)) for i in range(40)]
    report = check({"train": rows}).splits["train"]
    assert sum(n for *_, n in report.histogram) == 40
    assert all(low <= high for low, high, _ in report.histogram)
