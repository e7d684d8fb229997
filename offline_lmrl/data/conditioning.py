"""Returns as a condition: returns-to-go in floats, the scale that bins them, and the slot that tells the model.

A slot stands directly before the opening of every agent turn: `[slot] opening text closing`. It holds the return that
is still to come, as one reserved id behind the model's vocabulary (models/return_embedding.py) or as plain text. The
float is what is kept and updated; it is binned only here, at the input, as bins cannot be subtracted.
"""

import bisect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from offline_lmrl.data.errors import InputError, shown
from offline_lmrl.data.rendering import Renderer
from offline_lmrl.data.trajectory import Trajectory

KINDS = ("auto", "unique", "linear", "quantile")
ASK_NAMES = re.compile(r"max|p(\d|[1-9]\d|100)")
STATE_ASKS = re.compile(r"auto(:.+)?|expert:(\d+(\.\d+)?)")  # what they are depends on where the agent is
LABEL = "return_to_go"  # relabelled returns, one per agent turn, take the place of the logged ones
Ids = tuple[int, ...]


def returns_to_go(trajectory: Trajectory, discount_per_turn: float = 1.0) -> list[float]:
    """Per agent turn, in logged units: its reward and those of all later turns, R_k = r_k + γ · R_{k+1}.

    A turn that is not scored pays 0; of a cut log only what was logged counts. `labels["return_to_go"]` is given back
    as it is, if it is there. Raises: InputError where that is not one finite number per agent turn.
    """
    rewards = [turn.reward or 0.0 for turn in trajectory.turns if turn.is_trainable]
    labelled = trajectory.labels.get(LABEL)
    if labelled is not None:
        if len(labelled) != len(rewards) or not all(map(math.isfinite, labelled)):
            raise InputError(
                f"labels.{LABEL}: found {labelled}, expected one finite number for each of {len(rewards)} agent turns"
            )
        return [float(value) for value in labelled]
    returns, following = [], 0.0
    for reward in reversed(rewards):
        following = reward + discount_per_turn * following
        returns.append(following)
    return returns[::-1]


def check_ask(ask: float | str | None) -> None:
    """Raises: InputError for what cannot be asked for: neither None, a finite number, nor a known name."""
    number = isinstance(ask, int | float) and not isinstance(ask, bool) and math.isfinite(ask)
    named = isinstance(ask, str) and (ASK_NAMES.fullmatch(ask) or STATE_ASKS.fullmatch(ask))
    if not (ask is None or number or named):
        raise InputError(
            f"ask: found {shown(ask)}, expected a finite number, max, p0 to p100, auto, auto:RUN, or expert:κ"
        )


def check_binning(kind: str, bins: int, per: str) -> None:
    """Raises: InputError for a setting of `ReturnScale.fit` that it does not know."""
    for name, value, known in (("binning", kind, KINDS), ("per", per, ("global", "task"))):
        if value not in known:
            raise InputError(f"{name}: found {shown(value)}, expected one of {', '.join(known)}")
    if bins < 2:
        raise InputError(f"bins: found {bins}, expected at least 2")


@dataclass(frozen=True)
class ReturnTable:
    """The bins of one scale. Bin b holds the returns from edges[b − 1] up to, but not with, edges[b].

    edges: between neighbouring bins, rising (`fit_edges`). least, most: of the returns at turn starts in the training
      split.
    quantiles: p0, p1, ..., p100 of the returns of whole trajectories, from which asks are named.
    counts: training turns per bin.
    """

    edges: tuple[float, ...]
    least: float
    most: float
    quantiles: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def fit(cls, at_turns: np.ndarray, of_trajectories: np.ndarray, kind: str, bins: int) -> "ReturnTable":
        """From returns at turn starts, at least two distinct ones, and those of whole trajectories."""
        number = len(distinct(at_turns)[0])
        if kind == "unique" and number > bins:
            raise InputError(
                f"binning: found unique and {number} distinct returns, expected at most bins "
                f"({bins}); take linear or quantile"
            )
        edges = fit_edges(at_turns, kind, bins)
        counts = np.bincount(np.searchsorted(edges, at_turns, side="right"))
        quantiles = np.quantile(of_trajectories, np.linspace(0, 1, 101))
        least, most = float(at_turns.min()), float(at_turns.max())
        return cls(tuple(edges.tolist()), least, most, tuple(quantiles.tolist()), tuple(counts.tolist()))


def rounding_error(values: np.ndarray) -> float:
    """The difference up to which two of the values are taken for one number.

    More than sums of them in different order differ by, and far less than anybody tells apart.
    """
    return max(1e-9 * float(np.ptp(values)), 64 * float(np.finfo(values.dtype).eps) * float(np.abs(values).max()))


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest entry of each distinct number, rising, (K,) each.

    Entries that differ by rounding alone are one number: .7 − .1 and .6, or sums of the same rewards in another order.
    """
    ordered, tolerance = np.sort(values), rounding_error(values)
    starts = np.flatnonzero(np.append(True, np.diff(ordered) > tolerance))
    stops = np.append(starts[1:], len(ordered))
    # Dense values make chains of small steps that are no rounding any more: each such run is cut from its least on.
    wide = ordered[stops - 1] - ordered[starts] > tolerance
    cut = []
    for start, stop in zip(starts[wide].tolist(), stops[wide].tolist(), strict=True):
        while start < stop:
            start += int(np.searchsorted(ordered[start:stop], ordered[start] + tolerance, side="right"))
            cut.append(start)
    starts = np.unique(np.concatenate([starts, np.array(cut, dtype=np.int64)]))
    starts = starts[starts < len(ordered)]
    return ordered[starts], ordered[np.append(starts[1:], len(ordered)) - 1]


def fit_edges(values: np.ndarray, kind: str, bins: int) -> np.ndarray:
    """Return edges between bins, rising, each half-way between two neighbouring distinct numbers.

    In play a return is the ask less the rewards so far, in training the sum of those ahead: they agree up to rounding,
    which an edge on a number would turn into another bin, and no edge here does.

    Args:
      kind: unique (one bin per distinct number), linear (equal widths from the least to the most) or quantile (equally
        full). A number on a cut belongs to the bin above it; bins without a number are left out.
      bins: how many to aim for, at least 2; unused for unique.
    Returns: (B − 1,), none where all numbers are the same.
    """
    first, last = distinct(values)
    between = (last[:-1] + first[1:]) / 2
    if kind == "unique":
        return between
    shares = np.linspace(0, 1, bins + 1)[1:-1]
    cuts = first[0] + shares * (last[-1] - first[0]) if kind == "linear" else np.quantile(values, shares)
    below = np.searchsorted(last, cuts - rounding_error(values))  # so many numbers lie below each cut
    below = np.unique(below[below > 0]) if below.any() else np.array([1])  # nearly all are the least number
    return between[below - 1]


@dataclass(frozen=True)
class ReturnScale:
    """Which bin a return belongs to, fitted on the training split and saved with the weights.

    kind: unique, linear or quantile, as `fit_edges` takes them.
    per: global, or task: bins of each task are fitted on its own returns.
    tables: task -> its bins; "" where the scale is global.
    """

    kind: str
    per: str
    tables: Mapping[str, ReturnTable]

    @classmethod
    def fit(
        cls,
        trajectories: Sequence[Trajectory],
        kind: str = "auto",
        bins: int = 32,
        per: str = "global",
        discount_per_turn: float = 1.0,
    ) -> "ReturnScale":
        """From the returns-to-go at the starts of all agent turns.

        Args:
          kind: "auto" is unique where there are at most `bins` distinct returns, else linear.
          bins: most bins, at least 2.
        Raises: InputError where nothing is scored, or all returns (of a task) are the same.
        """
        check_binning(kind, bins, per)
        if not any(LABEL in t.labels or any(turn.reward is not None for turn in t.turns) for t in trajectories):
            raise InputError(
                "training data: found no rewards, expected some to condition on; score the data, "
                "or train without a condition (algorithm: bc)"
            )
        episodes: dict[str, list[list[float]]] = {}
        for trajectory in trajectories:
            if returns := returns_to_go(trajectory, discount_per_turn):
                episodes.setdefault(trajectory.task if per == "task" else "", []).append(returns)
        at_turns = {task: np.concatenate(rows) for task, rows in episodes.items()}
        different = {task: len(distinct(returns)[0]) for task, returns in at_turns.items()}
        for task in [task for task, number in different.items() if number < 2]:
            whose = f" of task {task!r}" if per == "task" else ""
            remedy = "take per: global" if len(episodes) > 1 else "train without a condition (algorithm: bc)"
            raise InputError(
                f"training data: found one return, {at_turns[task][0]:g}, at every agent turn{whose}, "
                f"expected at least two to tell apart; {remedy}"
            )
        if kind == "auto":
            kind = "unique" if max(different.values()) <= bins else "linear"
        tables = {
            task: ReturnTable.fit(at_turns[task], np.array([returns[0] for returns in rows]), kind, bins)
            for task, rows in episodes.items()
        }
        return cls(kind, per, tables)

    @property
    def bins(self) -> int:
        """Rows that the model needs: the bins of the finest table."""
        return max(len(table.counts) for table in self.tables.values())

    def table(self, task: str = "") -> ReturnTable:
        """The bins of a task. Raises: InputError for a task that is not in the training data."""
        name = task if self.per == "task" else ""
        if name not in self.tables:
            known = ", ".join(map(repr, sorted(self.tables)[:8]))
            raise InputError(
                f"task: found {shown(task)}, expected one of the training data, as returns are binned "
                f"per task: {known}"
            )
        return self.tables[name]

    def bin_of(self, value: float, task: str = "") -> int:
        """The bin of a return, from 0; beyond the data the first or the last. Raises: InputError for NaN."""
        if math.isnan(value):
            raise InputError("ask: found nan, expected a number")
        return bisect.bisect_right(self.table(task).edges, value)

    def clipped(self, value: float, task: str = "") -> bool:
        """Whether a return lies outside those of the training data, where its bin says less than it."""
        table = self.table(task)
        slack = 1e-6 * (table.most - table.least)
        return not table.least - slack <= value <= table.most + slack

    def named_ask(self, name: str, task: str = "") -> float:
        """A return of whole training trajectories: "max", or "p90" for the 90th percentile.

        Raises: InputError for another name.
        """
        if not ASK_NAMES.fullmatch(name):
            raise InputError(f"ask: found {shown(name)}, expected max, or p0 to p100")
        return self.table(task).quantiles[100 if name == "max" else int(name.removeprefix("p"))]

    def asks_for_the_usual(self, name: str, task: str = "") -> str | None:
        """Return a line about a percentile above the 50th whose bin is that of the median, if a better bin exists.

        This happens where fewer than one log in ten earns more than the others: p90 then asks for no more than they
        earn. None for every other ask. Raises: InputError as `named_ask`.
        """
        asked, median, best = (self.named_ask(one, task) for one in (name, "p50", "max"))
        percent = 100 if name == "max" else int(name.removeprefix("p"))
        if percent <= 50 or not self.bin_of(asked, task) == self.bin_of(median, task) < self.bin_of(best, task):
            return None
        return (
            f"ask: found {name}, {asked:g} in the training data and told as their median is, expected more than "
            f"the usual return; the best is {best:g} (ask: max)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        tables = {
            task: {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(table).items()}
            for task, table in self.tables.items()
        }
        return {"kind": self.kind, "per": self.per, "tables": tables}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ReturnScale":
        """The inverse of `to_dict`."""
        tables = {
            task: ReturnTable(**{name: tuple(x) if isinstance(x, list) else x for name, x in table.items()})
            for task, table in values["tables"].items()
        }
        return cls(values["kind"], values["per"], tables)


def texts_of(block: Mapping[str, Any]) -> list[str]:
    """What stands for each bin in a model's `returns` block with conditions as text."""
    return [block["text"].format(bin=b + 1, bins=block["bins"]) for b in range(block["bins"])]


def with_slots(
    prompt: Sequence[int], opening: Sequence[int], slot: Ids, past_opening: Sequence[int] | None = None
) -> list[int]:
    """A prompt that ends with the agent's opening, with the same slot before that and every earlier one.

    past_opening: ids before the agent's earlier turns; None = the opening.
    Raises: InputError where it ends otherwise.
    """
    n, opening = len(opening), list(opening)
    past = opening if past_opening is None else list(past_opening)
    if list(prompt[-n:]) != opening:
        raise InputError(
            f"prompt: found {list(prompt[-n:])} at its end, expected the agent's opening {opening}: a "
            "return is told directly before it"
        )
    told: list[int] = []
    for i, token in enumerate(prompt):
        if i == len(prompt) - n or list(prompt[i : i + len(past)]) == past and i < len(prompt) - n:
            told += slot
        told.append(token)
    return told


@dataclass(frozen=True)
class Slots:
    """The ids that tell a return to the model, and where a log has which.

    scale: bins returns. null: no return is asked for. bins: ids of each bin. discount_per_turn: γ of the returns.
    """

    scale: ReturnScale
    null: Ids
    bins: tuple[Ids, ...]
    discount_per_turn: float = 1.0

    @classmethod
    def from_block(cls, block: Mapping[str, Any], vocabulary: int, renderer: Renderer | None) -> "Slots":
        """What the `returns` block of a model's settings describes.

        Args:
          vocabulary: rows of the model's embedding; its reserved ids begin there, null first.
          renderer: only read for conditions as text, which have nothing where no return is asked for.
        Raises: InputError where the tokenizer does not tell two of the texts apart.
        """
        scale = ReturnScale.from_dict(block["scale"])
        if block["condition"] == "embedding":
            null, bins = (vocabulary,), tuple((vocabulary + 1 + b,) for b in range(block["bins"]))
        else:
            texts = texts_of(block)
            null, bins = (), tuple(tuple(renderer.encode_content(text)) for text in texts)
            if len({*bins, null}) <= len(bins):
                raise InputError(
                    f"text: found {shown(texts[0])} and others that the tokenizer does not tell apart, "
                    "expected a text with {bin} that it can spell"
                )
        return cls(scale, null, bins, block["discount_per_turn"])

    def ids(self, value: float | None, task: str = "") -> Ids:
        """The slot of a return; None is null."""
        return self.null if value is None else self.bins[self.scale.bin_of(value, task)]

    def of_log(self, trajectory: Trajectory) -> list[Ids]:
        """One slot per agent turn, and null for a turn behind the log's end, of whose return nothing is known."""
        returns = returns_to_go(trajectory, self.discount_per_turn)
        return [*(self.ids(value, trajectory.task) for value in returns), self.null]

    def nulls(self, trajectory: Trajectory) -> list[Ids]:
        """As `of_log`, with null everywhere: how the logs look to a policy that is asked for nothing."""
        return [self.null] * (1 + sum(turn.is_trainable for turn in trajectory.turns))

    def backwards(self, value: float, rewards: Sequence[float | None]) -> list[float]:
        """The inverse of `remaining`: what was asked for at each agent turn if `value` is left for the coming one."""
        returns = [value]
        for reward in reversed(rewards):
            returns.append((reward or 0.0) + self.discount_per_turn * returns[-1])
        return returns[:0:-1]

    def remaining(self, asked: float, rewards: Sequence[float | None]) -> list[float]:
        """What is still asked for at each agent turn and at the coming one, R ← (R − r) / γ after every reward.

        Rounding grows by 1 / γ per turn: under γ = .5 some fifty turns use up the digits of a float.
        """
        returns = [asked]
        for reward in rewards:
            returns.append((returns[-1] - (reward or 0.0)) / self.discount_per_turn)
        return returns
