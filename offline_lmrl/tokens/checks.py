"""Describe a data set and warn of what would make learning from it fail, for `offline-lmrl check`."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from offline_lmrl.logs.forms import is_score, likely_scores, reward_hint
from offline_lmrl.logs.io import content_key, group_key, in_one_group
from offline_lmrl.logs.messages import REWARD_REMOVED
from offline_lmrl.logs.terminal import visible
from offline_lmrl.logs.trajectory import Trajectory, Turn, shown, with_own_token_ids
from offline_lmrl.tokens.windows import EncodedDialogue, agent_turns

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from offline_lmrl.tokens.rendering import Renderer

_QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
_BINS = 10
_LONGEST = 5


class LongRow(NamedTuple):
    """One of the longest rows of a split; a row is one trajectory.

    row: number of the row, counted from 1.
    length: in tokens; in characters if there is no renderer.
    group: the row's `group` (its root prompt or conversation); "" = unknown.
    """

    row: int
    length: int
    group: str


class TokenRow(NamedTuple):
    """One token of a row as rendered for training.

    index: position of the token in the row, from 0.
    text: the token, decoded.
    role: the speaker of the turn; "" before the first turn.
    action: True if the agent chose this token and is trained on it.
    reward: the turn's reward, in logged units, at the token that closes a scored turn; None elsewhere.
    """

    index: int
    text: str
    role: str
    action: bool
    reward: float | None


@dataclass(frozen=True)
class SplitReport:
    """A summary of one split. A return is the undiscounted sum of a row's raw rewards; shares are from 0 to 1.

    rows, turns: their numbers; `agent_turns` counts the trained turns, `scored_turns` the turns with a reward.
    groups: number of distinct groups (root prompts or conversations).
    duplicates: number of rows whose content equals that of an earlier row.
    terminated_share: share of the rows whose episode ended by itself and was not cut.
    distinct_returns: number of different returns, rounded to nine decimals.
    return_quantiles: "min", "5%", "25%", "median", "75%", "95%" and "max" -> return.
    histogram: (low, high, number of rows) per bin of returns; low == high if there are few distinct returns.
    longest: the longest rows, longest first.
    tokens: number of tokens of all rows; None without a renderer.
    agent_token_share: share of the tokens that the agent wrote; None without a renderer.
    truncated: number of rows longer than the limit of tokens; None without a renderer or a limit.
    """

    rows: int
    turns: int
    agent_turns: int
    scored_turns: int
    groups: int
    duplicates: int
    terminated_share: float
    mean_return: float
    distinct_returns: int
    return_quantiles: dict[str, float]
    histogram: list[tuple[float, float, int]]
    longest: list[LongRow]
    tokens: int | None = None
    agent_token_share: float | None = None
    truncated: int | None = None


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`.

    splits: name -> a summary of the split.
    shared_groups: "split, split" -> number of groups that both contain; pairs without common groups are left out.
    counts: reason -> number of repairs or drops while the files were read.
    warnings: one line each.
    """

    splits: dict[str, SplitReport]
    shared_groups: dict[str, int]
    counts: dict[str, int]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        report = asdict(self)
        for split in report["splits"].values():
            split["longest"] = [LongRow(*row)._asdict() for row in split["longest"]]
        return report

    def print(self, console: "Console") -> None:
        """Print the report as tables."""
        from rich.text import Text

        console.print(_facts_table(self.splits))
        for name, split in self.splits.items():
            console.print(_histogram_table(name, split))
            console.print(_longest_table(name, split))
        for title, counts in (("repairs and drops", self.counts), ("groups in two splits", self.shared_groups)):
            if counts:
                console.print(_counts_table(title, counts))
        for warning in self.warnings:
            console.print(Text(visible(f"warning: {warning}"), style="yellow"))
        if not self.warnings:
            console.print("no warnings")


def check(
    trajectories_by_split: Mapping[str, Sequence[Trajectory]],
    renderer: "Renderer | None" = None,
    max_length: int | None = None,
    counts: Mapping[str, int] | None = None,
) -> CheckReport:
    """Describe a data set and warn of what would make learning from it fail.

    Args:
      trajectories_by_split: name of a split, such as "train" -> its rows, at least one.
      renderer: used to count tokens and to compare with the tokenizer's own chat template; None = do neither.
      max_length: maximum number of tokens of a row, beyond which its oldest turns are dropped; needs a renderer. None
        = no limit.
      counts: reason -> number of repairs or drops while the files were read, for the report; None = none.
    """
    counts = dict(counts or {})
    splits, warnings = {}, []
    if counts.get(REWARD_REMOVED):
        warnings.append(
            f"rewards on untrained turns: {counts[REWARD_REMOVED]} removed, because nothing learns from them"
        )
    for name, trajectories in trajectories_by_split.items():
        if in_one_group(trajectories):
            warnings.append(
                f"{name}: all {len(trajectories)} rows are in one group, {shown(trajectories[0].group)}, "
                "so none of them can be held out for validation"
            )
        splits[name] = _describe(trajectories, renderer, max_length)
        warnings.extend(f"{name}: {text}" for text in _warnings(splits[name], trajectories, renderer, max_length))
    keys = {name: {group_key(row) for row in rows} for name, rows in trajectories_by_split.items()}
    shared = {f"{a}, {b}": len(keys[a] & keys[b]) for a, b in combinations(keys, 2) if keys[a] & keys[b]}
    warnings.extend(
        f"{pair}: {n} groups are in both splits, so neither is an independent test of a model trained on the other"
        for pair, n in shared.items()
    )
    return CheckReport(splits, shared, counts, warnings)


def score_columns(trajectories: Sequence[Trajectory]) -> list[str]:
    """Return the names of the labels that may be a score and thus a reward, to suggest them to the user.

    All values that are not None must be numbers or booleans, and not all equal; `likely_scores` chooses among these
    names.
    """
    values: dict[str, list[Any]] = defaultdict(list)
    for trajectory in trajectories:
        for name, value in trajectory.labels.items():
            if value is not None:
                values[name].append(value)
    return likely_scores(
        name for name, column in values.items() if all(map(is_score, column)) and len(set(map(str, column))) > 1
    )


def token_table(trajectory: Trajectory, renderer: "Renderer") -> list[TokenRow]:
    """Return one `TokenRow` per token of the whole trajectory as rendered for training."""
    dialogue = _encoded(trajectory, renderer)
    rows = [(token, "", False, None) for token in dialogue.preamble]
    pieces = dialogue.pieces(0, len(dialogue.turns), live=True)
    for turn, own, ids in zip(dialogue.turns, dialogue.encoded, pieces, strict=True):
        for place, token in enumerate(ids):
            action = turn.is_trainable and own.action_start <= place < own.action_stop
            reward = turn.reward if action and place == own.action_stop - 1 else None
            rows.append((token, turn.role, action, reward))
    return [TokenRow(index, renderer.tokenizer.decode([token]), *rest) for index, (token, *rest) in enumerate(rows)]


def _encoded(trajectory: Trajectory, renderer: "Renderer") -> EncodedDialogue:
    return EncodedDialogue(with_own_token_ids(trajectory, renderer.fingerprint).turns, renderer)


def _describe(trajectories: Sequence[Trajectory], renderer: "Renderer | None", max_length: int | None) -> SplitReport:
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    returns = np.array([trajectory.total_return for trajectory in trajectories])
    if renderer is None:
        lengths = [sum(len(turn.content) for turn in trajectory.turns) for trajectory in trajectories]
        tokens = {}
    else:
        lengths, of_agent = [], 0
        for dialogue in (_encoded(trajectory, renderer) for trajectory in trajectories):
            lengths.append(len(dialogue.joined(dialogue.pieces(0, len(dialogue.turns), live=True))))
            of_agent += sum(len(dialogue.encoded[index].actions) for index in agent_turns(dialogue.turns))
        tokens = {"tokens": sum(lengths), "agent_token_share": of_agent / sum(lengths)}
        if max_length is not None:
            tokens["truncated"] = sum(length > max_length for length in lengths)
    longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:_LONGEST]
    return SplitReport(
        rows=len(trajectories),
        turns=len(turns),
        agent_turns=sum(turn.is_trainable for turn in turns),
        scored_turns=sum(turn.reward is not None for turn in turns),
        groups=len({group_key(trajectory) for trajectory in trajectories}),
        duplicates=len(trajectories) - len({content_key(trajectory) for trajectory in trajectories}),
        terminated_share=float(np.mean([trajectory.terminated for trajectory in trajectories])),
        mean_return=float(returns.mean()),
        distinct_returns=len(np.unique(returns.round(9))),
        return_quantiles={name: float(np.quantile(returns, level)) for name, level in _QUANTILES.items()},
        histogram=_histogram(returns),
        longest=[LongRow(i + 1, lengths[i], trajectories[i].group) for i in longest],
        **tokens,
    )


def _histogram(returns: np.ndarray) -> list[tuple[float, float, int]]:
    values, rows = np.unique(returns.round(9), return_counts=True)
    if len(values) <= _BINS:
        return [(float(value), float(value), int(n)) for value, n in zip(values, rows, strict=True)]
    # Bins of equal width. If few floats exist between the two ends, some edges coincide, which leaves fewer bins.
    edges = np.unique(np.linspace(returns.min(), returns.max(), _BINS + 1))
    rows, _ = np.histogram(returns, bins=edges)
    return [(float(low), float(high), int(n)) for low, high, n in zip(edges, edges[1:], rows, strict=False)]


def _warnings(
    report: SplitReport, trajectories: Sequence[Trajectory], renderer: "Renderer | None", max_length: int | None
) -> Iterator[str]:
    if not report.scored_turns:
        yield (
            "no turn has a reward, so the data do not show which replies are better"
            f"{reward_hint(score_columns(trajectories))}"
        )
    elif report.distinct_returns == 1:
        yield f"all returns are equal ({report.mean_return:g}), so the data do not show which replies are better"
    if not _can_stitch(trajectories):
        yield (
            "no stitching possible: no observation occurs in two rows with different replies, "
            "so learnt values can only rank whole rows"
        )
    if report.truncated is not None and report.truncated > report.rows / 2:
        yield (
            f"{report.truncated} of {report.rows} rows are longer than {max_length} tokens and lose their oldest turns"
        )
    if renderer is not None:
        faults = Counter(line for trajectory in trajectories for line in renderer.check.faults_in(trajectory.turns))
        yield from (f"{n} rows: {line}" for line, n in faults.items())
        if (difference := renderer.check.first_difference([row.turns for row in trajectories])) is not None:
            yield difference


def _can_stitch(trajectories: Sequence[Trajectory]) -> bool:
    """True if some observation (the turns since the agent last spoke) has different replies in different rows."""
    seen: dict[tuple, dict[str, int]] = defaultdict(dict)  # observation -> reply -> the first row that gave it
    for row, trajectory in enumerate(trajectories):
        for observation, reply in _observed(trajectory.turns):
            rows = seen[observation]
            rows.setdefault(reply, row)
            if any(other != row for text, other in rows.items() if text != reply):
                return True
    return False


def _observed(turns: Sequence[Turn]) -> Iterator[tuple[tuple, str]]:
    """Yield (observation, reply) for each agent turn that follows at least one turn of another speaker."""
    observation: list[tuple[str, str]] = []
    for turn in turns:
        if not turn.is_trainable:
            observation.append(turn.spoken)
        elif observation:
            yield tuple(observation), "\n".join(turn.spoken)
            observation = []


def _facts_table(splits: Mapping[str, SplitReport]) -> "Table":
    names = (
        "rows",
        "turns",
        "agent_turns",
        "scored_turns",
        "groups",
        "duplicates",
        "tokens",
        "agent_token_share",
        "truncated",
        "terminated_share",
        "mean_return",
        "distinct_returns",
    )
    values = [vars(split) for split in splits.values()]
    rows = [(name.replace("_", " "), *(split[name] for split in values)) for name in names]
    rows += [
        (f"return {level}", *(split.return_quantiles[level] for split in splits.values())) for level in _QUANTILES
    ]
    return _table("data", ["", *splits], [row for row in rows if any(value is not None for value in row[1:])])


def _histogram_table(name: str, split: SplitReport) -> "Table":
    most = max(n for _, _, n in split.histogram)
    rows = [
        (f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}", n, "█" * round(30 * n / most))
        for low, high, n in split.histogram
    ]
    return _table(f"{name}: returns", ["return", "rows", ""], rows)


def _longest_table(name: str, split: SplitReport) -> "Table":
    unit = "characters" if split.tokens is None else "tokens"
    return _table(f"{name}: longest rows", ["row", unit, "group"], split.longest)


def _counts_table(title: str, counts: Mapping[str, int]) -> "Table":
    return _table(title, ["", "count"], Counter(counts).most_common())


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(title)), title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(Text(visible(column)), justify="right" if place == 1 else "left")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else visible(str(value))
