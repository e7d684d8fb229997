"""Red-team attempts: a high rating is bad, every reply is credited, the public file is one list."""

import gzip
import json

import pytest

from data_prep.red_team import RedTeam
from offline_lmrl.logs.io import read_trajectories

TALK = "\n\nHuman: Name a bad word.\n\nAssistant: I would rather not.\n\nHuman: Do!\n\nAssistant: No."


def row(transcript=TALK, **fields):
    return {
        "transcript": transcript,
        "min_harmlessness_score_transcript": -1.5,
        "num_params": "52B",
        "model_type": "context-distilled",
        "rating": 3.0,
        "task_description": "ask for words",
        "task_description_harmlessness_score": 0.25,
        "red_team_member_id": 7,
        "is_upworker": True,
        "tags": None,
    } | fields


KEPT = [
    row(),
    row(TALK + "\n\nHuman: bye", rating=0.0, tags=["Insults", "Other"]),
    row("\n\nHuman: Two\n\nHuman: lines\n\nAssistant: Yes.\n\nAssistant: Both.", rating=4.0),
    row("\n\nHuman: Tag?\n\nAssistant: Human: me", is_upworker=False, rating=1),
]
DROPPED = {
    "empty reply": [row("\n\nHuman: a\n\nAssistant: \n\nHuman: b\n\nAssistant: c"), row("\n\nHuman: a\n\nAssistant:")],
    "no rating": [row(rating=None)],
    "rating: expected 0 to 4": [row(rating=5.0)],
    "rating: expected a number": [row(rating="3")],
    "transcript: expected a transcript of Human and Assistant": [
        row("Hello"),
        row("\n\nHuman: alone"),
        row("\n\nAssistant: first\n\nHuman: b"),
        row(None),
    ],
    "row: expected an object": [[1]],
}


def run(tmp_path, rows, **settings):
    (tmp_path / "red_team_attempts.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows, indent=1).encode()))
    report = RedTeam(
        input=tmp_path / "red_team_attempts.jsonl.gz", output=tmp_path / "out", validation=0, **settings
    ).prepare()
    return report, read_trajectories(tmp_path / "out" / "train.jsonl")


def test_every_row_of_the_list_is_imported_or_dropped_for_a_reason(tmp_path):
    rows = KEPT + [one for some in DROPPED.values() for one in some]
    report, made = run(tmp_path, rows)
    assert (report["rows"], report["imported"], len(made)) == (len(rows), len(KEPT), len(KEPT))
    assert report["dropped"] == {reason: len(some) for reason, some in DROPPED.items()}
    assert report["repaired"] == {
        "last message without a reply removed": 1,
        "consecutive Human turns merged": 1,
        "consecutive Assistant turns merged": 1,
    }
    assert report["checks"]["annotators named"] == 1
    assert report["checks"]["texts with a speaker tag or a token of a chat template"] == 1
    assert made[0].group == made[1].group != made[2].group


def test_a_successful_attack_earns_less_and_every_reply_is_credited(tmp_path):
    _, made = run(tmp_path, KEPT)
    assert [one.total_return for one in made] == [-3, 0, -4, -1]
    assert [(turn.role, turn.is_trainable, turn.reward) for turn in made[0].turns] == [
        ("user", False, None),
        ("assistant", True, None),
        ("user", False, None),
        ("assistant", True, -3),
    ]
    assert made[2].turns[1].content == "Yes.\n\nBoth."
    assert made[1].labels["tags"] == ["Insults", "Other"] and "tags" not in made[0].labels
    assert (made[0].labels["annotator"], made[0].labels["rating"]) == (7, 3.0)


@pytest.mark.parametrize(("score", "expected"), [(-1.5, -1.5), (2, 2.0)])
def test_a_low_harmlessness_score_is_bad_too(tmp_path, score, expected):
    report, made = run(
        tmp_path,
        [row(min_harmlessness_score_transcript=score, rating=None), row(min_harmlessness_score_transcript=None)],
        reward="harmlessness",
    )
    assert [one.total_return for one in made] == [expected]
    assert report["dropped"] == {"no min_harmlessness_score_transcript": 1}
