"""Pairs of comments: the winner is the younger one, few pairs of a post, groups by post."""

import json
import math

import pytest

from data_prep.shp import Shp
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_comparisons
from tests.comparisons import check_invariants


def row(first="Boil it.", second="Fry it.", votes=(8, 2), written=(200, 100), post="p1", **fields):
    return {
        "post_id": post,
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": f"How to cook {post}?",
        "c_root_id_A": "a1",
        "c_root_id_B": "b1",
        "created_at_utc_A": written[0],
        "created_at_utc_B": written[1],
        "score_A": votes[0],
        "score_B": votes[1],
        "human_ref_A": first,
        "human_ref_B": second,
        "labels": int(votes[0] > votes[1]),
        "seconds_difference": 100.0,
        "score_ratio": max(votes) / min(votes),
    } | fields


KEPT = [
    row(),
    row(votes=(2, 8.0), written=(100, 200), post="p2"),
    row("Bake it.", written=(100, 100), post="p3", domain=None, c_root_id_A=None),
    row("Steam it.", post="p4", history="how to cook P1"),
]
DROPPED = {
    "the preferred comment is the older one": [row(written=(100, 200))],
    "votes that contradict the label": [row(labels=0), row(votes=(3, 3))],
    "comment that was deleted": [row("[deleted]"), row(second="[removed] ")],
    "empty post or comment": [row(" "), row(history="")],
    "identical comments": [row("Fry  it.")],
    "labels: expected 1 for A or 0 for B": [row(labels=2)],
    "labels: expected a number": [row(labels=None)],
    "score_ratio: expected a number from 1 up": [row(score_ratio=0.5)],
    "score_A: expected a number": [row(score_A="8")],
    "created_at_utc_B: expected a number": [row(created_at_utc_B=None)],
    "post_id: expected text": [row(post_id=3)],
    "human_ref_A: expected text": [row(None)],
}


def run(tmp_path, rows, **settings):
    (tmp_path / "in.json").write_text("".join(json.dumps(one) + "\n" for one in rows))
    report = Shp(input=tmp_path / "in.json", output=tmp_path / "out", validation=0, **settings).prepare()
    return report, read_comparisons(tmp_path / "out" / "train.jsonl")


def test_every_row_is_imported_or_dropped_for_a_reason(tmp_path):
    rows = KEPT + [one for some in DROPPED.values() for one in some]
    report, made = run(tmp_path, rows)
    assert (report["rows"], report["imported"], len(made)) == (len(rows), len(KEPT), len(KEPT))
    assert report["dropped"] == {reason: len(some) for reason, some in DROPPED.items()}
    assert [one.target for one in made] == [(1, 0), (0, 1), (1, 0), (1, 0)]
    assert made[0].group == made[3].group != made[1].group  # the same words under another id


def test_votes_and_times_are_labels_and_the_ratio_is_the_strength(tmp_path):
    first = run(tmp_path, KEPT)[1][0]
    assert first.labels["strength"] == pytest.approx(math.log(4))
    assert first.labels["options"] == [
        {"c_root_id": "a1", "score": 8, "created_at_utc": 200},
        {"c_root_id": "b1", "score": 2, "created_at_utc": 100},
    ]
    assert first.labels["domain"] == "askculinary_train"


def test_of_a_post_the_pairs_with_the_clearest_votes_are_kept(tmp_path):
    rows = [row(f"Way {i}", votes=(i, 1)) for i in range(2, 9)] + [row(post="p2")]
    report, made = run(tmp_path, rows)
    assert [one.labels["options"][0]["score"] for one in made] == [4, 5, 6, 7, 8, 8]
    assert report["dropped"] == {"more than max_pairs of one post": 2}
    assert (report["rows"], report["imported"], report["comparisons"]) == (8, 6, 6)
    assert len(run(tmp_path, rows, max_pairs=None)[1]) == 8


def test_a_ratio_may_be_asked_for_and_settings_out_of_range_are_refused(tmp_path):
    report, made = run(tmp_path, [row(), row("Bake", votes=(5, 4))], min_ratio=2)
    assert len(made) == 1 and report["dropped"]["ratio of the votes below min_ratio"] == 1
    for setting in ({"min_ratio": 0.5}, {"max_pairs": 0}):
        with pytest.raises(InputError, match=f"{next(iter(setting))}: found 0"):
            run(tmp_path, [row()], **setting)


def test_the_invariants_of_an_importer_hold(tmp_path):
    _, made = run(tmp_path, KEPT)
    check_invariants(
        made,
        lambda one: [option[0].content for option in one.options],
        [one[name] for one in KEPT for name in ("human_ref_A", "human_ref_B")],
        str,
    )
