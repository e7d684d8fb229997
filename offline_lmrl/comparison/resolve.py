"""From the settings of a comparison to its runs and entries: references from method to method are resolved here, once.

A `_Method` has what is the same for every seed; `_Runs` names the folders of the runs of one seed after another.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from offline_lmrl.algorithms import ALGORITHMS
from offline_lmrl.comparison.config import CompareConfig
from offline_lmrl.comparison.methods import ELSEWHERE, LEARNT_WITH, CollectConfig, MethodConfig
from offline_lmrl.comparison.runs import FOREIGN, Entry, Run
from offline_lmrl.decoding.config import DecodingConfig, PlannerConfig
from offline_lmrl.errors import InputError, at, require, shown
from offline_lmrl.logs.files import reading
from offline_lmrl.models.adapters import saved_model
from offline_lmrl.renamed import current
from offline_lmrl.run import SPEED
from offline_lmrl.run_folder import COMPLETE
from offline_lmrl.settings import build
from offline_lmrl.tasks import make_environment

LENGTH = "max_new_tokens"
PLACES = ("methods", "partner", "evaluation", "data")  # settings whose names in a message are complete


def resolve(config: CompareConfig) -> list[Entry]:
    """Resolve all references of a comparison, and check all settings before hours of training.

    Returns: one entry per training seed and evaluated method, in this order; a model that is the same for all seeds
      has one entry.
    Raises: InputError that names the setting.
    """
    runs = _Runs(config)
    for method in runs.methods.values():
        with _naming(method.where):
            _check_value_heads(method)
            _check_entry(method, runs.entry(method.name, config.seeds[0]))
    if runs.partner is not None:
        with _naming("partner"):
            runs.partner.config()
            DecodingConfig.from_dict(config.partner.decoding)
    if config.training_environment:
        require(
            any(method.plays for method in runs.methods.values()),
            f"training_environment: found {sorted(config.training_environment)}, expected a method that learns by "
            "playing, or no such setting",
        )
        if config.partner is None:  # with a partner, the environment cannot be built before it is trained
            make_environment(**config.environment | config.training_environment)
    entries = [runs.entry(name, seed) for seed in config.seeds for name in config.evaluated]
    made_elsewhere = {run.folder: run for entry in entries for run in entry.runs() if run.settings is None}
    for folder, run in made_elsewhere.items():
        with at(f"{run.where}.checkpoint"):
            found = saved_model(folder).metadata  # at once: loading it for play would fail after hours of training
            played = any(entry.run.folder == folder for entry in entries)
            require(not played or "reward" not in found, f"{folder}: found a reward model, expected a causal LM")
    return list({entry.label: entry for entry in entries}.values())


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Context manager: put the name of a method's settings before an error message about a setting without its place.

    The configs of algorithms, models and decoding name their own fields only.
    """
    try:
        yield
    except InputError as error:
        if str(error).startswith((*(f"{name}." for name in PLACES), f"{where}:")):
            raise
        raise InputError(f"{where}: {error}") from error


@dataclass(frozen=True)
class _Method:
    """A method with the shared settings of its comparison merged in.

    name: its name; "partner" for the partner.
    own: its settings.
    config: the comparison.
    others: all methods by name, for references.
    """

    name: str
    own: MethodConfig
    config: CompareConfig
    others: Mapping[str, "_Method"]

    @property
    def where(self) -> str:
        """The dotted name of its settings, for error messages."""
        return "partner" if self.own is not self.config.methods.get(self.name) else f"methods.{self.name}"

    @cached_property
    def algorithm(self) -> str:
        """The name of its algorithm; for a checkpoint, that of the run in its folder, or FOREIGN."""
        checkpoint = self.own.checkpoint
        if checkpoint is None:
            return self.own.algorithm
        first = checkpoint if isinstance(checkpoint, str) else checkpoint[0]
        return settings_of_run(first.replace("{seed}", str(self.config.seeds[0]))).get("algorithm", FOREIGN)

    @property
    def plays(self) -> bool:
        """True if it learns from its own play in the environment."""
        if self.own.checkpoint is not None:
            return False
        return self.own.collect is not None or ALGORITHMS[self.algorithm].plays

    @property
    def trains_values(self) -> bool:
        return self.algorithm in ALGORITHMS and ALGORITHMS[self.algorithm].trains_values

    @property
    def betas(self) -> tuple[float, ...]:
        """The candidates for β; () if its algorithm trains no value heads."""
        if not self.trains_values:
            return ()
        return self.config.evaluation.betas if self.own.betas is None else self.own.betas

    @property
    def regime(self) -> str:
        if self.own.regime or self.algorithm != FOREIGN:
            return self.own.regime or ALGORITHMS[self.algorithm].regime
        raise InputError(
            f"{self.where}.regime: missing, expected a text for the data that the checkpoint learnt from, such as "
            "'labels only'"
        )

    @property
    def merged(self) -> dict[str, Any]:
        """Its `model` and `args`, merged over those of the comparison or of its train file."""
        shared = {"model": self.config.model, "args": self.config.args} if self.own.file is None else self.own.file
        elsewhere = ELSEWHERE if self.own.start_from is not None else ()
        model = {key: value for key, value in shared["model"].items() if key not in elsewhere}
        args, blocks = {**shared["args"], **self.own.args}, (shared["args"], self.own.args)
        below, above = (block.get("decoding") for block in blocks)
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            args["decoding"] = {**below, **above}
        if ALGORITHMS[self.algorithm].plays and (decoding := self._with_length(args.get("decoding"))):
            args["decoding"] = decoding
        return {"model": model | self.own.model, "args": args}

    @property
    def collect(self) -> CollectConfig | None:
        collect = self.own.collect
        return collect and replace(collect, decoding=self._with_length(collect.decoding))

    def longest(self, learning: bool) -> tuple[str, int | None]:
        """Return the dotted name and the value of the setting that decides max_new_tokens; None = its default.

        Args:
          learning: True for the play that the method learns from, False for the play that measures it.
        """
        places = {f"{self.where}.decoding": self.own.decoding}
        if self.where != "partner":
            places["evaluation.decoding"] = self.config.evaluation.decoding
        if learning and self.own.collect is not None:
            places = {f"{self.where}.collect.decoding": self.own.collect.decoding} | places
        elif learning:
            own = "decoding" in self.own.args
            place, args = (f"{self.where}.args", self.own.args) if own else ("args", self.config.args)
            places = {f"{place}.decoding": args.get("decoding")} | places
        for place, decoding in places.items():
            if isinstance(decoding, Mapping) and LENGTH in decoding:
                return f"{place}.{LENGTH}", decoding[LENGTH]
        return f"evaluation.decoding.{LENGTH}", None

    def _with_length(self, decoding: Any) -> dict[str, Any]:
        """Add max_new_tokens of the play that measures the method to the `decoding` of the play that it learns from.

        Returns: empty if neither is given, or if `decoding` is no mapping, which is refused later.
        """
        _, length = self.longest(learning=False)
        given = {} if length is None else {LENGTH: length}
        return {**given, **(decoding or {})} if isinstance(decoding or {}, Mapping) else {}

    def described(self) -> list[dict[str, Any]]:
        """Return the settings that determine its runs, as values that JSON can hold.

        Returns: its own settings, then those of the method that it starts from, and so on. The settings of each also
          hold, under `value_model`, `reward_model` and `asks`, the same list for its value model, for its reward
          model and for the method whose Q gives its requested return, if it has them.
        """
        own, used = self.own, {key: self.others[name] for key, name in self.own.references.items()}
        link: dict[str, Any] = {"algorithm": self.algorithm}
        if own.checkpoint is None:
            merged = self.merged
            link |= merged | {"args": {key: value for key, value in merged["args"].items() if key not in SPEED}}
        else:
            link |= {"regime": self.regime, "cost": own.cost and asdict(own.cost)}
        link["decoding"] = dict(own.decoding)
        if own.betas is not None:
            link["betas"] = list(own.betas)
        if self.collect is not None:
            link["collect"] = asdict(self.collect)
        if self.config.training_environment and self.plays:
            link["training_environment"] = self.config.training_environment
        if "value_model" in used:
            link["value_model"] = used["value_model"].described()
        if own.preference is not None or "reward_model" in used:
            model = used.get("reward_model")
            link |= {"preference": own.preference, "reward_model": [] if model is None else model.described()}
        if "decoding.ask" in used:
            link["asks"] = used["decoding.ask"].described()
        return [link, *(used["from"].described() if "from" in used else ())]


class _Runs:
    """The runs and entries of a comparison, each made once.

    methods: the methods of the comparison by name.
    partner: the partner's run; None = no partner.
    """

    def __init__(self, config: CompareConfig):
        self.config = config
        self.methods: dict[str, _Method] = {}
        self.methods |= {name: _Method(name, own, config, self.methods) for name, own in config.methods.items()}
        self.partner: Run | None = None
        self._made: dict[tuple[str, int], Run] = {}
        if (partner := config.partner) is not None:
            own = MethodConfig(partner.algorithm, model=partner.model, args=partner.args, decoding=partner.decoding)
            self.partner = self._training(_Method("partner", own, config, self.methods), partner.seed, {})

    def run(self, name: str, seed: int) -> Run:
        """Return the run of a method and seed; a method with `run_of` has that of the other method."""
        method = self.methods[name]
        if method.own.run_of is not None:
            return self.run(method.own.run_of, seed)
        if (name, seed) not in self._made:
            if method.own.checkpoint is not None:
                self._made[name, seed] = self._checkpoint(method, seed)
            else:
                named = {key: other for key, other in method.own.references.items() if key in LEARNT_WITH}
                needed = {key: self.run(other, seed) for key, other in named.items()}
                self._made[name, seed] = self._training(method, seed, needed)
        return self._made[name, seed]

    def _checkpoint(self, method: _Method, seed: int) -> Run:
        found, seeds, where = method.own.checkpoint, self.config.seeds, f"{method.where}.checkpoint"
        own = None if isinstance(found, str) and "{seed}" not in found else seed
        require(
            isinstance(found, str) or len(found) == len(seeds),
            f"{where}: found {len(found)} folders, expected one for each of {len(seeds)} seeds",
        )
        folder = found.replace("{seed}", str(seed)) if isinstance(found, str) else found[seeds.index(seed)]
        return Run(method.name, own, folder, method.where, cost=method.own.cost)

    def _training(self, method: _Method, seed: int, needed: Mapping[str, Run]) -> Run:
        """Return a run that is trained.

        Args:
          method: its method.
          seed: training seed.
          needed: "from", "value_model" or "reward_model" -> the run that the method names there.
        Raises: InputError that names the setting.
        """
        folder = str(Path(self.config.output) / "runs" / f"{method.name}-{seed}")
        merged, preference, own = method.merged, method.own.preference, {"output_dir": folder, "seed": seed}
        for key in own:
            require(
                key not in merged["args"],
                f"{method.where}.args.{key}: found a value, expected none: `seeds` and `output` set it",
            )
        if "from" in needed:
            merged["model"]["path"] = needed["from"].folder
        if "value_model" in needed:
            own["value_model"] = needed["value_model"].folder
        if "reward_model" in needed:
            preference = {**(preference or {}), "reward": needed["reward_model"].folder}
        settings = {
            "algorithm": method.algorithm,
            "model": merged["model"],
            "data": {**self.config.data, "preference": preference},
            "args": merged["args"] | own,
            "environment": self.config.environment | self.config.training_environment if method.plays else None,
        }
        partner = (self.partner,) if method.plays and self.partner is not None else ()
        key, _ = method.longest(learning=True)
        needs = (*needed.values(), *partner)
        return Run(method.name, seed, folder, method.where, settings, method.collect, needs, length_key=key)

    def entry(self, name: str, seed: int) -> Entry:
        """Return what is measured of a method with a training seed. Raises: InputError that names the setting."""
        method, run = self.methods[name], self.run(name, seed)
        named = method.own.references
        asks, scorer = (
            self.run(named[key], seed) if key in named else None for key in ("decoding.ask", "planner.scorer")
        )
        planner, planned = None, {}
        if method.own.planner is not None:
            planner = build(PlannerConfig, method.own.planner, f"{method.where}.planner")
            planned = asdict(planner)
            if scorer is not None:
                planned["scorer"] = self.methods[named["planner.scorer"]].described()
                planner = replace(planner, scorer=scorer.folder)
        ask = {} if asks is None else {"ask": f"auto:{asks.folder}"}
        same = all(used is None or used.seed is None for used in (run, asks, scorer))
        return Entry(
            name,
            self.config.seeds if same else (seed,),
            method.algorithm,
            run,
            asks=asks,
            scorer=scorer,
            partner=self.partner,
            decoding={**self.config.evaluation.decoding, **method.own.decoding, **ask},
            planner=planner,
            betas=method.betas,
            regime=method.regime,
            length_key=method.longest(learning=False)[0],
            described=method.described(),
            planned=planned,
        )


def _check_value_heads(method: _Method) -> None:
    """Check that every method from which another takes V or Q trains value heads, or starts from one that does.

    Raises: InputError that names the setting.
    """
    use = ALGORITHMS[method.algorithm].value_model if method.algorithm in ALGORITHMS else None
    sources = {key: method.own.references.get(key) for key in ("value_model", "planner.scorer", "decoding.ask")}
    require(
        sources["value_model"] is None or use is not None,
        f"{method.where}.value_model: found {shown(method.own.value_model)}, expected none: {method.algorithm} takes "
        "no value model",
    )
    if use == "starts":
        del sources["value_model"]  # only the trunk is taken
    for key, source in sources.items():
        start = source
        while start is not None and not method.others[start].trains_values:
            start = method.others[start].own.start_from
        require(
            source is None or start is not None,
            f"{method.where}.{key}: found {shown(source)}, which has no value heads, expected a method that has them",
        )


def _check_entry(method: _Method, entry: Entry) -> None:
    """Check the settings by which a method is trained and measured. Raises: InputError that names the setting."""
    own, run = method.own, entry.run
    require(
        method.algorithm != FOREIGN or own.cost is not None,
        f"{method.where}.cost: missing, expected the cost of training the checkpoint: training_tokens, "
        "generated_tokens, reward_queries",
    )
    require(
        not (own.evaluate and entry.betas) or bool(method.config.data.get("validation")),
        f"data.validation: missing, expected held-out trajectories to choose β of {method.name} on",
    )
    if run.settings is None:
        DecodingConfig.from_dict(entry.decoding)
        return
    args = run.config().args
    saved, found = args.to_dict().get("decoding") or {}, {}
    if own.evaluate:
        found[entry.length_key] = {**saved, **entry.decoding}
    if method.plays:
        found[run.length_key] = saved if run.collect is None else run.collect.decoding
    for key, decoding in found.items():
        length = DecodingConfig.from_dict(decoding).max_new_tokens
        require(
            length <= args.max_length,
            f"{key}: found {length}, expected at most the max_length of {method.name}, {args.max_length}, which must "
            "hold the reply",
        )


def settings_of_run(folder: str) -> dict[str, Any]:
    """Return the settings of the complete run in a folder; {} if the folder holds none, or is a hub name."""
    config = Path(folder) / "config.yaml"
    if not (Path(folder) / COMPLETE).is_file():
        return {}
    with reading(config, "the settings of a run"):
        return current(yaml.safe_load(config.read_text(encoding="utf-8")))
