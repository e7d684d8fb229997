"""What is done by a command that signal 9 ended, once it is started again: the same to the bit, with nothing left.

And what is said where the disk is full, or a file of a run is damaged: one line.
"""

import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import write_comparisons
from offline_lmrl.logs.trajectory import Turn
from tests.killing import Commands

SCRATCH = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 128}
TIMES = ("train_runtime", "per_second", "seconds", "made", "runtime")  # of what differs between two runs
EVENTS, MOMENTS = 7, 3  # kills per command, spread over its file events and its seconds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with data, a trained policy and a reward model; and what runs command lines."""
    folder = tmp_path_factory.mktemp("kills")
    commands = Commands(folder / "log")
    pairs = [
        Comparison(
            (Turn("user", f"go {i}"),),
            ((Turn("assistant", "left"),), (Turn("assistant", "right up"),)),
            ((1.0, 0.0), (0.0, 1.0))[i % 3 == 0],
            group=str(i),
        )
        for i in range(30)
    ]
    write_comparisons(folder / "pairs.jsonl", pairs)
    for argv in (
        ("prepare", "toys", "--task", "corridor", "--episodes", 30, "--output", folder / "data"),
        ("train", *_train(folder, "bc", folder / "policy")),
        ("train", *_train(folder, "ilql", folder / "guided")),
        ("train", *_train(folder, "reward_model", folder / "judge")),
    ):
        done = commands.run(*argv)
        assert done["rc"] == 0, done["text"]
    yield folder, commands
    commands.close()


def _train(folder: Path, algorithm: str, output: Path, **args) -> list:
    settings = {
        "algorithm": algorithm,
        "model": {"scratch": SCRATCH, "vocab_size": 280},
        "data": {"train": str(folder / "data" / "train.jsonl"), "validation": str(folder / "data/validation.jsonl")},
        "args": {
            "output_dir": str(output),
            "max_steps": 7,
            "per_device_train_batch_size": 4,
            "logging_steps": 2,
            "max_length": 64,
            "save_strategy": "steps",
            "save_steps": 3,
            "save_total_limit": 2,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "eval_strategy": "epoch",
            "learning_rate": 0.01,
        },
    }
    if algorithm == "reward_model":
        settings["data"] = {"train": str(folder / "pairs.jsonl")}
        settings["args"]["eval_strategy"] = "no"
    if algorithm == "ilql":
        settings["args"] |= {"value_heads": "linear"}
    if algorithm == "ppo":
        settings["model"], settings["data"] = {"path": str(folder / "policy")}, {}
        settings["environment"] = {"name": "gamble"}
        del settings["args"]["eval_strategy"]
        settings["args"] |= {"max_steps": 4, "save_steps": 2, "episodes": 8, "ema": 0.9}
        settings["args"]["decoding"] = {"max_new_tokens": 4}
    settings["args"] |= args
    file = folder / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return [file]


def _compare(folder: Path, output: Path) -> list:
    args = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "save_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    settings = {
        "environment": {"name": "corridor"},
        "prepare": {"command": "toys", "task": "corridor", "episodes": 12, "output": str(output / "data")},
        "data": {"train": str(output / "data/train.jsonl"), "validation": str(output / "data/validation.jsonl")},
        "output": str(output / "out"),
        "seeds": [0],
        "model": {"scratch": SCRATCH, "vocab_size": 280},
        "args": args,
        "methods": {"bc": {"algorithm": "bc"}, "ilql": {"algorithm": "ilql", "from": "bc"}},
        "evaluation": {"episodes": 4, "betas": [1], "offline_rows": 2, "decoding": {"max_new_tokens": 4}},
    }
    file = folder / "compare.yaml"
    file.write_text(yaml.safe_dump(settings))
    return [file]


COMMANDS = {
    **{name: lambda folder, output, name=name: ["train", *_train(folder, name, output / "run")]
       for name in ("bc", "ilql", "return_conditioned", "reward_model", "ppo")},
    "prepare": lambda folder, output: ["prepare", "toys", "--task", "corridor", "--episodes", 40,
                                       "--output", output / "data"],
    "prepare pairs": lambda folder, output: ["prepare", "preferences", "--input", folder / "pairs.jsonl",
                                             "--output", output / "pairs"],
    "relabel": lambda folder, output: ["relabel", folder / "data", "--scorer", folder / "judge",
                                       "--output", output / "scored"],
    "relabel into a datasets folder": lambda folder, output: [
        "relabel", folder / "data" / "train.jsonl", "--scorer", folder / "judge", "--output", output / "scored"],
    "export": lambda folder, output: ["export", folder / "guided", "--output", output / "plain", "--beta", 1,
                                      "--q_reduce", "first", "--support", 0, "--max_new_tokens", 2,
                                      "--prompts", folder / "prompts.txt"],
    "compare": lambda folder, output: ["compare", *_compare(folder, output)],
}  # fmt: skip


def contents(folder: Path) -> dict[str, object]:
    """What is in a folder, by path: JSON less times, tensors of optimizers, and the bytes of everything else."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "folder"
        elif path.name in ("training_args.bin", "table.md") or "/report/" in name and path.suffix != ".jsonl":
            found[name] = "differs in times"
        elif path.suffix in (".pt", ".pth"):
            found[name] = repr(torch.load(path, weights_only=False))
        elif path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = [_without_times(json.loads(line)) for line in lines]
        else:
            found[name] = path.read_bytes()
    return found


def _without_times(value):
    if isinstance(value, dict):
        return {key: _without_times(inner) for key, inner in value.items() if not any(t in key for t in TIMES)}
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value


def same(found: dict[str, object], expected: dict[str, object]) -> None:
    assert sorted(found) == sorted(expected)  # nothing is missing, nothing left behind
    different = [name for name in expected if found[name] != expected[name]]
    assert different == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_is_started_again_and_does_the_same(world, name):
    folder, commands = world
    output = folder / "output"
    argv = COMMANDS[name](folder, output)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    straight = commands.run(*argv, watched=output)
    assert straight["rc"] == 0, straight["text"]
    expected, total = contents(output), straight["events"]
    dice = random.Random(name)
    events = sorted({*dice.sample(range(1, total + 1), min(EVENTS - 3, total)), max(1, total // 2), total - 1, total})
    moments = [dice.uniform(0.02, straight["seconds"]) for _ in range(MOMENTS)]
    killed = 0
    for how in [*({"event": event} for event in events), *({"seconds": moment} for moment in moments)]:
        shutil.rmtree(output)
        output.mkdir()
        first = commands.run(*argv, watched=output, **how)
        assert first["rc"] in ({-9} if "event" in how else {0, -9}), first["text"]
        killed += first["rc"] == -9
        again = commands.run(*argv)
        whole = name == "export" and "which exists already" in again["text"]  # killed behind its last word
        assert again["rc"] == 0 or whole, (how, again["text"])
        same(contents(output), expected)
    assert killed >= len(events)
    print(f"{name}: {killed} kills, at {total} file events and over {straight['seconds']:.1f} s")


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root alone")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(world, name):
    folder, commands = world
    disk, failed = folder / "disk", 0
    disk.mkdir(exist_ok=True)
    argv = COMMANDS[name](folder, disk)
    for size in (8, 16, 32, 64, 96, 128, 160, 192, 224, 320, 448):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
        try:
            done = commands.run(*argv)
            failed += done["rc"] == 2
            assert done["rc"] in (0, 2) and one_line(done), (size, done["text"])
            assert not [path for path in disk.rglob(".*")]
        finally:
            subprocess.run(["umount", disk], check=True)
    assert failed > 0


def one_line(done: dict) -> bool:
    """Whether an error, if there is one, is the last line, alone, and says what was found where."""
    errors = [line for line in re.split(r"[\r\n]+", done["text"]) if line.startswith("error: ")]
    told = errors == [done["text"].strip().splitlines()[-1]] and ": found " in errors[0] if done["rc"] else not errors
    return told and "Traceback" not in done["text"]


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "noise": lambda file: file.write_bytes(bytes((i * 37 + 11) % 256 for i in range(100))),
    "another form": lambda file: file.write_text("[]\n"),
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


def stopped(folder: Path, algorithm: str, output: Path) -> list[list]:
    """Behind its first checkpoint."""
    shutil.rmtree(output / "checkpoint-7", ignore_errors=True)
    (output / "complete.json").unlink()
    return [["train", folder / f"{output.name}.yaml"]]


def finished(folder: Path, algorithm: str, output: Path) -> list[list]:
    if algorithm == "reward_model":
        return [["relabel", folder / "pairs.jsonl", "--scorer", output, "--output", output / "scored.jsonl"]]
    (folder / "prompts.txt").write_text("go\n")
    return [
        ["generate", output, "--prompts", folder / "prompts.txt", "--max_new_tokens", 4],
        [
            "export",
            output,
            "--output",
            output / "plain",
            "--beta",
            0,
            "--prompts",
            folder / "prompts.txt",
            "--max_new_tokens",
            4,
        ],
    ]


@pytest.mark.parametrize(
    ("algorithm", "what"),
    [("ilql", stopped), ("ppo", stopped), ("reward_model", stopped), ("ilql", finished), ("reward_model", finished)],
)
def test_a_damaged_file_of_a_run_is_one_line(world, algorithm, what):
    folder, commands = world
    output, whole = folder / "damaged", folder / "whole"
    shutil.rmtree(output, ignore_errors=True)
    assert commands.run("train", *_train(folder, algorithm, output))["rc"] == 0
    argvs = what(folder, algorithm, output)
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(output, whole)
    kinds, tried, refused = (".json", ".jsonl", ".yaml", ".safetensors", ".pt", ".pth"), 0, 0
    for file in sorted(path for path in output.rglob("*") if path.suffix in kinds and "rollouts" not in path.parts):
        for damage in DAMAGES.values():
            shutil.rmtree(output)
            shutil.copytree(whole, output)
            damage(file)
            for argv in argvs:
                done = commands.run(*argv)
                assert done["rc"] in (0, 2) and one_line(done), (file, argv, done["text"])
                tried, refused = tried + 1, refused + (done["rc"] == 2)
    assert refused > 0
    print(f"{algorithm}: {tried} commands on damaged folders, {refused} refused")
