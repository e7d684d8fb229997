"""The settings of the methods of a comparison, and the checks of what they say about one another.

A method is an algorithm with its settings, a train file, or a model made elsewhere. It is trained once per seed, which
gives one run: a folder with the trained model. A method may start from, learn from, plan with or take its requested
return from the run of another method; the settings then name this method, and the run of the same seed is used.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from offline_lmrl.errors import InputError, at, listed, require, shown
from offline_lmrl.logs.yaml_text import read_yaml
from offline_lmrl.renamed import current
from offline_lmrl.settings import build, nearest, setting
from offline_lmrl.shipped import config_path

NAME = r"\w[\w.+=,@ -]{0,99}"  # a method's name, which is also part of file names
SOURCES = ("algorithm", "train", "checkpoint", "run_of")  # each method has one of these
TRAINING = ("model", "args", "from", "value_model", "preference", "reward_model", "collect")
ELSEWHERE = ("path", "scratch", "vocab_size", "tokenizer")  # model settings that a method with `from` must not have
# Settings that name a method this one is trained with -> (block, names in it) of the settings that they determine
LEARNT_WITH = {
    "from": ("model", ELSEWHERE),
    "value_model": ("args", ("value_model",)),
    "reward_model": ("preference", ("reward",)),
}
FILE = ("algorithm", "model", "args", "data", "environment", "prepare")  # what a train file may set


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
        require_at_least(self, "collect.", rounds=1, episodes=1, first_seed=0)


@dataclass(frozen=True)
class CostConfig:
    """The cost of training a model that was made elsewhere, as its maker declares it; tables mark it as declared."""

    training_tokens: int | None = setting(
        None, "Tokens that training read, each counted as often as it was read; null = unknown."
    )
    generated_tokens: int | None = setting(None, "Tokens that were sampled to train it; null = none or unknown.")
    reward_queries: int | None = setting(None, "Replies that were scored to train it; null = none or unknown.")


@dataclass(frozen=True)
class MethodConfig:
    """A method of a comparison: an algorithm with its settings, trained once per seed, or a model made elsewhere."""

    algorithm: str = setting("", "Name of an algorithm, as in `train`.")
    train: str | None = setting(
        None,
        "FILE.yaml of `train`, or the name of a shipped config, in place of `algorithm` and of the comparison's "
        "`model` and `args`; the settings below override it. The comparison sets its output_dir and seed.",
    )
    checkpoint: str | tuple[str, ...] | None = setting(
        None,
        "Folder or hub name of a causal LM that was made elsewhere, of a LoRA adapter, or of a run; it is only "
        "measured. One for all seeds, a path with {seed} in it, or a list with one per seed.",
    )
    cost: CostConfig | None = setting(
        None, "CostConfig fields of a checkpoint, its declared cost; null = that of the run in the folder."
    )
    model: dict[str, Any] = setting(dict, "Model settings, merged key by key over the comparison's `model`.")
    args: dict[str, Any] = setting(dict, "Algorithm settings, merged key by key over the comparison's `args`.")
    start_from: str | None = setting(
        None,
        "Method whose run of the same seed supplies the initial weights; null = `model` decides. A YAML file calls it "
        "`from`.",
    )
    value_model: str | None = setting(
        None,
        "Method whose run of the same seed becomes `args.value_model`, for algorithms that learn from one.",
    )
    preference: dict[str, Any] | None = setting(
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
    decoding: dict[str, Any] = setting(
        dict,
        "DecodingConfig fields for its play, merged over `evaluation.decoding`. In `ask: auto:NAME`, NAME is the "
        "method whose run of the same seed supplies the requested return.",
    )
    planner: dict[str, Any] | None = setting(
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
        "with `collect`. A checkpoint declares it.",
    )
    file: dict[str, Any] | None = setting(None, "Contents of the file `train`, which is read into it.")

    @property
    def references(self) -> dict[str, str]:
        """The names of the methods whose runs of the same seed this one uses: setting -> name."""
        ask, scorer = str(self.decoding.get("ask")), (self.planner or {}).get("scorer", "heads")
        named = {
            "from": self.start_from,
            "value_model": self.value_model,
            "reward_model": self.reward_model,
            "run_of": self.run_of,
            "planner.scorer": None if scorer == "heads" else scorer,
            "decoding.ask": ask.removeprefix("auto:") if ask.startswith("auto:") else None,
        }
        return {key: name for key, name in named.items() if name is not None}

    @classmethod
    def of(cls, name: str, entry: Any) -> "MethodConfig":
        """Build a method from its entry in a YAML file, and check the entry.

        Args:
          name: name of the method.
          entry: mapping from field to value, in which `start_from` is called `from`; a MethodConfig is returned as it
            is.
        Raises: InputError that names the setting.
        """
        require(
            isinstance(name, str) and re.fullmatch(NAME, name) is not None,
            f"methods: found the name {shown(name)}, expected text of letters, digits, spaces and _ . + = , @ -, at "
            "most 100 characters, with a letter, digit or _ first, because it is part of file names",
        )
        if isinstance(entry, cls):
            return entry
        where = f"methods.{name}"
        require(isinstance(entry, Mapping), f"{where}: found {shown(entry)}, expected a mapping with `algorithm`")
        require_known(entry, {field.name for field in fields(cls)} - {"start_from", "file"} | {"from"}, where)
        given = {key: value for key, value in entry.items() if value is not None}
        _check_source(given, where)
        if "collect" in given:
            given.setdefault("regime", "environment")
        if "train" in given:
            given |= _from_file(given, where)
        method = build(cls, {"start_from" if key == "from" else key: value for key, value in given.items()}, where)
        require(
            min(method.betas or (), default=0) >= 0,
            f"{where}.betas: found {list(method.betas or ())}, expected a list of numbers, none below 0",
        )
        require("beta" not in method.decoding, f"{where}.decoding.beta: found a value, expected none: `betas` sets it")
        return method


def _check_source(given: Mapping[str, Any], where: str) -> None:
    """Check that a method has one of SOURCES, and no setting that this source determines or has no use for."""
    found = [key for key in SOURCES if key in given]
    several = " and ".join(found) or "none of them"
    require(len(found) == 1, f"{where}: found {several}, expected exactly one of {', '.join(SOURCES)}")
    for other in sorted(set(given) & set(TRAINING)):
        require(
            found[0] in ("algorithm", "train"),
            f"{where}.{other}: found beside `{found[0]}`, which sets it, expected only one of them",
        )
    require(
        "cost" not in given or "checkpoint" in given,
        f"{where}.cost: found it without `checkpoint`, expected none: the cost of a run is measured",
    )


def _from_file(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read the train file of a method.

    Args:
      given: the settings of the method; `train` is the path of the file.
      where: dotted name of the method, for error messages.
    Returns: `file`, the contents; `algorithm`; and `preference`, if the file or the method sets it.
    Raises: InputError that names the setting.
    """
    path = given["train"]
    require(
        isinstance(path, str),
        f"{where}.train: found {shown(path)}, expected the path of a YAML file or the name of a shipped config",
    )
    with at(f"{where}.train"):
        file = current(read_yaml(config_path(path), "settings"), path)
    require_known(file, set(FILE), f"{where}.train: {path}")
    algorithm = file.get("algorithm")
    require(isinstance(algorithm, str), f"{where}.train: {path}: algorithm: found {shown(algorithm)}, expected a name")
    for key in ("model", "args", "data"):
        block = file.setdefault(key, {})
        require(isinstance(block, Mapping), f"{where}.train: {path}: {key}: found {shown(block)}, expected a mapping")
    file["args"] = {key: value for key, value in file["args"].items() if key not in ("output_dir", "seed")}
    preference = given.get("preference") or file["data"].get("preference")
    return {"file": file, "algorithm": file["algorithm"]} | ({} if preference is None else {"preference": preference})


def complete_methods(methods: Mapping[str, MethodConfig]) -> dict[str, MethodConfig]:
    """Return the methods with those of `run_of: OTHER` completed from OTHER, after checking all references.

    A method with `run_of` keeps its `evaluate`, `planner` and `decoding`, and its `betas` and `regime` if they are
    given. Fields of `decoding` that it does not set, and all other settings, are those of OTHER.

    Raises: InputError that names the setting.
    """
    runs = {name for name, method in methods.items() if method.run_of is None}
    found = {}
    for name, method in methods.items():
        if method.run_of is not None:
            require_known([method.run_of], runs, f"methods.{name}.run_of")
            other = methods[method.run_of]
            given = {"betas": method.betas, "regime": method.regime}
            method = replace(
                other,
                **{key: value for key, value in given.items() if value is not None},
                evaluate=method.evaluate,
                planner=method.planner,
                run_of=method.run_of,
                decoding={**other.decoding, **method.decoding},
            )
        found[name] = method
    for name in found:
        _check_references(found, name)
    return found


def _check_references(methods: Mapping[str, MethodConfig], name: str, before: Sequence[str] = ()) -> None:
    """Check the references of a method to other methods.

    The methods must exist and must not need this one in turn. A setting that a reference determines must not be given
    as well, such as `args.value_model` with `value_model`.

    Args:
      methods: all methods by name.
      name: name of the method.
      before: names of the methods that need this one, to detect a circle.
    Raises: InputError that names the setting.
    """
    require(
        name not in before,
        f"methods.{name}: found the circle {' <- '.join([*before, name])}, expected `from`, `value_model` and "
        "`reward_model` without a circle",
    )
    method = methods[name]
    blocks = {"model": method.model, "args": method.args, "preference": method.preference or {}}
    for key, other in method.references.items():
        require_known([other], set(methods), f"methods.{name}.{key}")
        if key in LEARNT_WITH:
            _check_references(methods, other, (*before, name))
            block, names = LEARNT_WITH[key]
            for twice in sorted(set(names) & set(blocks[block])):
                where = f"methods.{name}.{block}.{twice}"
                raise InputError(f"{where}: found beside `{key}`, which sets it, expected only one of them")


def require_known(names: Iterable[str], known: set[str], where: str) -> None:
    """Check that all names are known.

    Args:
      names: the names to check.
      known: the allowed names.
      where: dotted name of the setting that holds the names, for the error message.
    Raises: InputError for the first unknown name, which also suggests the known name that is nearest to it.
    """
    for name in names:
        require(
            isinstance(name, str) and name in known,
            f"{where}: found {shown(name)}, expected one of {listed(sorted(known))}{nearest(str(name), known)}",
        )


def require_at_least(config: Any, where: str, **least: int) -> None:
    """Check fields of a config against the least value of each; NaN fails.

    Args:
      config: the config.
      where: start of the dotted names of its fields, for the error message.
      least: name of a field -> least value.
    Raises: InputError that names the setting.
    """
    for name, limit in least.items():
        value = vars(config)[name]
        require(value >= limit, f"{where}{name}: found {value}, expected at least {limit}")
