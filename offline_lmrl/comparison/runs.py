"""The runs of a comparison and its entries, without references to methods: other runs are named by their folders.

A run is one training with one seed, or a model made elsewhere. An entry is a method with a training seed that gets
rows of results: it plays one run, perhaps with the help of others. resolve.py makes both from the settings.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from offline_lmrl.algorithms import load_algorithm
from offline_lmrl.comparison.methods import CollectConfig, CostConfig
from offline_lmrl.comparison.rounds import train_in_rounds
from offline_lmrl.decoding.config import PlannerConfig
from offline_lmrl.run import DataConfig, ModelConfig, RunConfig, train
from offline_lmrl.settings import build

FOREIGN = "checkpoint"  # the algorithm of a model that is no run of this project
PLANNED = "planned"


@dataclass(frozen=True)
class Run:
    """One training with one seed, or a model made elsewhere.

    name: name of its method; "partner" for the partner.
    seed: training seed; None = a model made elsewhere that serves all seeds.
    folder: run directory, or the folder or hub name of the model.
    where: dotted name of its settings, for error messages.
    settings: `algorithm`, `model`, `data`, `args` and `environment` as in a train file; None = nothing is trained.
    collect: how it is trained in rounds; None = it is not.
    needs: the runs that it starts from, learns from or plays with.
    cost: declared cost of a model made elsewhere; None = that of the run in the folder.
    length_key: dotted name of the setting of the longest reply in the play that it learns from.
    """

    name: str
    seed: int | None
    folder: str
    where: str
    settings: Mapping[str, Any] | None = None
    collect: CollectConfig | None = None
    needs: tuple["Run", ...] = ()
    cost: CostConfig | None = None
    length_key: str = ""

    @property
    def label(self) -> str:
        return self.name if self.seed is None else f"{self.name}-{self.seed}"

    def with_needs(self) -> Iterator["Run"]:
        """Yield all runs that this one needs, directly or not, and then itself; a run may come several times."""
        for need in self.needs:
            yield from need.with_needs()
        yield self

    def config(self) -> RunConfig:
        """Build the settings of the run. Raises: InputError that names the setting."""
        settings, where = self.settings, self.where
        model = build(ModelConfig, settings["model"], f"{where}.model")
        args = build(load_algorithm(settings["algorithm"])[0], settings["args"], f"{where}.args")
        data = DataConfig(**settings["data"])
        # A run in rounds is trained on logs; its environment is that of the play between trainings.
        environment = None if self.collect is not None else settings["environment"]
        return RunConfig(settings["algorithm"], model, data, args, environment)

    def train(self, players: Mapping[str, Any]) -> None:
        """Train the run, as the command `train` does; a complete run is not trained again.

        Args:
          players: settings of the environment that are objects, for a run that learns by playing.
        """
        if self.collect is not None:
            train_in_rounds(self.config(), self.collect, self.settings["environment"], players)
        else:
            train(self.config(), players)


@dataclass(frozen=True)
class Entry:
    """A method with a training seed, to be measured.

    method: its name.
    seeds: the training seeds that its rows are for: one, or all for a model that is the same for every seed.
    algorithm: name of the algorithm that made its run; FOREIGN if none here did.
    run: the run that plays.
    asks: the run whose Q gives the requested return; None = none.
    scorer: the run that rates the planner's candidate replies; None = none.
    partner: the partner's run; None = no partner.
    decoding: DecodingConfig fields of its play.
    planner: settings of planned play; None = there is none.
    betas: candidates for β; () = play without value guidance.
    regime: text for the data that its run learnt from.
    length_key: dotted name of the setting of the longest reply in this play.
    described: settings that determine its runs, as values that JSON can hold.
    planned: the same for planned play.
    """

    method: str
    seeds: tuple[int, ...]
    algorithm: str
    run: Run
    asks: Run | None = None
    scorer: Run | None = None
    partner: Run | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)
    planner: PlannerConfig | None = None
    betas: tuple[float, ...] = ()
    regime: str = ""
    length_key: str = ""
    described: list[dict[str, Any]] = field(default_factory=list)
    planned: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.method if len(self.seeds) > 1 else f"{self.method}-{self.seeds[0]}"

    def identity(self, decode: str) -> dict[str, Any]:
        """Return the settings that determine its rows in one way of decoding; kept rows must have the same ones."""
        return {"method": self.described} | ({"planner": self.planned} if decode == PLANNED and self.planned else {})

    def runs(self) -> list[Run]:
        """Return all runs that must be complete before it is measured, each after those that it needs."""
        used = [run for run in (self.partner, self.run, self.asks, self.scorer) if run is not None]
        return list({run.label: run for first in used for run in first.with_needs()}.values())
