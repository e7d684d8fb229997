import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from offline_lmrl.cli.main import main
from offline_lmrl.evaluation.asks import AskPoint, ask_point, ask_rows, ask_table, draw_asks
from offline_lmrl.evaluation.metrics import Estimate
from offline_lmrl.evaluation.play import EvaluationResult
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.tasks.count import Count


def point(ask, achieved, turns=100):
    return AskPoint(ask, float(ask), int(ask), turns, 0.0, Estimate(achieved, achieved - 1, achieved + 1, 8))


def test_a_point_says_what_was_told_and_what_came_of_it():
    told = [
        {"ask": 4.0, "bin": 2, "clipped": False},
        {"ask": 6.0, "bin": 2, "clipped": True},
        {"ask": 5.0, "bin": 1, "clipped": False},
    ]
    rows = [{"cluster": i, "score": 3 + 2 * i, "labels": labels} for i, labels in enumerate(told)]
    scale = SimpleNamespace(table=lambda task: SimpleNamespace(counts=(10, 20, 30)))
    policy = SimpleNamespace(decoding=SimpleNamespace(ask="auto"), return_tokens=SimpleNamespace(scale=scale), task="")
    found = ask_point(policy, EvaluationResult(rows, [], 0.0))
    assert (found.ask, found.asked, found.bin, found.training_turns) == ("auto", 5.0, 2, 30)
    assert found.clipped == pytest.approx(1 / 3)
    assert found.achieved.mean == 5.0


def test_the_table_shows_obedience_and_bins_that_are_hardly_learnt():
    # asked 0, 2, 4 and achieved 1, 2, 3: a correlation of 1, and (1 + 0 + 1) / 3 apart
    lines = ask_table([point(0, 1.0), point(2, 2.0, turns=29), point(4, 3.0)]).splitlines()
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["0", "0.000", "0", "100"],
        ["2", "2.000", "2", "29"],
        ["4", "4.000", "4", "100"],
    ]
    assert [("few training turns" in line) for line in lines[1:4]] == [False, True, False]
    assert lines[4] == "correlation 1.000, mean distance 0.667"
    assert "correlation" not in ask_table([point(0, 1.0), point(2, 2.0)])


def test_rows_say_what_the_table_says():
    rows = ask_rows([point(0, 1.0), point(2, 2.0), point(4, 3.0)])
    assert rows[1] == {
        "ask": 2,
        "asked": 2.0,
        "bin": 2,
        "training_turns": 100,
        "clipped": 0.0,
        "achieved": {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 8},
    }
    assert rows[3] == {"correlation": pytest.approx(1.0), "mean_distance": pytest.approx(2 / 3)} and len(rows) == 4


def test_the_curve_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    draw_asks([point(4, 3.0), point(0, 1.0)], tmp_path / "asks.png")
    assert (tmp_path / "asks.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_asks_for_one_return_after_the_other(tmp_path, capsys):
    write_trajectories(tmp_path / "train.jsonl", Count().logs(40, seed=0))
    model = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
    }
    run = tmp_path / "run"
    settings = [
        f"--{key}={value}"
        for key, value in {
            "algorithm": "return_conditioned",
            "model.scratch": model,
            "model.vocab_size": 300,
            "data.train": tmp_path / "train.jsonl",
            "args.output_dir": run,
            "args.max_steps": 1,
            "args.use_cpu": True,
            "args.max_length": 96,
            "args.save_strategy": "no",
            "args.disable_tqdm": True,
        }.items()
    ]
    assert main(["train", *settings]) in (0, None)
    capsys.readouterr()
    play = ["evaluate", "play", str(run), "--environment", "count", "--episodes", "4", "--max_new_tokens", "2"]
    output = tmp_path / "asks.jsonl"
    assert main([*play, "--asks", "[2, p50, max]", "--output", str(output)]) in (0, None)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["ask"] for row in rows[:3]] == [2, "p50", "max"] and rows[0]["achieved"]["n"] == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["2.0", "p50", "max"]
    assert main([*play, "--asks", "[best]"]) == 2
    assert capsys.readouterr().err.startswith("error: ask: found 'best', expected")


def test_an_ask_of_one_episode_has_no_interval_in_file_and_picture(tmp_path):
    one = [replace(point(ask, ask), achieved=Estimate(ask, -math.inf, math.inf, 1)) for ask in (1.0, 2.0)]
    expected = [{"mean": ask, "low": None, "high": None, "n": 1} for ask in (1, 2)]
    assert [row["achieved"] for row in ask_rows(one)] == expected
    pytest.importorskip("matplotlib")
    draw_asks(one, tmp_path / "asks.png")
    assert (tmp_path / "asks.png").stat().st_size > 1000
