"""Reproducible draws of the next token: random numbers by seed and index, and the inverse CDF."""

import torch
from torch import Tensor

from offline_lmrl.ops.inputs import at_least_float32


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64 (Steele et al. 2014) to int64 with wrap-around.

    SplitMix64 is defined on unsigned numbers. The masks turn int64's arithmetic shifts into logical ones.
    """
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """Return random numbers, uniform in [0, 1); each is a function of its seed and counter only.

    The random numbers of an episode therefore do not depend on the other episodes in its batch.

    Args:
      seed: int64, of any shape.
      counter: int64, the index of the draw in the sequence of this seed; of a shape that broadcasts against `seed`.
    Returns: fp64, with 53 random bits.
    """
    golden = -0x61C8864680B583EB  # SplitMix64's increment, 0x9E3779B97F4A7C15, as int64
    bits = _mix(_mix(seed + golden) + counter * golden)
    return ((bits >> 11) & 0x1FFFFFFFFFFFFF).double() / 2.0**53


def sample_from(scores: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw tokens by the inverse CDF: the first token whose cumulative softmax(scores) exceeds u.

    It takes one exp of each score: the sum that normalises the CDF normalises the scores as well.

    Args:
      scores: (B, V) unnormalised log-probabilities; −inf is never drawn.
      u: (B,) in [0, 1), such as from `uniform`.
    Returns: (B,) long, token ids; (B,) fp64, log Σ exp(scores).
    """
    scores = at_least_float32(scores)
    most = scores.amax(-1, keepdim=True)
    cdf = (scores - most).exp_().cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:].contiguous()
    # right=True finds the first token with cdf > u · total, so that u = 0 skips leading tokens without mass.
    drawn = torch.searchsorted(cdf, u.to(cdf.dtype).unsqueeze(-1) * total, right=True)
    last = torch.searchsorted(cdf, total)  # the last token with mass, because u · total may round up to total
    return torch.minimum(drawn, last).squeeze(-1), (total.log() + most).squeeze(-1)
