"""Convert comparisons and trajectories to the rows that trainers of TRL read: preferences, labelled replies, texts.

    preferences   prompt, chosen, rejected        DPO and reward models
    kto           prompt, completion, label       KTO
    sft           prompt, completion, reward      supervised fine-tuning; TRL does not read the reward

Prompts and replies are lists of messages. A row holds one reply, because these trainers would train on turns of others
inside it. `TrlForm` applies to data of both kinds, and `read_trajectories` and `read_comparisons` read its rows back.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from offline_lmrl.errors import require
from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.preferences import to_comparisons, to_trajectories
from offline_lmrl.logs.trajectory import Trajectory, Turn, as_context, message_of


@dataclass(frozen=True, kw_only=True)
class TrlForm:
    """The settings by which data become rows for TRL.

    Trajectories: a preference is a pair of replies to the same turns with unequal rewards, and a label is made of each
    reply with a reward; earlier replies are context. Comparisons: the label is true for a reply that is preferred to
    the others on average and false for one that is not, and only the preferred are texts to train on (`sft`).

    Raises: InputError for a setting that cannot be used.
    """

    to: Literal["preferences", "kto", "sft"] | None = field(
        default=None,
        metadata={
            "help": "Rows to write for TRL instead: preferences (prompt, chosen, rejected; for DPO and reward "
            "models), kto (prompt, completion, label) or sft (prompt, completion); null = none."
        },
    )
    threshold: float | None = field(
        default=None,
        metadata={
            "help": "For --to kto: the label is true if the reward is above this and false below; null = the mean "
            "reward of the scored replies (0 for comparisons)."
        },
    )
    keep_share: float = field(
        default=1.0,
        metadata={
            "help": "For --to sft of trajectories: share of them to keep, best total returns first, in (0, 1]; those "
            "that equal the last one kept are kept too."
        },
    )

    def __post_init__(self) -> None:
        require(0 < self.keep_share <= 1, f"keep_share: found {self.keep_share}, expected above 0 and at most 1")
        for name, form in (("threshold", "kto"), ("keep_share", "sft")):
            unused = self.to != form and vars(self)[name] != TrlForm.__dataclass_fields__[name].default
            require(not unused, f"{name}: found {vars(self)[name]} with to {self.to}, expected it only with {form}")

    def convert(
        self, splits: dict[str, Sequence[Trajectory] | Sequence[Comparison]], counts: Counter[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """Make the rows of each split; splits without rows are left out.

        Args:
          splits: name of the split -> all its trajectories, or all its comparisons.
          counts: incremented for everything that the rows cannot express, under the reason.
        Raises: InputError if there is no row at all.
        """
        threshold = self.threshold
        if self.to == "kto" and threshold is None:
            rewards = [
                row.total_return
                for rows in splits.values()
                for row in (() if _compares(rows) else scored_replies(rows, Counter()))
            ]
            threshold = math.fsum(rewards) / max(1, len(rewards))
        made = {name: list(self._rows(rows, threshold, counts)) for name, rows in splits.items()}
        require(
            any(made.values()),
            f"to: found nothing that {self.to} can express ({dict(counts)}), expected at least one row",
        )
        return {name: rows for name, rows in made.items() if rows}

    def _rows(self, rows, threshold: float | None, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        if not rows:
            return iter(())
        if self.to == "preferences":
            pairs = rows if _compares(rows) else to_comparisons(scored_replies(rows, counts), counts)
            return preference_rows(pairs, counts)
        if _compares(rows):
            require(
                self.keep_share == 1,
                f"keep_share: found {self.keep_share} for comparisons, expected none: all preferred replies are kept",
            )
            signs = to_trajectories(rows, "sign", "end", "none", counts)
            return label_rows(signs, threshold, counts) if self.to == "kto" else sft_rows(signs, 1.0, counts)
        if self.to == "kto":
            return label_rows(scored_replies(rows, counts), threshold, counts)
        returns = sorted((row.total_return for row in rows), reverse=True)
        # Rounded before ceil, because .07 · 100 in floating point is a hair above 7.
        return sft_rows(rows, returns[math.ceil(round(self.keep_share * len(returns), 9)) - 1], counts)


def scored_replies(trajectories: Iterable[Trajectory], counts: Counter[str]) -> Iterator[Trajectory]:
    """Yield a trajectory for each agent turn with a reward, in which the turns before it are context.

    Args:
      counts: incremented for each trajectory that has no reward at all.
    """
    for row in trajectories:
        scored = [i for i, turn in enumerate(row.turns) if turn.reward is not None]
        counts["dropped: no reward"] += not scored
        for i in scored:
            turns = (*as_context(row.turns[:i]), row.turns[i])
            yield Trajectory(turns, group=row.group, task=row.task, source=row.source, labels=row.labels)


def _compares(rows: Sequence[Any]) -> bool:
    return len(rows) > 0 and isinstance(rows[0], Comparison)


def preference_rows(comparisons: Iterable[Comparison], counts: Counter[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield rows `prompt, chosen, rejected` of messages for TRL's DPO and reward trainers, one per pair of options.

    Args:
      counts: incremented for each dropped pair. A pair is dropped if it is a tie, or if a reply contains turns that
        are not the agent's, since TRL would train on them.
    """
    counts = Counter() if counts is None else counts
    for row in comparisons:
        prompt = _messages(row.context)
        for i, j in combinations(range(len(row.options)), 2):
            preference = row.preference(i, j)
            if preference == 0.5:
                counts["dropped: tie"] += 1
            elif not all(turn.is_trainable for k in (i, j) for turn in row.options[k]):
                counts["dropped: turns of others inside a reply"] += 1
            else:
                chosen, rejected = (i, j) if preference > 0.5 else (j, i)
                yield {
                    "prompt": prompt,
                    "chosen": _messages(row.options[chosen]),
                    "rejected": _messages(row.options[rejected]),
                    **_tools(row.context),
                }


def label_rows(
    trajectories: Iterable[Trajectory], threshold: float = 0.0, counts: Counter[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield rows `prompt, completion, label` of messages for TRL's KTO trainer.

    Args:
      threshold: the label is True if the return is above it and False if it is below.
      counts: incremented for each dropped trajectory. A trajectory is dropped if its return equals the threshold, or
        if its completion contains turns that are not the agent's, since TRL would train on them.
    """
    counts = Counter() if counts is None else counts
    for row in trajectories:
        start = next(i for i, turn in enumerate(row.turns) if turn.is_trainable)
        if row.total_return == threshold:
            counts["dropped: return equal to the threshold"] += 1
        elif not all(turn.is_trainable for turn in row.turns[start:]):
            counts["dropped: turns of others inside a completion"] += 1
        else:
            yield {
                "prompt": _messages(row.turns[:start]),
                "completion": _messages(row.turns[start:]),
                "label": row.total_return > threshold,
                **_tools(row.turns),
            }


def sft_rows(
    trajectories: Iterable[Trajectory], minimum: float = -math.inf, counts: Counter[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield rows `prompt, completion, reward` for TRL's SFT trainer, one per agent turn.

    The reward is that of the turn, or null. TRL ignores it; `read_trajectories` needs it.

    Args:
      minimum: the smallest return of a trajectory that is used.
      counts: incremented for each trajectory below the minimum, and each agent turn that has neither text nor tool
        calls.
    """
    counts = Counter() if counts is None else counts
    for row in trajectories:
        if row.total_return < minimum:
            counts["dropped: return below that of the rows kept"] += 1
            continue
        for i, turn in enumerate(row.turns):
            if turn.is_trainable and not (turn.content or turn.tool_calls):
                counts["dropped: empty reply"] += 1
            elif turn.is_trainable:
                prompt, completion = _messages(row.turns[:i]), _messages([turn])
                yield {"prompt": prompt, "completion": completion, "reward": turn.reward, **_tools(row.turns)}


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return turns as messages for chat templates; turns of role "environment" get the role "user"."""
    return [
        message_of(turn) | ({"role": "user"} if turn.role == "environment" else {})
        for turn in turns
        if turn.content or turn.tools is None
    ]


def _tools(turns: Sequence[Turn]) -> dict[str, Any]:
    """Return {"tools": list of schemas} for a row with these turns; {} if no turn has tools."""
    tools = next((turn.tools for turn in turns if turn.tools is not None), None)
    return {} if tools is None else {"tools": json.loads(tools)}
