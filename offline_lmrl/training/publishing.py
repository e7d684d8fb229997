"""The model card of a run, and the upload of its model to the hub.

A checkpoint also holds what resuming needs (optimizer, random states) and a run folder holds logs of training. None of
that is uploaded: only the files that opening the model needs, and the card.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainingArguments
from transformers.utils import PushInProgress
from transformers.utils.hub import hf_api

from offline_lmrl.training.metrics import METRICS, read_metrics

CARD = "README.md"
RESUME_STATE = (
    "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "averages-*", "trainer_state.json", "training_args.bin",
    "global_step*", "pytorch_model_fsdp*", "trained.safetensors", "average.safetensors", "loop.json", ".*",
)  # fmt: skip
ENDS = ("_low", "_high")  # of a 95 % interval, after the name of a metric


# Settings that say nothing of what was learnt, or that transformers fills in.
UNTOLD = (
    "accelerator_config", "dataloader_pin_memory", "disable_tqdm", "do_eval", "eval_steps", "eval_strategy", "hub_*",
    "log_completions", "logging_*", "output_dir", "per_device_eval_batch_size", "push_to_hub", "report_to", "run_name",
    "save_*", "use_cpu",
)  # fmt: skip


class Trained(Protocol):
    """What a model card is made of: a trainer of this project.

    algorithm: its name.
    args: its settings.
    model: the model.
    data: name of a data set, "training" or "validation" -> `path` (None = rows given in Python), `rows` and `hash`.
    regime: the information that the run learns from.
    next_commands: commands for the model, after `offline-lmrl`, with {run} for its name.
    """

    algorithm: str
    args: TrainingArguments
    model: Any
    data: Mapping[str, Mapping[str, Any]]
    regime: str
    next_commands: Sequence[str]


def sources(**data: tuple[Any, Any]) -> dict[str, dict[str, Any]]:
    """Return `Trained.data`. `data`: name of a data set -> (its path or rows, its rows or None); None is left out."""
    return {
        name: {"path": str(given) if isinstance(given, str | Path) else None, "rows": len(rows), "hash": ""}
        for name, (given, rows) in data.items()
        if rows is not None
    }


def model_files(folder: Path) -> list[str]:
    """Return the names of the files in a saved model or checkpoint that opening the model needs, and of the card."""
    names = (path.name for path in folder.iterdir() if path.is_file())
    return sorted(name for name in names if not any(fnmatch(name, pattern) for pattern in RESUME_STATE))


def upload(
    folder: Path, names: Sequence[str], args: TrainingArguments, repository: str, message: str
) -> PushInProgress:
    """Start to upload files of a folder to a repository of the hub, and return the upload, which can be waited for."""
    job = hf_api().upload_folder(
        repo_id=repository,
        folder_path=str(folder),
        allow_patterns=list(names),
        commit_message=message,
        token=args.hub_token,
        revision=args.hub_revision,
        run_as_future=True,
    )
    return PushInProgress([job])


def model_card(run: Trained) -> str:
    """Return the model card of a run in Markdown; the metrics are those of metrics.jsonl in its directory."""
    folder, base = Path(run.args.output_dir), run.model.config._name_or_path
    place = run.args.hub_model_id or str(folder)
    rows = read_metrics(folder) if (folder / METRICS).exists() else []
    step = max((row["step"] for row in rows), default=0)
    started = f" from {base}" if base else " from fresh weights"
    lines = [
        "---",
        "library_name: transformers",
        *([f"base_model: {base}"] if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) else []),
        "tags: [offline_lmrl, reinforcement-learning]",
        "---",
        "",
        f"# {place}",
        "",
        f"Trained with offline_lmrl (`{run.algorithm}`){started}, {step} optimizer steps; it learnt from: "
        f"{run.regime}.",
        "",
        "## Data",
        "",
        *_table(
            ("", "path", "rows", "sha256"),
            ((part, one["path"] or "rows of a program", one["rows"], one["hash"]) for part, one in run.data.items()),
        ),
        "",
        "## Settings that differ from their defaults",
        "",
        *_table(("setting", "value"), changed_settings(run.args).items()),
        "",
        f"## Metrics at step {step}",
        "",
        "In brackets: the 95 % interval, of held-out data over batches of rows, of play over episodes.",
        "",
        *_table(("metric", "value"), _last_values(rows).items()),
        "",
        "## Use",
        "",
        "transformers opens it as a plain language model, without what the value heads or returns add in decoding. "
        "With `pip install offline_lmrl`:",
        "",
        "```",
        *(f"offline-lmrl {command.format(run=place)}" for command in run.next_commands),
        "```",
        "",
    ]
    return "\n".join(lines)


def changed_settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the settings that differ from their defaults and decide what is learnt, by name."""
    found = {}
    for one in fields(args):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        value = vars(args)[one.name]
        # Values such as False and [] in place of None are filled in by transformers.
        if value != default and (value or default) and not any(fnmatch(one.name, pattern) for pattern in UNTOLD):
            found[one.name] = asdict(value) if is_dataclass(value) else value
    return found


def _last_values(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the last value of each loss, value and measurement by name, with its interval if it has one."""
    last = {name: value for row in rows for name, value in row.items() if isinstance(value, int | float)}
    found = {}
    for name, value in last.items():
        low, high = (last.get(f"{name}{end}") for end in ENDS)
        if re.match(r"(eval_)?loss|(eval_)?value/|environment/|fqe/|eval_accuracy", name) and not name.endswith(ENDS):
            found[name] = f"{value:.4g}" if low is None or high is None else f"{value:.4g} [{low:.4g}, {high:.4g}]"
    return found


def _table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    cells = [[_cell(value) for value in row] for row in rows]
    return [_line(titles), _line(["---"] * len(titles)), *map(_line, cells)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    return re.sub(r"([\\|`<])", r"\\\1", " ".join(str(value).split()))
