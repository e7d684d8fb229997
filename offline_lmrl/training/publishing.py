"""The model card of a run, and the upload of its model to the hub.

A checkpoint also holds what resuming needs (optimizer, random states) and a run folder holds logs of training. None of
that is uploaded: only the files that opening the model needs, and the card.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import MISSING, asdict, fields, is_dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainingArguments
from transformers.utils import PushInProgress
from transformers.utils.hub import hf_api

from offline_lmrl.errors import InputError, first_line
from offline_lmrl.training.metrics import METRICS, read_metrics

log = logging.getLogger(__name__)

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


def create_repository(args: TrainingArguments) -> str:
    """Create the repository of the hub that the settings name, if it is missing.

    Returns: its name with the user's; it is also the new `hub_model_id` of the settings.
    Raises: InputError if the hub refuses or cannot be reached.
    """
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    try:
        created = hf_api().create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True)
    except Exception as error:  # no network, no token, no permission
        raise InputError(
            f"push_to_hub: found no repository {name}, and it could not be created ({first_line(error)})"
        ) from error
    args.hub_model_id = created.repo_id
    return created.repo_id


def start_upload(
    folder: Path, names: Sequence[str], args: TrainingArguments, repository: str, message: str
) -> PushInProgress:
    """Start to upload files of a folder to a repository of the hub, and return the upload, which can be waited for.

    If it fails, a warning is logged, as training goes on.
    """

    def report(job: Future) -> None:
        if not job.cancelled() and job.exception() is not None:
            log.warning("%s: the upload of %s failed: %s", repository, folder, first_line(job.exception()))

    job = _upload(folder, names, args, repository, message)
    job.add_done_callback(report)
    return PushInProgress([job])


def upload(folder: Path, names: Sequence[str], args: TrainingArguments, repository: str, message: str) -> None:
    """Upload files of a folder to a repository of the hub.

    Raises: InputError if the upload fails.
    """
    try:
        _upload(folder, names, args, repository, message).result()
    except Exception as error:  # no network, no permission, a refused file
        raise InputError(
            f"{repository}: the upload failed ({first_line(error)}); {folder} holds the model, so upload it again "
            "or train without push_to_hub"
        ) from error


def _upload(folder: Path, names: Sequence[str], args: TrainingArguments, repository: str, message: str) -> Future:
    return hf_api().upload_folder(
        repo_id=repository,
        folder_path=str(folder),
        allow_patterns=list(names),
        commit_message=message,
        token=args.hub_token,
        revision=args.hub_revision,
        run_as_future=True,
    )


def model_card(run: Trained) -> str:
    """Return the model card of a run in Markdown; the metrics are those of metrics.jsonl in its directory."""
    folder, base = Path(run.args.output_dir), run.model.config._name_or_path
    place = run.args.hub_model_id or str(folder)
    on_hub = not Path(base).exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
    rows = read_metrics(folder) if (folder / METRICS).exists() else []
    step = max((row["step"] for row in rows), default=0)
    started = f" from {_without_place(base)}" if base else " from fresh weights"
    lines = [
        "---",
        "library_name: transformers",
        *([f"base_model: {base}"] if on_hub else []),
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
            (
                (part, _without_place(one["path"] or "rows of a program"), one["rows"], one["hash"])
                for part, one in run.data.items()
            ),
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
            found[one.name] = _without_place(asdict(value) if is_dataclass(value) else value)
    return found


def _without_place(value: Any) -> Any:
    """Return a setting in which an absolute path, also inside a mapping, is only its last part: the card is public."""
    if isinstance(value, Mapping):
        return {name: _without_place(one) for name, one in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


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
