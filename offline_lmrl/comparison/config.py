"""The settings of a comparison: dataclasses for the contents of the YAML file that `compare` takes, and their checks.

A method is an algorithm with its settings. It is trained once per seed, which gives one run: a folder with the trained
model. A method may start from, learn from, plan with or take its requested return from the run of another method; the
settings then name this method, and the run of the same seed is used.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from offline_lmrl.errors import InputError, shown
from offline_lmrl.evaluation.metrics import ScoreScale
from offline_lmrl.logs.yaml_text import read_yaml
from offline_lmrl.renamed import current
from offline_lmrl.settings import build, setting

TRAINING = {"model", "args", "from", "value_model", "preference", "reward_model", "collect"}  # excluded by `run_of`
NAME = r"\w[\w.+=,@ -]{0,99}"  # a method's name, which is also part of file names
ELSEWHERE = ("path", "scratch", "vocab_size", "tokenizer")  # model settings that a method with `from` must not have


@dataclass(frozen=True)
class CollectConfig:
    """Training in rounds: the policy plays, and is then trained offline on all logs so far (rounds.py)."""

    rounds: int = setting(
        1,
        "Number of rounds of play. The policy is trained once before the first round and once after each round, "
        "starting from its latest weights.",
    )
    episodes: int = setting(100, "Episodes per round; they are added to the logs and stay there.")
    decoding: dict[str, Any] = setting(
        dict,
        "DecodingConfig fields for this play, merged over those saved with the run. Without max_new_tokens the value "
        "of the method's evaluation is used, as for every method that learns by playing.",
    )
    first_seed: int = setting(
        10_000_000,
        "First episode seed of the rounds; keep it above the seeds of evaluation and selection.",
    )

    def __post_init__(self) -> None:
        for name in ("rounds", "episodes"):
            require_at_least(f"collect.{name}", getattr(self, name), 1)
        require_at_least("collect.first_seed", self.first_seed, 0)


@dataclass(frozen=True)
class MethodConfig:
    """A method of a comparison: an algorithm with its settings, trained once per seed."""

    algorithm: str = setting("", "Name of an algorithm, as in `train`.")
    model: Mapping[str, Any] = setting(dict, "Model settings, merged key by key over the comparison's `model`.")
    args: Mapping[str, Any] = setting(dict, "Algorithm settings, merged key by key over the comparison's `args`.")
    start_from: str | None = setting(
        None,
        "Method whose run of the same seed supplies the initial weights; null = `model` decides. A YAML file calls it "
        "`from`.",
    )
    value_model: str | None = setting(
        None,
        "Method whose run of the same seed becomes `args.value_model`, for algorithms that learn from one.",
    )
    preference: Mapping[str, Any] | None = setting(
        None,
        "For preference data, how rewards are made from the labels: `reward`, `reward_at` and `normalise` (run.py).",
    )
    reward_model: str | None = setting(
        None,
        "Method whose run of the same seed, a reward model, becomes `preference.reward`.",
    )
    evaluate: bool = setting(
        True,
        "False trains the method only for others that start or learn from it; it gets no rows.",
    )
    decoding: Mapping[str, Any] = setting(
        dict,
        "DecodingConfig fields for its play, merged over `evaluation.decoding`. In `ask: auto:NAME`, NAME is the "
        "method whose run of the same seed supplies the requested return.",
    )
    planner: Mapping[str, Any] | None = setting(
        None,
        "PlannerConfig fields. They add a row for planned play, with proposals sampled at β 0 and no requested "
        "return.",
    )
    betas: tuple[float, ...] | None = setting(
        None,
        "Candidates for β; null = `evaluation.betas`, an empty list = play without value guidance.",
    )
    run_of: str | None = setting(
        None,
        "Method whose runs are played again with other `decoding`, `planner` or `betas`. The method itself then has "
        "no algorithm and no training settings.",
    )
    collect: CollectConfig | None = setting(
        None,
        "CollectConfig fields. They train an algorithm that learns from data in rounds of play in the environment.",
    )
    regime: str | None = setting(
        None,
        'Text in the table for the data that the method may learn from; null = its algorithm\'s own, or "environment" '
        "with `collect`.",
    )

    def __post_init__(self) -> None:
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(self.betas))

    @property
    def asks(self) -> str | None:
        """The name of the method whose Q gives the requested return (`ask: auto:NAME`); None if no method does."""
        ask = str(self.decoding.get("ask"))
        return ask.removeprefix("auto:") if ask.startswith("auto:") else None

    @property
    def scorer(self) -> str | None:
        """The name of the method whose value heads rate the planner's candidate replies.

        None if there is no planner, or if it uses the policy's own return heads.
        """
        scorer = (self.planner or {}).get("scorer", "heads")
        return None if scorer == "heads" else scorer

    @classmethod
    def of(cls, name: str, entry: Any) -> "MethodConfig":
        """Build a method from its entry in a YAML file, and check the entry.

        Args:
          name: name of the method.
          entry: mapping from field to value, in which `start_from` is called `from`; a MethodConfig is returned as it
            is.
        Raises: InputError that names the setting.
        """
        if not (isinstance(name, str) and re.fullmatch(NAME, name)):
            raise InputError(
                f"methods: found the name {shown(name)}, expected text of letters, digits, spaces and "
                "_ . + = , @ -, at most 100 characters, with a letter, digit or _ first, because it is part of "
                "file names"
            )
        if isinstance(entry, cls):
            return entry
        if not isinstance(entry, Mapping):
            raise InputError(f"methods.{name}: found {shown(entry)}, expected a mapping with `algorithm`")
        fields = {f.name for f in dataclasses.fields(cls)} - {"start_from"} | {"from"}
        require_known(entry, fields, f"methods.{name}")
        if ("algorithm" in entry) == ("run_of" in entry):
            found = "both" if "algorithm" in entry else "neither"
            raise InputError(f"methods.{name}: found {found}, expected either `algorithm` or `run_of`")
        if "run_of" in entry and (other := sorted(set(entry) & TRAINING)):
            where = f"methods.{name}.{other[0]}"
            raise InputError(f"{where}: found beside `run_of`, which sets it, expected only one of them")
        betas = entry.get("betas")
        if betas is not None and not (isinstance(betas, Sequence) and all(_is_number(b) and b >= 0 for b in betas)):
            raise InputError(f"methods.{name}.betas: found {shown(betas)}, expected a list of numbers, none below 0")
        for key in ("model", "args", "decoding", "planner", "preference", "collect"):
            if not isinstance(entry.get(key), Mapping | None):
                raise InputError(f"methods.{name}.{key}: found {shown(entry[key])}, expected a mapping")
        if "beta" in (entry.get("decoding") or {}):
            raise InputError(f"methods.{name}.decoding.beta: found a value, expected none: `betas` sets it")
        given = {key: value for key, value in entry.items() if key != "from" and value is not None}
        if "collect" in given:
            given["collect"] = build(CollectConfig, given["collect"], f"methods.{name}.collect")
            given.setdefault("regime", "environment")
        return cls(start_from=entry.get("from"), **given)


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
        require_at_least("evaluation.selection.episodes", self.episodes, 1)
        require_at_least("evaluation.selection.first_seed", self.first_seed, 0)


@dataclass(frozen=True)
class EvaluationConfig:
    """The settings by which every method is measured."""

    episodes: int = setting(800, "Number of episode seeds; every method plays the same ones.")
    first_seed: int = setting(0, "First episode seed; the seeds are first_seed .. first_seed + episodes − 1.")
    repeats: int = setting(1, "Decoding seeds per episode seed in sampled play; greedy play has one.")
    betas: tuple[float, ...] = setting((1.0, 2.0, 4.0, 8.0, 16.0, 32.0), "Candidates for β, for value-guided methods.")
    kl_budget: float = setting(
        0.3,
        "Limit for choosing β offline, in nats per token: the largest β whose mean KL(guided ‖ π) on logged "
        "validation states is within it.",
    )
    offline_rows: int = setting(200, "Validation rows used to choose β offline.")
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
        for name in ("episodes", "repeats", "offline_rows", "batch_size"):
            require_at_least(f"evaluation.{name}", getattr(self, name), 1)
        require_at_least("evaluation.first_seed", self.first_seed, 0)
        require_at_least("evaluation.kl_budget", self.kl_budget, 0)
        if not self.betas or min(self.betas) < 0:
            raise InputError(f"evaluation.betas: found {list(self.betas)}, expected at least one number, none below 0")
        if "beta" in self.decoding:
            raise InputError("evaluation.decoding.beta: found a value, expected none: evaluation.betas sets it")

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
        require_at_least("workers", self.workers, 1)
        object.__setattr__(self, "seeds", tuple(self.seeds))
        object.__setattr__(self, "methods", {name: MethodConfig.of(name, m) for name, m in self.methods.items()})
        object.__setattr__(self, "methods", {name: self._resolved(name) for name in self.methods})
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: found {list(self.seeds)}, expected at least one, and no seed twice")
        if "name" not in self.environment:
            raise InputError("environment.name: missing, expected the name of an environment")
        require_known(self.data, {"train", "validation", "reward"}, "data")
        if not self.data.get("train"):
            raise InputError("data.train: missing, expected a file or folder of trajectories")
        if self.prepare is not None and "command" not in self.prepare:
            raise InputError("prepare.command: missing, expected the SOURCE of `offline-lmrl prepare SOURCE`")
        if not self.evaluated:
            raise InputError("methods: found none to evaluate, expected at least one")
        if self.baseline:
            require_known([self.baseline], set(self.evaluated), "baseline")
        else:
            object.__setattr__(self, "baseline", self.evaluated[0])
        for name in self.methods:
            self._check_way(name)
        if self.partner is not None and "partner" in self.methods:
            raise InputError(
                "methods: found the name 'partner' beside a partner, expected another: it names the partner's run"
            )
        self._check_selection()

    @property
    def evaluated(self) -> list[str]:
        """The names of the methods that are measured and get rows of results."""
        return [name for name, method in self.methods.items() if method.evaluate]

    @property
    def trained(self) -> list[str]:
        """The names of the measured methods, and of those that rate their plans or give their requested returns.

        Methods that these start or learn from are not listed.
        """
        helpers = [
            helper for name in self.evaluated for helper in (self.methods[name].scorer, self.methods[name].asks)
        ]
        return list(dict.fromkeys([*self.evaluated, *filter(None, helpers)]))

    def _resolved(self, name: str) -> MethodConfig:
        """Return the full settings of a method; those of a method with `run_of: OTHER` are completed from OTHER.

        Such a method keeps its `evaluate`, `planner` and `decoding`, and its `betas` and `regime` if they are given.
        Fields of `decoding` that it does not set, and all other settings, are those of OTHER.
        """
        method = self.methods[name]
        if method.run_of is None:
            return method
        runs = {other for other, there in self.methods.items() if there.run_of is None}
        require_known([method.run_of], runs, f"methods.{name}.run_of")
        other = self.methods[method.run_of]
        own = {key: getattr(method, key) for key in ("evaluate", "planner", "run_of")}
        given = {key: getattr(method, key) for key in ("betas", "regime") if getattr(method, key) is not None}
        return replace(other, **own, **given, decoding={**other.decoding, **method.decoding})

    def _check_way(self, name: str, before: tuple[str, ...] = ()) -> None:
        """Check the references of a method to other methods.

        The methods must exist and must not need this one in turn. A setting that a reference determines must not be
        given as well, such as `args.value_model` with `value_model`.

        Args:
          name: name of the method.
          before: names of the methods that need this one, to detect a circle.
        Raises: InputError that names the setting.
        """
        if name in before:
            circle = " <- ".join([*before, name])
            raise InputError(
                f"methods.{name}: found the circle {circle}, expected `from`, `value_model` and `reward_model` "
                "without a circle"
            )
        method = self.methods[name]
        for key, other in (
            ("from", method.start_from),
            ("value_model", method.value_model),
            ("reward_model", method.reward_model),
        ):
            if other is not None:
                require_known([other], set(self.methods), f"methods.{name}.{key}")
                self._check_way(other, (*before, name))
        if method.start_from is not None and (stated := sorted(set(ELSEWHERE) & set(method.model))):
            where = f"methods.{name}.model.{stated[0]}"
            raise InputError(f"{where}: found beside `from`, which sets it, expected only one of them")
        if method.scorer is not None:
            require_known([method.scorer], set(self.methods), f"methods.{name}.planner.scorer")
        if method.asks is not None:
            require_known([method.asks], set(self.methods), f"methods.{name}.decoding.ask")
        if method.reward_model is not None and "reward" in (method.preference or {}):
            where = f"methods.{name}.preference.reward"
            raise InputError(f"{where}: found beside `reward_model`, which sets it, expected only one of them")
        if method.value_model is not None and "value_model" in method.args:
            where = f"methods.{name}.args.value_model"
            raise InputError(f"{where}: found beside `value_model`, which sets it, expected only one of them")

    def _check_selection(self) -> None:
        chosen = self.evaluation.selection
        if chosen is None:
            return
        same = all(self.environment.get(key) == value for key, value in chosen.environment.items())
        reported = self.evaluation.seeds
        last = min(reported.stop, chosen.first_seed + chosen.episodes)
        shared = last - max(reported.start, chosen.first_seed)  # by arithmetic: a mistyped number may be huge
        if same and shared > 0:
            raise InputError(
                f"evaluation.selection.first_seed: found {shared} episode seeds that are also reported, "
                "expected other seeds, or another `environment`"
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
            _set(raw, dotted, value)
        raw = current(raw, str(path))  # the overrides too
        try:
            return build(cls, raw)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def _set(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        if not isinstance(raw.get(key), dict):
            raw[key] = {}
        raw = raw[key]
    raw[last] = value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_known(names: Iterable[str], known: set[str], where: str) -> None:
    """Check that all names are known.

    Args:
      names: the names to check.
      known: the allowed names.
      where: dotted name of the setting that holds the names, for the error message.
    Raises: InputError for the first unknown name, which also suggests the known name that is nearest to it.
    """
    for name in names:
        if not isinstance(name, str) or name not in known:
            near = difflib.get_close_matches(str(name)[:100], sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{where}: found {shown(name)}, expected one of {', '.join(sorted(known))}{hint}")


def require_at_least(name: str, value: float, least: float) -> None:
    """Check that value ≥ least; NaN fails.

    Args:
      name: dotted name of the setting, for the error message.
    Raises: InputError that names the setting.
    """
    if not value >= least:
        raise InputError(f"{name}: found {value}, expected at least {least}")
