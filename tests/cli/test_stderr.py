"""Commands on which nothing is wrong print only lines of this project on stderr, and real faults still show there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.logs.trajectory import Trajectory, Turn

ROOT = Path(__file__).parents[2]
OURS = re.compile(
    r"run\S*: (continues at step \d+ of \d+|\d+ steps, \d+ min \d+ s|the model is saved; next:|is extended to .*)"
    r"|step \d of \d( .held-out data.)?: loss .*"
    r"|  offline-lmrl .*"
    r"| +training +held-out data *|  (loss|value|accuracy|reward)\S*( +\S+ → \S+)+ *"
)
TINY = "{model_type: gpt2, n_layer: 1, n_embd: 8, n_head: 1, n_positions: 64}"


def stderr_of(folder: Path, *words: str) -> list[str]:
    """The lines on stderr of one command in a process of its own that are not lines of this project."""
    found = subprocess.run(
        [sys.executable, "-m", "offline_lmrl.cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    return [line for line in found.stderr.splitlines() if not OURS.fullmatch(line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stderr")
    rows = [
        Trajectory((Turn("user", "go"), Turn("assistant", word, reward=float(word == "left"))), group=str(i))
        for i, word in enumerate(("left", "right", "up") * 4)
    ]
    write_trajectories(folder / "logs.jsonl", rows)
    write_trajectories(folder / "held_out.jsonl", [Trajectory(row.turns, group=f"h{i}") for i, row in enumerate(rows)])
    (folder / "prompts.txt").write_text("go\n")
    (folder / "pairs.jsonl").write_text('{"prompt": "go", "chosen": "left", "rejected": "right"}\n')
    (folder / "ilql.yaml").write_text(
        "algorithm: ilql\n"
        f"model: {{scratch: {TINY}, vocab_size: 280}}\n"
        "data: {train: logs.jsonl, validation: held_out.jsonl}\n"
        "args: {output_dir: run, max_steps: 4, save_steps: 2, logging_steps: 2, per_device_train_batch_size: 4, "
        "max_length: 64}\n"
    )
    return folder


@pytest.mark.slow
def test_nothing_but_our_own_lines(folder):
    lora = (
        "--model.path",
        "run",
        "--model.scratch",
        "null",
        "--model.lora",
        "{r: 2}",
        "--args.output_dir",
        "run_lora",
    )
    reward = (
        "--algorithm",
        "reward_model",
        "--model.path",
        "run",
        "--model.scratch",
        "null",
        "--data.validation",
        "null",
    )
    reward += ("--data.train", "pairs.jsonl", "--args.output_dir", "run_reward")
    commands = {
        "train": ("train", "ilql.yaml"),
        "extend": ("train", "ilql.yaml", "--args.max_steps", "6"),
        "adapter": ("train", "ilql.yaml", *lora),
        "reward model": ("train", "ilql.yaml", *reward),
        "generate": ("generate", "run", "--prompts", "prompts.txt", "--max_new_tokens", "2"),
        "generate with an adapter": ("generate", "run_lora", "--prompts", "prompts.txt", "--max_new_tokens", "2"),
        "generate from a checkpoint": (
            "generate",
            "run/checkpoint-6",
            "--prompts",
            "prompts.txt",
            "--max_new_tokens",
            "2",
        ),
        "evaluate": ("evaluate", "logs", "run_lora", "--data", "held_out.jsonl"),
        "relabel": ("relabel", "logs.jsonl", "--scorer", "run_reward", "--output", "relabelled.jsonl"),
    }
    assert {name: lines for name, words in commands.items() if (lines := stderr_of(folder, *words))} == {}
    # A base model that really lacks weights is still reported.
    weights = load_file(folder / "run" / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, folder / "run" / "model.safetensors", {"format": "pt"})
    assert "c_fc.weight" in "".join(stderr_of(folder, *commands["generate"]))
