"""The rows of a comparison on disk: results.jsonl, from which interrupted comparisons resume.

A row of kind "run" has two fields that say how it was made: `config`, all settings and data hashes that determine it,
and `made`, the code, machine and command. Rows of other settings are refused, never mixed with new ones.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from offline_lmrl.comparison.config import CompareConfig
from offline_lmrl.comparison.measure import TEMPERATURES, Setting
from offline_lmrl.comparison.provenance import provenance
from offline_lmrl.comparison.rows import SCHEME, Row, as_lines, plain, read_results
from offline_lmrl.comparison.runs import PLANNED, Entry
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.metrics import label_means, mean_interval
from offline_lmrl.logs.files import say_differences, writing
from offline_lmrl.logs.io import (
    data_hash,
    holds_comparisons,
    read_comparisons,
    read_trajectories,
    write_text,
)
from offline_lmrl.logs.preferences import to_trajectories
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.run_folder import weights_hash
from offline_lmrl.tasks import make_environment


class Storage:
    """The rows of a comparison and the file that holds them.

    rows: all rows, in the order of the file.

    Args:
      config: the comparison.
      entries: its entries, in the order in which their rows are stored.
    """

    def __init__(self, config: CompareConfig, entries: Sequence[Entry]):
        self.config, self.folder = config, Path(config.output)
        self.entries = {(entry.method, seed): entry for entry in entries for seed in entry.seeds}
        self.rows: list[Row] = []

    def open(self) -> None:
        """Start from the results.jsonl of an earlier call, if there is one, and write the first files of the folder.

        The rows of kind "run" in it are kept; all other rows are computed anew. Then results.jsonl, config.json and
        the folders episodes/, samples/ and runs/ are written.

        Raises: InputError if a row was made with other settings.
        """
        self._kept(self.folder / "report" / "results.jsonl")  # only checked: the new report overwrites this file
        kept = self._kept(self.folder / "results.jsonl")
        for name in ("episodes", "samples", "runs"):
            with writing(self.folder / name):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.rows = [*self._fixed_rows(), *kept]
        self._save()
        write_text(self.folder / "config.json", json.dumps(plain(asdict(self.config)), indent=1) + "\n")

    def missing(self, entry: Entry) -> list[Setting]:
        """Return the settings of an entry that have no row yet."""
        choices: list[str | None] = [None]
        if entry.betas:
            choices = ["offline", "returns"] if self.config.evaluation.selection else ["offline"]
        done = {
            (row["decode"], row["beta_chosen"])
            for row in self.rows
            if row["kind"] == "run" and row["method"] == entry.method and row["seed"] == entry.seeds[-1]
        }
        settings = [Setting(decode, chosen) for decode in TEMPERATURES for chosen in choices]
        if entry.planner is not None:
            settings.append(Setting(PLANNED, None))
        return [setting for setting in settings if (setting.decode, setting.chosen) not in done]

    def add(self, entry: Entry, row: Row) -> None:
        """Add a row of an entry, once for each of its seeds, and save the file.

        The rows of the file are sorted by seed and method, not by time. The samples of the first seed are enough to
        show how a method replies; the files in samples/ hold all seeds.
        """
        for seed in entry.seeds:
            own = {"seed": seed, "samples": row["samples"] if seed == self.config.seeds[0] else []}
            self.rows.append({**row, **own, "made": provenance(), **self._identity(entry, row["decode"])})
        order = {run: place for place, run in enumerate(self.entries)}
        # Fixed rows and runs of methods no longer listed come first (−1). The sort is stable: within a run the
        # settings keep their order.
        self.rows.sort(key=lambda row: order.get((row["method"], row["seed"]), -1) if row["kind"] == "run" else -1)
        self._save()

    def _save(self) -> None:
        """Write results.jsonl atomically: if the process is killed, the file has the old rows or all new ones."""
        write_text(self.folder / "results.jsonl", as_lines(self.rows))

    def _kept(self, path: Path) -> list[Row]:
        """Return the rows of kind "run" in a results file; empty if there is no such file.

        Raises: InputError if one of these rows was made with other settings.
        """
        runs = [row for row in read_results(path) if row["kind"] == "run"] if path.exists() else []
        for row in runs:
            expected = self._identity(self.entries.get((row["method"], row["seed"])), row["decode"])
            difference = say_differences(row["config"], expected.pop("config")) or say_differences(row, expected)
            if difference:
                raise InputError(
                    f"{path}: {row['method']}: {difference}; choose another `output`, or remove "
                    "results.jsonl, report/ and runs/ there"
                )
        return runs

    def _identity(self, entry: Entry | None, decode: str) -> dict[str, Any]:
        """Return the fields of a row that name what determines it; a kept row must have the same ones.

        Returns: `config`, settings and hashes of data; and, for models made elsewhere, `weights`, the hash of the one
          that plays, and `other_weights`, those of the ones that it starts from, learns from or plays with.
        """
        if entry is None:  # a method that the config no longer lists
            return {"config": self._shared}
        found: dict[str, Any] = {"config": plain(self._shared | entry.identity(decode))}
        weights = {run.label: self._weights[run.folder] for run in entry.runs() if run.settings is None}
        if entry.run.label in weights:
            found["weights"] = weights.pop(entry.run.label)
        return found | ({"other_weights": weights} if weights else {})

    @cached_property
    def _weights(self) -> dict[str, str]:
        """A hash of the weights of each model made elsewhere, by its folder; of one on the hub, its name."""
        runs = [run for entry in self.entries.values() for run in entry.runs() if run.settings is None]
        return {folder: weights_hash(folder) or folder for folder in {run.folder for run in runs}}

    @cached_property
    def _shared(self) -> dict[str, Any]:
        evaluation = asdict(self.config.evaluation)
        for name in ("batch_size", "labels"):  # these change no number in a row
            del evaluation[name]
        return plain(
            {
                "rows": SCHEME,
                "environment": self.config.environment,
                "data": {"train": data_hash(self.train_data), "validation": data_hash(self.validation_data)},
                "partner": self.config.partner and asdict(self.config.partner),
                "evaluation": evaluation,
            }
        )

    @cached_property
    def train_data(self) -> list[Trajectory]:
        return _logs(self.config.data["train"], self.config.data.get("reward"))

    @cached_property
    def validation_data(self) -> list[Trajectory]:
        path = self.config.data.get("validation")
        return _logs(path, self.config.data.get("reward")) if path else []

    def _fixed_rows(self) -> Iterator[Row]:
        config, scale = self.config, self.config.evaluation.score
        shown = {"baseline": config.baseline, "labels": config.evaluation.labels}
        yield {"kind": "comparison", **shown, "config": plain(asdict(config))}
        if not holds_comparisons(config.data["train"]):  # a preference label is not a return
            yield self._behaviour()
        # A partner is trained only later, and no optimum is known for play against one.
        optimum = None if config.partner else _optimum(make_environment(**config.environment))
        if optimum is not None:
            normalised = scale and scale.normalise(optimum)
            yield {"kind": "optimum", "method": "optimum", "score": optimum, "normalised": normalised, "labels": {}}
        for name, columns in config.reference.items():
            known = {key: columns[key] for key in ("score", "normalised") if key in columns}
            labels = {key: value for key, value in columns.items() if key not in known}
            yield {"kind": "published", "method": name, **known, "labels": labels}

    def _behaviour(self) -> Row:
        """Return the row of the training data: their mean return, its interval over groups, and the label means."""
        scale = self.config.evaluation.score
        returns = [t.total_return for t in self.train_data]
        behaviour = mean_interval(returns, [t.group or i for i, t in enumerate(self.train_data)])
        cut = sum(not t.terminated for t in self.train_data) / len(self.train_data)
        return {
            "kind": "behaviour",
            # The return of a cut log is only partial, so the title shows how many are cut.
            "method": f"behaviour ({cut:.0%} of the logs are cut)" if cut else "behaviour",
            "score": behaviour.mean,
            "interval": behaviour.interval,
            "n": behaviour.n,
            "normalised": scale and scale.normalise(behaviour.mean),
            "labels": label_means(t.labels for t in self.train_data),
        }


def _logs(source: str, reward: str | None) -> list[Trajectory]:
    """Read logged trajectories, or read comparisons and make a trajectory of each option.

    The trajectory of an option has the default reward of `to_trajectories`, whatever reward a method learns from.

    Args:
      source: file or folder of trajectories or comparisons.
      reward: column that holds the score of a trajectory's row; None = the default column.
    """
    if holds_comparisons(source):
        return to_trajectories(read_comparisons(source))
    return read_trajectories(source, reward=reward)


def _optimum(environment: Any) -> float | None:
    """Return the best possible mean score; None if the environment has no method `optimum`.

    Args:
      environment: an environment, or a function that makes one.
    """
    environment = environment() if callable(environment) else environment
    optimum = getattr(environment, "optimum", None)
    return None if optimum is None else optimum()
