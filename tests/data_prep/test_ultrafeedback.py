"""Rated completions: every shape of ratings known."""

import copy
import json

import pytest

from data_prep.ultrafeedback import ASPECTS, UltraFeedback
from offline_lmrl.logs.io import read_comparisons
from offline_lmrl.logs.preferences import to_trajectories
from tests.comparisons import check_invariants, read_one


def completion(response, *ratings, **fields):
    """Ratings of helpfulness, honesty, instruction following and truthfulness."""
    annotations = {
        aspect: {"Rating": rating, "Rationale": "because"} for aspect, rating in zip(ASPECTS, ratings, strict=False)
    }
    return {
        "model": f"m{len(response)}",
        "principle": "honesty",
        "custom_system_prompt": "Be honest.",
        "response": response,
        "annotations": annotations,
        "overall_score": 5.0,
        "critique": "ok",
        **fields,
    }


def row(*completions, instruction="Name a bird.", source="flan", **fields):
    return {
        "source": source,
        "instruction": instruction,
        "models": ["m"],
        "completions": list(completions),
        "correct_answers": ["Wren"],
        "incorrect_answers": None,
        **fields,
    }


FOUR = [
    completion("Wren", "5", "5", "5", "4"),
    completion("A robin.", "5", "5", "4", "5"),
    completion("Bat", "1", "2", "2", "1", overall_score=10),
    completion("Eagle!", "3", "4", "4", "4"),
]
KEPT = [
    row(*FOUR),
    row(*FOUR[:2], completion("Gull", "1", "N/A", "1", "1"), instruction="And by the sea?"),
    row(FOUR[0], completion("Rook"), completion("Crow", "N/A", "n/a", None, ""), completion("Jay", 2, 2.0, 2, 2)),
    row(FOUR[0], completion("", "1", "1", "1", "1"), completion("Owl", "2", "1", "1", "1"), instruction="At night?"),
]
DROPPED = {
    "a question of TruthfulQA, a benchmark": [row(*FOUR, source="truthful_qa")],
    "empty instruction": [row(*FOUR, instruction=" ")],
    "instruction: expected text": [row(*FOUR, instruction=None)],
    "no aspect on which all rated completions have a rating": [
        row(completion("a"), completion("b")),
        row(),
        row(completion("a", "1"), completion("b", None, "1")),
    ],
    "fewer than two ranked responses": [row(FOUR[0]), row(FOUR[0], completion("b"))],
    "one text with two ranks": [row(FOUR[0], completion("Wren", "1", "1", "1", "1"))],
    "completions: expected a list": [{**row(), "completions": None}],
    "completions: response: expected text": [row(FOUR[0], {**FOUR[1], "response": None})],
    "completions: annotations: expected an object": [row(FOUR[0], {**FOUR[1], "annotations": ["4"]})],
    "completions: annotations: honesty: expected an object": [
        row(FOUR[0], {**FOUR[1], "annotations": {"honesty": "4"}})
    ],
    "completions: annotations: helpfulness: Rating: expected 1 to 5 or N/A": [
        row(FOUR[0], completion("b", rating, "1", "1", "1")) for rating in ("7", "good", True, [4], 10**400)
    ],
}


def run(tmp_path, rows, **settings):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = UltraFeedback(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0, **settings).prepare()
    return read_comparisons(tmp_path / "out" / "train.jsonl"), report


def words(comparison):
    return [f"{comparison.context[0].content} {option[0].content}" for option in comparison.options]


def test_every_row_is_imported_or_dropped_for_a_reason(tmp_path):
    rows = KEPT + [row for rows in DROPPED.values() for row in rows]
    made, report = run(tmp_path, rows)
    assert (report["rows"], report["imported"], len(made)) == (len(rows), len(KEPT), len(KEPT))
    assert report["dropped"] == {reason: len(rows) for reason, rows in DROPPED.items()}
    assert report["repaired"] == {
        "overall_score 10 with a mean rating of at most 2 read as 1": 1,
        "aspects left out on which some rated completion has no rating": 1,
        "response without a rank left out": 2,
        "empty response left out": 1,
    }


def test_completions_are_ranked_by_the_mean_of_the_aspects_all_are_rated_for():
    made, unrated, some, _ = [read_one(UltraFeedback, row) for row in KEPT]
    # means 4.75, 4.75, 1.5 and 3.75
    assert made.ranking == ((0, 1), (3,), (2,)) and made.target == (0.5, 0.5, 0.0, 0.0)
    # without honesty 14/3, 14/3 and 1
    assert unrated.ranking == ((0, 1), (2,))
    assert words(some) == ["Name a bird. Wren", "Name a bird. Jay"] and some.target == (1.0, 0.0)
    assert [option["model"] for option in some.labels["options"]] == ["m4", "m3"]
    assert made.labels["options"][2] == {
        "model": "m3",
        "principle": "honesty",
        "custom_system_prompt": "Be honest.",
        "critique": "ok",
        "overall_score": 1,
        "ratings": {"helpfulness": 1.0, "honesty": 2.0, "instruction_following": 2.0, "truthfulness": 1.0},
        "rating": 1.5,
    }
    scored = to_trajectories([made, unrated], reward="rating", normalise="none")
    assert [row.total_return for row in scored] == pytest.approx([4.75, 4.75, 1.5, 3.75, 14 / 3, 14 / 3, 1])
    assert (made.labels["source"], made.labels["correct_answers"], made.source) == ("flan", ["Wren"], "ultrafeedback")


def test_the_invariants_of_an_importer_hold():
    made = [read_one(UltraFeedback, row) for row in KEPT]
    known = [f"{row['instruction']} {one['response']}" for row in KEPT for one in row["completions"]]
    check_invariants(made, words, known, str)


def test_the_benchmark_is_kept_where_it_is_asked_for(tmp_path):
    made, report = run(tmp_path, DROPPED["a question of TruthfulQA, a benchmark"], truthful_qa=True)
    assert len(made) == 1 and not report["dropped"]


def test_what_is_compared_does_not_hang_on_the_order_of_the_completions():
    turned = copy.deepcopy(KEPT[0])
    turned["completions"] = turned["completions"][::-1]
    first, second = (read_one(UltraFeedback, one) for one in (KEPT[0], turned))
    assert second == first.select([3, 2, 1, 0])
