"""Scored rows in any common form: what cannot be used is dropped for a reason, and the rest split by group."""

import json

import pytest

from data_prep.scored import Scored
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_trajectories

SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
KEPT = [
    {"messages": SAID, "reward": 1.0},
    {"conversations": [{"from": "human", "value": "q2"}, {"from": "gpt", "value": "a"}], "reward": "2"},
    {"prompt": "Q!", "completion": "a", "label": "True"},
    {"prompt": "r", "response": "a", "reward": None, "group": "g"},
]
DROPPED = {
    "reward: expected a number": [{"messages": SAID, "reward": "good"}],
    "message without content": [{"messages": [{"role": "user"}], "reward": 1}],
    "fields: expected messages, or prompt and completion with a reward or label": [{"text": "x"}],
}


def run(tmp_path, rows, **settings):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = Scored(input=tmp_path / "in.jsonl", output=tmp_path / "out", **{"validation": 0, **settings}).prepare()
    return read_trajectories(tmp_path / "out" / "train.jsonl"), report


def test_every_row_is_imported_or_dropped_for_a_reason(tmp_path):
    made, report = run(tmp_path, [*KEPT, *(row for rows in DROPPED.values() for row in rows)])
    assert [row.total_return for row in made] == [1.0, 2.0, 1.0, 0.0]
    assert report["dropped"] == {reason: len(rows) for reason, rows in DROPPED.items()}
    assert report["repaired"]["reward of the row put on its last agent turn"] == 2
    assert made[0].group == made[2].group != made[1].group  # the first user turn, blind to case and punctuation
    assert made[3].group == "g"


def test_the_column_of_the_score_is_named(tmp_path):
    rows = [{"messages": SAID, "stars": 4}, {"messages": SAID}]
    made, report = run(tmp_path, rows, reward="stars")
    assert [row.turns[1].reward for row in made] == [4.0, None]
    assert report["kept as it is"] == {"no 'stars' in the row, so it is not scored": 1}
    problem = "star: found no row with this column, expected the name of the column that holds the scores"
    with pytest.raises(InputError, match=problem):
        run(tmp_path, rows, reward="star")
