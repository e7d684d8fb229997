"""Comparisons of summaries: posts and articles, white space, confidence, the splits of the source."""

import json

import pytest

from data_prep.summarize import SummarizeComparisons
from offline_lmrl.logs.io import read_comparisons
from tests.comparisons import check_invariants, read_one

POST = {"id": "t3_a", "post": "My cat sleeps all day.", "title": "Is it well?", "subreddit": "pets"}
ARTICLE = {"id": "0f3", "article": "A bridge was closed.", "site": "herald", "title": None, "post": None}


def row(first=" Cat sleeps.", second="A cat is asleep.", info=POST, choice=0, **fields):
    summaries = [{"text": first, "policy": "sup1", "note": None}, {"text": second, "policy": "ref", "note": "ok"}]
    return {
        "info": info,
        "summaries": summaries,
        "choice": choice,
        "worker": "w1",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": None},
    } | fields


def without(name, **fields):
    return {key: value for key, value in row(**fields).items() if key != name}


KEPT = [
    row(),
    without("extra", second="Another.", choice=1),
    row(info=ARTICLE, batch="a batch that nobody knows", split="valid2", extra=None),
    row(info={"id": "t3_b", "post": "Bare."}, split="valid1", extra={"confidence": 5, "other": 1}),
    row(first="Sleeps", extra={"confidence": 8}, choice=1),
    row(first="Sleeping", extra={"confidence": 3}, choice=1),
]
DROPPED = {
    "identical summaries": [row("Same  words", " Same words ")],
    "empty summary": [row(first=" \n")],
    "empty post or article": [row(info={"id": "i", "article": " "})],
    "info: expected exactly one of post and article": [
        row(info=POST | ARTICLE | {"post": "x"}),
        row(info={"id": "t3"}),
    ],
    "info: id: expected text": [row(info={"post": "x"})],
    "info: title: expected text": [row(info=POST | {"title": 3})],
    "info: expected an object": [without("info")],
    "summaries: expected 2": [row(summaries=row()["summaries"] * 2)],
    "summaries: expected an object": [row(summaries=["a", "b"])],
    "summaries: text: expected text": [row(summaries=[{}, {}])],
    "choice: expected 0 or 1": [row(choice=2)],
    "choice: expected a number": [row(choice=None), row(choice=True)],
    "extra: confidence: expected 1 to 9": [row(extra={"confidence": 0})],
    "split: expected one of train, valid1, valid2, test": [row(split="valid3")],
    "row: expected an object": [[row()]],
}


def run(tmp_path, rows, **settings):
    (tmp_path / "batch3.json").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return SummarizeComparisons(input=tmp_path / "batch3.json", output=tmp_path / "out", **settings).prepare()


def read(tmp_path, split):
    return read_comparisons(tmp_path / "out" / f"{split}.jsonl")


def test_every_row_is_imported_or_dropped_for_a_reason(tmp_path):
    rows = KEPT + [one for some in DROPPED.values() for one in some]
    report = run(tmp_path, rows)
    assert (report["rows"], report["imported"], report["comparisons"]) == (len(rows), len(KEPT), len(KEPT))
    assert report["dropped"] == {reason: len(some) for reason, some in DROPPED.items()}
    assert report["repaired"] == {"white space removed at the ends of a summary": 4}
    assert report["kept as it is"] == {"the confidence favours the summary that was not chosen": 1}
    assert {name: split["comparisons"] for name, split in report["splits"].items()} == {
        "train": 4,
        "validation": 1,
        "test": 1,
    }
    assert report["checks"]["annotators named"] == 1
    # ref: chosen in 3 of 6, and no reply of sup1 beats one of ref more often
    assert report["baselines"]["the summary that a person wrote"]["accuracy"] == 0.5


def test_the_fields_that_are_there_tell_what_is_summarised(tmp_path):
    run(tmp_path, KEPT)
    (article,), first = read(tmp_path, "test"), read(tmp_path, "train")[0]
    assert [turn.content for turn in article.context] == ["ARTICLE: A bridge was closed.\n\nTL;DR:"]
    assert first.context[0].content == (
        "SUBREDDIT: r/pets\n\nTITLE: Is it well?\n\nPOST: My cat sleeps all day.\n\nTL;DR:"
    )
    assert [option[0].content for option in first.options] == ["Cat sleeps.", "A cat is asleep."]
    assert article.labels["site"] == "herald" and "confidence" not in article.labels
    assert first.labels["options"] == [{"policy": "sup1"}, {"policy": "ref", "note": "ok"}]


@pytest.mark.parametrize(
    ("confidence", "choice", "target"),
    [
        (8, 1, (0.125, 0.875)),
        (9, 1, (0, 1)),
        (1, 0, (1, 0)),
        (5, 1, (0.5, 0.5)),
        (3, 1, (0, 1)),
        (None, 0, (1, 0)),
    ],
)
def test_confidence_is_a_label_and_the_target_only_if_asked_for(tmp_path, confidence, choice, target):
    one = row(choice=choice, split="valid2", extra={"confidence": confidence})
    run(tmp_path, [one])
    assert read(tmp_path, "test")[0].target == (1 - choice, choice)
    run(tmp_path, [one], soft=True)
    (soft,) = read(tmp_path, "test")
    assert soft.target == target and soft.labels.get("confidence") == confidence


def test_a_post_of_two_splits_stays_in_the_later_one_even_with_another_id(tmp_path):
    again = row(info=POST | {"id": "t3_crosspost"}, split="valid2", first="So.")
    report = run(tmp_path, [row(), again, row(info={"id": "t3_b", "post": "Bare."})], validation=0)
    assert {name: split["comparisons"] for name, split in report["splits"].items()} == {"train": 1, "test": 1}
    assert report["removed, their group is in a later split"] == 1
    assert read(tmp_path, "train")[0].labels["id"] == "t3_b"


def test_the_invariants_of_an_importer_hold():
    made = [read_one(SummarizeComparisons, one, soft=True)[1] for one in KEPT]
    check_invariants(
        made,
        lambda one: [option[0].content for option in one.options],
        [summary["text"] for one in KEPT for summary in one["summaries"]],
        str.strip,
    )
