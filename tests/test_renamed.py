"""Names of settings from before version 0.2: in files, in flags, and in runs that were written then."""

import json
import shutil

import pytest
import yaml

from offline_lmrl.cli import main
from offline_lmrl.cli.parser import Command
from offline_lmrl.comparison.rows import read_results
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError
from offline_lmrl.renamed import KEYS, MOVED, VALUES, current, evaluate_commands

WALK = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 256}


def test_settings_are_renamed_at_every_depth_but_not_where_the_keys_are_not_ours():
    old = {
        "algorithm": "iql",
        "args": {"critic": "run", "beta": 2, "sampling": {"top_p": 0.9}},
        "methods": {"critic": {"judge": "prompt", "from": "critic"}},
        "environment": {"name": "mine", "prompt": "hello", "critic": 1},
        "preference": {"place": "terminal"},
        "seeds": [0, 1],
    }
    assert current(old) == {
        "algorithm": "awr",
        "args": {"value_model": "run", "decoding": {"top_p": 0.9, "beta": 2}},
        "methods": {"critic": {"reward_model": "prompt", "from": "critic"}},
        "environment": {"name": "mine", "prompt": "hello", "critic": 1},
        "preference": {"reward_at": "end"},
        "seeds": [0, 1],
    }
    assert current(current(old)) == current(old)


def test_chains_of_methods_in_results_are_renamed_but_not_the_labels_of_users(tmp_path):
    link = {"algorithm": "iql", "sampling": {}, "critic": [{"algorithm": "ilql", "judge": "x"}]}
    labels = {"memory": 0.5, "place": 2.0, "prompt": 1.0}
    row = {"kind": "published", "method": "critic", "score": 1.0, "labels": labels, "config": {"method": [link]}}
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = read_results(tmp_path / "results.jsonl")
    link = {"algorithm": "awr", "decoding": {}, "value_model": [{"algorithm": "ilql", "reward_model": "x"}]}
    assert found == row | {"config": {"method": [link]}}


def test_both_names_of_a_setting_are_refused_with_file_and_key():
    with pytest.raises(InputError, match="^f.yaml: args.beta: found it with decoding.beta, its new name"):
        current({"args": {"decoding": {"beta": 1}, "beta": 2}}, "f.yaml")
    with pytest.raises(InputError, match="^f.yaml: args.critic: found it with value_model, its new name"):
        current({"args": {"value_model": "a", "critic": "b"}}, "f.yaml")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--args.critic", "critic"], {"args.value_model": "critic"}),
        (["--args.sampling.top_p=.9"], {"args.decoding.top_p": ".9"}),
        (["--args.beta", "4", "--beta=4"], {"args.decoding.beta": "4", "beta": "4"}),
        (["--args={ask: max}"], {"args": '{"decoding": {"ask": "max"}}'}),
        (["--methods.m.args.clip=1"], {"methods.m.args.decoding.clip": "1"}),
        (["--algorithm=iql"], {"algorithm": "awr"}),
        (["--place", "terminal"], {"reward_at": "end"}),
        (["--place=turn"], {"reward_at": "turn"}),
        (["--methods.critic.sampling.ask", "max"], {"methods.critic.decoding.ask": "max"}),
        (["--environment.prompt", "terminal"], {"environment.prompt": "terminal"}),
        (["--scorer", "iql"], {"scorer": "iql"}),
        (["--scorer", "{kind: regex}"], {"scorer": "{kind: regex}"}),
        (
            ["--environment.algorithm", "iql", "--algorithm", "iql"],
            {"environment.algorithm": "iql", "algorithm": "awr"},
        ),
        (
            ["--settings.memory", "3", "--settings.place=terminal"],
            {"settings.memory": "3", "settings.place": "terminal"},
        ),
        (["--args", "{critic: runs/x, seed: 1}"], {"args": '{"value_model": "runs/x", "seed": 1}'}),
        (["--data.preference={place: terminal}"], {"data.preference": '{"reward_at": "end"}'}),
        (["--environment", "{prompt: x}", "--args", "{}"], {"environment": "{prompt: x}", "args": "{}"}),
    ],
)
def test_flags_are_renamed_with_their_values(given, expected, caplog):
    found = Command("x", {}).words(given)
    assert found == expected
    assert all(word.value == yaml.safe_load(word) for word in found.values() if word != ".9")
    old = {word.removeprefix("--").partition("=")[0] for word in given if word.startswith("--")}
    warned = "the command line: " in caplog.text
    assert warned or old == set(expected)


def as_before(value):
    """Settings and stored values as version 0.1 wrote them."""
    old = {new: key for key, new in KEYS.items()}
    if isinstance(value, dict):
        found = {}
        if isinstance(args := value.get("args"), dict):
            decoding = args.get("decoding", {})
            moved = {name: decoding[name] for name in MOVED["args"] if name in decoding}
            value = value | {"args": {name: inner for name, inner in args.items() if name != "decoding"} | moved}
        for name, inner in value.items():
            inner = (
                {new: was for was, new in VALUES.get(name, {}).items()}.get(inner, inner)
                if isinstance(inner, str)
                else inner
            )
            found[old.get(name, name)] = inner if name in ("template_text", "environment") else as_before(inner)
        return found
    return [as_before(inner) for inner in value] if isinstance(value, list) else value


def write_as_before(folder):
    for path in folder.rglob("*"):
        if path.name in ("config.json", "loop.json", "complete.json"):
            path.write_text(json.dumps(as_before(json.loads(path.read_text()))))
        elif path.suffix == ".yaml":
            path.write_text(yaml.safe_dump(as_before(yaml.safe_load(path.read_text()))))


@pytest.fixture
def logs(tmp_path):
    assert main(["prepare", "toys", "--task", "walk", "--episodes", "40", "--output", str(tmp_path / "data")]) == 0
    return tmp_path / "data" / "train.jsonl"


def command(tmp_path, logs, name, *more):
    spec = {"scratch": WALK, "vocab_size": 280} if name != "awr" else {"path": str(tmp_path / "ilql")}
    args = {"output_dir": str(tmp_path / name), "max_steps": 4, "save_steps": 2, "logging_steps": 1, "max_length": 200}
    args |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", **dict(more)}
    settings = {"algorithm": name, "model": spec, "data": {"train": str(logs)}, "args": args}
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(as_before(settings)))
    return main(["train", str(file)])


def test_runs_written_before_open_play_and_resume_to_the_same_weights(tmp_path, logs, capsys, caplog):
    few_shot = ("few_shot", {"n": 1, "max_tokens": 100})
    assert command(tmp_path, logs, "ilql", few_shot) == 0
    assert "args.prompt is now called args.few_shot" in caplog.text
    straight = (tmp_path / "ilql" / "model.safetensors").read_bytes()
    write_as_before(tmp_path / "ilql")
    policy = LanguagePolicy.load(tmp_path / "ilql", device="cpu")
    assert policy.decoding.beta == 4.0 and policy.spec.max_tokens == 100
    assert command(tmp_path, logs, "ilql", few_shot) == 0  # the same run, and complete
    shutil.rmtree(tmp_path / "ilql" / "checkpoint-4")
    for name in ("complete.json", "model.safetensors"):
        (tmp_path / "ilql" / name).unlink()
    assert command(tmp_path, logs, "ilql", few_shot) == 0
    assert "continues at step 2" in caplog.text
    assert (tmp_path / "ilql" / "model.safetensors").read_bytes() == straight


def test_an_extraction_written_before_is_the_same_run(tmp_path, logs, capsys):
    assert command(tmp_path, logs, "ilql") == 0
    value_model = ("value_model", str(tmp_path / "ilql"))
    assert command(tmp_path, logs, "awr", value_model) == 0
    write_as_before(tmp_path / "awr")
    found = yaml.safe_load((tmp_path / "awr" / "config.yaml").read_text())
    assert found["algorithm"] == "iql" and "critic_weights" in found["contents"]
    before = (tmp_path / "awr" / "config.yaml").stat().st_mtime_ns
    assert command(tmp_path, logs, "awr", value_model) == 0
    assert (tmp_path / "awr" / "config.yaml").stat().st_mtime_ns == before  # not trained again


def test_evaluate_of_before_becomes_the_commands_that_its_flags_choose(caplog):
    def now(*argv):
        return evaluate_commands(argv, lambda path: path == "pairs")

    assert now("run", "--environment", "maze", "--beta", "2") == [
        ["play", "run", "--beta", "2", "--environment", "maze"]
    ]
    assert "evaluate RUN is now called evaluate play RUN; version 0.2 is the last" in caplog.text
    assert now("run", "--data=logs", "--show", "1") == [["logs", "run", "--data=logs", "--show", "1"]]
    assert now("run", "--settings.size", "3", "--asks", "[0]", "--data", "logs", "--device", "cpu") == [
        ["play", "run", "--device", "cpu", "--settings.size", "3", "--asks", "[0]"],
        ["logs", "run", "--device", "cpu", "--data", "logs"],
    ]
    assert now("run", "--data", "pairs", "--output", "x") == [["scorer", "run", "--data", "pairs", "--output", "x"]]
    for argv in (["run"], ["plya", "run", "--beta", "2"]):
        with pytest.raises(InputError, match=f"evaluate: found '{argv[0]}', expected play, logs or scorer"):
            now(*argv)
