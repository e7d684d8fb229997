"""The command line from outside: exit codes, one-line errors that leave nothing behind, and what each command does."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest
import transformers
import yaml
from transformers import TrainingArguments

from offline_lmrl import read_trajectories
from offline_lmrl.algorithms import ALGORITHMS, load_algorithm
from offline_lmrl.cli import main
from offline_lmrl.cli.data import SOURCES, prepare_from_settings
from offline_lmrl.cli.main import COMMANDS
from offline_lmrl.cli.parser import Command, ready
from offline_lmrl.comparison.config import CompareConfig
from offline_lmrl.comparison.methods import MethodConfig
from offline_lmrl.decoding.config import PlannerConfig
from offline_lmrl.decoding.policy import LanguagePolicy, LanguageSession
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.errors import LONGEST_MESSAGE, InputError
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.logs.prompts import read_prompts
from offline_lmrl.logs.terminal import visible
from offline_lmrl.logs.yaml_text import read_yaml
from offline_lmrl.run import DataConfig, ModelConfig
from offline_lmrl.settings import REQUIRED, Parameter, all_settings, nearest, parameters_of, setting
from offline_lmrl.tasks.hidden_rule import HiddenRule
from offline_lmrl.tokens.few_shot import FewShotConfig
from offline_lmrl.tokens.tokenizers import train_tokenizer

GOOD = {"prompt": "left or right?", "completion": "left", "reward": 1.0}
TRAIN_FILE = """
algorithm: ilql
model:
  vocab_size: 280
  scratch: {model_type: gpt2, n_layer: 1, n_embd: 8, n_head: 1, n_positions: 64}
data: {train: DATA}
args: {output_dir: RUN, max_steps: 2, max_length: 64, use_cpu: true, learning_rate: 1e-3}
"""


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(command):
    """Runs what must be refused and returns the message of its one line."""

    def run(*arguments, stdin=""):
        code, out, err = command(*arguments, stdin=stdin)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
        return err.removeprefix("error: ").strip()

    return run


def write_rows(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_train_file(folder: Path, data: Path, run: Path) -> Path:
    file = folder / "train.yaml"
    file.write_text(TRAIN_FILE.replace("DATA", str(data)).replace("RUN", str(run)))
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with data.jsonl, train.yaml and the run that they give."""
    transformers.logging.disable_progress_bar()  # as a shell without a terminal has it
    folder = tmp_path_factory.mktemp("trained")
    rows = [{**GOOD, "completion": side, "reward": float(side == "left")} for side in ("left", "right") * 4]
    file = write_train_file(folder, write_rows(folder / "data.jsonl", *rows), folder / "run")
    assert main(["train", str(file)]) == 0
    return folder


# Bad input.


def messages(*turns):
    return {"messages": [dict(zip(("role", "content", "reward"), turn, strict=False)) for turn in turns]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "left or right?", ', "data.jsonl:2: JSON: "),
        ({**GOOD, "reward": "high"}, "data.jsonl:2: reward: found 'high'"),
        ({**GOOD, "reward": float("nan")}, "data.jsonl:2: reward: found nan"),
        ({**GOOD, "completion": ""}, "data.jsonl:2: "),
        (messages(("user", "hi", 1.0), ("assistant", "ho")), "data.jsonl:2: messages[0].reward: found 1.0 on a turn"),
        (messages(("user", "hi"), ("assistant", 3)), "data.jsonl:2: messages[1].content: found 3"),
        (messages(("user", "hi"), ("assistant", "ho", float("nan"))), "data.jsonl:2: messages[1].reward: found nan"),
        (messages(("user", "hi"), ("user", "ho")), "data.jsonl:2: messages: found only untrained turns"),
        (messages(("user", "hi"), ("robot", "ho")), "data.jsonl:2: messages[1].role: found 'robot'"),
        (messages(("user", "hi"), ("assistant", "")), "data.jsonl:2: messages[1].content: found empty text"),
        ([1, 2], "data.jsonl:2: "),
    ],
)
def test_bad_row_is_refused_with_file_row_and_field(refused, tmp_path, row, said):
    data = write_rows(tmp_path / "data.jsonl", GOOD, row)
    assert said in refused("check", data)
    file = write_train_file(tmp_path, data, tmp_path / "run")
    assert said in refused("train", file)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["run\0", "run\udcff"])
def test_text_that_no_file_can_hold_is_refused_before_anything_is_done(refused, tmp_path, name):
    file = write_train_file(tmp_path, write_rows(tmp_path / "data.jsonl", GOOD), tmp_path / "run")
    made = ("prepare", "maze", "--output", name)
    for arguments in (("train", file, "--args.output_dir", name), ("check", name), made):
        assert refused(*arguments).startswith(f"found {name!r}, expected text in UTF-8 without NUL characters")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "train.yaml"]


def test_numbers_beyond_64_bits_are_refused_from_file_and_command_line(refused, tmp_path):
    file = write_train_file(tmp_path, write_rows(tmp_path / "data.jsonl", GOOD), tmp_path / "run")
    assert refused("train", file, "--args.seed", 2**64) == (
        f"args.seed: found {2**64}, expected a number of at most 64 bits"
    )
    assert len(refused("train", file, "--args.seed", "1" * 5000)) < LONGEST_MESSAGE
    file.write_text(file.read_text() + f"prepare: {{command: maze, episodes: {2**64}}}")
    assert f"found text that is not YAML ({2**64}, expected a number of at most 64 bits)" in refused("train", file)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("--args.report_to", "comet_ml"), "report_to: found comet_ml, which cannot be used here (Comet"),
        (("--args.report_to", "paper"), "report_to: found 'paper', expected none, or some of azure_ml, "),
        (("--args.lr_scheduler_kwargs", "{min_lr_rat: 0.1}"), "lr_scheduler_kwargs: found {'min_lr_rat': 0.1} ("),
        (("--args.seed", 2**32), "seed: found 4294967296, expected 0 to 4294967295"),
        (("--args.seed", "? "), "args.seed: "),
        (("--args.seed", "a: &a [*a]"), "found 'a: &a [*a]', with *a, which refers to no value that ends before it"),
        (("--args.output_dir", "x" * 5000), ""),
        (
            ("--model.scratch", "{model_type: [gpt2]}"),
            "model.scratch.model_type: found ['gpt2'], expected a causal LM",
        ),
        (("--model.scratch", "{model_type: gpt2, n_layer: [1]}"), "model.scratch.n_layer: found [1], expected int"),
        (
            ("--model.scratch", "{model_type: gpt2, n_embd: -8}"),
            "model.scratch: found fields from which transformers cannot make a gpt2 model (",
        ),
        (("--model.scratch", f"{{model_type: gpt2, n_layer: {2**40}}}"), "model.scratch: found 1099511627776 layers"),
        (
            ("--model.scratch", f"{{model_type: gpt2, n_positions: {2**40}}}"),
            "model.scratch: found a model of ",
        ),
        (("--model.scratch", "{model_type: gpt2, to_dict: 1}"), "model.scratch.to_dict: gpt2 has no such field"),
        (("--algorithm", "[bc]"), "algorithm: found '[bc]', expected one of bc, "),
    ],
)
def test_settings_that_cannot_be_trained_with_are_named_before_training(refused, trained, tmp_path, settings, said):
    arguments = ("train", trained / "train.yaml", "--args.output_dir", tmp_path / "run")
    assert refused(*arguments, *settings).startswith(said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", {"offline_lmrl": 3}, "offline_lmrl: found 3, expected an object"),
        (
            "config.json",
            {"offline_lmrl": {"window": {"context": 1, "strid": 2}}},
            "window: strid: found a setting that",
        ),
        (
            "config.json",
            {"offline_lmrl": {"window": {"stride": "1"}}},
            "offline_lmrl.window.stride: found '1', expected",
        ),
        ("config.json", {"offline_lmrl": {"reward_scale": {"scale": -1.0}}}, "reward_scale: reward_scale: found -1.0"),
        (
            "config.json",
            {"offline_lmrl": {"value_heads": {"heads": 2}}},
            "offline_lmrl.value_heads: found {'heads': 2}",
        ),
        (
            "config.json",
            {"offline_lmrl": {"value_heads": {}}},
            "offline_lmrl.value_heads: found {}, expected an object",
        ),
        ("config.json", {"offline_lmrl": {"decoding": [1]}}, "offline_lmrl.decoding: found [1], expected an object"),
        ("config.json", {"offline_lmrl": {"decoding": {"beta": "x"}}}, "beta: found 'x', expected a finite number"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id: found 'x', expected the id of a token"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "found a folder whose tokenizer cannot be read ("),
        ("model.safetensors", b"", "found a folder whose model cannot be read ("),
        (
            "chat_template.jinja",
            b"{% for m in messages %}" + b"(" * 3000,
            "trained with another tokenizer or chat templ",
        ),
    ],
)
def test_a_damaged_run_is_refused_in_one_line_by_all_that_open_one(refused, trained, tmp_path, file, content, said):
    run = shutil.copytree(trained / "run", tmp_path / "damaged")
    if isinstance(content, bytes):
        (run / file).write_bytes(content)
    else:
        (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | content))
    for arguments in (
        ("evaluate", "play", run, "--environment", "gamble"),
        ("generate", run),
        ("evaluate", "logs", run, "--data", trained / "data.jsonl"),
        ("export", run, "--output", tmp_path / "out", "--q_reduce", "mean", "--support", "0"),
    ):
        assert said in refused(*arguments, stdin="left or right?")
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_files_are_refused(refused, tmp_path):
    empty = write_rows(tmp_path / "empty.jsonl")
    missing = tmp_path / "missing.jsonl"
    assert refused("check", empty).startswith(f"{empty} ")
    assert refused("check", missing).startswith(f"{missing}: found no such file")
    for data in (empty, missing):
        assert str(data) in refused("train", write_train_file(tmp_path, data, tmp_path / "run"))
    for name in ("train", "compare"):
        assert str(tmp_path / "missing.yaml") in refused(name, tmp_path / "missing.yaml")
    assert not (tmp_path / "run").exists()


def test_rows_longer_than_the_context_are_refused(refused, tmp_path):
    data = write_rows(tmp_path / "long.jsonl", {**GOOD, "completion": "left " * 200})
    file = write_train_file(tmp_path, data, tmp_path / "run")
    assert "longer than max_length" in refused("train", file)
    short = write_rows(tmp_path / "data.jsonl", GOOD)
    said = refused("train", file, "--data.train", short, "--args.max_length", 100)
    assert said == "max_length: found 100, expected at most the model's 64 positions"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "wrong", "said"),
    [
        ("args", {"lerning_rate": 1}, "args.lerning_rate: found a setting that does not exist; did you mean 'args."),
        ("learning_rate", 1, "learning_rate: found a setting that does not exist; did you mean 'args.learning_rate'?"),
        ("args", {"expectile": 1.5}, "expectile: found 1.5, expected "),
        ("args", {"expectile": float("nan")}, "expectile: found nan, expected "),
        ("args", {"context": "two"}, "args.context: found 'two', expected a whole number or null"),
        ("args", {"value_heads": "cubic"}, "args.value_heads: found 'cubic', expected one of tied, linear, mlp"),
        ("args", {"learning_rate": None}, "args.learning_rate: found null, expected a finite number"),
        ("args", 3, "args: found 3, expected a mapping of settings"),
        ("model", {"path": "here"}, "expected exactly one of them"),
        ("algorithm", "dqn", "algorithm: found 'dqn', expected one of bc, mc_awbc, ilql"),
        ("algorithm", ["bc"], "algorithm: found ['bc'], expected a name"),
    ],
)
def test_bad_setting_is_refused_with_its_key(refused, tmp_path, section, wrong, said):
    file = write_train_file(tmp_path, write_rows(tmp_path / "data.jsonl", GOOD), tmp_path / "run")
    settings = read_yaml(file, "settings")
    settings[section] = {**settings[section], **wrong} if isinstance(wrong, dict) else wrong
    file.write_text(yaml.safe_dump(settings))
    assert said in refused("train", file)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["- 1", "args: {", "just words", ""])
def test_file_that_is_no_mapping_is_refused(refused, tmp_path, text):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    for name in ("train", "compare"):
        assert refused(name, file).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--args.lerning_rate", "1"], "args.lerning_rate: found a setting that does not exist; did you mean "),
        (["--args.learning", "1"], "args.learning: found a setting that does not exist"),  # no abbreviations
        (["--args.stride=x"], "args.stride: found 'x', expected a whole number"),
        (["--args.stride"], "--args.stride: found nothing after it, expected a value"),
        (["more.yaml"], "found 'more.yaml' among the settings, expected --key value pairs"),
    ],
)
def test_bad_override_is_refused_with_its_key(refused, trained, arguments, said):
    assert said in refused("train", trained / "train.yaml", *arguments)


def test_unknown_names_are_refused_with_the_nearest(refused, trained):
    assert refused("trian").endswith("did you mean 'train'?")
    assert refused("prepare", "maz", "--output", "x").endswith("did you mean 'maze'?")
    for name in ("config", "train", "compare"):
        assert refused(name, "maze/ful").endswith("did you mean 'maze/full'?")
    assert "'maze'" in refused("evaluate", "play", trained / "run", "--environment", "maez")
    assert "settings" in refused(
        "evaluate", "play", trained / "run", "--environment", "maze", "--setings.observed", "full"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--environment", "gamble", "--episodes", "0"], "episodes: found 0"),
        (["--environment", "gamble", "--temperature", "-1"], "temperature: found -1.0"),
        (["--environment", "gamble", "--top_p", "1.5"], "top_p: found 1.5"),
        (["--data", "DATA", "--show", "9"], "show: found 9, expected 1 to 8"),
        (["--show", "1", "--environment", "gamble"], "data: missing, expected `offline-lmrl evaluate logs RUN"),
        (["--environment", "gamble", "--planner.depth", "0"], "depth: found 0"),
        (["--environment", "gamble", "--planner.wdth", "2"], "did you mean"),
        (["--data", "DATA", "--planner.width", "2"], "environment: missing, expected `offline-lmrl evaluate play RUN"),
        (["--environment", "gamble", "--planner.width", "2", "--ask", "max"], "ask: found 'max' with --planner"),
        (["--environment", "gamble", "--asks", "[0, 1]", "--ask", "2"], "ask: found 2.0 with --asks"),
        (["--environment", "gamble", "--asks", "[]"], "asks: found none, expected a list of returns to request"),
        (["--data", "DATA", "--asks", "[0]"], "environment: missing, expected `offline-lmrl evaluate play RUN"),
        (["--environment", "gamble", "--asks", "[0]", "--output", "x.png"], "output: found x.png with --asks"),
        (
            ["--environment", "gamble", "--demonstrations", "DATA"],
            "environment: found Gamble, which has no method task",
        ),
        ([], "expected play, logs or scorer"),
    ],
)
def test_bad_number_is_refused_before_the_model_is_loaded(refused, trained, monkeypatch, arguments, said):
    monkeypatch.setattr("offline_lmrl.decoding.policy.LanguagePolicy.load", None)
    arguments = [str(trained / "data.jsonl") if word == "DATA" else word for word in arguments]
    assert said in refused("evaluate", trained / "run", *arguments)


@pytest.mark.parametrize(("name", "how"), [("evaluate play", ["--environment", "gamble"]), ("generate", ["--chat"])])
def test_the_task_decides_which_returns_can_be_asked_for(refused, trained, monkeypatch, name, how):
    def load(run, task, **_):
        raise InputError(f"played: {task}")

    monkeypatch.setattr("offline_lmrl.decoding.policy.LanguagePolicy.load", load)
    assert "played: maze" in refused(*name.split(), trained / "run", *how, "--task", "maze")


def test_a_device_that_is_not_there_is_refused(refused, trained):
    for device in ("gpu", "cuda:99"):
        said = refused("generate", trained / "run", "--device", device, stdin="hi")
        assert said.startswith(f"device: found '{device}' (")


def test_run_with_another_tokenizer_is_refused(refused, trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    train_tokenizer(["something else entirely"] * 9, 270).save_pretrained(tmp_path / "run")
    assert "tokenizer: found fingerprint" in refused("generate", tmp_path / "run", stdin="hi")


def test_path_that_cannot_be_written_is_refused(refused, trained, tmp_path):
    blocked = write_rows(tmp_path / "file", "a file, not a folder") / "out"
    assert str(blocked) in refused("prepare", "maze", "--episodes", 4, "--output", blocked)
    assert str(blocked) in refused("train", trained / "train.yaml", "--args.output_dir", blocked)
    for name, rest in (("generate", []), ("evaluate play", ["--environment", "gamble"])):
        assert str(blocked) in refused(*name.split(), trained / "run", *rest, "--output", blocked, stdin="hi")
        assert refused(*name.split(), trained / "run", *rest, "--output", ".", stdin="hi").startswith(
            "output: found ."
        )
    said = refused("generate", trained / "run", "--output", tmp_path, stdin="hi")
    assert said == f"output: found the folder {tmp_path}, expected a file"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("", "stdin: found no prompt"),
        ("hi\n{", "stdin:2: JSON: "),
        ('{"messages": ' + "[" * 9999, "stdin:1: JSON: found a line that does not parse: nested too deep"),
        ('{"text": "hi"}', "stdin:1: prompt: found None, expected text or a list of messages"),
        ('{"messages": [{"role": "robot", "content": "hi"}]}', "stdin:1: messages[0].role: found 'robot'"),
        ('{"prompt": [{"role": "user"}]}', "stdin:1: prompt: found message without content, expected messages of"),
    ],
)
def test_bad_prompt_is_refused_with_its_line(refused, trained, prompts, said):
    assert said in refused("generate", trained / "run", stdin=prompts)


def test_prompts_are_spelt_as_logs_are(tmp_path):
    said = [{"from": "developer", "value": "s"}, {"from": "human", "value": "q"}]
    rows = [{"conversations": said}, {"messages": said}, {"prompt": said}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "q\n")
    expected = [("system", "s"), ("user", "q")]
    found = read_prompts(str(tmp_path / "prompts.jsonl"))
    assert [[(turn.role, turn.content) for turn in turns] for turns in found] == [expected] * 3 + [expected[1:]]


def test_bad_input_prints_one_line_from_a_shell_too(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", GOOD, "{")
    shell = [sys.executable, "-m", "offline_lmrl.cli", "check", str(data)]
    run = subprocess.run(shell, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"error: .*data\.jsonl:2: JSON: .*\n", run.stderr)


# Commands.


def test_top_level_help_names_every_command(command):
    code, out, _ = command("--help")
    assert code == 0
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)
    assert re.search("^  train .*: bc, .*reward_model$", out, re.MULTILINE)
    assert command()[0] == 2


def test_train_help_is_about_the_algorithm(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--algorithm", "bc", "--help"])
    out = capsys.readouterr().out
    assert "--args.keep_share" in out and "--args.expectile" not in out and "--args.output_dir" not in out


def test_interrupt_exits_130_without_a_traceback(command, monkeypatch):
    def interrupted(name, argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["offline_lmrl.cli.main"], "_run", interrupted)
    assert command("train") == (130, "", "interrupted\n")


def test_settings_on_the_command_line_win_over_the_file(command, trained, tmp_path):
    arguments = ("train", trained / "train.yaml", "--args.output_dir", tmp_path / "run", "--args.max_steps", 1)
    code, out, _ = command(*arguments)
    assert (code, out.splitlines()[-1]) == (0, str(tmp_path / "run"))
    resolved = read_yaml(tmp_path / "run" / "config.yaml", "settings")
    assert (resolved["args"]["max_steps"], resolved["args"]["learning_rate"]) == (1, 1e-3)
    assert command(*arguments)[:2] == (0, f"{tmp_path / 'run'}\n")  # complete, so there is nothing to do


def test_dry_run_says_what_would_run(command, trained, tmp_path):
    arguments = ("--args.output_dir", tmp_path / "run", "--dry_run")
    code, out, _ = command("train", trained / "train.yaml", *arguments)
    assert code == 0
    assert "optimizer steps: 2\n" in out and "windows: 8\n" in out
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_evaluate_plays_an_environment_and_saves_what_can_be_trained_on(command, trained, tmp_path):
    settings = ("--environment", "gamble", "--episodes", 3, "--max_new_tokens", 3)
    code, out, _ = command("evaluate", "play", trained / "run", *settings, "--output", tmp_path / "played.jsonl")
    assert code == 0 and out.startswith("score: ") and "\nn: 3\n" in out
    assert len(read_trajectories(tmp_path / "played.jsonl")) == 3


def test_evaluate_plays_what_is_planned(command, trained):
    settings = ("--environment", "gamble", "--episodes", 2, "--max_new_tokens", 3, "--planner.expand", 2)
    code, out, _ = command("evaluate", "play", trained / "run", *settings, "--planner.scorer", trained / "run")
    assert code == 0 and "\nplanned_tokens: " in out


def test_evaluate_plays_every_episode_behind_a_demonstration_of_its_task(command, trained, tmp_path, monkeypatch):
    shown, read, start = tmp_path / "shown.jsonl", [], LanguagePolicy.start
    write_trajectories(shown, HiddenRule().demonstrations(1, seed=0))

    def watched(self, seeds, asks=None, few_shot=None):
        read.extend(demonstration.task for (demonstration,) in few_shot)
        return start(self, seeds, asks)

    monkeypatch.setattr(LanguagePolicy, "start", watched)
    play = ("--environment", "hidden_rule", "--episodes", 3, "--max_new_tokens", 3)
    code, out, _ = command("evaluate", "play", trained / "run", *play, "--demonstrations", shown)
    assert code == 0 and "\nn: 3\n" in out and read == [HiddenRule().task(seed) for seed in range(3)]


def test_evaluate_reads_held_out_logs(command, trained):
    code, out, _ = command("evaluate", "logs", trained / "run", "--data", trained / "data.jsonl", "--betas", "[1, 2]")
    assert code == 0 and out.startswith("8 trajectories, ")
    assert "no replies were generated: max_length: found " in out  # the run's window has no space for 64 tokens
    code, out, _ = command("evaluate", "logs", trained / "run", "--data", trained / "data.jsonl", "--show", 2)
    assert code == 0 and "assistant: right   [reward 0]" in out


def test_evaluate_lets_every_beta_reply_to_held_out_logs_and_writes_a_page(command, trained, tmp_path):
    logs = (
        "evaluate",
        "logs",
        trained / "run",
        "--data",
        trained / "data.jsonl",
        "--prompts",
        2,
        "--max_new_tokens",
        3,
    )
    code, out, err = command(*logs, "--betas", "[1]", "--output", tmp_path / "out")
    assert code == 0, err
    assert "\n  β 1 " in out and "chosen offline: β " in out and f"written: {tmp_path / 'out' / 'choices.html'}" in out
    found = json.loads((tmp_path / "out" / "choices.json").read_text())
    assert found["decoding"]["max_new_tokens"] == 3 and len(found["choices"]["rows"][1]["texts"]) <= 2
    for wrong, message in (
        (("--prompts", -1), "prompts: found -1, expected 0 (no replies) or more"),
        (("--output", tmp_path / "page.html"), "page.html, expected a folder or a file that ends in .json"),
        (("--asks", "[max]"), "ask: found 'max', expected null"),
        (("--kl_budget", 0.3), "kl_budget: found"),
    ):
        code, _, err = command(*logs, *wrong)
        assert code == 2 and message in err, err


def test_generated_replies_are_records_that_can_be_read_again(command, trained, tmp_path):
    prompts = 'left or right?\n\n{"prompt": "up?"}\n{"messages": [{"role": "user", "content": "down?"}]}\n'
    settings = ("--n", 2, "--beta", 2, "--max_new_tokens", 3, "--output", tmp_path / "replies.jsonl")
    assert command("generate", trained / "run", *settings, stdin=prompts)[:2] == (0, "")
    replies = read_trajectories(tmp_path / "replies.jsonl")
    assert [reply.turns[0].content for reply in replies] == ["left or right?"] * 2 + ["up?"] * 2 + ["down?"] * 2
    for reply in replies:
        said = reply.turns[-1]
        assert 1 <= len(said.token_ids) == len(said.behaviour_log_prob) <= 3
        assert len(reply.labels["policy_log_prob"][0]) == len(said.token_ids)
    file = tmp_path / "prompts.txt"
    file.write_text("left or right?\n")
    _, out, _ = command("generate", trained / "run", "--prompts", file, "--beta", 2, "--max_new_tokens", 3)
    assert json.loads(out)["messages"][1]["token_ids"] == list(replies[0].turns[1].token_ids)


def test_generate_prints_text_on_a_terminal_and_json_in_a_pipe(command, trained, tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text("left or right?\n")
    (tmp_path / "two.txt").write_text("left or right?\nup?\n")

    def printed(prompts, *more):
        settings = ("--temperature", 0, "--beta", 2, "--max_new_tokens", 3, *more)
        code, out, _ = command("generate", trained / "run", "--prompts", tmp_path / prompts, *settings)
        return out if code == 0 else None

    rows = [json.loads(line)["messages"][-1]["content"] for line in printed("two.txt").splitlines()]
    assert printed("two.txt", "--json", "false") == visible(f"> left or right?\n{rows[0]}\n\n> up?\n{rows[1]}\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert printed("one.txt") == visible(f"{rows[0]}\n")
    assert json.loads(printed("one.txt", "--json"))["messages"][-1]["content"] == rows[0]
    assert printed("one.txt", "--json", "false", "--output", tmp_path / "x.jsonl") is None


def test_chat_answers_turn_by_turn_until_the_input_ends(command, trained, monkeypatch):
    asked, reply = [], LanguageSession.reply

    def watched(self, rows, histories):
        asked.append(list(histories[0]))
        return reply(self, rows, histories)

    monkeypatch.setattr(LanguageSession, "reply", watched)
    code, out, _ = command("generate", trained / "run", "--chat", "--max_new_tokens", 2, stdin="hello\n\nagain\n")
    assert code == 0
    assert [turn.content for turn in asked[1] if turn.role == "user"] == ["hello", "again"]
    assert asked[1][1].role == "assistant" and asked[1][1].token_ids


def test_check_shows_a_row_token_by_token(command, trained):
    code, out, _ = command("check", trained / "data.jsonl", "--tokenizer", trained / "run", "--row", 2)
    assert code == 0
    assert re.search(r"'<eos>' +│ assistant │ x +│ 0 ", out)


def test_prepare_writes_what_check_reads(command, tmp_path):
    code, out, _ = command("prepare", "maze", "--output", tmp_path / "maze", "--episodes", 12)
    assert code == 0 and out.startswith("episodes: 12\n")
    assert command("check", tmp_path / "maze")[0] == 0


def test_check_takes_several_paths_as_splits_of_one_data_set(command, tmp_path):
    row = {"prompt": "q", "completion": "a", "stars": 1}
    for name, group in (("train", "g"), ("held", "g"), ("other", "h")):
        rows = [{**row, "stars": stars, "group": group} for stars in (1, 2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held, other = (tmp_path / f"{name}.jsonl" for name in ("train", "held", "other"))
    code, out, _ = command("check", train, held, other, "--reward", "stars")
    assert code == 0
    out = " ".join(out.split())
    assert "train.jsonl, held.jsonl: 1 groups are in both splits" in out and "all 2 rows are in one group, 'h'" in out
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    pairs = tmp_path / "pairs.jsonl"
    code, _, error = command("check", train, pairs)
    assert (code, error) == (
        2,
        f"error: data: found comparisons in {pairs} and none in {train}, expected data of one kind\n",
    )


def test_prepare_makes_comparisons_that_check_describes(command, tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "a long reply", "rejected": f"no {i % 2}"} for i in range(20)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n")
    code, out, _ = command("prepare", "preferences", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out")
    assert code == 0 and "\n  the longer reply: wins: 20, losses: 0, ties: 0, accuracy: 1, interval: [0.8389, 1" in out
    counts = out[out.index("\nsplits:") :]  # last, where they are seen
    assert counts.startswith("\nsplits:\n  train: comparisons: 20, groups: 20\nrows: 21\nimported: 20\ndropped:\n")
    assert "\n  fields: expected context, options and target; or" in counts and "\nrepaired: none\n" in counts
    code, out, _ = command("check", tmp_path / "out")
    assert code == 0 and out.startswith("train:\n  comparisons: ") and "    replies of at most one word: 0\n" in out
    assert out.endswith("repairs and drops: none\ngroups in two splits: none\n")
    (tmp_path / "in.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n")
    code, _, err = command("prepare", "preferences", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "new")
    assert code == 2 and err.count("\n") == 1 and "found a git-LFS pointer" in err


def test_prepare_block_of_a_comparison_is_typed(tmp_path):
    prepare_from_settings({"command": "maze", "output": str(tmp_path / "maze"), "episodes": 12})
    assert (tmp_path / "maze" / "train.jsonl").exists()
    with pytest.raises(InputError, match="^prepare.episodes: found 'many', expected a whole number$"):
        prepare_from_settings({"command": "maze", "output": str(tmp_path / "other"), "episodes": "many"})
    with pytest.raises(InputError, match="^prepare.input: missing, expected text or a path$"):
        prepare_from_settings({"command": "kto", "output": str(tmp_path / "other")})


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_names_what_it_needs_and_refuses_what_none_can_use(refused, capsys, tmp_path, source):
    with pytest.raises(SystemExit):
        main(["prepare", source, "--help"])
    text = capsys.readouterr().out
    needed = re.findall(r"--(\w+) [A-Z]", text.splitlines()[0])
    assert "output" in needed
    assert refused("prepare", source).startswith(f"{needed[0]}: missing, expected `offline-lmrl prepare")
    given = {"input": tmp_path / "none.jsonl", "output": tmp_path / "out", "task": "count", "tokenizer": "none"}

    def said(**settings):
        values = {**{name: given[name] for name in needed}, **settings}
        return refused("prepare", source, *(word for name, value in values.items() for word in (f"--{name}", value)))

    for name in {"input", "output"} & set(needed):
        assert said(**{name: ""}) == f"{name}: found empty text, expected a path"
    if "--validation" in text:
        for share in ("1.5", "-0.1", "1.0"):
            assert said(validation=share) == f"validation: found {share}, expected 0 to below 1"
        assert said(validation=".nan") == "validation: found nan, expected a finite number"
        assert said(validation="inf") == "validation: found 'inf', expected a finite number"


def test_config_lists_and_prints_the_shipped_files(command):
    _, out, _ = command("config")
    assert "maze/full\n" in out
    text = (Path(__file__).parents[2] / "configs" / "maze" / "full.yaml").read_text()
    assert command("config", "maze/full")[:2] == (0, text)


# The parser.


def test_nearest_prefers_the_right_name_in_another_group():
    assert nearest("seed", ["data.feed", "args.seed"]) == "; did you mean 'args.seed'?"
    assert nearest("args.sed", ["data.feed", "args.seed"]) == "; did you mean 'args.seed'?"
    assert nearest("xyz", ["data.feed", "args.seed"]) == ""


def test_overrides_are_text_with_the_value_that_yaml_reads_in_it():
    found = Command("x", {}).words(["--a.b", "1e-3", "--c=[1, 2]", "--d", "null", "--e", "{x", "--f", "-1"])
    assert found == {"a.b": "1e-3", "c": "[1, 2]", "d": "null", "e": "{x", "f": "-1"}
    assert [word.value for word in found.values()] == [1e-3, [1, 2], None, "{x", -1]
    for words in (["--a"], ["--a", "--b", "1"]):
        with pytest.raises(InputError, match="--a: found nothing after it"):
            Command("x", {}).words(words)


@dataclass
class Base:
    old: int = setting(1, "A field of the base.")
    other: int = setting(1, "Another.")


@dataclass
class Inner:
    deep: int = setting(0, "A field of a field.")


@dataclass
class Ours(Base):
    new: int = setting(1, "A new field.")
    newer: Inner | None = setting(None, "A field that may be null.")
    other: int = setting(2, "Another default.")


CONFIGS = [*(load_algorithm(name)[0] for name in ALGORITHMS), ModelConfig, DataConfig, DecodingConfig, PlannerConfig]
CONFIGS += [CompareConfig, MethodConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_has_a_help_text_and_no_two_share_a_sentence(config):
    texts = {name: one.help for name, one in all_settings(parameters_of(config)) if one.help}
    assert {field.name for field in fields(config)} <= set(texts)
    theirs = TrainingArguments.__dataclass_fields__
    ours = {name: text for name, text in texts.items() if name.partition(".")[0] not in theirs}
    sentences = Counter(sentence for text in ours.values() for sentence in re.split(r"(?<=\.) (?=[A-Z])", text))
    assert [sentence for sentence, n in sentences.items() if n > 1] == []
    assert all(text[-1] in ".]" and not re.search(r"\bNone\b", text) for text in ours.values())


def test_help_shows_our_fields_first_and_inherited_ones_on_request():
    command = Command("x", {"a": Parameter(Ours), "flag": Parameter(bool, False, "A %.")}, inherited={"a.old"})
    for everything, names in ((False, []), (True, ["old"])):
        text = command.help(everything)
        assert re.findall(r"--a\.([\w.]+)", text) == ["other", "new", *names, "newer.deep"]
        assert "--flag [{true,false}]" in text and "A %. (true or false; default: false)" in text
    assert "Another default. (a whole number; default: 2)" in " ".join(text.split())


def function(data: list[str], rate: float = 0.5, *, output: Path, kind: Literal["a", "b"] = "a", fast: bool = False):
    """Do something.

    Args:
      data: files
        to read.
      rate: a rate.
    Raises: nothing.
    """


@dataclass
class Config:
    """Do something else."""

    run: str = setting(REQUIRED, "A run.")
    decoding: dict = setting(dict, "Settings.")


def measure(config: Config):
    """Measure."""
    return config


def test_a_function_gives_the_settings_of_a_command_and_their_help(capsys):
    def command(*words):
        return ready("do", function, words, ("data",)).keywords

    with pytest.raises(SystemExit, match="0"):
        command("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: offline-lmrl do DATA ... --output OUTPUT [--key value ...] Do something. settings:")
    assert "files to read. (a list)" in text and "--kind {a,b}" in text and "nothing" not in text
    found = {"data": ["5", "b"], "rate": 1.0, "output": Path("7"), "fast": True}
    assert command("5", "b", "--rate", "1", "--output=7", "--fast") == found
    assert command("5", "--fast", "b", "--fast", "false", "--output", "7")["fast"] is False
    for words, message in (
        (["--output", "x"], "data: missing, expected `offline-lmrl do DATA ... --output OUTPUT"),
        (["a"], "output: missing, expected `offline-lmrl do"),
        (["a", "--output", "x", "--kind", "c"], "kind: found 'c', expected one of a, b"),
        (["a", "--output", "x", "--rate"], "--rate: found nothing after it, expected a value"),
    ):
        with pytest.raises(InputError, match=message):
            command(*words)


def test_a_config_gives_the_settings_of_a_command_and_decoding_is_given_by_flags():
    assert ready("do", measure, ["7", "--beta", "2", "--stop", "[x]"], ("run",))() == Config(
        "7", {"beta": 2.0, "stop": ("x",)}
    )
    with pytest.raises(InputError, match="^bet: found a setting that does not exist; did you mean 'beta'"):
        ready("do", measure, ["7", "--bet", "2"], ("run",))


def test_an_error_names_the_file_if_the_value_is_from_it():
    command = Command("x", {"few": Parameter(FewShotConfig), "rate": Parameter(float, 1.0)}, takes_file=True)
    for settings, words, message in (
        ({"rate": "x"}, [], "f.yaml: rate: found 'x'"),
        ({"rate": "x"}, ["--rate", "y"], "rate: found 'y'"),
        ({"few": {"n": 0}}, ["--rate", "2"], "f.yaml: few_shot.n: found 0"),
        ({"few": {"n": 0}}, ["--few.n", "x"], "few.n: found 'x'"),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            command.read(words, settings, "f.yaml")


@dataclass
class WithPrompt:
    few_shot: FewShotConfig | None = None


def test_a_group_that_may_be_null_is_read_and_checked():
    def parsed(*argv, **settings):
        return Command("x", {"args": Parameter(WithPrompt)}).read(argv, settings, "f.yaml")["args"].few_shot

    assert parsed() is None
    assert parsed("--args.few_shot.n", "2", "--args.few_shot.part", "last") == FewShotConfig(n=2, part="last")
    assert parsed(args={"few_shot": {"turns": 3}}) == FewShotConfig(turns=3)
    file = {"few_shot": {"turns": 3, "n": 4, "demonstrations": "no"}}
    assert parsed("--args.few_shot.n", "2", args=file) == FewShotConfig(n=2, turns=3, demonstrations="no")
    assert parsed("--args.few_shot", "{n: 2}", args=file) == FewShotConfig(n=2, turns=3, demonstrations="no")
    assert parsed("--args.few_shot", "null", args=file) is None
    with pytest.raises(InputError, match="^few_shot.n: found 0, expected at least 1$"):
        parsed("--args.few_shot.n", "0", args=file)
    with pytest.raises(InputError, match="^few_shot.n: found 0, expected at least 1$"):
        parsed("--args.few_shot.n", "0")
    with pytest.raises(
        InputError, match="partt: found a setting that does not exist; did you mean 'args.few_shot.part'"
    ):
        parsed(args={"few_shot": {"partt": "last"}})


@pytest.mark.parametrize("given", ["logs", "logs/train.jsonl"])
def test_prepare_does_not_write_over_what_it_reads(refused, tmp_path, given):
    (tmp_path / "logs").mkdir()
    rows = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n"
    (tmp_path / "logs" / "train.jsonl").write_text(rows)
    message = refused("prepare", "preferences", "--input", tmp_path / given, "--output", tmp_path / "logs")
    assert message == f"output: found {tmp_path / 'logs'}, which is or contains the input, expected another folder"
    assert [path.read_text() for path in (tmp_path / "logs").iterdir()] == [rows]
