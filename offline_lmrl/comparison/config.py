"""The settings of a comparison: dataclasses for the contents of the YAML file that `compare` takes, and their checks.

methods.py has the settings of a single method.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offline_lmrl.comparison.methods import MethodConfig, complete_methods, require_at_least, require_known
from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.evaluation.metrics import ScoreScale
from offline_lmrl.logs.yaml_text import read_yaml
from offline_lmrl.renamed import current
from offline_lmrl.settings import build, set_dotted, setting


@dataclass(frozen=True)
class PartnerConfig:
    """A model that plays the other side inside the environment, trained once and used for every method and seed."""

    algorithm: str = setting("bc", "Name of an algorithm, as in `train`.")
    model: dict[str, Any] = setting(dict, "Model settings, merged over the comparison's `model`.")
    args: dict[str, Any] = setting(dict, "Algorithm settings, merged over the comparison's `args`.")
    seed: int = setting(0, "Its training seed.")
    decoding: dict[str, Any] = setting(dict, "DecodingConfig fields for its play.")
    argument: str = setting("partner", "Keyword under which the environment takes the partner's policy.")


@dataclass(frozen=True)
class SelectionConfig:
    """The episodes that are played to choose β, the weight of value guidance; their scores are not reported."""

    episodes: int = setting(200, "Number of episodes per β.")
    first_seed: int = setting(1_000_000, "First episode seed.")
    environment: dict[str, Any] = setting(
        dict,
        "Keywords that differ from those of the reported environment (for example another file of scenarios).",
    )

    def __post_init__(self) -> None:
        require_at_least(self, "evaluation.selection.", episodes=1, first_seed=0)


@dataclass(frozen=True)
class EvaluationConfig:
    """The settings by which every method is measured."""

    episodes: int = setting(800, "Number of episode seeds; every method plays the same ones.")
    first_seed: int = setting(0, "First episode seed; the seeds are first_seed .. first_seed + episodes − 1.")
    repeats: int = setting(1, "Decoding seeds per episode seed in sampled play; greedy play has one.")
    betas: tuple[float, ...] = setting((1.0, 2.0, 4.0, 8.0, 16.0, 32.0), "Candidates for β, for value-guided methods.")
    offline_rows: int = setting(
        200,
        "Validation rows on which β is chosen offline: the smallest within 5% of the largest realised advantage, "
        "whose replies are not repeated, unfinished or empty more often; see `offline-lmrl evaluate logs --help`.",
    )
    selection: SelectionConfig | None = setting(
        None,
        "Episodes on which β is also chosen by returns; null = β is chosen offline only.",
    )
    cluster: str | None = setting(
        None,
        "Label that dependent episodes share (for example scenario or start); null = the episode seed.",
    )
    score: ScoreScale | None = setting(
        None,
        "Worst, mean and best score (`min`, `mean`, `max`) for the normalised column; null = no such column.",
    )
    labels: tuple[str, ...] | None = setting(None, "Names of the numeric labels that become columns; null = all.")
    decoding: dict[str, Any] = setting(
        dict,
        "DecodingConfig fields for the play of every method. Methods that learn by playing also take their "
        "max_new_tokens from here, unless their own `decoding`, `args.decoding` or `collect.decoding` sets it.",
    )
    batch_size: int = setting(1024, "Episodes played at the same time.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        require_at_least(self, "evaluation.", episodes=1, repeats=1, offline_rows=1, batch_size=1)
        require_at_least(self, "evaluation.", first_seed=0)
        require(
            min(self.betas, default=-1) >= 0,
            f"evaluation.betas: found {list(self.betas)}, expected at least one number, none below 0",
        )
        require(
            "beta" not in self.decoding,
            "evaluation.decoding.beta: found a value, expected none: evaluation.betas sets it",
        )

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.episodes)


@dataclass(frozen=True)
class CompareConfig:
    """A comparison of methods on one environment."""

    environment: dict[str, Any] = field(
        metadata={
            "help": "`name` of a known environment or `package.module:Class` (whose code is run), and its keywords."
        }
    )
    data: dict[str, str | None] = field(
        metadata={
            "help": "`train` and `validation`, files or folders of trajectories or comparisons; `reward`, the column "
            "that holds the score."
        }
    )
    methods: dict[str, Any] = field(
        metadata={"help": "Mapping from name to settings (MethodConfig), in the order of the table."}
    )
    output: str = field(
        metadata={"help": "Folder for results.jsonl, table.md, report/, episodes/, samples/ and runs/."}
    )
    prepare: dict[str, Any] | None = setting(
        None,
        "`command` (of `offline-lmrl prepare`) and its settings; run once if data.train is missing or unfinished.",
    )
    seeds: tuple[int, ...] = setting(
        (0, 1, 2, 3, 4),
        "Training seeds of every method. Intervals over fewer than five seeds are wide; with one seed they describe "
        "that run alone.",
    )
    model: dict[str, Any] = setting(dict, "Model settings that all methods share.")
    args: dict[str, Any] = setting(dict, "Algorithm settings that all methods share.")
    partner: PartnerConfig | None = setting(None, "The model that plays inside the environment; null = none plays.")
    evaluation: EvaluationConfig = setting(EvaluationConfig, "How every method is measured.")
    baseline: str = setting(
        "",
        'Method that the paired differences are taken against; "" = the first evaluated one.',
    )
    reference: dict[str, dict[str, float]] = setting(
        dict,
        "Published results, name -> {column: number}, printed below ours and marked as published.",
    )
    workers: int = setting(
        1,
        "Number of worker processes, each with its share of the cores. They first train one seed each, then measure "
        "one run each. The numbers do not depend on it, except for last bits that depend on the number of threads.",
    )
    training_environment: dict[str, Any] = setting(
        dict,
        "Environment keywords that differ when methods play in order to learn (for example scenarios that are not "
        "reported).",
    )

    def __post_init__(self) -> None:
        require_at_least(self, "", workers=1)
        object.__setattr__(self, "seeds", tuple(self.seeds))
        methods = {name: MethodConfig.of(name, entry) for name, entry in self.methods.items()}
        object.__setattr__(self, "methods", complete_methods(methods))
        require(
            0 < len(self.seeds) == len(set(self.seeds)),
            f"seeds: found {list(self.seeds)}, expected at least one, and no seed twice",
        )
        require("name" in self.environment, "environment.name: missing, expected the name of an environment")
        require_known(self.data, {"train", "validation", "reward"}, "data")
        require(bool(self.data.get("train")), "data.train: missing, expected a file or folder of trajectories")
        require(
            self.prepare is None or "command" in self.prepare,
            "prepare.command: missing, expected the SOURCE of `offline-lmrl prepare SOURCE`",
        )
        require(bool(self.evaluated), "methods: found none to evaluate, expected at least one")
        object.__setattr__(self, "baseline", self.baseline or self.evaluated[0])
        require_known([self.baseline], set(self.evaluated), "baseline")
        for name, method in self.methods.items():
            self._check_file(f"methods.{name}.train", method)
        require(
            self.partner is None or "partner" not in self.methods,
            "methods: found the name 'partner' beside a partner, expected another: it names the partner's run",
        )
        self._check_selection()

    @property
    def evaluated(self) -> list[str]:
        """The names of the methods that are measured and get rows of results."""
        return [name for name, method in self.methods.items() if method.evaluate]

    def _check_file(self, where: str, method: MethodConfig) -> None:
        """Check that the train file of a method names the data and the environment of the comparison, or none.

        Raises: InputError that names the file and the setting.
        """
        file = method.file or {}
        found = {f"data.{key}": value for key, value in file.get("data", {}).items() if key != "preference"}
        expected = {f"data.{key}": self.data.get(key) for key in ("train", "validation", "reward")}
        if file.get("environment") is not None:
            found["environment"] = file["environment"]
            expected["environment"] = self.environment | self.training_environment
        for key, value in found.items():
            require(
                value is None or value == expected.get(key),
                f"{where}: {method.train}: {key}: found {shown(value)}, expected {shown(expected.get(key))} as in the "
                "comparison, or no such setting",
            )

    def _check_selection(self) -> None:
        chosen = self.evaluation.selection
        if chosen is None:
            return
        same = all(self.environment.get(key) == value for key, value in chosen.environment.items())
        reported = self.evaluation.seeds
        last = min(reported.stop, chosen.first_seed + chosen.episodes)
        shared = last - max(reported.start, chosen.first_seed)  # by arithmetic: a mistyped number may be huge
        require(
            not same or shared <= 0,
            f"evaluation.selection.first_seed: found {shared} episode seeds that are also reported, expected other "
            "seeds, or another `environment`",
        )

    @classmethod
    def read(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> "CompareConfig":
        """Read a comparison from a YAML file.

        Args:
          path: the file.
          overrides: values that replace those in the file, by dotted key ("evaluation.episodes"); None = none.
        Raises: InputError that names the file and the key.
        """
        raw = current(read_yaml(path, "settings"), str(path))
        for dotted, value in (overrides or {}).items():
            set_dotted(raw, dotted, value)
        try:
            return build(cls, raw)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
