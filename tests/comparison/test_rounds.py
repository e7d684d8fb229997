"""Offline algorithms in rounds: what was learnt plays, joins the logs, and is learnt from."""

import json

import pytest
import yaml

from offline_lmrl.algorithms import load_algorithm
from offline_lmrl.comparison.compare import run_compare
from offline_lmrl.comparison.config import CompareConfig, EvaluationConfig
from offline_lmrl.comparison.methods import CollectConfig, MethodConfig
from offline_lmrl.comparison.rounds import train_in_rounds
from offline_lmrl.comparison.rows import read_results
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.environments.rollouts import rollout
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_trajectories, write_trajectories
from offline_lmrl.run import DataConfig, ModelConfig, RunConfig
from offline_lmrl.tasks.gamble import Gamble

SCRATCH = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 32}
WORLD = {"name": "gamble"}
LOGS = 40


@pytest.fixture
def logs(tmp_path):
    write_trajectories(tmp_path / "logs.jsonl", Gamble().logs(LOGS, seed=0))
    return DataConfig(str(tmp_path / "logs.jsonl"))


def learn(folder, data, algorithm="bc", rounds=2, environment=WORLD, model=None, episodes=6, **settings):
    settings = {
        "max_steps": 2,
        "max_length": 32,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        **settings,
    }
    args = load_algorithm(algorithm)[0](output_dir=str(folder), **settings)
    collect = CollectConfig(rounds, episodes=episodes, decoding={"max_new_tokens": 3})
    model = model or ModelConfig(scratch=SCRATCH, vocab_size=270)
    return train_in_rounds(RunConfig(algorithm, model, data, args), collect, environment)


@pytest.mark.parametrize("algorithm", ["bc", "ilql"])
def test_every_round_learns_from_all_logs_so_far_and_goes_on_from_the_last(tmp_path, logs, algorithm):
    run = learn(tmp_path / "run", logs, algorithm)
    played = [read_trajectories(run / f"round-{k}" / "logs.jsonl") for k in (0, 1)]
    assert [len(rows) for rows in played] == [LOGS + 6, LOGS + 12] and played[1][: LOGS + 6] == played[0]
    seeds = [t.labels["seed"] for t in played[1][LOGS:]]
    assert len(set(seeds)) == 12
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run / "round-1", run)]
    assert [c["model"]["path"] for c in configs] == [str(run / "round-0"), str(run / "round-1")]
    assert [c["data"]["train"] for c in configs] == [str(run / f"round-{k}" / "logs.jsonl") for k in (0, 1)]
    assert configs[1]["collect"]["rounds"] == 2 and configs[1]["environment"] == WORLD
    # Each round's episodes are those of the policy that it trained.
    again = rollout(LanguagePolicy.load(run / "round-0", device="cpu", max_new_tokens=3), Gamble, seeds[:6])
    assert [t.turns[-1].token_ids for t in again] == [t.turns[-1].token_ids for t in played[0][LOGS:]]


def test_what_was_played_is_counted_with_what_was_read(tmp_path, logs):
    run = learn(tmp_path / "run", logs)
    folders = (run, run / "round-0", run / "round-1")
    reports = [json.loads((folder / "complete.json").read_text()) for folder in folders]
    assert reports[0]["environment_steps"] == reports[0]["reward_queries"] == reports[0]["episodes"] == 12
    said = [turn for t in read_trajectories(run / "round-1" / "logs.jsonl")[LOGS:] for turn in t.turns]
    assert reports[0]["generated_tokens"] == sum(len(turn.token_ids or ()) for turn in said)
    assert reports[0]["start_tokens"] == sum(report["training_tokens"] for report in reports[1:])
    assert "environment_steps" not in reports[1]


def test_a_stopped_run_goes_on_and_a_finished_one_stays(tmp_path, logs):
    run = learn(tmp_path / "run", logs)
    texts = {p: p.read_text() for name in ("complete", "logs", "metrics") for p in run.rglob(f"{name}.json*")}
    learn(tmp_path / "run", logs)
    assert {path: path.read_text() for path in texts} == texts
    (run / "complete.json").unlink()
    (run / "round-1" / "collected.json").unlink()
    learn(tmp_path / "run", logs)
    for path, text in texts.items():
        assert path.name == "metrics.jsonl" or path.read_text() == text


def test_a_round_is_played_again_if_its_settings_changed_before_the_run_was_complete(tmp_path, logs):
    run = learn(tmp_path / "run", logs, rounds=1)
    for file in [file for file in run.iterdir() if file.is_file()]:
        file.unlink()  # as if the run had been stopped after its round of play
    learn(tmp_path / "run", logs, rounds=1, episodes=4)
    assert json.loads((run / "complete.json").read_text())["episodes"] == 4
    assert len(read_trajectories(run / "round-0" / "logs.jsonl")) == LOGS + 4


def test_rounds_of_other_settings_are_refused(tmp_path, logs):
    learn(tmp_path / "run", logs, rounds=1)
    with pytest.raises(InputError, match="take another output_dir"):
        learn(tmp_path / "run", logs, rounds=1, learning_rate=0.5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"algorithm": "ppo"}, "collect: found it for ppo"),
        ({"data": DataConfig()}, "collect: found it for bc with data.train None"),
        ({"rounds": 0}, "rounds: found 0"),
    ],
)
def test_rounds_that_cannot_be_say_why(tmp_path, logs, settings, message):
    with pytest.raises(InputError, match=message):
        learn(tmp_path / "run", settings.pop("data", logs), **settings)
    assert not (tmp_path / "run" / "round-0" / "complete.json").exists()


def test_a_comparison_trains_in_rounds_and_counts_what_was_played(tmp_path, logs):
    plain = {"algorithm": "bc", "args": {"max_steps": 1}}
    settings = {
        "environment": WORLD,
        "data": {"train": logs.train},
        "output": str(tmp_path / "out"),
        "seeds": (0,),
        "model": {"scratch": SCRATCH, "vocab_size": 270},
        "args": {"max_length": 32, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True},
        "evaluation": EvaluationConfig(episodes=2, decoding={"max_new_tokens": 3}),
    }
    collect = {"rounds": 1, "episodes": 5, "decoding": {"max_new_tokens": 3}}
    config = CompareConfig(methods={"bc": plain, "iterated": {**plain, "collect": collect}}, **settings)
    run_compare(config)
    rows = {row["method"]: row for row in read_results(tmp_path / "out" / "results.jsonl") if row["kind"] == "run"}
    assert rows["iterated"]["cost"]["environment_steps"] == rows["iterated"]["cost"]["reward_queries"] == 5
    assert (rows["iterated"]["regime"], rows["bc"]["regime"]) == ("environment", "labels only")
    assert rows["iterated"]["cost"]["training_tokens"] > rows["bc"]["cost"]["training_tokens"]
    assert "environment_steps" not in rows["bc"]["cost"]
    with pytest.raises(InputError, match="iterated: method.0.collect.episodes: found 5, expected 6"):
        run_compare(CompareConfig(methods={"iterated": {**plain, "collect": {**collect, "episodes": 6}}}, **settings))


def test_a_slip_in_rounds_names_its_key():
    with pytest.raises(InputError, match="methods.x.collect.round: found .*did you mean '.*rounds'"):
        MethodConfig.of("x", {"algorithm": "bc", "collect": {"round": 1}})
