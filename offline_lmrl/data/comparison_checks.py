"""What is in a set of comparisons, and what a reward model could learn from it besides quality."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, combinations
from typing import Any

import numpy as np

from offline_lmrl.data.comparison import Comparison
from offline_lmrl.data.io import group_key
from offline_lmrl.data.preference_forms import END_TOKENS, normalised
from offline_lmrl.data.trajectory import Trajectory, Turn

Feature = Callable[[Comparison, int], float]  # of one option of a comparison

_REFUSAL = re.compile(r"\b(i can ?(no|['’])t|i(['’]m| am) (sorry|afraid|unable|not (able|sure|comfortable))|"
                      r"i (won['’]t|will not)|i (do not|don['’]t) (think|want|feel)|as an ai)\b", re.IGNORECASE)
_TEMPLATE = re.compile(r"<\|[^|<>]*\|>|</?s>|\[/?INST\]|<(start|end)_of_turn>|\b(Human|Assistant|User):")
_ANNOTATORS = ("annotator", "worker", "labeler")
_CUTS = (512, 1024, 2048)
_Z = 1.959963984540054


def describe(comparisons: Sequence[Comparison], features: Mapping[str, Feature] | None = None) -> dict[str, Any]:
    """Facts as plain values for JSON.

    `baselines` says how often the option with more of a feature is the preferred one, over all pairs of options of one
    comparison that are no tie; a reward model that does no better has learnt nothing else. `checks` counts what other
    tools break on.

    Args:
      features: further baselines by name.
    """
    replies = [text for row in comparisons for _, text in _replies(row)]
    contexts = [len(_text(row.context)) for row in comparisons]
    sizes = Counter(len(row.options) for row in comparisons)
    pairs = [(row, i, j) for row in comparisons for i, j in combinations(range(len(row.options)), 2)]
    decided = [(row, i, j) for row, i, j in pairs if row.preference(i, j) != 0.5]
    same = sum(normalised(_text(row.options[i])) == normalised(_text(row.options[j])) for row, i, j in pairs)
    return {
        "comparisons": len(comparisons),
        "by number of options": {str(k): n for k, n in sorted(sizes.items())},
        "groups": len({group_key(row) for row in comparisons}),
        "pairs": len(pairs),
        "ties": len(pairs) - len(decided),
        "characters of a context": _quantiles(contexts),
        "characters of a reply": _quantiles([len(text) for text in replies]),
        "share of the characters that is compared": round(
            sum(map(len, replies)) / max(1, sum(map(len, replies)) + sum(
                context * len(row.options) for context, row in zip(contexts, comparisons, strict=True))), 4),
        "checks": {"replies equal up to case and punctuation": same, **pitfalls(comparisons)},
        "baselines": baselines(decided, features),
    }


def pitfalls(rows: Sequence[Comparison | Trajectory]) -> dict[str, Any]:
    """Counts of what other tools break on; the replies of a trajectory are its trainable turns."""
    replies = [reply for row in rows for reply in _replies(row)]
    groups = Counter(group_key(row) for row in rows)
    annotators = {str(row.labels[name]) for row in rows for name in _ANNOTATORS if name in row.labels}
    return {
        "rows that share their first user turn with another": sum(n for n in groups.values() if n > 1),
        # Each of n siblings is left alone in the test rows only if all others are drawn too.
        "share of a random 20% of rows with a sibling in the rest": round(
            sum(n * (1 - 0.2 ** (n - 1)) for n in groups.values()) / max(len(rows), 1), 4),
        "replies of at most one word": sum(len(text.split()) < 2 for _, text in replies),
        "replies with a refusal in them": sum(bool(_REFUSAL.search(text)) for _, text in replies),
        "texts with a speaker tag or a token of a chat template": sum(
            bool(_TEMPLATE.search(turn.content)) for row in rows for turn in _turns(row)),
        **{f"replies lost if rows were cut on the right at {cut} characters": sum(start >= cut for start, _ in replies)
           for cut in _CUTS},
        "annotators named": len(annotators),
    }


def baselines(pairs: Sequence[tuple[Comparison, int, int]],
              features: Mapping[str, Feature] | None = None) -> dict[str, Any]:
    """`prefer` for every feature, `features` included, by name."""
    return {name: prefer(pairs, feature) for name, feature in {**_FEATURES, **(features or {})}.items()}


def prefer(pairs: Iterable[tuple[Comparison, int, int]], feature: Feature) -> dict[str, Any]:
    """How often the option with more of a feature is preferred: wins, losses, ties of the feature; the accuracy that
    counts such ties half, and its 95% interval (Wilson 1927), which takes pairs as independent."""
    wins = losses = ties = 0
    for row, i, j in pairs:
        difference = feature(row, i) - feature(row, j)
        if difference == 0:
            ties += 1
        elif (difference > 0) == (row.preference(i, j) > 0.5):
            wins += 1
        else:
            losses += 1
    n = wins + losses + ties
    if not n:
        return {"wins": 0, "losses": 0, "ties": 0}
    share = (wins + ties / 2) / n
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n)) / (1 + _Z**2 / n)
    return {"wins": wins, "losses": losses, "ties": ties, "accuracy": round(share, 4),
            "interval": [round(middle - half, 4), round(middle + half, 4)]}


def merge_repeats(comparisons: Sequence[Comparison], counts: Counter[str]) -> list[Comparison]:
    """Comparisons of the same replies to one context as one: targets averaged by weight, weights added.

    So one that is preferred here and rejected there gets a soft target. The labels of the others stay in
    `labels["merged"]`; a ranking or a strength on which they do not agree goes.

    Args:
      counts: gets the comparisons that went into others, and those of them that contradicted.
    """
    together: dict[tuple, list[Comparison]] = {}
    for row in comparisons:
        together.setdefault((row.context, frozenset(row.options)), []).append(row)
    merged = []
    for same in together.values():
        first = same[0]
        if len(same) > 1 and len(set(first.options)) == len(first.options):
            rows = [row.select([row.options.index(option) for option in first.options]) for row in same]
            counts["merged: the same replies compared again"] += len(rows) - 1
            counts["merged: of those, contradictions"] += sum(row.ranks != first.ranks for row in rows[1:])
            merged.append(_merged(rows))
        else:
            merged += same
    return merged


def _merged(rows: Sequence[Comparison]) -> Comparison:
    first, weight = rows[0], math.fsum(row.weight for row in rows)
    target = tuple(math.fsum(row.weight * row.target[i] for row in rows) / weight for i in range(len(first.options)))
    agreed = all((row.ranking, row.labels.get("strength")) == (first.ranking, first.labels.get("strength"))
                 for row in rows)
    labels = {**first.labels, "merged": [dict(row.labels) for row in rows[1:]]}
    if not agreed:
        labels.pop("strength", None)
    return Comparison(first.context, first.options, target, first.ranking if agreed else None, weight, first.group,
                      first.source, labels)


def _replies(row: Comparison | Trajectory) -> list[tuple[int, str]]:
    """Each reply with the number of characters before it."""
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


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    return {name: float(np.quantile(values, level)) for name, level in (("median", 0.5), ("95%", 0.95), ("max", 1.0))}
