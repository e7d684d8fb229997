"""Distributions over the next token: warpers on π, the support filter, guidance by Q and V, and reproducible draws.

The order is fixed. First π is filtered and divided by the temperature, because Q is trained only on tokens like those
of the data. Then guidance is added on the remaining tokens: log π(a|s) + β·clip(reduce(Q) − V) (Snell et al. 2023,
ILQL, section on policy extraction). Filters, warping and guidance take any leading shape (...) before the vocabulary,
such as (B, V) or (B, T, V). In shapes, V is the size of the vocabulary; in equations, it is the state value.
"""

import torch
from torch import Tensor

from offline_lmrl.ops.precision import at_least_float32

Q_REDUCTIONS = ("min", "mean", "first")


def support_filter(log_prob: Tensor, support: float) -> Tensor:
    """Set tokens with π(a|s) < support · max π(·|s) to −inf; the best token always stays.

    This is the threshold of discrete BCQ (Fujimoto et al. 2019).

    Args:
      log_prob: (..., V), log-probabilities or unnormalised logits, as only differences to the best token matter.
      support: the threshold in [0, 1]; 0 keeps all tokens.
    Returns: (..., V), not renormalised.
    """
    if support <= 0.0:
        return log_prob
    share = (log_prob - log_prob.amax(-1, keepdim=True)).exp()
    return log_prob.masked_fill(share < support, -torch.inf)


def _top_k_filter(log_prob: Tensor, k: int) -> Tensor:
    worst_kept = log_prob.topk(min(k, log_prob.shape[-1]), dim=-1).values[..., -1:]
    return log_prob.masked_fill(log_prob < worst_kept, -torch.inf)


def _top_p_filter(log_prob: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of best tokens with a total probability of at least top_p; set the others to −inf."""
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
    """Compute log π after warping: support filter at temperature 1, then temperature, top-k, top-p and min-p.

    The support filter comes first because it estimates which tokens occur in the data, which does not depend on the
    temperature. The other steps are in the order of transformers' `generate`.

    Args:
      logits: (..., V); −inf marks tokens that a constraint forbids.
      temperature: the divisor of log π; 0 (greedy) has the effect of 1 here, and the caller takes the argmax.
      top_k: keep the k best tokens; None = all.
      top_p: keep the smallest set of best tokens with this probability; None = all.
      min_p: keep tokens with at least min_p times the best probability at this temperature (Nguyen et al. 2024);
        None = all.
      support: the threshold of `support_filter`; 0 = all.
    Returns: (..., V) normalised log-probabilities, fp32 or float64; −inf for dropped tokens.
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
    """Reduce Q of H heads to one Q.

    Args:
      q: (H, ...).
      q_reduce: "min" (used in the papers), "mean", or "first" (the first head). The last two are linear, so Q can be
        merged into the weights of an LM head.
    Returns: (...).
    """
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
    """Compute unnormalised guided scores  log π(a|s) + β · clip(reduce(Q(s,a)) − V(s)).

    Args:
      log_prob: (..., V) log π after warping (or logits); −inf stays −inf.
      q: (H, ..., V), Q of each of H heads for every token, in scaled reward units.
      v: V(s), (...); needed only with `clip`, because V cancels in a softmax otherwise. None = it is not subtracted.
      beta: β, a number or a tensor that broadcasts against (..., V), such as (B, 1).
      q_reduce: how the H heads become one Q (`reduce_q`).
      clip: the upper limit of the advantage; 0.0 only punishes tokens below V; None = no limit.
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
    """Compute how a requested return R changes log π(a|s):  (1 + w) · (log π(a|s,R) − log π(a|s)) / T.

    The sum of log π(·|s) / T and this change is classifier-free guidance (Ho and Salimans 2022, on log-probabilities),
    ((1+w)·log π(·|s,R) − w·log π(·|s)) / T.

    Args:
      conditional: logits of the model whose input requests the return R, (..., V).
      null: logits of the same model whose input requests no return (the null condition), (..., V).
      scale: w; with 0 the sum is log π(·|s,R) / T.
      temperature: T; 0 has the effect of 1, as in `warp_log_probs`.
    Returns: (..., V), fp32 or float64.
    """
    conditional, null = at_least_float32(conditional), at_least_float32(null)
    difference = conditional.log_softmax(-1) - null.log_softmax(-1)
    return (1.0 + scale) / (temperature or 1.0) * difference


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64 (Steele et al. 2014) to int64 with wrap-around.

    SplitMix64 is defined on unsigned numbers. The masks turn int64's arithmetic shifts into logical ones.
    """
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """Return random numbers, uniform in [0, 1); number i is a function of seed[i] and counter[i] only.

    The random numbers of an episode therefore do not depend on the other episodes in its batch.

    Args:
      seed: (B,) int64.
      counter: (B,) int64, the index of the draw in the sequence of this seed.
    Returns: (B,) fp64, with 53 random bits.
    """
    golden = -0x61C8864680B583EB  # SplitMix64's increment, 0x9E3779B97F4A7C15, as int64
    bits = _mix(_mix(seed + golden) + counter * golden)
    return ((bits >> 11) & 0x1FFFFFFFFFFFFF).double() / 2.0**53


def sample_from(scores: Tensor, u: Tensor) -> Tensor:
    """Draw tokens by the inverse CDF: the first token whose cumulative softmax(scores) exceeds u.

    Args:
      scores: (B, V) unnormalised log-probabilities; −inf is never drawn.
      u: (B,) in [0, 1), such as from `uniform`.
    Returns: (B,) long, token ids.
    """
    cdf = at_least_float32(scores).softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:].contiguous()
    # right=True finds the first token with cdf > u · total, so that u = 0 skips leading tokens without mass.
    drawn = torch.searchsorted(cdf, u.to(cdf.dtype).unsqueeze(-1) * total, right=True)
    last = torch.searchsorted(cdf, total)  # the last token with mass, because u · total may round up to total
    return torch.minimum(drawn, last).squeeze(-1)
