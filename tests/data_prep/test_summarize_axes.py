"""Rated summaries: axes to rewards, centred by post."""

import json

import pytest

from data_prep.summarize import SummarizeAxes
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_trajectories
from tests.data_prep.test_summarize_comparisons import ARTICLE, POST

AXES = {"overall": 3, "accuracy": 5, "coverage": 4, "coherence": 2}


def row(words=" Cat sleeps.", info=POST, axes=AXES, **fields):
    summary = {"text": words, "policy": "ref", "note": None, "axes": axes}
    return {"info": info, "split": "train", "summary": summary, "worker": "w", "batch": "cnndm1"} | fields


KEPT = [
    row(axes=AXES | {"compatible": True}),
    row("Asleep", axes=AXES | {"overall": 6}),
    row("Shut", ARTICLE, split="test"),
    row("Closed", ARTICLE, axes={"overall": 7.0, "accuracy": None}, split="valid2"),
    row("Cat", POST | {"id": "again"}, axes={"overall": 3}),
]
DROPPED = {
    "no rating on the axis overall": [row(axes={"accuracy": 3}), row(axes={"overall": None})],
    "axes: overall: expected 1 to 7": [row(axes={"overall": 8})],
    "axes: coverage: expected a number": [row(axes=AXES | {"coverage": "4"})],
    "summary: axes: expected an object": [row(axes=None)],
    "summary: expected an object": [row(summary=["x"])],
    "empty summary": [row(" ")],
    "info: expected exactly one of post and article": [row(info={"id": "t3"})],
}


def run(tmp_path, rows, **settings):
    (tmp_path / "in.json").write_text("".join(json.dumps(one) + "\n" for one in rows))
    report = SummarizeAxes(input=tmp_path / "in.json", output=tmp_path / "out", validation=0, **settings).prepare()
    return report, {name: read_trajectories(tmp_path / "out" / f"{name}.jsonl") for name in report["splits"]}


def test_every_row_is_imported_or_dropped_for_a_reason_and_centred_by_post(tmp_path):
    rows = KEPT + [one for some in DROPPED.values() for one in some]
    report, made = run(tmp_path, rows)
    assert (report["rows"], report["imported"]) == (len(rows), len(KEPT))
    assert report["dropped"] == {reason: len(some) for reason, some in DROPPED.items()}
    assert report["repaired"] == {"white space removed at the ends of a summary": 1}
    assert {name: len(some) for name, some in made.items()} == {"train": 3, "test": 2}
    # the post: (3 + 6 + 3) / 3 = 4 over both ids; the article: (3 + 7) / 2 = 5 over both of its splits
    assert [one.total_return for one in made["train"]] == [-1, 2, -1]
    assert [one.total_return for one in made["test"]] == [-2, 2]  # valid2 is test too
    first = made["train"][0]
    assert [(turn.role, turn.content) for turn in first.turns[1:]] == [("assistant", "Cat sleeps.")]
    assert first.labels["axes"] == AXES | {"compatible": True} and first.labels["reward"] == {"raw": 3, "shift": 4}
    assert (first.labels["policy"], first.labels["worker"], first.labels["id"]) == ("ref", "w", "t3_a")


def test_the_reward_is_the_weighted_sum_of_the_axes(tmp_path):
    report, made = run(tmp_path, [row()], overall=0, accuracy=0.5, coherence=2, centre=False)
    assert made["train"][0].total_return == 0.5 * 5 + 2 * 2
    assert report["weights"] == {"accuracy": 0.5, "coherence": 2}
    with pytest.raises(InputError, match="found weights of 0 on all of overall, accuracy"):
        run(tmp_path, [row()], overall=0)
