"""Comparisons of answers with sources: ties, strengths, citation marks and quotes."""

import json

import pytest

from data_prep.webgpt import WebGpt
from offline_lmrl.logs.io import read_comparisons
from offline_lmrl.logs.preferences import to_trajectories
from tests.comparisons import check_invariants

QUOTES = {"title": ["Tides (sea.org)", "Moon"], "extract": ["The moon pulls.", "It is far."]}


def row(first="The moon pulls [1]. It is far [1, 2].", second="Because of wind.", score=0.5, question=None, **fields):
    question = question or {"full_text": "Why are there tides?", "dataset": "eli5", "id": "q1"}
    tokens = {"prefix": [1, 2], "completion": [3]}
    return {
        "question": question,
        "answer_0": first,
        "answer_1": second,
        "score_0": score,
        "score_1": -score,
        "quotes_0": QUOTES,
        "quotes_1": {"title": [], "extract": []},
        "tokens_0": tokens,
        "tokens_1": tokens,
    } | fields


def asked(text, name):
    return {"full_text": text, "dataset": "eli5", "id": name}


KEPT = [
    row(),
    row("[1] Tides.\n[2]\nSea.", score=0.0),
    row(second="No idea", score=-1, question=asked("Why?", "q2"), quotes_0=None, quotes_1=None, tokens_0=None),
    row("See a[1][2].", "why", question=asked("Why are there tides", "q3")),
]
DROPPED = {
    "empty answer": [row(""), row("x", "[1]")],
    "identical answers": [row("a [1]", "a")],
    "empty question": [row(question=asked(" ", "q"))],
    "scores that do not sum to 0": [row(score_1=0.5)],
    "score_0: expected −1 to 1": [row(score=2)],
    "score_1: expected a number": [row(score_1=None)],
    "question: expected an object": [row() | {"question": "Why?"}],
    "question: full_text: expected text": [row(question={"id": "q"})],
    "question: id: expected text": [row(question={"full_text": "Why?"})],
    "answer_0: expected text": [row(None)],
}


def run(tmp_path, rows, **settings):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    report = WebGpt(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0, **settings).prepare()
    return report, read_comparisons(tmp_path / "out" / "train.jsonl")


def test_every_row_is_imported_or_dropped_for_a_reason(tmp_path):
    rows = KEPT + [one for some in DROPPED.values() for one in some]
    report, made = run(tmp_path, rows)
    assert (report["rows"], report["imported"], len(made)) == (len(rows), len(KEPT), len(KEPT))
    assert report["dropped"] == {reason: len(some) for reason, some in DROPPED.items()}
    assert report["repaired"] == {"citation marks removed from an answer": 4}
    assert report["kept as it is"] == {"tie": 1} and report["ties"] == 1


def test_scores_are_probabilities_and_rewards_and_a_tie_stays(tmp_path):
    _, made = run(tmp_path, KEPT)
    assert [one.target for one in made] == [(0.75, 0.25), (0.5, 0.5), (0, 1), (0.75, 0.25)]
    assert [[option["score"] for option in one.labels["options"]] for one in made] == [
        [0.5, -0.5],
        [0, 0],
        [-1, 1],
        [0.5, -0.5],
    ]
    rewards = [one.total_return for one in to_trajectories(made, reward="prob", normalise="none")]
    assert rewards == [0.5, -0.5, 0, 0, -1, 1, 0.5, -0.5]  # the scores
    assert made[0].group == made[1].group == made[3].group != made[2].group  # q1 and q3 ask the same


def test_marks_go_without_the_quotes_and_stay_behind_them(tmp_path):
    _, made = run(tmp_path, KEPT)
    assert [one.options[0][0].content for one in made] == [
        "The moon pulls. It is far.",
        "Tides.\n\nSea.",
        "The moon pulls. It is far.",
        "See a.",
    ]
    _, made = run(tmp_path, KEPT, quotes=True)
    (tool, answer), (plain,) = made[0].options
    assert tool.content == "[1] Tides (sea.org)\nThe moon pulls.\n\n[2] Moon\nIt is far."
    assert (tool.role, tool.is_trainable, answer.is_trainable, plain.role) == ("tool", False, True, "assistant")
    assert answer.content == "The moon pulls [1]. It is far [1, 2]." and len(made[2].options[0]) == 1


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"title": ["a"], "extract": []}, "quotes_0: expected one for each extract"),
        ({"title": [1], "extract": ["a"]}, "quotes_0: title: expected text"),
        ({"title": "a"}, "quotes_0: title: expected a list"),
        ("a", "quotes_0: expected an object"),
    ],
)
def test_broken_quotes_matter_only_where_they_are_read(tmp_path, broken, reason):
    rows = [row(), row("other", quotes_0=broken)]
    assert not run(tmp_path, rows)[0]["dropped"]
    assert run(tmp_path, rows, quotes=True)[0]["dropped"] == {reason: 1}


def test_the_invariants_of_an_importer_hold(tmp_path):
    _, made = run(tmp_path, KEPT, quotes=True)
    check_invariants(
        made,
        lambda one: [option[-1].content for option in one.options],
        [one[name] for one in KEPT for name in ("answer_0", "answer_1")],
        str,
    )
