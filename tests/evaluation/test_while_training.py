"""A policy is measured while it trains, without any effect on the training, and the run says so."""

import json

import pytest
import torch

from offline_lmrl import run
from offline_lmrl.algorithms.ilql import ILQLConfig
from offline_lmrl.comparison.gather import _entry_of
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.while_training import Watch, WatchConfig
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.run import RunConfig
from offline_lmrl.run_folder import read_report
from tests.test_run import data, scratch, settings  # noqa: F401 (a fixture)
from tests.training.test_trainer import logs, parameters, rows, trainer

PLAYED = WatchConfig(environment={"name": "count"}, episodes=2)


def test_watching_changes_no_weight_and_no_other_row(tmp_path):
    saves = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 5,
        "logging_steps": 2,
        "decoding": {"max_new_tokens": 2},
    }
    plain = trainer(tmp_path / "plain", held_out=logs(3), dropout=True, **saves)
    plain.train()
    watched = trainer(tmp_path / "watched", held_out=logs(3), dropout=True, log_completions=2, **saves)
    both = WatchConfig(environment={"name": "count"}, episodes=2, fqe=2)
    watched.add_callback(Watch(watched, both, logs(3)))
    watched.train()
    assert torch.equal(parameters(watched), parameters(plain))
    found = rows(tmp_path / "watched")
    measured = [row for row in found if "environment/score" in row]
    assert [row for row in found if row not in measured] == rows(tmp_path / "plain")
    assert [row["step"] for row in measured] == [2, 4, 5]
    assert all(
        {"environment/score_low", "environment/score_high", "fqe/value", "fqe/td_error"} <= row.keys()
        for row in measured
    )
    replies = [json.loads(line) for line in (tmp_path / "watched" / "completions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in replies] == [2, 2, 4, 4, 5, 5]
    assert all(row.keys() == {"step", "prompt", "reply", "logged"} for row in replies)
    assert {row["prompt"] for row in replies} == {"you are at 00", "you are at 10"}


def test_a_watched_run_is_marked(tmp_path, data):  # noqa: F811
    args = settings(tmp_path / "run", ILQLConfig, max_steps=1, decoding={"max_new_tokens": 2})
    done = run.train(RunConfig("ilql", scratch(), data, args, evaluation=PLAYED))
    regime = "labels only, watched in an environment"
    assert read_report(done)["regime"] == regime
    assert _entry_of(str(done), {})[0].regime == regime
    assert f"it learnt from: {regime}." in (done / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "evaluation: found neither environment nor fqe"),
        ({"environment": {}}, "evaluation.environment.name: missing"),
        ({"fqe": -1}, "evaluation: found neither"),
        ({"fqe": 1, "episodes": 0}, "evaluation.episodes: found 0"),
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(InputError, match=said):
        WatchConfig(**settings)


def test_fitted_q_evaluation_needs_held_out_data(tmp_path):
    with pytest.raises(InputError, match="evaluation.fqe: found 5, expected 0, as there are no validation data"):
        Watch(trainer(tmp_path), WatchConfig(fqe=5))


@pytest.mark.parametrize(
    ("held_out", "settings", "said"),
    [
        (None, {}, "log_completions: found 2, expected 0, as there are no validation data"),
        (logs(3), {"eval_strategy": "no"}, "log_completions: found 2 with eval_strategy no, expected 0"),
        (
            [Trajectory((Turn("assistant", "left", reward=1.0),))],
            {},
            "log_completions: found 2, expected 0, as no validation row has a turn before the agent's first",
        ),
        (logs(3), {"decoding": {"max_new_tokens": 64}}, "max_length: found 64, expected at least 66"),
    ],
)
def test_replies_that_cannot_be_drawn_are_refused_before_training(tmp_path, held_out, settings, said):
    settings = {"decoding": {"max_new_tokens": 2}, **settings}
    with pytest.raises(InputError, match=said):
        trainer(tmp_path, held_out=held_out, log_completions=2, **settings)


def test_a_policy_that_cannot_play_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match="max_length: found 64, expected at least 66"):
        Watch(trainer(tmp_path, decoding={"max_new_tokens": 64}), PLAYED)
