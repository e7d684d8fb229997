"""Run folders in which a file is damaged: used as they are, or refused in one line, by every command that opens
one."""

import json
import random
import shutil
from pathlib import Path

import pytest
import transformers

from tests import fuzzing
from tests.fuzzing import run_command

SCRATCH = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 64}
ARGS = {"max_steps": 1, "max_length": 64, "use_cpu": True, "learning_rate": 1e-3}
RUNS = {
    "bc": {"algorithm": "bc", "data": "scored.jsonl"},
    "ilql": {"algorithm": "ilql", "data": "scored.jsonl", "args": {"value_heads": "tied"}},
    "lora": {"algorithm": "ilql", "data": "scored.jsonl", "model": {"path": "bc", "lora": {"r": 2}}},
    "return_conditioned": {"algorithm": "return_conditioned", "data": "scored.jsonl"},
    "reward_model": {"algorithm": "reward_model", "data": "pairs.jsonl"},
}
COMMANDS = {
    "evaluate logs": ("evaluate", "logs", "RUN", "--data", "scored.jsonl", "--betas", "[1]"),
    "evaluate play": ("evaluate", "play", "RUN", "--environment", "gamble", "--episodes", 2, "--max_new_tokens", 2),
    "generate": ("generate", "RUN", "--max_new_tokens", 2),
    "export": ("export", "RUN", "--output", "exported", "--beta", 0, "--max_new_tokens", 2),
    "relabel": ("relabel", "scored.jsonl", "--scorer", "RUN", "--output", "relabelled.jsonl"),
    "evaluate scorer": ("evaluate", "scorer", "RUN", "--data", "pairs.jsonl"),
    "train on": ("train", "--algorithm", "bc", "--model.path", "RUN", "--data.train", "scored.jsonl",
                 "--args.output_dir", "on", "--args.max_steps", 1, "--args.max_length", 32, "--args.use_cpu", "true"),
    "check": ("check", "scored.jsonl", "--tokenizer", "RUN"),
}  # fmt: skip
WILD = (None, True, False, 0, 1, 2, 7, -1, 2**40, 0.5, -1.5, 1e300, "", "x", "1", "é", [], {}, [None], ["x"], [[1]],
        {"x": 1}, {"": None}, fuzzing.deep(20), "x" * 3000, "nan", float("nan"))  # fmt: skip
NAMES = ("", "x", "kind", "heads", "beta", "model_type", "architectures", "context", "template", "eos_token_id")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with data and a run of every kind, and the working folder."""
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        scored = [
            {"prompt": "left or right?", "completion": side, "reward": float(side == "left")}
            for side in ("left", "right") * 2
        ]
        pairs = [{"prompt": f"q{i}", "chosen": "left", "rejected": "right"} for i in range(4)]
        for name, rows in (("scored", scored), ("pairs", pairs)):
            Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, settings in RUNS.items():
            config = {
                "model": {"scratch": SCRATCH, "vocab_size": 280},
                **settings,
                "data": {"train": settings["data"]},
                "args": {**ARGS, **settings.get("args", {}), "output_dir": name},
            }
            Path("train.yaml").write_text(json.dumps(config))
            code, _, err = run_command("train", "train.yaml")
            assert code == 0, err
            shutil.copy("train.yaml", f"{name}.yaml")
        yield folder


def damage(file: Path, rng: random.Random) -> None:
    """Damages one file: its values where it holds JSON, its bytes, or the whole of it."""
    kind, content = rng.randrange(8), file.read_bytes()
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.write_bytes(b"")
    elif kind < 6 and file.suffix == ".json":
        file.write_text(json.dumps(fuzzing.mutated(json.loads(content), rng, WILD, NAMES)))
    elif file.suffix == ".safetensors" and kind < 6:  # the header says what lies where
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(fuzzing.mutated(json.loads(content[8 : 8 + size]), rng, WILD, NAMES)).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    else:
        file.write_bytes(fuzzing.damaged_bytes(content, rng))


@pytest.mark.parametrize("name", RUNS)
def test_the_runs_that_are_damaged_are_whole(runs, name):
    for title, command in COMMANDS.items():
        code, _, err = run_command(*(name if word == "RUN" else word for word in command), stdin="left or right?\n")
        fits = ("relabel" in title or "scorer" in title) == (name == "reward_model")
        assert (code == 0) == fits or title in ("check", "train on"), (title, err)
        _remove_outputs(runs)


def _remove_outputs(folder: Path) -> None:
    for made in ("exported", "on"):
        shutil.rmtree(folder / made, ignore_errors=True)
    (folder / "relabelled.jsonl").unlink(missing_ok=True)


@pytest.mark.parametrize(("seed", "n"), [(0, 1), *(pytest.param(s, 40, marks=pytest.mark.slow) for s in (1, 2))])
@pytest.mark.parametrize("name", RUNS)
def test_a_damaged_run_is_used_or_refused(runs, name, seed, n):
    whole = runs / f"{name}.whole"
    if not whole.exists():
        shutil.copytree(runs / name, whole)

    def check(rng: random.Random) -> None:
        files = [path for path in sorted((runs / name).iterdir()) if path.is_file()]
        file = rng.choice(files)
        damage(file, rng)
        fitting = (
            ("relabel", "evaluate scorer")
            if name == "reward_model"
            else ("evaluate logs", "evaluate play", "generate", "export")
        )
        try:
            for title in (*fitting, "train on", "check"):
                command = [name if word == "RUN" else word for word in COMMANDS[title]]
                run_command(*command, seconds=30, stdin="left or right?\n")
        except BaseException as error:
            error.add_note(f"{title}, {file.name}")
            raise
        finally:
            _remove_outputs(runs)
            shutil.rmtree(runs / name)
            shutil.copytree(whole, runs / name)

    fuzzing.each(n, check, seed)
