"""Distributions over the next token: warpers on π, the support filter, guidance by Q and V, and reproducible draws.

The order is fixed: π is filtered and tempered first, because Q is only trained where the data is, and guidance is
added on the survivors: log π(a|s) + β·clip(reduce(Q) − V) (Snell et al. 2023, ILQL, section on policy extraction).
All functions take any leading shape (...) before the vocabulary, so (B, V) and (B, T, V) are both fine.
"""

import torch
from torch import Tensor

from offline_lmrl.ops.precision import at_least_float32

Q_REDUCTIONS = ("min", "mean", "first")


def support_filter(log_prob: Tensor, support: float) -> Tensor:
    """Drops (sets to −inf) tokens with π(a|s) < support · max π(·|s); 0 keeps all and the best token always stays.

    The threshold of discrete BCQ (Fujimoto et al. 2019). Unnormalised logits serve as well as log-probabilities,
    as only differences to the best are read. Args and result: (..., V); what stays is not renormalised.
    """
    if support <= 0.0:
        return log_prob
    share = (log_prob - log_prob.amax(-1, keepdim=True)).exp()
    return log_prob.masked_fill(share < support, -torch.inf)


def _top_k_filter(log_prob: Tensor, k: int) -> Tensor:
    worst_kept = log_prob.topk(min(k, log_prob.shape[-1]), dim=-1).values[..., -1:]
    return log_prob.masked_fill(log_prob < worst_kept, -torch.inf)


def _top_p_filter(log_prob: Tensor, top_p: float) -> Tensor:
    """The smallest set of best tokens that holds at least top_p of the probability."""
    prob, order = log_prob.softmax(-1).sort(-1, descending=True)
    before = prob.cumsum(-1) - prob  # mass of the better tokens: 0 for the best, which therefore always stays
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return log_prob.masked_fill(dropped, -torch.inf)


def warp_log_probs(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    support: float = 0.0,
) -> Tensor:
    """log π after warping: support filter at temperature 1, then temperature, top-k, top-p, min-p, renormalised.

    The support filter comes first because it says where data is, whatever temperature is asked for; the others follow
    the order of transformers' `generate`. min-p keeps tokens with at least min_p times the best probability
    (Nguyen et al. 2024) at that temperature. Temperature 0 (greedy) is taken as 1 here: the caller takes the argmax.

    Args:
      logits: (..., V); −inf marks tokens that a constraint forbids.
    Returns: (..., V) normalised log-probabilities, fp32 or float64, −inf where dropped.
    """
    log_prob = support_filter(at_least_float32(logits), support)
    if temperature not in (0.0, 1.0):
        log_prob = log_prob / temperature
    if top_k is not None:
        log_prob = _top_k_filter(log_prob, top_k)
    if top_p is not None and top_p < 1.0:
        log_prob = _top_p_filter(log_prob, top_p)
    if min_p is not None:
        log_prob = support_filter(log_prob, min_p)
    return log_prob.log_softmax(-1)


def reduce_q(q: Tensor, q_reduce: str) -> Tensor:
    """One Q from H heads, (H, ...) -> (...): "min" (the papers'), "mean", or "first" (both of these fold)."""
    if q_reduce == "min":
        return q.amin(0)
    if q_reduce == "mean":
        return q.mean(0)
    if q_reduce == "first":
        return q[0]
    raise ValueError(f"q_reduce: found {q_reduce!r}, expected one of {', '.join(Q_REDUCTIONS)}")


def guide(
    log_prob: Tensor,
    q: Tensor,
    v: Tensor | None = None,
    beta: float | Tensor = 1.0,
    q_reduce: str = "min",
    clip: float | None = None,
) -> Tensor:
    """Unnormalised guided scores  log π(a|s) + β · clip(reduce(Q(s,a)) − V(s)).

    `clip` caps the advantage from above (0.0 only punishes tokens below V). V cancels in a softmax, so it is only
    needed with a clip; without one, pass None.

    Args:
      log_prob: (..., V) log π after warping (or logits); −inf stays −inf.
      q: (H, ..., V) one row per head, in the units of the value heads.
      v: (...) or None.
      beta: a number, or a tensor that broadcasts against (..., V), such as (B, 1).
    Returns: (..., V).
    """
    advantage = reduce_q(q, q_reduce)
    if v is not None:
        advantage = advantage - v.unsqueeze(-1)
    if clip is not None:
        if v is None:
            raise ValueError("guide: clip caps Q − V, but v is None; pass V(s) or drop the clip")
        advantage = advantage.clamp(max=clip)
    return log_prob + beta * advantage


def condition_shift(conditional: Tensor, null: Tensor, scale: float, temperature: float = 1.0) -> Tensor:
    """What a condition R adds to log π(a|s):  (1 + w) · (log π(a|s,R) − log π(a|s)) / T.

    The sum is classifier-free guidance (Ho and Salimans 2022, on log-probabilities), (1+w)·log π(·|R) − w·log π, at
    temperature T; 0 counts as 1, as in `warp_log_probs`.

    Args:
      conditional, null: (..., V) logits with the condition and without. scale: w; 0 leaves log π(·|R).
    Returns: (..., V) fp32 or float64.
    """
    conditional, null = at_least_float32(conditional), at_least_float32(null)
    difference = conditional.log_softmax(-1) - null.log_softmax(-1)
    return (1.0 + scale) / (temperature or 1.0) * difference


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014) on int64 that wraps; shifts are made logical by masks."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) that depend on nothing but their own (seed, counter).

    A row's randomness is its own, whatever batch it is in. Args: (B,) int64 each. Returns: (B,) fp64, 53 random bits.
    """
    golden = -0x61C8864680B583EB
    bits = _mix(_mix(seed + golden) + counter * golden)
    return ((bits >> 11) & 0x1FFFFFFFFFFFFF).double() / 2.0**53


def sample_from(scores: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF: the first token whose cumulative softmax(scores) exceeds u.

    Args:
      scores: (B, V) unnormalised log-probabilities; −inf is never drawn.
      u: (B,) in [0, 1).
    Returns: (B,) long.
    """
    cdf = at_least_float32(scores).softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:].contiguous()
    drawn = torch.searchsorted(cdf, u.to(cdf.dtype).unsqueeze(-1) * total, right=True)
    last = torch.searchsorted(cdf, total)  # the last token with mass: u · total may round up to total
    return torch.minimum(drawn, last).squeeze(-1)
