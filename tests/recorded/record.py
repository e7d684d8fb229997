"""Run a fixed list of commands with the checkout that Python finds first, and write what came of each as JSON.

`compare.py` runs this for two checkouts. All of it is on the CPU with one thread, so that two runs on one machine give
the same bits. Usage: record.py FOLDER, an empty folder that gets the runs and record.json.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
ARGS = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "max_length": 96,
    "logging_steps": 2,
    "save_steps": 4,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
TIMES = re.compile(
    r"time|second|made|commit|machine|created|sha256"
)  # keys of what differs between two runs of one checkout
PLAYED = ["--environment", "walk", "--episodes", 20, "--max_new_tokens", 4]

# name -> algorithm and what differs from the settings that all share. `run:NAME` is the folder of an earlier run.
RUNS: dict[str, dict[str, Any]] = {
    "bc": {"algorithm": "bc"},
    "bc of the better half": {"algorithm": "bc", "args": {"keep_share": 0.5}},
    "ilql, tied": {"algorithm": "ilql", "args": {"value_heads": "tied"}},
    "ilql, linear": {"algorithm": "ilql", "args": {"value_heads": "linear"}},
    "ilql, mlp": {"algorithm": "ilql", "args": {"value_heads": "mlp", "monte_carlo": 0.3}},
    "ilql, by turns": {"algorithm": "ilql", "args": {"bootstrap_from_turn": True, "discount_per_turn": 0.9}},
    "ilql, context 1": {"algorithm": "ilql", "args": {"context": 1}},
    "ilql, lora": {"algorithm": "ilql", "model": {"path": "run:bc", "lora": {"r": 2}}},
    "iql": {"algorithm": "iql", "model": {"path": "run:bc"}, "args": {"critic": "run:ilql, tied"}},
    "returns": {"algorithm": "return_conditioned"},
    "returns, quantiles": {"algorithm": "return_conditioned", "args": {"binning": "quantile", "context": 1}},
    "returns, text": {"algorithm": "return_conditioned", "args": {"condition": "text", "condition_dropout": 0.0}},
    "returns, few-shot": {
        "algorithm": "return_conditioned",
        "args": {"prompt": {"n": 1, "max_tokens": 100}, "max_length": 192},
    },
    "returns, heads": {
        "algorithm": "return_conditioned",
        "args": {"return_weight": 1.0, "environment_weight": 0.5, "condition_dropout": 0.3},
    },
    "ppo": {
        "algorithm": "ppo",
        "model": {"path": "run:bc"},
        "environment": {"name": "walk"},
        "args": {"episodes": 8, "sampling": {"max_new_tokens": 4}, "logging_steps": None},
    },
    "reward model": {"algorithm": "reward_model", "data": "pairs", "args": {"head": "terminal"}},
    "reward model, turns": {"algorithm": "reward_model", "data": "pairs", "args": {"head": "turn", "bootstrap": 1}},
    "reward model, tokens": {"algorithm": "reward_model", "data": "pairs", "args": {"head": "token"}},
}

# How each run is decoded beside sampled and greedy play of all: name -> (run, flags).
DECODINGS: dict[str, tuple[str, list]] = {
    "β, min, support": ("ilql, tied", ["--beta", 4, "--support", 0.01]),
    "β, mean, clip": ("ilql, mlp", ["--beta", 4, "--q_reduce", "mean", "--clip", 1]),
    "β, candidates": ("ilql, linear", ["--beta", 4, "--candidates", 4, "--top_p", 0.9]),
    "β, one turn in view": ("ilql, context 1", ["--beta", 2]),
    "asked for a number": ("returns", ["--ask", -4]),
    "asked for the most": ("returns", ["--ask", "max"]),
    "asked for p90": ("returns, quantiles", ["--ask", "p90"]),
    "asked for V": ("returns", ["--ask", "auto:run:ilql, tied"]),
    "asked with guidance": ("returns", ["--ask", "max", "--condition_scale", 1.5]),
    "planned": ("returns, heads", ["--planner.width", 2, "--planner.expand", 2, "--planner.depth", 2]),
}

COMMANDS = ("prepare", "check", "train", "evaluate", "generate", "export", "compare", "relabel", "select", "config")


class Recorder:
    """Runs commands in `folder` and keeps what came of them in `found`, a mapping of names to plain values."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.found: dict[str, Any] = {}

    def run_of(self, name: str) -> Path:
        return self.folder / "runs" / re.sub(r"\W+", "_", name)

    def command(self, name: str, *argv: Any, stdin: str = "") -> int:
        """Run a command; keep its exit code and what it printed."""
        from offline_lmrl.cli.main import main

        out, err = io.StringIO(), io.StringIO()
        before, sys.stdin = sys.stdin, io.StringIO(stdin)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([self.placed(str(argument)) for argument in argv])
            except SystemExit as end:  # of a help page
                code = end.code
            except Exception:
                traceback.print_exc()
                code = 1
        sys.stdin = before
        self.found[f"{name}: exit code"] = code
        self.found[f"{name}: stdout"] = self.plain(out.getvalue())
        self.found[f"{name}: stderr"] = self.plain(err.getvalue())
        return code

    def placed(self, text: str) -> str:
        """Text with `run:NAME` as the folder of that run."""
        return re.sub(r"run:([\w, -]+)", lambda match: str(self.run_of(match[1])), text)

    def plain(self, text: str) -> list[str]:
        """Lines without the folder, bars and times."""
        for path, name in ((self.folder, "FOLDER"), (sys.prefix, "PYTHON"), (os.getcwd(), "CHECKOUT")):
            text = text.replace(str(path), name)
        unsteady = r"\d+%\||it/s|━|is now called"  # bars, and warnings about the names of settings used here
        lines = [line for line in re.split(r"[\r\n]+", text) if not re.search(unsteady, line)]
        return [re.sub(r"\d+(\.\d+)? ?(s|min|h|seconds)\b|\d+:\d\d(:\d\d)?", "TIME", line) for line in lines]

    def files(self, name: str, folder: Path) -> None:
        """Keep what lies in a folder: a hash per tensor, JSON without times, text."""
        for path in sorted(folder.rglob("*")):
            key = f"{name}: {path.relative_to(folder)}"
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as tensors:
                    self.found |= {f"{key}: {part}": digest(tensors.get_tensor(part)) for part in tensors.keys()}
            elif path.name == "optimizer.pt":
                self.found[key] = digest(torch.load(path, weights_only=True))
            elif path.suffix == ".json":
                self.found[key] = self.timeless(json.loads(path.read_text()))
            elif path.suffix == ".jsonl":
                self.found[key] = [self.timeless(json.loads(line)) for line in path.read_text().splitlines()]
            elif path.suffix == ".yaml":
                self.found[key] = self.timeless(yaml.safe_load(path.read_text()))
            elif path.suffix in (".md", ".txt", ".jinja"):
                self.found[key] = self.plain(path.read_text())

    def timeless(self, value: Any) -> Any:
        if isinstance(value, dict):
            pairs = (("\n".join(self.plain(key)), inner) for key, inner in value.items() if not TIMES.search(key))
            return {key: self.timeless(inner) for key, inner in pairs}
        if isinstance(value, str):
            return "\n".join(self.plain(value))
        return [self.timeless(inner) for inner in value] if isinstance(value, list) else value


def digest(value: Any) -> str:
    """A hash of tensors and plain values, nested in any way."""
    sha = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            sha.update(str((part.dtype, tuple(part.shape))).encode())
            sha.update(part.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            for key in part:
                sha.update(repr(key).encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            sha.update(str(len(part)).encode())
            for inner in part:
                add(inner)
        else:
            sha.update(repr(part).encode())

    add(value)
    return sha.hexdigest()[:16]


def settings_of(recorder: Recorder, name: str) -> dict[str, Any]:
    """The settings of a run, whole."""
    given = RUNS[name]
    data = recorder.folder / "data"
    settings: dict[str, Any] = {"algorithm": given["algorithm"], "model": {"scratch": LLAMA, "vocab_size": 280}}
    settings["data"] = {"train": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl")}
    if given.get("data") == "pairs":
        settings["data"] = {"train": str(recorder.folder / "pairs" / "train.jsonl")}
    if "environment" in given:
        settings |= {"environment": given["environment"], "data": {}}
    args = {**ARGS, **given.get("args", {}), "output_dir": str(recorder.run_of(name))}
    settings["args"] = {key: value for key, value in args.items() if value is not None}
    if "model" in given:
        settings["model"] = given["model"]
    return yaml.safe_load(recorder.placed(yaml.safe_dump(settings, width=10**6)))


def data(recorder: Recorder) -> None:
    """Logs and pairs that everything learns from."""
    folder = recorder.folder
    recorder.command("data", "prepare", "toys", "--task", "walk", "--episodes", 80, "--output", folder / "data")
    rows = [{"prompt": f"way {i}?", "chosen": f"left {i % 5}", "rejected": f"up and right {i % 3}"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ["--input", folder / "pairs.jsonl", "--output", folder / "pairs"]
    recorder.command("pairs", "prepare", "preferences", *source)
    recorder.command("check", "check", folder / "data")
    recorder.command("check pairs", "check", folder / "pairs")


def train(recorder: Recorder) -> None:
    for name in RUNS:
        file = recorder.folder / f"{recorder.run_of(name).name}.yaml"
        file.write_text(yaml.safe_dump(settings_of(recorder, name)))
        recorder.command(f"dry run of {name}", "train", file, "--dry_run")
        recorder.command(name, "train", file)
        recorder.files(name, recorder.run_of(name))


def decode(recorder: Recorder) -> None:
    folder, held_out = recorder.folder / "played", recorder.folder / "data" / "validation.jsonl"
    for name, given in RUNS.items():
        if given["algorithm"] == "reward_model":
            pairs = recorder.folder / "pairs" / "validation.jsonl"
            recorder.command(f"{name}, judged", "evaluate", recorder.run_of(name), "--data", pairs)
            continue
        for how, flags in {"sampled": [], "greedy": ["--temperature", 0]}.items():
            played(recorder, f"{name}, {how}", name, flags)
        shown = ["--demonstrations", recorder.folder / "data" / "train.jsonl"] if name == "returns, few-shot" else []
        recorder.command(f"{name}, on logs", "evaluate", recorder.run_of(name), "--data", held_out, *shown)
        recorder.command(f"{name}, shown", "evaluate", recorder.run_of(name), "--data", held_out, *shown, "--show", 1)
    for name, (run, flags) in DECODINGS.items():
        played(recorder, name, run, flags)
    recorder.command(
        "replies",
        "generate",
        recorder.run_of("ilql, tied"),
        "--beta",
        2,
        "--max_new_tokens",
        6,
        stdin="Where to?\nAnd now?\n",
    )
    recorder.files("played", folder)


def played(recorder: Recorder, name: str, run: str, flags: Sequence[Any]) -> None:
    """Twenty episodes, kept with the ids that were sampled and what was learnt from them."""
    output = recorder.folder / "played" / f"{re.sub(r'[^a-z0-9]+', '_', name)}.jsonl"
    output.parent.mkdir(exist_ok=True)
    recorder.command(name, "evaluate", recorder.run_of(run), *PLAYED, *flags, "--output", output)


def score(recorder: Recorder) -> None:
    folder = recorder.folder
    logs, pairs, scored = folder / "data" / "train.jsonl", folder / "pairs" / "train.jsonl", folder / "scored"
    whole, turns = (str(recorder.run_of(name)) for name in ("reward model", "reward model, turns"))
    specs = {
        "values": {"kind": "value_heads", "run": str(recorder.run_of("ilql, tied"))},
        "both": {"kind": "ensemble", "scorers": [whole, turns]},
    }
    for name, spec in specs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))
    scorers = {"whole": (whole, "terminal"), "turns": (turns, "turn")}
    scorers |= {name: (folder / f"{name}.yaml", "turn") for name in specs}
    for name, (scorer, place) in scorers.items():
        output = ["--output", scored / f"{name}.jsonl"]
        recorder.command(f"relabelled, {name}", "relabel", logs, "--scorer", scorer, "--place", place, *output)
    made = ["--make", "rewards", "--output", scored / "made.jsonl"]
    recorder.command("pairs as rewards", "relabel", pairs, "--scorer", whole, *made)
    disputed = ["--scorer", folder / "both.yaml", "--output", scored / "selected.jsonl"]
    recorder.command("selected", "select", pairs, *disputed)
    recorder.files("scored", scored)


def leave(recorder: Recorder) -> None:
    folding = {
        "bc": [],
        "ilql, linear": ["--beta", 1, "--q_reduce", "first", "--support", 0],
        "ilql, tied": ["--beta", 1, "--q_reduce", "mean", "--support", 0],
        "returns": [],
    }
    for name, flags in folding.items():
        output = recorder.folder / "exported" / recorder.run_of(name).name
        recorder.command(f"export of {name}", "export", recorder.run_of(name), "--output", output, *flags)
        recorder.files(f"export of {name}", output)


def compare(recorder: Recorder) -> None:
    folder = recorder.folder
    settings = {
        "environment": {"name": "walk"},
        "output": str(folder / "compared"),
        "seeds": [0, 1],
        "data": {"train": str(folder / "data/train.jsonl"), "validation": str(folder / "data/validation.jsonl")},
        "model": {"scratch": LLAMA, "vocab_size": 280},
        "args": {**ARGS, "max_steps": 3, "save_strategy": "no"},
        "methods": {
            "bc": {"algorithm": "bc"},
            "ilql": {"algorithm": "ilql", "from": "bc"},
            "told": {"algorithm": "return_conditioned", "from": "bc", "sampling": {"ask": "max"}},
        },
        "evaluation": {
            "episodes": 8,
            "betas": [1, 4],
            "offline_rows": 4,
            "sampling": {"max_new_tokens": 4},
            "selection": {"episodes": 4},
        },
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(settings))
    recorder.command("compare", "compare", folder / "compare.yaml")
    for name in ("results.jsonl", "table.md", "report/report.md", "report/manifest.json"):
        path = folder / "compared" / name
        if path.exists():
            # A table is as wide as the commit and the command in it, which differ.
            text = re.sub(r"\b[0-9a-f]{40}\b", "COMMIT", re.sub(r" {2,}|-{3,}", " ", path.read_text()))
            found = map(json.loads, text.splitlines()) if name.endswith("l") else [text]
            found = [json.loads(text)] if name.endswith(".json") else found
            recorder.found[f"compare: {name}"] = [recorder.timeless(value) for value in found]


def help_pages(recorder: Recorder) -> None:
    recorder.command("help", "--help")
    for command in COMMANDS:
        for flag in ("--help", "--help_all"):
            recorder.command(f"{command} {flag}", command, flag)
    for algorithm in ("bc", "ilql", "iql", "return_conditioned", "ppo", "reward_model"):
        recorder.command(f"train {algorithm} --help_all", "train", "--algorithm", algorithm, "--help_all")
    recorder.command("configs", "config")


def refuse(recorder: Recorder) -> None:
    """Bad inputs, each with its exit code and its one line."""
    folder, train = recorder.folder, recorder.folder / "bc.yaml"
    elsewhere = ["--args.output_dir", folder / "x"]
    rows = {
        "no json": "{",
        "a list": "[]",
        "a number": "7",
        "empty": "",
        "nothing known": '{"a": 1}',
        "no role": '{"messages": [{"content": "a"}]}',
        "no messages": '{"messages": []}',
        "an unknown role": '{"messages": [{"role": "robot", "content": "a"}]}',
        "a reward that is text": '{"messages": [{"role": "assistant", "content": "a", "reward": "high"}]}',
        "a reward that is no number": '{"messages": [{"role": "assistant", "content": "a", "reward": NaN}]}',
        "a reward of the user": '{"messages": [{"role": "user", "content": "a", "reward": 1}]}',
        "no end": '{"messages": [{"role": "assistant", "content": "a"}], "terminated": "no"}',
        "one reply of a pair": '{"prompt": "a", "chosen": "b"}',
        "one reply alone": '{"prompt": "a", "responses": ["b"]}',
        "ranks that do not fit": '{"prompt": "a", "responses": ["b", "c"], "ranks": [1]}',
    }
    for name, text in rows.items():
        file = folder / "bad" / f"{re.sub(r'[^a-z]+', '_', name)}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text + "\n")
        recorder.command(f"check of {name}", "check", file)
        recorder.command(f"training on {name}", "train", train, "--data.train", file, *elsewhere)
    overrides = {
        "args.max_step": 3,
        "args.max_steps": "many",
        "args.learning_rate": -1,
        "args.context": 0,
        "args.max_length": 0,
        "args.keep_share": 2,
        "args.template": "mine",
        "args.save_strategy": "sometimes",
        "model.path": folder / "none",
        "model.vocab_size": 3,
        "model.scratch.model_type": "gpt9",
        "data.train": folder / "none.jsonl",
        "algorithm": "dqn",
        "data.reward": "stars",
        "args.per_device_train_batch_size": 0,
        "args.seed": "x",
        "models.path": "y",
    }
    for key, value in overrides.items():
        name = recorder.plain(f"training with {key} {value}")[0]
        recorder.command(name, "train", train, f"--{key}", value, *elsewhere)
    run = recorder.run_of("ilql, tied")
    others = [
        ["evaluate", run],
        ["evaluate", folder / "none", "--environment", "walk"],
        ["evaluate", run, "--environment", "wlk"],
        ["evaluate", run, "--data", folder / "none.jsonl"],
        ["evaluate", run, *PLAYED, "--beta", -1],
        ["evaluate", run, *PLAYED, "--temperature", -1],
        ["evaluate", run, *PLAYED, "--top_p", 2],
        ["evaluate", run, *PLAYED, "--ask", "max"],
        ["evaluate", run, *PLAYED, "--asks", "[max]"],
        ["generate", run, "--prompts", folder / "none.txt"],
        ["generate", run, "--best_of", 0],
        ["export", run, "--output", folder / "y"],
        ["export", folder / "none", "--output", folder / "y"],
        ["relabel", folder / "data", "--scorer", folder / "none", "--output", folder / "y"],
        ["relabel", folder / "none", "--scorer", run, "--output", folder / "y"],
        ["select", folder / "data", "--scorer", run, "--output", folder / "y"],
        ["compare", folder / "none.yaml"],
        ["compare", folder / "compare.yaml", "--seeds", "[]"],
        ["compare", folder / "compare.yaml", "--baseline", "none"],
        ["config", "maze/none"],
        ["prepare", "nothing"],
        ["train"],
        ["tain", train],
        ["prepare", "toys", "--task", "chess", "--output", folder / "y"],
    ]
    for argv in others:
        recorder.command(f"refused: {recorder.plain(' '.join(map(str, argv)))[0]}", *argv)


PARTS: tuple[Callable[[Recorder], None], ...] = (data, train, decode, score, leave, compare, help_pages, refuse)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    recorder = Recorder(Path(folder).resolve())
    for part in PARTS:
        part(recorder)
    text = json.dumps(recorder.found, ensure_ascii=False, indent=0, sort_keys=True)
    (recorder.folder / "record.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
