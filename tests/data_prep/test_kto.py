"""Single replies with a label: ±1 on the reply alone, and no label is no opinion."""

import json

import pytest

from data_prep.kto import Kto
from offline_lmrl.logs.io import read_trajectories

TALK = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Sky?\n\nAssistant:"
USER = {"role": "user", "content": "Sky?"}
KEPT = [
    {"prompt": "Sky?", "completion": "Blue.", "label": True, "worker": "w1"},
    {"prompt": "Sky?", "completion": "Sky? Green.</s>", "label": False},
    {
        "prompt": [USER, {"role": "assistant", "content": "Which?"}, {"role": "user", "content": "Ours."}],
        "completion": [{"role": "assistant", "content": "Blue."}],
        "label": 1,
    },
    {"prompt": TALK, "completion": " Blue.", "label": "False"},
    {
        "prompt": [USER],
        "completion": [
            {"role": "assistant", "content": "look()"},
            {"role": "tool", "content": "blue"},
            {"role": "assistant", "content": "Blue."},
        ],
        "label": False,
        "group": "g",
    },
    {"prompt": "sky", "completion": "Blue.", "label": True},
    {"prompt": "Sky?", "completion": "Blue.", "label": False},
]
DROPPED = {
    "no label": [{"prompt": "p", "completion": "c", "label": None}, {"prompt": "p", "completion": "c"}],
    "empty reply": [{"prompt": "p", "completion": " ", "label": True}, {"prompt": "p", "completion": "p", "label": 0}],
    "label: expected true, false or null": [{"prompt": "p", "completion": "c", "label": label} for label in (-1, "y")],
    "prompt: expected text or messages": [{"completion": "c", "label": True}],
    "completion: expected text or messages": [{"prompt": "p", "completion": None, "label": True}],
    "completion: expected a list of messages": [{"prompt": "p", "completion": 3, "label": True}],
    "a completion without an agent turn": [{"prompt": "p", "completion": [USER], "label": True}],
    "a reward in addition to the label": [
        {"prompt": "p", "completion": [{"role": "assistant", "content": "c", "reward": 2}], "label": True}
    ],
    "row: expected an object": [3],
}


def run(tmp_path, rows):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = Kto(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0).prepare()
    return read_trajectories(tmp_path / "out" / "train.jsonl"), report


def said(row):
    return [(turn.role, turn.content, turn.is_trainable, turn.reward) for turn in row.turns]


def test_every_row_is_imported_or_dropped_for_a_reason(tmp_path):
    rows = KEPT + [row for rows in DROPPED.values() for row in rows]
    made, report = run(tmp_path, rows)
    assert (report["rows"], report["imported"], len(made)) == (len(rows), len(KEPT), len(KEPT))
    assert report["dropped"] == {reason: len(rows) for reason, rows in DROPPED.items()}
    assert report["repaired"] == {
        "prompt removed from the start of a reply": 1,
        "end token removed from a reply": 1,
        "label 1 or 0 taken as true or false": 1,
        "label written as a word": 1,
    }
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dropped"] == report["dropped"]


def test_only_the_reply_is_credited_with_its_label(tmp_path):
    made, _ = run(tmp_path, KEPT)
    user = ("user", "Sky?", False, None)
    assert said(made[0]) == [user, ("assistant", "Blue.", True, 1.0)]
    assert said(made[1]) == [user, ("assistant", " Green.", True, -1.0)]
    assert said(made[2])[1:] == [
        ("assistant", "Which?", False, None),
        ("user", "Ours.", False, None),
        ("assistant", "Blue.", True, 1.0),
    ]
    assert said(made[3]) == [
        ("user", "Hi", False, None),
        ("assistant", "Hello.", False, None),
        user,
        ("assistant", "Blue.", True, -1.0),
    ]
    assert said(made[4])[1:] == [
        ("assistant", "look()", True, None),
        ("tool", "blue", False, None),
        ("assistant", "Blue.", True, -1.0),
    ]
    assert made[0].labels == {"label": True, "worker": "w1"} and made[0].source == "kto"
    assert made[0].group == made[1].group == made[2].group == made[5].group != made[4].group == "g"


def test_the_balance_of_the_labels_is_told(tmp_path):
    _, report = run(tmp_path, KEPT[:2] + KEPT[3:])
    assert report["labels"] == {"true": 2, "false": 4}
    assert report["weights that balance the labels"] == {"true": 2.0, "false": 1.0}
    assert report["checks"]["texts with different returns"] == 1  # "Sky?" and "Blue." with either label
    assert report["checks"]["groups with one return only"] == 2  # of "Hi" and of "g"
    assert report["splits"]["train"]["mean_return"] == pytest.approx(-2 / 6)
