"""Describe a set of comparisons, and measure which features besides quality a reward model could learn from it.

A feature is a function of (comparison, index of an option) that returns a number, such as the length of the reply. A
pair is (comparison, i, j): options i and j of one comparison. A pair wins for a feature if the option with more of the
feature is the preferred one, loses if it is the other one, and ties if both options have equally much of the feature.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, combinations
from os.path import commonprefix
from typing import Any

import numpy as np

from offline_lmrl.logs.comparison import Comparison
from offline_lmrl.logs.io import group_key
from offline_lmrl.logs.preference_forms import END_TOKENS, normalised
from offline_lmrl.logs.trajectory import Trajectory, Turn, nests_too_deep
from offline_lmrl.ops.intervals import student_t, wilson

Feature = Callable[[Comparison, int], float]  # of one option of a comparison
Pair = tuple[Comparison, int, int]  # two options of a comparison

_REFUSAL = re.compile(
    r"\b(i can ?(no|['’])t|i(['’]m| am) (sorry|afraid|unable|not (able|sure|comfortable))|"
    r"i (won['’]t|will not)|i (do not|don['’]t) (think|want|feel)|as an ai)\b",
    re.IGNORECASE,
)
_TEMPLATE = re.compile(r"<\|[^|<>]*\|>|</?s>|\[/?INST\]|<(start|end)_of_turn>|\b(Human|Assistant|User):")
_ANNOTATORS = {"annotator", "worker", "labeler"}
_OUTCOMES = ("wins", "losses", "ties")
_CUTS = (512, 1024, 2048)


def describe(comparisons: Sequence[Comparison], features: Mapping[str, Feature] | None = None) -> dict[str, Any]:
    """Summarise comparisons as a nested dict of plain values, for JSON.

    The entry `baselines` holds how often the option with more of a feature is preferred, over all pairs of options of
    one comparison, without pairs whose options are equally preferred. A reward model that does no better has learnt
    nothing beyond that feature. The entry `checks` counts properties of the data that other tools handle badly.

    Args:
      comparisons: the comparisons.
      features: name -> feature, for further baselines besides those of _FEATURES; None = no others.
    """
    return summary(count_features(comparisons, features))


def count_features(comparisons: Sequence[Comparison], features: Mapping[str, Feature] | None = None) -> Counter:
    """Count everything that `summary` needs.

    If two sets of comparisons share no group, their counts can be added to get the counts of the union.

    Args:
      comparisons: the comparisons.
      features: name -> feature, for further baselines besides those of _FEATURES; None = no others.
    """
    pairs = [(row, i, j) for row in comparisons for i, j in combinations(range(len(row.options)), 2)]
    decided = [(row, i, j) for row, i, j in pairs if row.preference(i, j) != 0.5]
    counts = _count_faults(comparisons)
    for row in comparisons:
        counts["size", len(row.options)] += 1
        counts["context", len(_text(row.context))] += 1
        for before, text in _replies(row):
            counts["reply", len(text)] += 1
            counts["characters of contexts"] += before
    counts["pairs"] += len(pairs)
    counts["decided"] += len(decided)
    counts["same"] += sum(
        normalised(_text(row.options[i])) == normalised(_text(row.options[j])) for row, i, j in pairs
    )
    for row, i, j in pairs:
        counts.update(_shared_start(_text(row.options[i]), _text(row.options[j])))
    groups = _by_group(decided)
    for name, feature in {**_FEATURES, **(features or {})}.items():
        for outcomes, n in count_outcomes_per_group(groups, feature).items():
            counts["baseline", name, outcomes] += n
    return counts


def summary(counts: Counter) -> dict[str, Any]:
    """Return the summary that `describe` documents, from the counts of `count_features`."""
    sizes = sorted(key for key in counts if key[0] == "size")
    compared = sum(key[1] * n for key, n in counts.items() if key[0] == "reply")
    competed: dict[str, Counter] = defaultdict(Counter)
    for key, n in counts.items():
        if key[0] == "baseline":
            competed[key[1]][key[2]] = n
    return {
        "comparisons": counts["rows"],
        "by number of options": {str(key[1]): counts[key] for key in sizes},
        "groups": counts["groups"],
        "pairs": counts["pairs"],
        "ties": counts["pairs"] - counts["decided"],
        "characters of a context": _quantiles(counts, "context"),
        "characters of a reply": _quantiles(counts, "reply"),
        "share of the characters that is compared": round(
            compared / max(1, compared + counts["characters of contexts"]), 4
        ),
        "checks": {
            "replies equal up to case and punctuation": counts["same"],
            "pairs that a split by characters, as in TRL, would cut inside a reply": counts["inside a reply"],
            "of those, inside a word": counts["inside a word"],
            **_check_summary(counts),
        },
        "baselines": {name: _accuracy(groups) for name, groups in competed.items()},
    }


def data_faults(rows: Sequence[Comparison | Trajectory]) -> dict[str, Any]:
    """Count properties of the data that other tools handle badly, such as replies of at most one word.

    The replies of a comparison are its options, those of a trajectory its trainable turns.

    Returns: description of the property -> the number of cases, or a share in [0, 1].
    """
    return _check_summary(_count_faults(rows))


def baselines(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Measure, for each feature in _FEATURES, how often the option with more of it is the preferred one.

    Args:
      pairs: pairs of options of which one is preferred.
    Returns: name of the feature -> the result of `prefer`: `wins`, `losses`, `ties`, `accuracy` and `interval`.
    """
    return {name: prefer(pairs, feature) for name, feature in _FEATURES.items()}


def prefer(pairs: Iterable[Pair], feature: Feature) -> dict[str, Any]:
    """Measure how often the option with more of a feature is the preferred one.

    Args:
      pairs: pairs of options of which one is preferred.
    Returns: the numbers of `wins`, `losses` and `ties` of the feature; `accuracy`, the share of wins, in which a tie
      counts half; and `interval`, the lower and upper end of its 95% confidence interval. The last two are missing if
      there are no pairs. The interval is Wilson's (1927) for the `_effective` number of pairs, since the pairs of a
      group are not independent. Its quantile is that of Student's t with (number of groups − 1) degrees of freedom,
      or the normal one if the data do not show how much groups differ.
    """
    return _accuracy(count_outcomes_per_group(_by_group(pairs), feature))


def _by_group(pairs: Iterable[Pair]) -> list[list[Pair]]:
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[group_key(pair[0])].append(pair)
    return list(groups.values())


def count_outcomes_per_group(groups: Iterable[Sequence[Pair]], feature: Feature) -> Counter[tuple[int, int, int]]:
    """Count groups of pairs by how many of their pairs win, lose and tie for a feature.

    Args:
      groups: the pairs of each group.
      feature: the feature.
    Returns: (wins, losses, ties) -> number of groups. (0, 0, 0) is always a key, so the result is never empty.
    """
    counts = Counter({(0, 0, 0): 0})
    for pairs in groups:
        found = Counter(_outcome(pair, feature) for pair in pairs)
        counts[tuple(found[outcome] for outcome in _OUTCOMES)] += 1
    return counts


def _outcome(pair: Pair, feature: Feature) -> str:
    row, i, j = pair
    difference = feature(row, i) - feature(row, j)
    if difference == 0:
        return "ties"
    return "wins" if (difference > 0) == (row.preference(i, j) > 0.5) else "losses"


def _accuracy(groups: Mapping[tuple[int, int, int], int]) -> dict[str, Any]:
    outcomes = {name: sum(group[i] * n for group, n in groups.items()) for i, name in enumerate(_OUTCOMES)}
    pairs = sum(outcomes.values())
    if not pairs:
        return outcomes
    share = (outcomes["wins"] + outcomes["ties"] / 2) / pairs
    n, many = _effective(groups, share, pairs), sum(groups.values())
    low, high = wilson(share, n, student_t(many - 1 if _varies(share, many) else math.inf))
    return {**outcomes, "accuracy": round(share, 4), "interval": [round(low, 4), round(high, 4)]}


def _varies(share: float, groups: int) -> bool:
    """True if the variation between groups shows how alike the outcomes within a group are."""
    return share not in (0, 1) and groups > 1


def _effective(groups: Mapping[tuple[int, int, int], int], share: float, pairs: int) -> float:
    """Estimate how many independent pairs would be as informative: p(1 − p) / variance, at most the number n of pairs.

    The variance is the jackknife's over the G groups, (G − 1)/G · Σ_g ((w_g − p n_g) / (1 − n_g/n))² / n², with w_g
    wins among n_g of n pairs. A tie is a coin flip: half a win, with a variance of 1/4.
    If every pair has the same outcome, or one group holds all pairs, the data do not show how alike the pairs of a
    group are. They then count as fully dependent, which gives n² / Σ n_g².

    Args:
      groups: (wins, losses, ties) -> number of groups, as from `count_outcomes_per_group`.
      share: p, the share of wins over all pairs, with a tie as half a win.
      pairs: n.
    """
    many = sum(groups.values())
    if not _varies(share, many):
        return pairs**2 / sum(sum(group) ** 2 * n for group, n in groups.items())
    variance = 0.0
    for (wins, losses, ties), n in groups.items():
        size = wins + losses + ties
        apart = (wins + ties / 2 - share * size) ** 2 + ties / 4
        variance += n * apart / (1 - size / pairs) ** 2 * (many - 1) / many / pairs**2
    return min(pairs, share * (1 - share) / variance) if variance > 0 else pairs


def _shared_start(first: str, second: str) -> list[str]:
    """Name the damage that two replies suffer if their longest common prefix, in characters, is taken as the prompt.

    Returns: keys to count: none if the replies share no text at their start; else "inside a reply", and also "inside a
      word" if the cut is within a word of either reply.
    """
    shared = commonprefix([first, second])
    if not shared.strip():
        return []
    following = first[len(shared) :][:1], second[len(shared) :][:1]
    return ["inside a reply"] + ["inside a word"] * (shared[-1].isalnum() and any(map(str.isalnum, following)))


def _count_faults(rows: Sequence[Comparison | Trajectory]) -> Counter:
    counts: Counter = Counter()
    groups = Counter(group_key(row) for row in rows)
    for n in groups.values():
        counts["groups"] += 1
        counts["rows"] += n
        counts["siblings"] += n if n > 1 else 0
        # A row has no sibling in the other 80% only if all its n - 1 siblings are drawn too: 0.2 ** (n - 1).
        counts["expected siblings"] += n * (1 - 0.2 ** (n - 1))
    for row in rows:
        for before, text in _replies(row):
            counts["short"] += len(text.split()) < 2
            counts["refusals"] += bool(_REFUSAL.search(text))
            for cut in _CUTS:
                counts["lost", cut] += before >= cut
        counts["templates"] += sum(bool(_TEMPLATE.search(turn.content)) for turn in _turns(row))
        for name in _ANNOTATORS & row.labels.keys():
            counts["annotator", str(row.labels[name])] += 1
    return counts


def _check_summary(counts: Counter) -> dict[str, Any]:
    return {
        "rows that share their first user turn with another": counts["siblings"],
        "share of a random 20% of rows with a sibling in the rest": round(
            counts["expected siblings"] / max(counts["rows"], 1), 4
        ),
        "replies of at most one word": counts["short"],
        "replies with a refusal in them": counts["refusals"],
        "texts with a speaker tag or a token of a chat template": counts["templates"],
        **{f"replies lost if rows were cut on the right at {cut} characters": counts["lost", cut] for cut in _CUTS},
        "annotators named": sum(key[0] == "annotator" for key in counts),
    }


def merge_repeats(comparisons: Sequence[Comparison], counts: Counter[str]) -> list[Comparison]:
    """Merge comparisons that have the same group, context and replies (in any order) into the first of them.

    The merged target is the mean of their targets, weighted by `weight`; the merged weight is the sum. A reply that is
    preferred in one comparison and rejected in another thus gets a soft target. The labels of all but the first are
    kept in the list `labels["merged"]`, unless they would nest too deep. If the comparisons disagree on `ranking` or
    on `labels["strength"]`, the merged comparison has neither.

    Args:
      comparisons: the comparisons.
      counts: incremented, under keys that start with "merged: ", for each comparison that is merged into an earlier
        one, for each of these that orders the replies in another way, and for each entry of labels that is left out.
    """
    together: dict[tuple, list[Comparison]] = {}
    for row in comparisons:
        together.setdefault((row.group, row.context, frozenset(row.options)), []).append(row)
    merged = []
    for same in together.values():
        first = same[0]
        if len(same) > 1 and len(set(first.options)) == len(first.options):
            rows = [row.select([row.options.index(option) for option in first.options]) for row in same]
            counts["merged: the same replies compared again"] += len(rows) - 1
            counts["merged: of those, contradictions"] += sum(row.ranks != first.ranks for row in rows[1:])
            merged.append(_merged(rows, counts))
        else:
            merged += same
    return merged


def _merged(rows: Sequence[Comparison], counts: Counter[str]) -> Comparison:
    first, weight = rows[0], math.fsum(row.weight for row in rows)
    target = tuple(math.fsum(row.weight * row.target[i] for row in rows) / weight for i in range(len(first.options)))
    agreed = all(
        (row.ranking, row.labels.get("strength")) == (first.ranking, first.labels.get("strength")) for row in rows
    )
    others = [dict(row.labels) for row in rows[1:]]
    kept = [labels for labels in others if not nests_too_deep({"merged": [labels]})]
    if len(kept) < len(others):
        counts["merged: labels left out, because they would nest too deep"] += len(others) - len(kept)
    labels = {**first.labels, "merged": kept}
    if not agreed:
        labels.pop("strength", None)
    return Comparison(
        first.context,
        first.options,
        target,
        first.ranking if agreed else None,
        weight,
        first.group,
        first.source,
        labels,
    )


def _replies(row: Comparison | Trajectory) -> list[tuple[int, str]]:
    """Return (number of characters before the reply, text of the reply) for each reply."""
    if isinstance(row, Comparison):
        before = len(_text(row.context))
        return [(before, _text(option)) for option in row.options]
    starts = accumulate((len(turn.content) for turn in row.turns), initial=0)
    return [(start, turn.content) for start, turn in zip(starts, row.turns, strict=False) if turn.is_trainable]


def _turns(row: Comparison | Trajectory) -> Iterator[Turn]:
    return chain(row.context, *row.options) if isinstance(row, Comparison) else iter(row.turns)


def _text(turns: Sequence[Turn]) -> str:
    return "".join(turn.content for turn in turns)


def _of_reply(measure: Callable[[str], float]) -> Feature:
    return lambda row, i: measure(_text(row.options[i]))


_FEATURES: dict[str, Feature] = {
    "the longer reply": _of_reply(len),
    "the shorter reply": _of_reply(lambda text: -len(text)),
    "the reply with a refusal": _of_reply(lambda text: bool(_REFUSAL.search(text))),
    "the reply that starts with white space": _of_reply(lambda text: text[:1].isspace()),
    "the reply that ends with white space": _of_reply(lambda text: text[-1:].isspace()),
    "the reply that ends with an end token": _of_reply(lambda text: text.rstrip().endswith(END_TOKENS)),
}


def _quantiles(counts: Counter, kind: str) -> dict[str, float]:
    """Return median, 95% quantile and maximum of the lengths counted under (kind, length).

    The result is that of np.quantile on the list of all lengths, which is not built. Empty if there are no lengths.
    """
    lengths = sorted(key[1] for key in counts if key[0] == kind)
    ends = np.cumsum([counts[kind, length] for length in lengths])
    if not lengths:
        return {}

    def quantile(level: float) -> float:
        place = level * (ends[-1] - 1)
        # Sorted value number r, from 0, is the first length whose cumulative count exceeds r.
        low, high = (lengths[rank] for rank in np.searchsorted(ends, (math.floor(place), math.ceil(place)), "right"))
        return float(low + (high - low) * (place % 1))

    return {name: quantile(level) for name, level in (("median", 0.5), ("95%", 0.95), ("max", 1.0))}
