"""The page and the JSON of an evaluation on held-out logs, made of rows by hand."""

import json
import re
from dataclasses import replace

import pytest

from offline_lmrl.comparison.choice_page import write_choices
from offline_lmrl.evaluation.choices import PLAIN, Choice, ChoiceRow, ChoiceTable
from offline_lmrl.evaluation.metrics import Estimate
from offline_lmrl.evaluation.offline_report import OfflineReport
from offline_lmrl.evaluation.ranking import rank_agreement
from offline_lmrl.logs.trajectory import Turn

LOUD = "<script>alert(1)</script> \x1b[2J & `code`"


def row(choice, gain, broken):
    one = Estimate(-1.0, -1.5, -0.5, 40)
    shares = {"unlikely": 0.0, "repeated": broken, "unfinished": 0.0, "empty": 0.0, "broken": broken}
    rest = {"distinct_1": 0.5, "distinct_2": 0.9, "tokens": one, "texts": (f"{choice} says", LOUD)}
    advantage = Estimate(gain, gain - 0.1, gain + 0.1, 40)
    return ChoiceRow(choice, advantage, one, 0.1, 0.2, one, one, one, **shares, **rest)


@pytest.fixture
def report():
    rows = [
        row(PLAIN, 0.0, 0.02),
        row(Choice(4.0), 0.3, 0.04),
        row(Choice(32.0), 0.4, 0.5),
        row(Choice(0.0, "max"), 0.1, 0),
    ]
    agreement = rank_agreement([1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 1.0, 0.0], list("abcd"))
    table = ChoiceTable(rows, [(Turn("user", LOUD),), (Turn("user", "second"),)], agreement, 4)
    log_prob = Estimate(-2.0, float("-inf"), float("inf"), 3)
    return OfflineReport(4, 90, {}, log_prob, [], None, {"Q of a turn": agreement}, [], table, None, Choice(4.0))


def test_the_page_needs_no_other_file_and_runs_nothing(report, tmp_path):
    page = write_choices(report, tmp_path / "new" / "out", {"run": "runs/<b>", "data": "held.jsonl"})
    text = page.read_text()
    assert page == tmp_path / "new" / "out" / "choices.html" and "<svg" in text
    assert "<script" not in text and "\x1b" not in text and "<b>" not in text.split("<figcaption>")[0]
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert "&lt;script&gt;alert(1)" in text and "β 4 (chosen)" in text and "+0.30 [+0.20, +0.40]" in text


def test_the_file_is_json_without_numbers_that_json_lacks(report, tmp_path):
    write_choices(report, tmp_path / "held.json", {"run": "r"})
    assert (tmp_path / "held.html").exists()
    found = json.loads((tmp_path / "held.json").read_text(), parse_constant=pytest.fail)
    assert found["log_prob"] == {"mean": -2.0, "interval": None, "n": 3} and found["chosen"] == {
        "beta": 4.0,
        "ask": None,
    }
    assert [one["choice"]["ask"] for one in found["choices"]["rows"]] == [None, None, None, "max"]
    assert found["choices"]["prompts"][1] == [{"role": "user", "content": "second"}]


def test_three_replies_to_each_prompt_are_side_by_side(report):
    lines = str(report).splitlines()
    start = lines.index("prompt: second")
    assert lines[start - 4].startswith("prompt: <script>")
    assert [line.split(":")[0].strip() for line in lines[start + 1 : start + 4]] == ["β 0", "β 4", "ask max"]


def test_logs_without_rewards_have_a_page_without_a_picture(report, tmp_path):
    rows = [replace(one, advantage=None) for one in report.choices.rows]
    bare = replace(report, choices=ChoiceTable(rows, report.choices.prompts, None, 0), chosen=None, calibration=None)
    text = write_choices(bare, tmp_path, {"run": "r"}).read_text()
    assert "<svg" not in text and "nan" not in text.lower().replace("finance", "") and "–" in text
    assert "no gain is estimated" in str(bare)


def test_a_page_without_replies_says_why(report, tmp_path):
    bare = replace(report, choices=None, chosen=None, no_replies="max_length: found 9, expected at least 70")
    text = write_choices(bare, tmp_path, {"run": "r"}).read_text()
    assert "no replies were generated: max_length: found 9" in text and "What each choice does" not in text
