"""Steps with labels: a turn and a reward each."""

import json

import pytest

from data_prep.stepwise import Stepwise
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_trajectories
from offline_lmrl.tokens.checks import token_table
from tests.comparisons import RENDERER

KEPT = [
    {"prompt": "2 + 2?", "completions": ["2 and 2 ", "\n\nis 4."], "labels": [True, True], "correct": True},
    {"prompt": [{"role": "user", "content": "2 + 2?"}], "completions": ["It is 5.", "4."], "labels": [False, True]},
    {"prompt": "3 + 3?", "completions": ["Hm.", "So", "6", "\n"], "labels": [None, 1, "false", True], "group": "g"},
]
DROPPED = {
    "no step with a label": [
        {"prompt": "p", "completions": ["a"], "labels": [None]},
        {"prompt": "p", "completions": [], "labels": []},
        {"prompt": "p", "completions": [" "], "labels": [True]},
    ],
    "labels: expected one for each completion": [{"prompt": "p", "completions": ["a", "b"], "labels": [True]}],
    "labels: expected true, false or null": [{"prompt": "p", "completions": ["a"], "labels": [-1]}],
    "labels: expected a list": [{"prompt": "p", "completions": ["a"], "labels": True}],
    "completions: expected a list": [{"prompt": "p", "completions": "a", "labels": [True]}],
    "completions: expected text": [{"prompt": "p", "completions": [None], "labels": [True]}],
    "prompt: expected text or messages": [{"completions": ["a"], "labels": [True]}],
    "prompt: expected a list of messages": [{"prompt": 3, "completions": ["a"], "labels": [True]}],
}


def run(tmp_path, rows, **settings):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = Stepwise(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0, **settings).prepare()
    return read_trajectories(tmp_path / "out" / "train.jsonl"), report


def test_every_row_is_imported_or_dropped_for_a_reason(tmp_path):
    rows = KEPT + [row for rows in DROPPED.values() for row in rows]
    made, report = run(tmp_path, rows)
    assert (report["rows"], report["imported"], len(made)) == (len(rows), len(KEPT), len(KEPT))
    assert report["dropped"] == {reason: len(rows) for reason, rows in DROPPED.items()}
    assert report["repaired"] == {
        "white space around a step removed": 2,
        "empty step left out": 1,
        "labels 1 or 0 taken as true or false": 1,
        "labels written as a word": 1,
    }
    assert report["kept as it is"] == {"a right step after a wrong one": 1}


def test_every_step_is_a_turn_that_earns_its_own_reward(tmp_path):
    made, _ = run(tmp_path, KEPT)
    assert [(turn.content, turn.is_trainable, turn.reward) for turn in made[0].turns] == [
        ("2 + 2?", False, None),
        ("2 and 2", True, 1.0),
        ("is 4.", True, 1.0),
    ]
    assert [(turn.content, turn.is_trainable, turn.reward) for turn in made[2].turns[1:]] == [
        ("Hm.", False, None),
        ("So", True, 1.0),
        ("6", True, -1.0),
    ]
    assert made[0].labels == {"correct": True, "labels": [True, True]}
    assert made[0].group == made[1].group != made[2].group == "g"
    table = token_table(made[1], RENDERER)
    assert [token.reward for token in table if token.reward is not None] == [-1.0, 1.0]
    assert all(token.action for token in table if token.reward is not None)


def test_what_steps_earn_can_be_set(tmp_path):
    made, _ = run(tmp_path, KEPT, right=0)
    assert [row.total_return for row in made] == [0.0, -1.0, -1.0]
    with pytest.raises(InputError, match="wrong: found 1, expected a number below right"):
        run(tmp_path, KEPT, wrong=1, right=1)
