"""Rows of several folders in one report: results of comparisons, and runs that `evaluate play` measured one by one.

Rows are shown together if every run played the same episodes under the same decode budget; else they are refused with
the setting that differs, and never mixed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from offline_lmrl.comparison.config import EvaluationConfig
from offline_lmrl.comparison.measure import Played, Setting, result_row
from offline_lmrl.comparison.methods import CostConfig, require_known
from offline_lmrl.comparison.provenance import provenance
from offline_lmrl.comparison.resolve import settings_of_run
from offline_lmrl.comparison.rows import SCHEME, Row, as_lines, plain, read_results
from offline_lmrl.comparison.runs import FOREIGN, PLANNED, Entry, Run
from offline_lmrl.decoding.planner import Planner
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.play import EvaluationResult
from offline_lmrl.logs.files import locked, say_differences
from offline_lmrl.logs.io import write_text
from offline_lmrl.run_folder import regime

EPISODES = ("episodes", "first_seed", "repeats", "cluster")  # settings of an evaluation that decide what is played
LENGTH = "max_new_tokens"
APART = "runs that played otherwise need another folder; `report` shows several folders in one table"
# Settings of a run that its method's runs with other seeds need not share.
OF_ONE_RUN = ("path", "value_model", "output_dir", "logging_dir", "run_name", "seed", "data_seed")
ONE_BY_ONE = "one_by_one"  # field of a row of kind "comparison": its runs were not made by one comparison


def gather(folders: Sequence[str | Path], baseline: str | None = None) -> list[Row]:
    """Return the rows of all folders as those of one comparison.

    A method that several folders have under one name keeps it if its settings are the same and the training seeds
    differ; else the folder is added to its name.

    Args:
      folders: folders with a results.jsonl.
      baseline: method that differences are taken against; None = that of the first folder.
    Raises: InputError if there are no results, or if they cannot be compared.
    """
    found = {str(folder): read_folder(folder) for folder in folders}
    first = next(iter(found))
    for folder, rows in found.items():
        difference = say_differences(played_as(rows), played_as(found[first]))
        if difference:
            raise InputError(f"{folder}: {difference} as in {first}; runs that played otherwise cannot be compared")
    rows = found[first] if len(found) == 1 else _joined(found)
    if baseline is not None:
        shown = rows[0]
        require_known([baseline], {row["method"] for row in rows if row["kind"] == "run"}, "baseline")
        rows = [{**shown, "baseline": baseline}, *rows[1:]]
    return rows


def read_folder(folder: str | Path) -> list[Row]:
    """Return the rows in a folder, after checking that they belong together.

    Raises: InputError if there is no results.jsonl, or if its rows belong to different comparisons.
    """
    source = Path(folder) / "results.jsonl"
    if not source.is_file():
        raise InputError(f"{source}: found no such file, expected the results of a comparison or of `evaluate play`")
    rows = sorted(read_results(source), key=lambda row: row["kind"] != "comparison")
    if not rows or rows[0]["kind"] != "comparison":
        raise InputError(f"{source}: found no row of kind comparison, expected one")
    refuse_mixed(rows, source)
    return rows


def played_as(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the settings that runs must share to be compared: environment, partner, episodes, longest reply.

    Empty if no run has been measured yet.
    """
    config = next((row["config"] for row in rows if row["kind"] == "run"), None)
    if config is None:
        return {}
    evaluation = config.get("evaluation", {})
    return {
        "environment": config.get("environment"),
        "partner": config.get("partner"),
        "evaluation": {name: evaluation.get(name) for name in EPISODES},
        "decoding": {LENGTH: evaluation.get("decoding", {}).get(LENGTH)},
    }


def refuse_mixed(rows: Sequence[Row], source: Path) -> None:
    """Check that all rows of kind "run" can belong to one comparison.

    They must agree in environment, partner and episodes. Those of a comparison must also agree in data and in the
    whole evaluation; and those of one method and way of decoding must have equal configs.

    Args:
      rows: rows of results, of any kind.
      source: path of their file, for the error message.
    Raises: InputError that names the settings which differ.
    """
    runs = [row for row in rows if row["kind"] == "run"]
    apart = any(row.get(ONE_BY_ONE) for row in rows)
    own: dict[tuple[str, str], dict[str, Any]] = {}
    for row in runs:
        mine = own.setdefault((row["method"], row["decode"]), row["config"])
        shared = ("environment", "data", "partner", "evaluation")
        every, expected = ({name: other["config"].get(name) for name in shared} for other in (row, runs[0]))
        if apart:
            every, expected = played_as([row]), played_as(runs)
        difference = say_differences(every, expected) or say_differences(row["config"], mine)
        if difference:
            mixed = "the folder holds results or a report of another comparison: move them away"
            raise InputError(f"{source}: {row['method']}: {difference}; {APART if apart else mixed}")


def _joined(found: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Return the rows of several folders, the row of kind "comparison" first, then behaviours and so on."""
    names = _names(found)
    shown = {folder: rows[0] for folder, rows in found.items()}
    configs = {folder: row["config"] for folder, row in shown.items()}
    first = next(iter(shown))
    config = {
        **configs[first],
        "methods": {
            names.get((folder, name), name): method
            for folder, config in configs.items()
            for name, method in config["methods"].items()
        },
        **{key: {folder: config[key] for folder, config in configs.items()} for key in ("data", "model", "args")},
    }
    baseline = names.get((first, shown[first]["baseline"]), shown[first]["baseline"])
    joined: list[Row] = [{**shown[first], "baseline": baseline, ONE_BY_ONE: True, "config": config}]
    for kind in ("behaviour", "optimum", "run", "published"):
        rows = [(folder, row) for folder, rows in found.items() for row in rows if row["kind"] == kind]
        if kind == "run":
            joined += [{**row, "method": names[folder, row["method"]]} for folder, row in rows]
            continue
        for i, (folder, row) in enumerate(rows):
            others = [other for _, other in rows[:i] if other["method"] == row["method"]]
            if row not in others:
                joined.append({**row, "method": f"{row['method']} ({folder})"} if others else row)
    return joined


def _names(found: Mapping[str, Sequence[Row]]) -> dict[tuple[str, str], str]:
    """Return the names of methods in a joint report: (folder, name there) -> name."""
    runs: dict[str, dict[str, list[Row]]] = {}
    for folder, rows in found.items():
        for row in rows:
            if row["kind"] == "run":
                runs.setdefault(row["method"], {}).setdefault(folder, []).append(row)
    names = {}
    for name, by_folder in runs.items():
        seeds = [seed for rows in by_folder.values() for seed in {row["seed"] for row in rows}]
        every = [row for rows in by_folder.values() for row in rows]
        made = {(row["decode"], json.dumps(row["config"], sort_keys=True)) for row in every}
        same = len(set(seeds)) == len(seeds) and len(made) == len({decode for decode, _ in made})
        alone = same or len(by_folder) == 1
        names |= {(folder, name): name if alone else f"{name} ({folder})" for folder in by_folder}
    return names


# Runs that are measured one by one.


@dataclass(frozen=True)
class SinglePlay:
    """The play of a single run, whose result becomes a row in a folder of results.

    folder: folder of the results; results.jsonl, episodes/ and samples/ are written into it.
    run: the run directory, or the folder or hub name of a causal LM.
    player: what plays: the policy of the run, or a planner with it.
    environment: `name` and settings of `make_environment`.
    evaluation: the settings of the evaluation; `decoding` is taken from the player.
    settings: further settings that change the play, such as `planner`, as values that JSON can hold.
    """

    folder: Path
    run: str
    player: LanguagePolicy | Planner
    environment: Mapping[str, Any]
    evaluation: EvaluationConfig
    settings: Mapping[str, Any]

    def rows(self, result: EvaluationResult | None) -> list[Row]:
        """Return the rows of the folder with the row of this play, which replaces that of the same play before.

        Args:
          result: what was played; None = nothing yet, to check only that the folder can take the row.
        Raises: InputError if the folder holds results of other play, or of another run by the same name.
        """
        source, decoding = self.folder / "results.jsonl", self.player.decoding
        evaluation = replace(self.evaluation, decoding={LENGTH: decoding.max_new_tokens})
        decode = PLANNED if isinstance(self.player, Planner) else "sampled" if decoding.temperature > 0 else "greedy"
        setting = Setting(decode, "given" if decoding.beta and decode != PLANNED else None)
        entry, data = _entry_of(self.run, asdict(decoding))
        shared = {
            "environment": dict(self.environment),
            "partner": None,
            "evaluation": {name: vars(evaluation)[name] for name in (*EPISODES, "decoding")},
        }
        config = {"rows": SCHEME, "data": data, **shared, "method": [{**entry.described[0], **self.settings}]}
        row: dict[str, Any] = {"kind": "run", "method": entry.method, "algorithm": entry.algorithm, "decode": decode}
        row |= {"seed": entry.seeds[0], "beta_chosen": setting.chosen, "run": self.run, "config": plain(config)}
        earlier = [old for old in read_folder(self.folder) if old["kind"] == "run"] if source.exists() else []
        again = [old for old in earlier if all(old[k] == row[k] for k in ("method", "seed", "decode", "beta_chosen"))]
        for old in again:
            found, expected = ({"run": str(Path(one["run"]).resolve()), **one["config"]} for one in (row, old))
            if difference := say_differences(found, expected):
                raise InputError(f"{source}: {row['method']}: {difference}; {APART}")
        if result is not None:
            row = result_row(
                self.folder, evaluation, entry, Played(setting, decoding.beta, result, decoding.temperature)
            ) | {"made": provenance(), "config": row["config"]}
            row.pop("declared", None)  # of a model made elsewhere nothing is known here
        rows = [*(old for old in earlier if old not in again), row]
        methods = {other["method"]: {"algorithm": other["algorithm"], "decoding": {}} for other in rows}
        rows.sort(key=lambda other: list(methods).index(other["method"]))  # stable: the rows of a method in a block
        comparison = {
            "kind": "comparison",
            ONE_BY_ONE: True,
            "baseline": rows[0]["method"],
            "labels": None,
            "config": {**shared, "data": {}, "model": {}, "args": {}, "methods": methods},
        }
        refuse_mixed([comparison, *rows], source)
        return [comparison, *rows]

    def save(self, result: EvaluationResult) -> None:
        """Add the row of what was played to the folder. Raises: InputError as `rows` does."""
        with locked(self.folder):
            write_text(self.folder / "results.jsonl", as_lines(self.rows(result)))


def _entry_of(run: str, decoding: dict[str, Any]) -> tuple[Entry, dict[str, Any] | None]:
    """Return the entry of a run that is measured alone, and hashes of the data that it learnt from.

    The method is called as the folder, without the training seed at its end.
    """
    settings = settings_of_run(run)
    algorithm = settings.get("algorithm", FOREIGN)
    seed = settings.get("args", {}).get("seed", 0)
    name = Path(run).resolve().name if Path(run).exists() else run
    learnt_from, cost = (regime(algorithm, settings), None) if settings else ("not declared", CostConfig())
    entry = Entry(
        name.removesuffix(f"-{seed}"),
        (seed,),
        algorithm,
        Run(name, seed, run, name, cost=cost),
        decoding=decoding,
        regime=learnt_from,
        described=[{"algorithm": algorithm, "decoding": decoding, **_trained_with(settings)}],
    )
    hashes = settings.get("input_hashes")
    return entry, hashes and {name: hashes.get(name) for name in ("train", "validation")}


def _trained_with(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that must be equal in its method's runs with other seeds; {} if none are known.

    Paths of runs are left out, because each seed may start or learn from its own.
    """
    found = {group: dict(settings.get(group) or {}) for group in ("model", "args")}
    for name in OF_ONE_RUN:
        found["model"].pop(name, None)
        found["args"].pop(name, None)
    return found if settings else {}
