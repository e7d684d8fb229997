"""Condition a model on returns: returns-to-go as floats, the scale that bins them, and the ids that encode them.

Return ids come directly before the opening of every agent turn: `[return] opening text closing`. They encode the bin
of the return-to-go (the rewards from this turn on), as one reserved id after the model's vocabulary
(models/return_embedding.py) or as text. In training it is the logged return-to-go; in play it is the requested return
(`ask`) less the rewards so far. Null ids are the ids that are used where no return is requested (the null condition).
Returns are stored and updated as floats, because bins cannot be subtracted; they are binned only here, at the model's
input.
"""

import bisect
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.windows import Ids

KINDS = ("auto", "unique", "linear", "quantile")
ASK_NAMES = re.compile(r"max|p(\d|[1-9]\d|100)")
STATE_ASKS = re.compile(r"auto(:.+)?|expert:(\d+(\.\d+)?)")  # requests whose value depends on the state
LABEL = "return_to_go"  # label with relabelled returns, one per agent turn, which replace the logged ones


def returns_to_go(trajectory: Trajectory, discount_per_turn: float = 1.0) -> list[float]:
    """Return the return-to-go of each agent turn, R_k = r_k + γ · R_{k+1}, in logged units.

    An unscored turn counts as reward 0. If the log was cut before the episode ended, only logged rewards count. If the
    trajectory has a label "return_to_go", the label's values are returned unchanged.

    Args:
      discount_per_turn: γ.
    Returns: one number per trainable turn, in order.
    Raises: InputError if the label is not one finite number per agent turn.
    """
    rewards = [turn.reward or 0.0 for turn in trajectory.turns if turn.is_trainable]
    labelled = trajectory.labels.get(LABEL)
    if labelled is not None:
        require(
            len(labelled) == len(rewards) and all(map(math.isfinite, labelled)),
            f"labels.{LABEL}: found {labelled}, expected one finite number for each of {len(rewards)} agent turns",
        )
        return [float(value) for value in labelled]
    return _returns_before(0.0, rewards, discount_per_turn)


def _returns_before(last: float, rewards: Sequence[float | None], discount: float) -> list[float]:
    """Return the return-to-go at each of some turns, R_k = r_k + γ · R_{k+1}.

    Args:
      last: the return-to-go at the turn after them.
      rewards: the reward of each turn; None counts as 0.
      discount: γ.
    """
    backwards = accumulate(reversed(rewards), lambda after, r: (r or 0.0) + discount * after, initial=last)
    return list(backwards)[:0:-1]


def check_ask(ask: float | str | None) -> None:
    """Check that a requested return is None, a finite number or a known name.

    The names are "max", "p0" to "p100", "auto", "auto:RUN" and "expert:κ".

    Raises: InputError if it is none of these.
    """
    number = isinstance(ask, int | float) and not isinstance(ask, bool) and math.isfinite(ask)
    named = isinstance(ask, str) and (ASK_NAMES.fullmatch(ask) or STATE_ASKS.fullmatch(ask))
    require(
        bool(ask is None or number or named),
        f"ask: found {shown(ask)}, expected a finite number, max, p0 to p100, auto, auto:RUN, expert:κ, or null",
    )


def check_binning(kind: str, bins: int, per: str) -> None:
    """Check the settings of `ReturnScale.fit`.

    Raises: InputError for an unknown `kind` or `per`, or fewer than 2 bins.
    """
    for name, value, known in (("binning", kind, KINDS), ("per", per, ("global", "task"))):
        require(value in known, f"{name}: found {shown(value)}, expected one of {', '.join(known)}")
    require(bins >= 2, f"bins: found {bins}, expected at least 2")


@dataclass(frozen=True)
class ReturnTable:
    """The bins of one task, or of all tasks. Bin b, from 0, holds the returns-to-go in [edges[b − 1], edges[b]).

    edges: the B − 1 edges between neighbouring bins, increasing (`fit_edges`).
    least: the smallest return-to-go of an agent turn in the training split.
    most: the largest one.
    quantiles: p0, p1, ..., p100 of the returns of whole trajectories, the values of the requests "p0" to "p100".
    counts: number of the training split's agent turns in each bin.
    """

    edges: tuple[float, ...]
    least: float
    most: float
    quantiles: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def fit(cls, at_turns: np.ndarray, of_trajectories: np.ndarray, kind: str, bins: int) -> "ReturnTable":
        """Fit the bins.

        Args:
          at_turns: (N,) returns-to-go of agent turns, at least two of them distinct.
          of_trajectories: (M,) returns of whole trajectories.
          kind: as for `fit_edges`.
          bins: as for `fit_edges`.
        Raises: InputError if kind is "unique" and there are more than `bins` distinct returns.
        """
        edges = fit_edges(at_turns, kind, bins)
        require(
            kind != "unique" or len(edges) < bins,
            f"binning: found unique with {len(edges) + 1} distinct returns, expected at most {bins} (bins); "
            "use linear or quantile",
        )
        counts = np.bincount(np.searchsorted(edges, at_turns, side="right"))
        quantiles = np.quantile(of_trajectories, np.linspace(0, 1, 101))
        least, most = float(at_turns.min()), float(at_turns.max())
        return cls(tuple(edges.tolist()), least, most, tuple(quantiles.tolist()), tuple(counts.tolist()))


def rounding_error(values: np.ndarray) -> float:
    """Return the difference up to which two of the values count as the same number.

    It is larger than the rounding error between sums of the same rewards in different order, and far smaller than any
    difference that matters.
    """
    return max(1e-9 * float(np.ptp(values)), 64 * float(np.finfo(values.dtype).eps) * float(np.abs(values).max()))


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group values that are equal up to rounding into K distinct numbers.

    Values that differ only by rounding count as one number: .7 − .1 and .6, or sums of the same rewards in another
    order.

    Returns: the smallest and the largest value of each number, (K,) each, increasing.
    """
    ordered, tolerance = np.sort(values), rounding_error(values)
    starts = np.flatnonzero(np.append(True, np.diff(ordered) > tolerance))
    stops = np.append(starts[1:], len(ordered))
    # Dense values can form chains of small steps whose total exceeds any rounding error. Cut each such run into pieces
    # no wider than the tolerance, starting from its smallest value.
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
    """Return the edges between bins, increasing, each half-way between two neighbouring distinct numbers.

    During play, a return is the requested return minus the rewards so far; in training, it is the sum of the rewards
    ahead. The two agree up to rounding. If an edge were equal to one of the numbers, rounding could change the bin, so
    edges are placed between numbers.

    Args:
      values: (N,) returns.
      kind: "unique" (one bin per distinct number), "linear" (equal widths from the smallest to the largest) or
        "quantile" (equally many values per bin). A number exactly on the border of two such bins belongs to the upper
        one. Empty bins are left out.
      bins: number of bins to aim for, at least 2; unused for "unique".
    Returns: (B − 1,) edges of B bins; empty if kind is "unique" and all numbers are the same.
    """
    first, last = distinct(values)
    between = (last[:-1] + first[1:]) / 2
    if kind == "unique":
        return between
    shares = np.linspace(0, 1, bins + 1)[1:-1]
    cuts = first[0] + shares * (last[-1] - first[0]) if kind == "linear" else np.quantile(values, shares)
    below = np.searchsorted(last, cuts - rounding_error(values))  # how many numbers are below each cut
    below = np.unique(below[below > 0]) if below.any() else np.array([1])  # nearly all values are the minimum
    return between[below - 1]


@dataclass(frozen=True)
class ReturnScale:
    """A map from returns to bins, fitted on the training split and saved with the weights.

    kind: "unique", "linear" or "quantile", as for `fit_edges`.
    per: "global", or "task" if each task has bins that are fitted to that task's returns only.
    tables: task -> its bins; if `per` is "global", the only key is "".

    The methods take and return returns in logged units. Their argument `task` is a trajectory's task; it is ignored if
    `per` is "global".
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
        """Fit the scale to the returns-to-go at the starts of all agent turns.

        Args:
          kind: "unique", "linear" or "quantile" (`fit_edges`); "auto" means "unique" if there are at most `bins`
            distinct returns, else "linear".
          bins: maximum number of bins, at least 2.
          per: "global", or "task" for separate bins per task.
          discount_per_turn: γ of the returns.
        Raises: InputError if no turn is scored, or if all returns (of one task) are the same.
        """
        check_binning(kind, bins, per)
        require(
            any(LABEL in t.labels or any(turn.reward is not None for turn in t.turns) for t in trajectories),
            "training data: found no rewards, expected rewards from which to compute returns; score the data, "
            "or train a model that is not conditioned on returns (algorithm: bc)",
        )
        episodes: dict[str, list[list[float]]] = {}
        for trajectory in trajectories:
            if returns := returns_to_go(trajectory, discount_per_turn):
                episodes.setdefault(trajectory.task if per == "task" else "", []).append(returns)
        at_turns = {task: np.concatenate(rows) for task, rows in episodes.items()}
        different = {task: len(distinct(returns)[0]) for task, returns in at_turns.items()}
        for task in [task for task, number in different.items() if number < 2]:
            whose = f" of task {task!r}" if per == "task" else ""
            remedy = (
                "use per: global"
                if len(episodes) > 1
                else "train a model that is not conditioned on returns (algorithm: bc)"
            )
            raise InputError(
                f"training data: found the same return, {at_turns[task][0]:g}, at every agent turn{whose}, "
                f"expected at least two distinct returns; {remedy}"
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
        """The largest number of bins of any table; the model needs a reserved id for each."""
        return max(len(table.counts) for table in self.tables.values())

    def table(self, task: str = "") -> ReturnTable:
        """Return the bins of a task.

        Raises: InputError if the scale is per task and the training data do not contain the task.
        """
        name = task if self.per == "task" else ""
        if name not in self.tables:
            known = ", ".join(map(repr, sorted(self.tables)[:8]))
            raise InputError(
                f"task: found {shown(task)}, expected a task of the training data ({known}), "
                "because returns are binned per task"
            )
        return self.tables[name]

    def bin_of(self, value: float, task: str = "") -> int:
        """Return the bin of a return, counted from 0; the first or the last bin for a return outside the data.

        Raises: InputError for NaN, or for an unknown task of a scale per task.
        """
        require(not math.isnan(value), "ask: found nan, expected a number")
        return bisect.bisect_right(self.table(task).edges, value)

    def clipped(self, value: float, task: str = "") -> bool:
        """True if the return is outside the training range, so that its bin is only the nearest one."""
        table = self.table(task)
        slack = 1e-6 * (table.most - table.least)
        return not table.least - slack <= value <= table.most + slack

    def named_ask(self, name: str, task: str = "") -> float:
        """Return a quantile of the returns of whole training trajectories.

        Args:
          name: "max", or "p0" to "p100" for a percentile.
        Raises: InputError for any other name.
        """
        require(ASK_NAMES.fullmatch(name) is not None, f"ask: found {shown(name)}, expected max, or p0 to p100")
        return self.table(task).quantiles[100 if name == "max" else int(name.removeprefix("p"))]

    def value_of(self, ask: float | str | None, task: str = "") -> float | None:
        """Return a requested return as a number: a name as `named_ask` does, any other request as it is."""
        return self.named_ask(ask, task) if isinstance(ask, str) else ask

    def asks_for_the_usual(self, name: str, task: str = "") -> str | None:
        """Return a warning if a percentile above the 50th has the same bin as the median, and a better bin exists.

        Such a request has no effect: if, for example, fewer than one log in ten earns more than the rest, "p90"
        requests no more than the rest earn.

        Args:
          name: "max", or "p0" to "p100" for a percentile.
        Returns: one line, or None if there is nothing to warn of.
        Raises: InputError for any other name.
        """
        asked, median, best = (self.named_ask(one, task) for one in (name, "p50", "max"))
        percent = 100 if name == "max" else int(name.removeprefix("p"))
        if percent <= 50 or not self.bin_of(asked, task) == self.bin_of(median, task) < self.bin_of(best, task):
            return None
        return (
            f"ask: found {name}, the return {asked:g}, which is in the same bin as the median of the training data, "
            f"expected a return in a higher bin; the best return is {best:g} (ask: max)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ReturnScale":
        """Build the scale from the values of `to_dict`."""
        tables = {
            task: ReturnTable(**{name: tuple(x) if isinstance(x, list) else x for name, x in table.items()})
            for task, table in values["tables"].items()
        }
        return cls(values["kind"], values["per"], tables)


def texts_of(block: Mapping[str, Any]) -> list[str]:
    """Return the text that encodes each bin, lowest bin first.

    Args:
      block: the entry `returns` of a model's run metadata, with `condition: text`; `text` is a format with {bin}, from
        1, and {bins}.
    """
    return [block["text"].format(bin=b + 1, bins=block["bins"]) for b in range(block["bins"])]


def with_return_ids(
    prompt: Sequence[int], opening: Sequence[int], return_ids: Ids, past_opening: Sequence[int] | None = None
) -> list[int]:
    """Insert the same return ids before every opening of the agent in a prompt that ends with such an opening.

    Args:
      prompt: ids that end with `opening`.
      opening: ids that the template puts before the agent's next turn (the generation prompt).
      return_ids: the ids to insert.
      past_opening: ids that the template puts before the agent's earlier turns; None = the same as `opening`.
    Raises: InputError if the prompt does not end with `opening`.
    """
    n, opening = len(opening), list(opening)
    past = opening if past_opening is None else list(past_opening)
    require(
        list(prompt[-n:]) == opening,
        f"prompt: found {list(prompt[-n:])} at its end, expected the ids of the agent's opening, {opening}, "
        "because a return is inserted directly before them",
    )
    found: list[int] = []
    for i, token in enumerate(prompt):
        if i == len(prompt) - n or list(prompt[i : i + len(past)]) == past and i < len(prompt) - n:
            found += return_ids
        found.append(token)
    return found


@dataclass(frozen=True)
class ReturnTokens:
    """The ids that encode returns for a model, and functions that choose them for a log.

    scale: the map from returns to bins.
    null: the ids used if no return is requested; () if returns are encoded as text.
    bins: the ids of each bin, lowest bin first.
    discount_per_turn: γ of the returns.
    """

    scale: ReturnScale
    null: Ids
    bins: tuple[Ids, ...]
    discount_per_turn: float = 1.0

    @classmethod
    def from_block(cls, block: Mapping[str, Any], vocabulary: int, renderer: Renderer | None) -> "ReturnTokens":
        """Build them from the run metadata of a return-conditioned model.

        Args:
          block: the entry `returns` of the run metadata, with `condition` ("embedding" = reserved ids, or "text"),
            `scale`, `bins`, `discount_per_turn` and, for "text", `text`.
          vocabulary: number of rows of the model's embedding. The reserved ids start at this number, null first.
          renderer: encodes the texts of "text"; unused, and may be None, for "embedding".
        Raises: InputError if the tokenizer gives two of the texts the same ids, or no ids for a text.
        """
        scale = ReturnScale.from_dict(block["scale"])
        if block["condition"] == "embedding":
            null, bins = (vocabulary,), tuple((vocabulary + 1 + b,) for b in range(block["bins"]))
        else:
            texts = texts_of(block)
            null, bins = (), tuple(tuple(renderer.encode_content(text)) for text in texts)
            require(
                len({*bins, null}) > len(bins),
                f"text: found texts, such as {shown(texts[0])}, that the tokenizer encodes as the same ids or as "
                "none, expected a text with {bin} that gets different ids for every bin",
            )
        return cls(scale, null, bins, block["discount_per_turn"])

    def ids(self, value: float | None, task: str = "") -> Ids:
        """Return the ids that encode a return in logged units; for None, those of the null condition."""
        return self.null if value is None else self.bins[self.scale.bin_of(value, task)]

    def of_log(self, trajectory: Trajectory) -> list[Ids]:
        """Return the ids for each agent turn of a log, and null ids for a turn after it, whose return is unknown."""
        returns = returns_to_go(trajectory, self.discount_per_turn)
        return [*(self.ids(value, trajectory.task) for value in returns), self.null]

    def nulls(self, trajectory: Trajectory) -> list[Ids]:
        """Return null ids for each agent turn of a log and for a turn after its end, for training without requests."""
        return [self.null] * (1 + sum(turn.is_trainable for turn in trajectory.turns))

    def backwards(self, value: float, rewards: Sequence[float | None]) -> list[float]:
        """Return the requested return at each past agent turn, R_k = r_k + γ · R_{k+1}, given that at the next turn.

        It is the inverse of `remaining`.

        Args:
          value: the requested return at the next turn, in logged units.
          rewards: the reward of each past agent turn, in logged units; None counts as 0.
        """
        return _returns_before(value, rewards, self.discount_per_turn)

    def remaining(self, asked: float, rewards: Sequence[float | None]) -> list[float]:
        """Return the requested return at each past agent turn and at the next one, R ← (R − r) / γ after every reward.

        The rounding error grows by 1 / γ per turn: with γ = .5, it uses up the digits of a float in about fifty turns.

        Args:
          asked: the requested return at the first turn, in logged units.
          rewards: the reward of each past agent turn, in logged units; None counts as 0.
        """
        return list(accumulate(rewards, lambda now, r: (now - (r or 0.0)) / self.discount_per_turn, initial=asked))
