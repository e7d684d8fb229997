"""Configs with anything in them: planned, or refused in one line, in time and with nothing left behind."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from offline_lmrl.comparison.config import CompareConfig
from offline_lmrl.decoding.scorers import load_scorer
from offline_lmrl.errors import LONGEST_MESSAGE, InputError
from offline_lmrl.logs.yaml_text import load_yaml
from tests import fuzzing
from tests.fuzzing import run_command, time_limit

SCRATCH = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 64}
ARGS = {
    "output_dir": "run",
    "max_steps": 2,
    "max_length": 64,
    "use_cpu": True,
    "learning_rate": 1e-3,
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "context": 2,
    "warmup_steps": 0.1,
    "seed": 1,
}
SCORED = {"model": {"scratch": SCRATCH, "vocab_size": 280}, "data": {"train": "scored.jsonl", "validation": None}}
PAIRS = {"model": {"scratch": SCRATCH, "vocab_size": 280}, "data": {"train": "pairs.jsonl"}}
CONFIGS: dict[str, dict[str, Any]] = {
    "bc": {"algorithm": "bc", **SCORED, "args": {**ARGS, "keep_share": 0.5}},
    "ilql": {"algorithm": "ilql", **SCORED, "args": {
        **ARGS, "value_heads": "tied", "expectile": 0.8, "discount_per_turn": 0.9,
        "few_shot": {"n": 1, "demonstrations": "scored.jsonl", "max_tokens": 20}}},
    "return_conditioned": {"algorithm": "return_conditioned", **SCORED, "args": {
        **ARGS, "condition": "embedding", "bins": 4}},
    "preference": {"algorithm": "ilql", **PAIRS, "data": {
        "train": "pairs.jsonl", "preference": {"reward": "sign", "reward_at": "end", "normalise": "none"}},
        "args": ARGS},
    "reward_model": {"algorithm": "reward_model", **PAIRS, "args": {**ARGS, "head": "turn"}},
    "ppo": {"algorithm": "ppo", "model": SCORED["model"] | {"path": None}, "data": {"train": "scored.jsonl"},
            "environment": {"name": "gamble"}, "args": {
                **ARGS, "lr_scheduler_kwargs": None, "decoding": {"max_new_tokens": 3}}},
}  # fmt: skip
# Sizes between a toy's and what no machine has would be tried, and take their time.
WILD = (
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    2**31,
    2**40,
    2**62,
    -(2**63),
    2**63,
    10**25,
    0.5,
    -1.5,
    1e308,
    5e-324,
    float("inf"),
    "",
    " ",
    "x",
    "a b",
    "0",
    "1",
    "1e999",
    ".nan",
    ".inf",
    "true",
    "null",
    "x" * 5000,
    "\x1b[31m",
    "é",
    "../x",
    "/",
    "[",
    "{a: &a [*a]}",
    "sign",
    "gpt2",
    "package.module:Class",
    "os:getcwd",
    [],
    {},
    [None],
    [[]],
    [1, "x"],
    ["x"],
    {"x": 1},
    {"x": {"x": None}},
    {"0": 0},
    fuzzing.deep(30),
    fuzzing.deep(250),
    [0] * 3000,
)
NAMES = ("", "x", "x" * 3000, "model_type", "path", "seed", "0", "a.b", "report_to", "fsdp", "deepspeed", "kind",
         "num_labels", "vocab_size", "self", "kwargs", "args", "tie_word_embeddings", "rope_parameters",
         "hidden_act", "activation_function", "return_dict", "output_hidden_states", "architectures", "torch_dtype",
         "auto_map", "quantization_config", "attn_implementation")  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder, with data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    transformers.logging.disable_progress_bar()
    scored = [
        {"prompt": "left or right?", "completion": side, "reward": float(side == "left"), "task": "t"}
        for side in ("left", "right") * 4
    ]
    pairs = [{"prompt": f"q{i}", "chosen": "left", "rejected": "right"} for i in range(8)]
    for name, rows in (("scored", scored), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def text_of(config: Any, rng: random.Random) -> bytes:
    """As YAML; one in six is damaged as text too."""
    text = json.dumps(config).encode()
    if rng.randrange(6) == 0:
        text = fuzzing.damaged_bytes(text, rng)
    if rng.randrange(12) == 0:
        text = rng.choice((b"? ", b"- " * 5000, b"[" * 200_000, b"a: &a [*a]\n", b"{" * 5000, b"\xff\xfe")) + text
    return text


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_the_configs_that_are_damaged_are_whole(here, algorithm):
    (here / "train.yaml").write_text(json.dumps(CONFIGS[algorithm]))
    code, out, err = run_command("train", "train.yaml", "--dry_run")
    assert code == 0 and "optimizer steps: " in out, err


@pytest.mark.parametrize(("seed", "n"), [(0, 4), *(pytest.param(s, 100, marks=pytest.mark.slow) for s in (1, 2))])
@pytest.mark.parametrize("algorithm", CONFIGS)
def test_a_damaged_training_config_is_planned_or_refused(here, algorithm, seed, n):
    before = sorted(here.iterdir())

    def check(rng: random.Random) -> None:
        config = fuzzing.mutated(CONFIGS[algorithm], rng, WILD, NAMES)
        (here / "train.yaml").write_bytes(text_of(config, rng))
        run_command("train", "train.yaml", "--dry_run", seconds=30)
        (here / "train.yaml").unlink()
        assert sorted(here.iterdir()) == before

    fuzzing.each(n, check, seed)


COMPARE = {
    path.stem: load_yaml(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*/*.yaml"))
    if "methods" in load_yaml(path.read_text())
}
SCORER = {
    "kind": "ensemble",
    "k": 1,
    "scorers": [
        {"kind": "regex", "pattern": "x", "must": True},
        {
            "kind": "sum",
            "weights": [1, 0.5],
            "scorers": [{"kind": "regex", "pattern": "y"}, {"kind": "python", "function": "tests.tiny:byte_level"}],
        },
    ],
}


@pytest.mark.parametrize(("seed", "n"), [(0, 30), *(pytest.param(s, 2000, marks=pytest.mark.slow) for s in (1, 2))])
def test_a_damaged_comparison_config_is_read_or_refused(here, seed, n):
    names = sorted(COMPARE)

    def check(rng: random.Random) -> None:
        config = fuzzing.mutated(COMPARE[rng.choice(names)], rng, WILD, NAMES)
        (here / "compare.yaml").write_bytes(text_of(config, rng))
        with time_limit(20):
            try:
                CompareConfig.read(here / "compare.yaml")
            except InputError as error:
                assert str(error).startswith(f"{here / 'compare.yaml'}: ") and "\n" not in str(error)

    fuzzing.each(n, check, seed)


@pytest.mark.parametrize(("seed", "n"), [(0, 50), *(pytest.param(s, 2000, marks=pytest.mark.slow) for s in (1, 2))])
def test_a_damaged_scorer_is_made_or_refused(here, seed, n):
    def check(rng: random.Random) -> None:
        spec = fuzzing.mutated(SCORER, rng, WILD, NAMES)
        (here / "scorer.yaml").write_bytes(text_of(spec, rng))
        with time_limit(20):
            for given in (spec, here / "scorer.yaml"):
                try:
                    load_scorer(given)
                except InputError as error:
                    assert len(str(error)) <= LONGEST_MESSAGE and "\n" not in str(error)

    fuzzing.each(n, check, seed)
