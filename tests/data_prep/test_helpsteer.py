"""HelpSteer2 and HelpSteer3: rated responses to one prompt and preferences from −3 to 3."""

import gzip
import json

import pytest

from data_prep.helpsteer import RATINGS, HelpSteer
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_comparisons
from offline_lmrl.logs.preferences import to_trajectories

LONG = "c#\n<extra_id_1>Assistant\nA language.\n<extra_id_1>User\nMore, please"


def rated(prompt, response, *ratings, **more):
    return {"prompt": prompt, "response": response, **dict(zip(RATINGS, ratings, strict=True)), **more}


def preferred(strength, split="train", **more):
    return {
        "split": split,
        "prompt": LONG,
        "response_1": "one",
        "response_2": "two",
        "preference_strength": strength,
        "preference_statement": "s",
        "preference_elaboration": "e",
        "three_most_similar_preferences": [{"statement": "s", "elaboration": "e", "strength": strength}],
        **more,
    }


def third(preference, **more):
    return {
        "domain": "general",
        "language": "english",
        "context": [{"role": "user", "content": "q"}],
        "response1": "one",
        "response2": "two",
        "overall_preference": preference,
        "individual_preference": [{"score": preference, "reasoning": "r", "feedback1": "a", "feedback2": "b"}],
        **more,
    }


KEPT = [
    rated("q", "good", 4, 3, 4, 2, 1),
    rated("q", "bad", 1, 3, 4, 2, 3),
    rated(LONG, "x", 2, 2, 2, 2, 2),
    rated(LONG, "y", 2, 1, 1, 1, 1),
]


def run(tmp_path, rows, **settings):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = HelpSteer(input=tmp_path / "in.jsonl", output=tmp_path / "out", **{"validation": 0, **settings}).prepare()
    return {split: read_comparisons(tmp_path / "out" / f"{split}.jsonl") for split in report["splits"]}, report


def test_responses_to_one_prompt_are_ranked_by_a_rating_and_keep_all_of_them(tmp_path):
    made, report = run(tmp_path, [*KEPT, rated("alone", "z", 1, 1, 1, 1, 1)])
    one, two = made["train"]
    assert (one.target, one.ranking) == ((1.0, 0.0), ((0,), (1,))) and one.context[0].content == "q"
    assert one.labels["options"][0] == {**dict(zip(RATINGS, (4, 3, 4, 2, 1), strict=True)), "rating": 4}
    assert (two.target, two.ranking) == ((0.5, 0.5), ((0, 1),))
    assert [(turn.role, turn.content) for turn in two.context] == [
        ("user", "c#"),
        ("assistant", "A language."),
        ("user", "More, please"),
    ]
    assert report["assembled"] == {
        "responses compared": 4,
        "responses not compared": 1,
        "sets of responses dropped: fewer than two ranked responses": 1,
    }
    assert [row.total_return for row in to_trajectories([one], "rating", normalise="none")] == [4, 1]
    made, _ = run(tmp_path, KEPT, rating="verbosity")
    assert [row.target for row in made["train"]] == [(0.0, 1.0), (1.0, 0.0)]


@pytest.mark.parametrize("row, field", [(preferred, "preference_strength"), (third, "overall_preference")])
def test_a_preference_has_a_side_and_a_strength(tmp_path, row, field):
    prompts = {
        preferred: lambda text: {"prompt": text},
        third: lambda text: {"context": [{"role": "user", "content": text}]},
    }
    rows = [row(value, **prompts[row](f"q{value}")) for value in (-3, 0, 1)]
    made, _ = run(tmp_path, rows)
    assert [row.target for row in made["train"]] == [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    assert [row.labels["strength"] for row in made["train"]] == [3, 0, 1]
    assert all(set(row.labels) > {"strength"} and field not in row.labels for row in made["train"])


def test_preferences_name_their_own_split(tmp_path):
    made, report = run(
        tmp_path, [preferred(1, prompt=f"q{i}", split=("train", "val")[i % 2]) for i in range(6)], validation=0.5
    )
    assert {split: len(rows) for split, rows in made.items()} == {"train": 3, "validation": 3}


def test_published_folders_have_train_and_validation(tmp_path):
    (tmp_path / "in").mkdir()
    for split in ("train", "validation"):
        rows = [{**row, "prompt": f"{row['prompt']} {split}"} for row in KEPT[:2]]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "in" / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    splits = HelpSteer(input=tmp_path / "in", output=tmp_path / "out").prepare()["splits"]
    assert {name: split["comparisons"] for name, split in splits.items()} == {"train": 1, "validation": 1}


def test_rows_that_cannot_be_used_are_dropped_for_a_reason(tmp_path):
    bad = {
        "empty response": [rated("q", " ", 1, 1, 1, 1, 1)],
        "empty prompt": [rated(" ", "a", 1, 1, 1, 1, 1)],
        "helpfulness: expected a number": [rated("q", "a", [4, 3], 1, 1, 1, 1), rated("q", "a", None, 1, 1, 1, 1)],
        "preference_strength: expected -3 to 3": [preferred(4)],
        "split: expected one of train, val, validation": [preferred(1, split="dev")],
        "fewer than two ranked responses": [third(1, response2="one")],
        "one text with two ranks": [],
        "context: expected a list of messages": [third(1, context="q")],
    }
    bad["one text with two ranks"] = bad.pop("fewer than two ranked responses")
    rows = [row for some in bad.values() for row in some]
    _, report = run(tmp_path, [*KEPT, *rows])
    assert report["dropped"] == {reason: len(some) for reason, some in bad.items()}
    assert report["rows"] == len(rows) + len(KEPT)


def test_nothing_to_compare_is_one_line(tmp_path):
    with pytest.raises(InputError, match="found nothing to compare .* expected two responses to one prompt"):
        run(tmp_path, [KEPT[0], KEPT[2]])
    with pytest.raises(InputError, match="fields: expected prompt, response_1, response_2, preference_strength, or"):
        run(tmp_path, [{"prompt": "q", "response": "a", "helpfulness": 1}])
