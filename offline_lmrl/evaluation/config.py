"""The settings of a comparison: dataclasses for the contents of a `compare` file, and their checks."""

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from offline_lmrl.data.errors import InputError, in_our_words, shown
from offline_lmrl.data.yaml_text import read_yaml
from offline_lmrl.evaluation.metrics import ScoreScale

TRAINING = {"model", "args", "from", "critic", "preference", "judge", "collect"}  # excluded by `run_of`
NAME = r"\w[\w.+=,@ -]{0,99}"  # a method's name, which is also part of file names
ELSEWHERE = ("path", "scratch", "vocab_size", "tokenizer")  # model settings that `from` decides


@dataclass(frozen=True)
class CollectConfig:
    """Rounds of play between rounds of offline training (rounds.py).

    rounds: number of rounds of play. The policy is trained once before the first round and once after each round,
      starting from its latest weights.
    episodes: episodes per round; they are added to the logs and stay there.
    sampling: SamplingConfig fields for this play, merged over those saved with the run. Without max_new_tokens the
      value of the method's evaluation is used, as for every method that learns by playing.
    first_seed: first episode seed of the rounds; keep it above the seeds of evaluation and selection.
    """

    rounds: int = 1
    episodes: int = 100
    sampling: dict[str, Any] = field(default_factory=dict)
    first_seed: int = 10_000_000

    def __post_init__(self) -> None:
        for name in ("rounds", "episodes"):
            require_at_least(f"collect.{name}", getattr(self, name), 1)
        require_at_least("collect.first_seed", self.first_seed, 0)


@dataclass(frozen=True)
class MethodConfig:
    """A method, which is one group of rows in the table: an algorithm with its settings, trained once per seed.

    algorithm: name of an algorithm, as in `train`.
    model: model settings, merged key by key over the comparison's `model`.
    args: algorithm settings, merged key by key over the comparison's `args`.
    start_from: method whose run of the same seed supplies the initial weights; None = `model` decides. A YAML file
      calls it `from`.
    critic: method whose run of the same seed becomes `args.critic`, for algorithms that learn from one.
    preference: for preference data, how rewards are made from the labels: `reward`, `place` and `normalise` (run.py).
    judge: method whose run of the same seed, a reward model, becomes `preference.reward`.
    evaluate: False trains the method only for others that start or learn from it; it gets no rows.
    sampling: SamplingConfig fields for its play, merged over `evaluation.sampling`. In `ask: auto:NAME`, NAME is the
      method whose run of the same seed supplies the requested return.
    planner: PlannerConfig fields. They add a row for planned play, with proposals sampled at β 0 and no requested
      return.
    betas: candidates for β; None = `evaluation.betas`, an empty list = play without value guidance.
    run_of: method whose runs are played again with other `sampling`, `planner` or `betas`. The method itself then has
      no algorithm and no training settings.
    collect: CollectConfig fields. They train an algorithm that learns from data in rounds of play in the environment.
    regime: text in the table for the data that the method may learn from; None = its algorithm's own, or "environment"
      with `collect`.
    """

    algorithm: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    critic: str | None = None
    preference: Mapping[str, Any] | None = None
    judge: str | None = None
    evaluate: bool = True
    sampling: Mapping[str, Any] = field(default_factory=dict)
    planner: Mapping[str, Any] | None = None
    betas: tuple[float, ...] | None = None
    run_of: str | None = None
    collect: CollectConfig | None = None
    regime: str | None = None

    def __post_init__(self) -> None:
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(self.betas))

    @property
    def asks(self) -> str | None:
        """The method whose Q supplies the requested return; None if no method does."""
        ask = str(self.sampling.get("ask"))
        return ask.removeprefix("auto:") if ask.startswith("auto:") else None

    @property
    def scorer(self) -> str | None:
        """The method whose run rates the plans; None if there is no planner or it uses the policy's own heads."""
        scorer = (self.planner or {}).get("scorer", "heads")
        return None if scorer == "heads" else scorer

    @classmethod
    def of(cls, name: str, entry: Any) -> "MethodConfig":
        """Build a method from its entry in a YAML file, in which `start_from` is called `from`.

        Args:
          name: name of the method.
          entry: mapping of its settings; a MethodConfig is returned as it is.
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
        for key in ("model", "args", "sampling", "planner", "preference", "collect"):
            if not isinstance(entry.get(key), Mapping | None):
                raise InputError(f"methods.{name}.{key}: found {shown(entry[key])}, expected a mapping")
        if "beta" in (entry.get("sampling") or {}):
            raise InputError(f"methods.{name}.sampling.beta: found a value, expected none: `betas` sets it")
        given = {key: value for key, value in entry.items() if key != "from" and value is not None}
        if "collect" in given:
            given["collect"] = build(CollectConfig, given["collect"], f"methods.{name}.collect.")
            given.setdefault("regime", "environment")
        return cls(start_from=entry.get("from"), **given)


@dataclass(frozen=True)
class PartnerConfig:
    """A model that plays inside the environment. It is trained once and is the same for every method and seed.

    algorithm: name of an algorithm, as in `train`.
    model: model settings, merged over the comparison's `model`.
    args: algorithm settings, merged over the comparison's `args`.
    seed: its training seed.
    sampling: SamplingConfig fields for its play.
    argument: keyword under which the environment takes the partner's policy.
    """

    algorithm: str = "bc"
    model: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    argument: str = "partner"


@dataclass(frozen=True)
class SelectionConfig:
    """Episodes on which β is chosen by returns. They are never the reported ones.

    episodes: number of episodes per β.
    first_seed: first episode seed.
    environment: keywords that differ from those of the reported environment (for example another file of scenarios).
    """

    episodes: int = 200
    first_seed: int = 1_000_000
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_at_least("evaluation.selection.episodes", self.episodes, 1)
        require_at_least("evaluation.selection.first_seed", self.first_seed, 0)


@dataclass(frozen=True)
class EvaluationConfig:
    """The way in which every method is measured.

    episodes: number of episode seeds; every method plays the same ones.
    first_seed: first episode seed; the seeds are first_seed .. first_seed + episodes − 1.
    repeats: decoding seeds per episode seed in sampled play; greedy play has one.
    betas: candidates for β, for value-guided methods.
    kl_budget: limit for choosing β offline, in nats per token: the largest β whose mean KL(guided ‖ π) on logged
      validation states is within it.
    offline_rows: validation rows used to choose β offline.
    selection: episodes on which β is also chosen by returns; None = β is chosen offline only.
    cluster: label that dependent episodes share (for example scenario or start); None = the episode seed.
    score: worst, mean and best score (`min`, `mean`, `max`) for the normalised column; None = no such column.
    labels: names of the numeric labels that become columns; None = all.
    sampling: SamplingConfig fields for the play of every method. Methods that learn by playing also take their
      max_new_tokens from here, unless their own `sampling`, `args.sampling` or `collect.sampling` sets it.
    batch_size: episodes played at the same time.
    """

    episodes: int = 800
    first_seed: int = 0
    repeats: int = 1
    betas: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    kl_budget: float = 0.3
    offline_rows: int = 200
    selection: SelectionConfig | None = None
    cluster: str | None = None
    score: ScoreScale | None = None
    labels: tuple[str, ...] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 1024

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("episodes", "repeats", "offline_rows", "batch_size"):
            require_at_least(f"evaluation.{name}", getattr(self, name), 1)
        require_at_least("evaluation.first_seed", self.first_seed, 0)
        require_at_least("evaluation.kl_budget", self.kl_budget, 0)
        if not self.betas or min(self.betas) < 0:
            raise InputError(f"evaluation.betas: found {list(self.betas)}, expected at least one number, none below 0")
        if "beta" in self.sampling:
            raise InputError("evaluation.sampling.beta: found a value, expected none: evaluation.betas sets it")

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.episodes)


@dataclass(frozen=True)
class CompareConfig:
    """A comparison of methods on one environment.

    environment: `name` of a known environment or `package.module:Class` (whose code is run), and its keywords.
    data: `train` and `validation`, files or folders of trajectories or comparisons; `reward`, the column that holds
      the score.
    methods: mapping from name to settings (MethodConfig), in the order of the table.
    output: folder for results.jsonl, table.md, report/, episodes/, samples/ and runs/.
    prepare: `command` (of `offline-lmrl prepare`) and its settings; run once if data.train is missing or unfinished.
    seeds: training seeds of every method. Intervals over fewer than five seeds are wide; with one seed they describe
      that run alone.
    model: model settings that all methods share.
    args: algorithm settings that all methods share.
    baseline: method that the paired differences are taken against; "" = the first evaluated one.
    reference: published results, name -> {column: number}, printed below ours and marked as published.
    workers: number of worker processes, each with its share of the cores. They first train one seed each, then measure
      one run each. The numbers do not depend on it, except for last bits that depend on the number of threads.
    training_environment: environment keywords that differ when methods play in order to learn (for example scenarios
      that are not reported).
    """

    environment: dict[str, Any]
    data: dict[str, str | None]
    methods: dict[str, Any]
    output: str
    prepare: dict[str, Any] | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    model: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    partner: PartnerConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    baseline: str = ""
    reference: dict[str, dict[str, float]] = field(default_factory=dict)
    workers: int = 1
    training_environment: dict[str, Any] = field(default_factory=dict)

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
        """The names of the methods that get rows."""
        return [name for name, method in self.methods.items() if method.evaluate]

    @property
    def trained(self) -> list[str]:
        """The names of the methods that get rows, and of those that rate their plans or supply their asks."""
        judges = [judge for name in self.evaluated for judge in (self.methods[name].scorer, self.methods[name].asks)]
        return list(dict.fromkeys([*self.evaluated, *filter(None, judges)]))

    def _resolved(self, name: str) -> MethodConfig:
        """Fill in a method with `run_of`: it takes the training settings of that method and keeps its own decoding.

        A method without `run_of` is returned as it is.
        """
        method = self.methods[name]
        if method.run_of is None:
            return method
        runs = {other for other, there in self.methods.items() if there.run_of is None}
        require_known([method.run_of], runs, f"methods.{name}.run_of")
        other = self.methods[method.run_of]
        own = {key: getattr(method, key) for key in ("evaluate", "planner", "run_of")}
        given = {key: getattr(method, key) for key in ("betas", "regime") if getattr(method, key) is not None}
        return replace(other, **own, **given, sampling={**other.sampling, **method.sampling})

    def _check_way(self, name: str, before: tuple[str, ...] = ()) -> None:
        """Check that the methods which this one needs exist, that they do not need it in turn, and that no setting is
        given in two places.

        Args:
          before: the methods that led here, for finding a circle.
        Raises: InputError that names the setting.
        """
        if name in before:
            circle = " <- ".join([*before, name])
            raise InputError(
                f"methods.{name}: found the circle {circle}, expected `from`, `critic` and `judge` without a circle"
            )
        method = self.methods[name]
        for key, other in (("from", method.start_from), ("critic", method.critic), ("judge", method.judge)):
            if other is not None:
                require_known([other], set(self.methods), f"methods.{name}.{key}")
                self._check_way(other, (*before, name))
        if method.start_from is not None and (stated := sorted(set(ELSEWHERE) & set(method.model))):
            where = f"methods.{name}.model.{stated[0]}"
            raise InputError(f"{where}: found beside `from`, which sets it, expected only one of them")
        if method.scorer is not None:
            require_known([method.scorer], set(self.methods), f"methods.{name}.planner.scorer")
        if method.asks is not None:
            require_known([method.asks], set(self.methods), f"methods.{name}.sampling.ask")
        if method.judge is not None and "reward" in (method.preference or {}):
            where = f"methods.{name}.preference.reward"
            raise InputError(f"{where}: found beside `judge`, which sets it, expected only one of them")
        if method.critic is not None and "critic" in method.args:
            where = f"methods.{name}.args.critic"
            raise InputError(f"{where}: found beside `critic`, which sets it, expected only one of them")

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
        raw = read_yaml(path, "settings")
        for dotted, value in (overrides or {}).items():
            _set(raw, dotted, value)
        try:
            return build(cls, raw, "")
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def _set(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        if not isinstance(raw.get(key), dict):
            raw[key] = {}
        raw = raw[key]
    raw[last] = value


def build(cls: type, raw: Mapping[str, Any], prefix: str) -> Any:
    """Build a dataclass instance from a mapping and check names and types.

    Nested dataclasses are built one by one, so that an error names a key and not a union of types. Fields of type
    dict[str, Any] are copied without parsing: the parser would interpret their strings again ("no" as False).

    Args:
      cls: the dataclass.
      raw: its settings.
      prefix: dotted name of the mapping, for error messages, with a dot at its end; "" = the top of the file.
    Raises: InputError that names the key.
    """
    import jsonargparse

    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    hints = typing.get_type_hints(cls)
    hints = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    nested = {}
    for name, hint in hints.items():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part) or part == dict[str, Any]:
                nested[name] = part
    parts: dict[str, Any] = {}
    for key, value in raw.items():
        require_known([key], set(hints), prefix.rstrip(".") or "settings")
        if key in nested and isinstance(value, Mapping):
            part = nested[key]
            parts[key] = build(part, value, f"{prefix}{key}.") if dataclasses.is_dataclass(part) else dict(value)
        elif key in nested and value is not None:
            raise InputError(f"{prefix}{key}: found {shown(value)}, expected a mapping of settings")
    given = {key: value for key, value in raw.items() if key not in nested}
    for key in [key for key, value in given.items() if value is None]:
        if type(None) not in typing.get_args(hints[key]):
            del given[key]  # null means "not given" for a setting that cannot be null
    for name in sorted(required - set(parts) - set(given)):
        raise InputError(f"{prefix}{name}: missing, expected {'a mapping' if name in nested else 'a value'}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip=set(hints) - set(given))  # adding all TrainingArguments would be slow
    try:
        plain = parser.parse_object(given).as_dict()
    except argparse.ArgumentError as error:
        raise InputError(in_our_words(str(error), prefix)) from error
    return cls(**{key: plain[key] for key in given}, **parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_known(names: Iterable[str], known: set[str], where: str) -> None:
    """Check that all names are known.

    Args:
      where: dotted name of the setting that holds the names, for the error message.
    Raises: InputError for the first unknown name, with the known name that is nearest to it.
    """
    for name in names:
        if not isinstance(name, str) or name not in known:
            near = difflib.get_close_matches(str(name)[:100], sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{where}: found {shown(name)}, expected one of {', '.join(sorted(known))}{hint}")


def require_at_least(name: str, value: float, least: float) -> None:
    """Check that value >= least; NaN fails.

    Raises: InputError that names the setting.
    """
    if not value >= least:
        raise InputError(f"{name}: found {value}, expected at least {least}")
