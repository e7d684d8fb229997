"""`Comparison`: alternative replies to one context with people's preference among them, and its form on disk.

The context is the turns before the replies. A reply is called an option.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from offline_lmrl.errors import InputError, require
from offline_lmrl.logs.trajectory import (
    Turn,
    finite,
    labels_text,
    messages_of,
    require_labels,
    require_list,
    require_text,
    shown,
)


@dataclass(frozen=True)
class Comparison:
    """K replies to one context, with the probability that each is the best.

    Attributes:
      context: the turns before every option. They are not trained on, so an agent turn among them gets
        trainable = False. May be empty: then the agent opens the dialogue.
      options: K >= 2 replies, each a tuple of turns with at least one trainable turn. Their turns have no rewards,
        because a preference is not a reward.
      target: (K,) probability that each option is the best: one-hot, uniform over options that tie as the best, or
        soft. Sums to 1.
      ranking: tuples of indices into `options`, best first; options in one tuple are tied. Every index occurs exactly
        once. None = unknown.
      weight: factor of this comparison in averages and losses, above 0.
      group: a key of the prompt or conversation; "" = unknown. Comparisons of one group always go to the same split
        (train, validation or test).
      source: the name of the data set or file that the comparison is from.
      labels: every raw human signal by name, as values that JSON can hold; never shown to a model.
        `labels["options"]`, if present, is a list with one entry per option (such as its author and votes).
        `labels["strength"]`, if present, is by how much the better option is better, from 0 up.

    Raises: InputError that names the invalid field.
    """

    context: tuple[Turn, ...]
    options: tuple[tuple[Turn, ...], ...]
    target: tuple[float, ...]
    ranking: tuple[tuple[int, ...], ...] | None = None
    weight: float = 1.0
    group: str = ""
    source: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "context", tuple(_as_context(turn, i) for i, turn in enumerate(self.context)))
        object.__setattr__(self, "options", tuple(map(tuple, self.options)))
        require(len(self.options) >= 2, f"options: found {len(self.options)}, expected at least 2")
        for i, option in enumerate(self.options):
            _check_option(option, f"options[{i}]")
        object.__setattr__(self, "target", _target(self.target, len(self.options)))
        if self.ranking is not None:
            object.__setattr__(self, "ranking", _ranking(self.ranking, self.target))
        weight = finite("weight", self.weight)
        if weight <= 0:
            raise InputError(f"weight: found {weight}, expected a number above 0")
        object.__setattr__(self, "weight", weight)
        for name in ("group", "source"):
            require_text(name, vars(self)[name])
        _check_labels(self.labels, len(self.options))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each of the K options: 0 = best, 1 = next best, ...; tied options have the same rank.

        Without a ranking, options are ordered by target.
        """
        if self.ranking is not None:
            place = {option: rank for rank, tied in enumerate(self.ranking) for option in tied}
            return tuple(place[i] for i in range(len(self.options)))
        levels = sorted(set(self.target), reverse=True)
        return tuple(levels.index(probability) for probability in self.target)

    def preference(self, i: int, j: int) -> float:
        """Return P(option i is better than option j) = target[i] / (target[i] + target[j]) (Luce's choice rule).

        If both targets are 0, the ranking decides: 1, 0, or 1/2 for a tie.
        """
        mine, other = self.target[i], self.target[j]
        if mine + other > 0:
            return mine / (mine + other)
        ranks = self.ranks
        return (1 + (ranks[i] < ranks[j]) - (ranks[i] > ranks[j])) / 2

    def select(self, places: Sequence[int]) -> "Comparison":
        """Return a comparison of some of the options only, in a given order.

        If options are left out, the target is renormalised. If the target is 0 for all options that are kept, it
        becomes uniform over those of them with the best rank.

        Args:
          places: indices of the options to keep: a permutation, a pair, or any other selection.
        """
        target = [self.target[i] for i in places]
        if len(places) < len(self.options):
            total = math.fsum(target)
            if total > 0:
                target = [probability / total for probability in target]
            else:
                ranks = [self.ranks[i] for i in places]
                target = [(rank == min(ranks)) / ranks.count(min(ranks)) for rank in ranks]
        ranking = self.ranking
        if ranking is not None:
            kept = [tuple(new for new, old in enumerate(places) if old in tied) for tied in ranking]
            ranking = tuple(tied for tied in kept if tied)
        labels = dict(self.labels)
        if "options" in labels:
            labels["options"] = [labels["options"][i] for i in places]
        return replace(
            self, options=tuple(self.options[i] for i in places), target=tuple(target), ranking=ranking, labels=labels
        )


def to_record(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as a plain dict for disk: context and options as messages, labels as a JSON string.

    Raises: InputError if the labels cannot be written as JSON.
    """
    ranking = None if comparison.ranking is None else [list(tied) for tied in comparison.ranking]
    options = [messages_of(option) for option in comparison.options]
    return {
        "context": messages_of(comparison.context),
        "options": options,
        "target": list(comparison.target),
        "ranking": ranking,
        "weight": comparison.weight,
        "group": comparison.group,
        "source": comparison.source,
        "labels": labels_text(comparison.labels),
    }


def _as_context(turn: Any, i: int) -> Turn:
    if not isinstance(turn, Turn):
        raise InputError(f"context[{i}]: found {shown(turn)}, expected a Turn")
    if turn.trainable or turn.reward is not None:
        raise InputError(
            f"context[{i}]: found a turn that is trainable or has a reward, expected turns that are neither trained "
            "on nor rewarded"
        )
    return replace(turn, trainable=False) if turn.is_trainable else turn


def _check_option(option: tuple[Turn, ...], name: str) -> None:
    for turn in option:
        if not isinstance(turn, Turn):
            raise InputError(f"{name}: found {shown(turn)}, expected Turn objects")
        if turn.reward is not None:
            raise InputError(
                f"{name}: found a reward of {turn.reward}, expected none, because the target replaces rewards"
            )
    require(any(turn.is_trainable for turn in option), f"{name}: found no agent turn, expected at least one")


def _target(target: Any, size: int) -> tuple[float, ...]:
    values = tuple(finite("target", value) for value in require_list("target", target))
    if len(values) != size or min(values) < 0 or not math.isclose(math.fsum(values), 1.0, abs_tol=1e-6):
        raise InputError(
            f"target: found {shown(list(values))} for {size} options, expected one probability for each "
            "option, with a sum of 1"
        )
    return values


def _ranking(ranking: Any, target: tuple[float, ...]) -> tuple[tuple[int, ...], ...]:
    groups = tuple(tuple(require_list("ranking", tied)) for tied in require_list("ranking", ranking))
    places = [place for tied in groups for place in tied]
    whole = all(isinstance(place, int | Integral) and not isinstance(place, bool) for place in places)
    if not whole or not all(groups) or sorted(places) != list(range(len(target))):
        raise InputError(
            f"ranking: found {shown(ranking)} for {len(target)} options, expected lists that together hold the "
            "index of each option, from 0, exactly once"
        )
    for better, worse in zip(groups, groups[1:], strict=False):
        if min(target[i] for i in better) < max(target[i] for i in worse):
            raise InputError(
                f"target: found {shown(list(target))} with the ranking {shown(ranking)} (best first), "
                "expected no higher probability for an option that is ranked lower"
            )
    return tuple(tuple(int(place) for place in tied) for tied in groups)


def _check_labels(labels: Any, size: int) -> None:
    require_labels(labels)
    if "options" in labels and (not isinstance(labels["options"], list) or len(labels["options"]) != size):
        raise InputError(
            f"labels.options: found {shown(labels['options'])} for {size} options, expected a list with "
            "an entry for each option"
        )
    if labels.get("strength") is not None and finite("labels.strength", labels["strength"]) < 0:
        raise InputError(f"labels.strength: found {labels['strength']}, expected a number from 0 up")
