"""Faults of generated replies that can be counted without a judge of their content.

A reply is broken if it is empty, unfinished, repetitive (a sequence of GRAM tokens occurs REPEATS times), or unlikely:
its mean log-probability per token under the plain policy is below the QUANTILE of that policy's own replies.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from offline_lmrl.logs.protocols import Reply

GRAM = 4
REPEATS = 4
QUANTILE = 0.01


def repeats(tokens: Sequence[Any]) -> bool:
    """True if a sequence of GRAM tokens occurs at least REPEATS times, overlaps included."""
    return max(_grams(tokens, GRAM).values(), default=0) >= REPEATS


def distinct(replies: Sequence[Sequence[Any]], n: int) -> float:
    """Return the number of different sequences of n tokens divided by that of all, over all replies (distinct-n).

    It falls as more or longer replies are counted, so compare only sets of about the same size. 1 for no sequence.

    Args:
      replies: the tokens of each reply.
      n: length of a sequence.
    """
    counts: Counter[tuple[Any, ...]] = Counter()
    for tokens in replies:
        counts.update(_grams(tokens, n))
    return len(counts) / counts.total() if counts else 1.0


def least_likely(log_probs: Sequence[float]) -> float:
    """Return the limit below which a reply is unlikely, the QUANTILE of the plain policy's own replies.

    Args:
      log_probs: mean log-probability per token of each of the plain policy's replies, under that policy, in nats.
    """
    return float(np.quantile(log_probs, QUANTILE))


def is_broken(reply: Reply, tokens: Sequence[int], log_prob: float, limit: float) -> bool:
    """True if a reply is empty, unfinished, repetitive or unlikely.

    Args:
      reply: the reply.
      tokens: its token ids.
      log_prob: its mean log-probability per token under the plain policy, in nats.
      limit: result of `least_likely`.
    """
    return not reply.text.strip() or not reply.closed or repeats(tokens) or log_prob < limit


def _grams(tokens: Sequence[Any], n: int) -> Counter[tuple[Any, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
