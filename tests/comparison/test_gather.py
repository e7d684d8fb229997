"""Runs of several folders in one report, and runs that are measured one by one."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from offline_lmrl.algorithms.behaviour_cloning import BCConfig
from offline_lmrl.cli.main import main
from offline_lmrl.comparison.gather import gather
from offline_lmrl.comparison.page import write_report
from offline_lmrl.comparison.report import Results, table
from offline_lmrl.comparison.rows import read_results
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.run import DataConfig, ModelConfig, RunConfig, train
from offline_lmrl.tasks.gamble import Gamble
from tests.comparison.test_page import CONFIG, SCORES, results, run, write

EVALUATION = {"episodes": 4, "first_seed": 0, "repeats": 1, "cluster": None, "decoding": {"max_new_tokens": 8}}


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # a report of tables


def folder_of(path, seeds=(0, 1), methods=("bc", "ilql"), evaluation=EVALUATION, environment=None, **changes):
    """A folder with the sampled rows of some methods, as `compare` writes it."""
    rows = []
    for row in (run(method, seed) for method in methods for seed in seeds):
        config = row["config"] | {"evaluation": evaluation, "environment": environment or CONFIG["environment"]}
        rows.append({**row, "config": config | changes})
    shown = {"kind": "comparison", "baseline": methods[0], "labels": None}
    shown["config"] = CONFIG | {"methods": {name: CONFIG["methods"][name] for name in methods}}
    return write(path, [shown, *rows])


def methods_of(rows):
    return {row["method"]: [run["seed"] for run in rows if run.get("method") == row["method"]] for row in rows[1:]}


def test_runs_of_two_comparisons_stand_in_one_table_paired_by_seed(tmp_path):
    first = folder_of(tmp_path / "a")
    second = folder_of(tmp_path / "b", methods=("ppo",))
    rows = gather([first, second])
    assert methods_of(rows) == {"bc": [0, 1], "ilql": [0, 1], "ppo": [0, 1]}
    difference = Results(rows).against_baseline(next(key for key in Results(rows).groups if key.method == "ppo"))
    assert difference.mean == SCORES["ppo"] - SCORES["bc"]
    assert "minus ilql" in table(gather([first, second], baseline="ilql"))
    with pytest.raises(InputError, match="baseline: found 'ilq', expected one of bc, ilql, ppo; did you mean 'ilql'"):
        gather([first, second], baseline="ilq")


def test_a_method_in_two_folders_is_one_if_only_its_seeds_differ(tmp_path):
    folders = [folder_of(tmp_path / "a", seeds=(0,)), folder_of(tmp_path / "b", seeds=(1,))]
    assert methods_of(gather(folders)) == {"bc": [0, 1], "ilql": [0, 1]}
    other = folder_of(
        tmp_path / "c", seeds=(2,), methods=("bc",), method=[{"algorithm": "bc", "args": {"max_steps": 8}}]
    )
    assert methods_of(gather([folders[0], other])) == {f"bc ({folders[0]})": [0], "ilql": [0], f"bc ({other})": [2]}
    again = folder_of(tmp_path / "d", seeds=(0,))
    assert set(methods_of(gather([folders[0], again]))) == {
        f"{name} ({folder})" for name in ("bc", "ilql") for folder in (folders[0], again)
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluation": EVALUATION | {"episodes": 5}}, "evaluation.episodes: found 5, expected 4 as in "),
        ({"evaluation": EVALUATION | {"first_seed": 9}}, "evaluation.first_seed: found 9, expected 0 as in "),
        (
            {"evaluation": EVALUATION | {"decoding": {"max_new_tokens": 9}}},
            "decoding.max_new_tokens: found 9, expected 8",
        ),
        ({"environment": {"name": "maze"}}, "environment.name: found 'maze', expected 'gamble' as in "),
        ({"partner": {"seed": 3}}, "partner: found {'seed': 3}, expected None as in "),
    ],
)
def test_rows_that_cannot_be_compared_are_refused_by_both_folders_and_the_setting(tmp_path, change, message):
    first, second = folder_of(tmp_path / "a"), folder_of(tmp_path / "b", **change)
    with pytest.raises(InputError, match=message) as refused:
        gather([first, second])
    assert str(refused.value).startswith(f"{second}: ") and str(first) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_joint_report_is_drawn_again_from_its_own_rows(tmp_path, capsys):
    folders = [folder_of(tmp_path / "a"), folder_of(tmp_path / "b", methods=("ppo",), data={"train": "of b"})]
    with pytest.raises(InputError, match="output: missing"):
        from offline_lmrl.cli.train import report

        report([str(folder) for folder in folders])
    assert main(["report", *map(str, folders), "--output", str(tmp_path / "joint"), "--baseline", "ilql"]) == 0
    printed = capsys.readouterr().out
    assert "minus ilql" in printed and printed.splitlines()[-1] == str(tmp_path / "joint" / "report.html")
    page = (tmp_path / "joint" / "report.md").read_text()
    assert write_report(tmp_path / "joint") == tmp_path / "joint"
    assert (tmp_path / "joint" / "report.md").read_text() == page and "of b" in (
        tmp_path / "joint" / "manifest.json"
    ).read_text()


def test_methods_with_other_numbers_of_episodes_have_no_difference(tmp_path):
    rows = results()
    for row in rows:
        if row.get("method") == "ilql":
            row["cells"] = [[name, 2 * total, 2 * count] for name, total, count in row["cells"]]
            row["scores"] = [2 * scores for scores in row["scores"]]
    found = Results(rows)
    ilql, bc = (next(key for key in found.groups if key.method == name) for name in ("ilql", "bc"))
    assert found.difference(ilql, bc) is None and found.against_baseline(ilql) is None
    assert not any("ilql" in (a.method, b.method) and a.method != b.method for a, b in found.wins["sampled"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_trajectories(folder / "logs.jsonl", Gamble().logs(8, seed=0))
    tiny = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 32}
    args = BCConfig(str(folder / "bc-7"), seed=7, max_steps=1, use_cpu=True, max_length=32, save_strategy="no")
    return train(
        RunConfig("bc", ModelConfig(scratch=tiny, vocab_size=270), DataConfig(str(folder / "logs.jsonl")), args)
    )


def test_a_run_measured_alone_is_a_row_like_those_of_a_comparison(trained, tmp_path, capsys):
    play = ["evaluate", "play", str(trained), "--environment", "gamble", "--episodes", "3", "--max_new_tokens", "2"]
    output = ["--output", str(tmp_path / "single")]
    assert main([*play, *output]) == main([*play, *output, "--temperature", "0"]) == main([*play, *output]) == 0
    shown, *rows = read_results(tmp_path / "single" / "results.jsonl")
    assert [(row["method"], row["seed"], row["decode"], row["n"]) for row in rows] == [
        ("bc", 7, "greedy", 3),
        ("bc", 7, "sampled", 3),
    ]
    assert shown["baseline"] == "bc" and rows[0]["regime"] == "labels only" and rows[0]["run"] == str(trained)
    assert rows[0]["cost"]["training_tokens"] == json.loads((trained / "complete.json").read_text())["training_tokens"]
    assert rows[0]["config"]["environment"] == {"name": "gamble"} and rows[0]["config"]["data"]["train"]
    assert rows[0]["config"]["evaluation"]["decoding"] == {"max_new_tokens": 2}
    assert (tmp_path / "single" / rows[0]["episodes"]).exists()
    assert main(["report", str(tmp_path / "single")]) == 0
    assert "bc, sampled" in (tmp_path / "single" / "report" / "report.md").read_text()
    capsys.readouterr()
    assert main([*play, *output, "--repeats", "2"]) == 2
    assert "evaluation.repeats: found 2, expected 1" in capsys.readouterr().err
    assert len(read_results(tmp_path / "single" / "results.jsonl")) == 3


def test_runs_measured_alone_are_seeds_of_one_method_only_if_they_were_trained_alike(trained, tmp_path, capsys):
    config = (trained / "config.yaml").read_text()
    for name, rate in (("bc-8", None), ("bc-9", "0.5")):
        folder = tmp_path / name
        shutil.copytree(trained, folder)
        changed = config.replace("\n  seed: 7", f"\n  seed: {name[-1]}").replace(str(trained), str(folder))
        if rate is not None:
            changed = re.sub("learning_rate: .*", f"learning_rate: {rate}", changed)
        (folder / "config.yaml").write_text(changed)
    play = ["--environment", "gamble", "--episodes", "3", "--max_new_tokens", "2", "--output", str(tmp_path / "out")]
    assert [main(["evaluate", "play", str(run), *play]) for run in (trained, tmp_path / "bc-8")] == [0, 0]
    capsys.readouterr()
    assert main(["evaluate", "play", str(tmp_path / "bc-9"), *play]) == 2
    assert "args.learning_rate: found 0.5, expected 1e-05" in capsys.readouterr().err
    rows = [row for row in read_results(tmp_path / "out" / "results.jsonl") if row["kind"] == "run"]
    assert [(row["method"], row["seed"]) for row in rows] == [("bc", 7), ("bc", 8)]


def test_play_of_a_run_in_another_way_is_refused_before_it_is_played(trained, tmp_path, capsys, monkeypatch):
    data, output = str(trained.parent / "logs.jsonl"), str(tmp_path / "single")
    play = ["--environment", "hidden_rule", "--episodes", "3", "--max_new_tokens", "2", "--output", output]
    assert main(["evaluate", "play", str(trained), *play]) == 0
    before = Path(output, "results.jsonl").read_text()
    twin = tmp_path / "twin" / trained.name
    shutil.copytree(trained, twin)
    monkeypatch.setattr("offline_lmrl.evaluation.play.evaluate_policy", None)
    for one, more, message in (
        (trained, ["--temperature", "0.5"], "decoding.temperature: found 0.5, expected 1.0"),
        (trained, ["--demonstrations", data], "demonstrations: found .*, expected None"),
        (trained, ["--task", "gamble"], "task: found 'gamble', expected None"),
        (twin, [], "bc: run: found .*, expected '"),
    ):
        capsys.readouterr()
        code, line = main(["evaluate", "play", str(one), *play, *more]), capsys.readouterr().err
        assert code == 2 and re.search(rf"{message}.*need another folder; `report` shows", line), line
    assert Path(output, "results.jsonl").read_text() == before


def test_a_model_of_another_library_measured_alone_declares_no_cost(trained, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in trained.iterdir():
        if file.is_file() and file.name not in ("complete.json", "config.yaml", "metrics.jsonl"):
            (plain / file.name).write_bytes(file.read_bytes())
    play = ["evaluate", "play", str(plain), "--environment", "gamble", "--episodes", "2", "--max_new_tokens", "2"]
    assert main([*play, "--output", str(tmp_path / "single")]) == 0
    _, row = read_results(Path(tmp_path / "single" / "results.jsonl"))
    assert (row["method"], row["algorithm"], row["regime"]) == ("plain", "checkpoint", "not declared")
    assert "training_tokens" not in row["cost"] and "training tokens" not in table([_, row])
