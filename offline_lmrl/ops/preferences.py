"""Preferences and scores: losses of reward models, their normalisation, best-of-n, combined scores, abstention.

A batch of comparisons is packed: scores (M,) of all options of all C comparisons, and `comparison` (M,) long, which of
0..C−1 each option belongs to. Options of a comparison may lie anywhere, K may differ. Losses return one number per
comparison, (C,), however many options it has: all pairs of one prompt are one element of the batch (Ouyang et al.
2022, InstructGPT, on reward modelling). What is known of the order comes as `target` (M,), the probability that each
option is the best of its comparison, or as `rank` (M,) long, 0 = best, equal = tied.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from offline_lmrl.ops.precision import at_least_float32
from offline_lmrl.ops.shapes import check_shapes


class Pairs(NamedTuple):
    """P pairs of options to be compared; made without scores, so once per batch.

    first, second: (P,) which of the M options. prob: (P,) that `first` is preferred; ½ is a tie.
    comparison: (P,) which of the C comparisons the pair belongs to. comparisons: C.
    """

    first: Tensor
    second: Tensor
    prob: Tensor
    comparison: Tensor
    comparisons: int


def known_pairs(target: Tensor, rank: Tensor, comparison: Tensor) -> Pairs:
    """Make every unordered pair of options of one comparison whose order is known.

    If the target is above 0 for either option, prob = t_i / (t_i + t_j) (Luce 1959, the choice axiom): for two options
    the target itself. Otherwise it is 1 or 0 as the ranks say. Equal ranks without any target make no pair, since
    options that nobody ordered look like that too.

    Args: target, rank, comparison (M,) each.
    """
    check_shapes("m, m, m", target, rank, comparison)
    first, second = _pairs_within(comparison)
    total, order = target[first] + target[second], (rank[second] - rank[first]).sign()
    known = (total > 0) | (order != 0)
    prob = torch.where(total > 0, target[first] / total, 0.5 + 0.5 * order)[known]
    return Pairs(first[known], second[known], prob, comparison[first[known]], _count(comparison))


def bradley_terry_loss(
    difference: Tensor, prob: Tensor, margin: Tensor | float = 0.0, error_rate: float = 0.0
) -> Tensor:
    """−[p log P̃ + (1 − p) log(1 − P̃)]  with  P̃ = (1 − ε) σ(Δ − m) + ε/2.

    Bradley & Terry 1952; soft p for ties and unsure labels, and the floor ε (0.1 in the paper) for labels given at
    random, are Christiano et al. 2017, on fitting the reward function. With ε > 0 the loss is at most −log(ε/2), and
    the gradient of a label that is contradicted with confidence vanishes.

    Args:
      difference: (P,) score of the first option minus that of the second.
      prob: (P,) p, that the first is preferred.
      margin: m, by how much the first should lead, negative where the second should: (P,) or one number.
      error_rate: ε in [0, 1).
    Returns: (P,) nats.
    """
    check_shapes("p, p", difference, prob)
    lead = difference - margin
    return -(prob * _log_sigmoid(lead, error_rate) + (1 - prob) * _log_sigmoid(-lead, error_rate))


def all_pairs_loss(score: Tensor, pairs: Pairs, margin: Tensor | None = None, error_rate: float = 0.0) -> Tensor:
    """Mean of `bradley_terry_loss` over the pairs of each comparison; Ouyang et al. 2022 (InstructGPT), their factor
    1 / C(K,2). A comparison without pairs gives 0.

    Args:
      score: (M,).
      margin: (M,) or None; in a pair, the first should lead by its own margin less that of the second.
      error_rate: ε in [0, 1), see there.
    Returns: (C,) nats.
    """
    check_shapes("m", score)
    if margin is not None:
        check_shapes("m, m", score, margin)
        score = score - margin
    loss = bradley_terry_loss(score[pairs.first] - score[pairs.second], pairs.prob, error_rate=error_rate)
    return _mean_per(loss, pairs.comparison, pairs.comparisons)


def best_of_k_loss(score: Tensor, target: Tensor, comparison: Tensor) -> Tensor:
    """−Σ_i t_i log softmax_i(score) over the options of each comparison. Ziegler et al. 2019, the loss of their reward
    model on the best of four. Two options: Bradley–Terry. Args: (M,) each. Returns: (C,) nats."""
    check_shapes("m, m, m", score, target, comparison)
    count = _count(comparison)
    loss = target * (_segment_logsumexp(score, comparison, count)[comparison] - score)
    return loss.new_zeros(count).index_add(0, comparison, loss)


def regression_loss(score: Tensor, rating: Tensor) -> Tensor:
    """½ (score − rating)². Ziegler et al. 2019, their code, the label type of a scalar rating. Args, result: (M,)."""
    check_shapes("m, m", score, rating)
    return 0.5 * (score - rating).square()


def plackett_luce_loss(score: Tensor, rank: Tensor, comparison: Tensor) -> Tensor:
    """−log P(ranking) = Σ_i [ log Σ_{j not above i} e^{s_j} − s_i ]: the best is chosen from all, the next from those
    left, and so on. Plackett 1975, Luce 1959; two options: Bradley–Terry.

    Tied options are each chosen from all that are not above them, their equals included (as Breslow 1974 does it for
    survival times), which draws their scores together. A last group of g tied options counts g − 1 times instead of
    g, since in any order of them the last choice is forced: then a tie of two options is Bradley–Terry at p = ½.
    If the order of the rest is unknown rather than tied, take `best_of_k_loss`.

    Args: score (M,); rank, comparison (M,) long.
    Returns: (C,) nats.
    """
    check_shapes("m, m, m", score, rank, comparison)
    option, other = torch.nonzero(comparison[:, None] == comparison, as_tuple=True)
    left, tied = rank[other] >= rank[option], rank[other] == rank[option]
    size = torch.bincount(option[tied], minlength=len(score))
    is_last = torch.bincount(option[left], minlength=len(score)) == size
    chosen_from = _segment_logsumexp(score[other[left]], option[left], len(score))
    loss = at_least_float32(chosen_from - score)
    loss = torch.where(is_last, 1 - 1 / size.to(loss.dtype), 1.0) * loss
    return loss.new_zeros(_count(comparison)).index_add(0, comparison, loss)


def gain_and_bias(score: Tensor, mean: float = 0.0, std: float = 1.0) -> tuple[float, float]:
    """(g, b) that give g · score + b this mean and (population) standard deviation:  g = std / σ,  b = mean − g · μ.

    Ziegler et al. 2019, who normalise on samples of the reference policy, so that one KL weight means the same for
    all reward models.

    Args: score (M,).
    Raises: ValueError where the scores do not vary.
    """
    check_shapes("m", score)
    score = score.detach().double()
    spread = score.std(correction=0).item()
    if not spread > 0:
        raise ValueError(f"score: found {len(score)} scores with spread {spread}, expected scores that differ")
    gain = std / spread
    return gain, mean - gain * score.mean().item()


def centring_bias(score: Tensor) -> float:
    """b that gives score + b the mean 0 on texts of reference (Stiennon et al. 2020, human summaries); Bradley–Terry
    leaves the location free. Args: score (M,)."""
    check_shapes("m", score)
    return -score.detach().double().mean().item()


def best_of_n(prob: Tensor, score: Tensor, n: int) -> Tensor:
    """Distribution of the best of n draws:  P(y) = F(y)^n − F(y⁻)^n, F the distribution function of the score.

    Beirami et al. 2024, section on the derivation of the best-of-n policy, for distinct scores; among equal scores
    the first draw wins, so that they share their mass as they do in `prob`.

    Args: prob (V,) of an enumerable policy, score (V,).
    Returns: (V,) fp64.
    """
    check_shapes("v, v", prob, score)
    prob = prob.double()
    ordered, order = score.contiguous().sort()
    mass = F.pad(prob[order].cumsum(0), (1, 0))  # mass[k]: probability of the k worst
    below = mass[torch.searchsorted(ordered, score.contiguous())]
    up_to = mass[torch.searchsorted(ordered, score.contiguous(), right=True)]
    won = (up_to / mass[-1]) ** n - (below / mass[-1]) ** n
    return torch.where(prob > 0, prob / (up_to - below) * won, 0.0)


def best_of_n_kl(prob: Tensor, score: Tensor, n: int) -> Tensor:
    """Exact KL of `best_of_n` to the policy it draws from, in nats. Args: as there. Returns: scalar fp64."""
    best = best_of_n(prob, score, n)
    return (torch.xlogy(best, best) - torch.xlogy(best, prob.double())).sum()


def best_of_n_kl_bound(n: int) -> float:
    """log n − (n − 1)/n, in nats: an upper bound of `best_of_n_kl` (Beirami et al. 2024), reached only where single
    answers are rare, and far off where they are few."""
    return math.log(n) - (n - 1) / n


def rule_adjusted_score(preference: Tensor, average: Tensor | float, kept: Tensor) -> Tensor:
    """e^R / (e^R + e^{average}) · (Π_i p_i)^{1/n}: preference against the average, times how surely all rules hold.

    Glaese et al. 2022 (Sparrow), their score for reranking. A rule that is surely broken gives 0.

    Args:
      preference: (K,) R, scores of a preference model. average: mean of such scores, a number or (K,).
      kept: (K,R) probability that each of R ≥ 1 rules is kept.
    Returns: (K,) in [0, 1].
    """
    check_shapes("k, k r", preference, kept)
    return torch.sigmoid(preference - average) * kept.log().mean(-1).exp()


def calibration_error(prob: Tensor, outcome: Tensor, bins: int = 10) -> Tensor:
    """Σ_b (n_b / N) · |mean p − mean outcome| over equally wide bins of p. Guo et al. 2017, expected calibration
    error.

    Args:
      prob: (N,) predicted, in [0, 1]. outcome: (N,) what came: 0, 1, or a share such as ½ for a tie.
    Returns: scalar in [0, 1].
    """
    check_shapes("n, n", prob, outcome)
    index = (prob * bins).long().clamp(max=bins - 1)  # p = 1 belongs to the last bin
    gap = prob.new_zeros(bins).index_add(0, index, prob - outcome.to(prob.dtype))
    return gap.abs().sum() / len(prob)


def abstention_threshold(score: Tensor, coverage: float) -> float:
    """Threshold above or at which that share of the scores lies: answer where score ≥ threshold.

    Menick et al. 2022 (GopherCite), one threshold for all questions. With equal scores at the threshold the share is
    larger. Coverage below half a score gives infinity: never answer.

    Args: score (N,) of held-out answers; coverage in [0, 1].
    """
    check_shapes("n", score)
    if not 0 <= coverage <= 1:
        raise ValueError(f"coverage: found {coverage}, expected a share between 0 and 1")
    answered = round(coverage * len(score))
    return score.topk(answered).values[-1].item() if answered else math.inf


def _count(comparison: Tensor) -> int:
    return int(comparison.max()) + 1


def _pairs_within(comparison: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nonzero((comparison[:, None] == comparison).triu(1), as_tuple=True)


def _log_sigmoid(x: Tensor, error_rate: float) -> Tensor:
    """log((1 − ε) σ(x) + ε/2), where σ(x) may underflow."""
    if error_rate == 0:
        return F.logsigmoid(x)
    return torch.logaddexp(F.logsigmoid(x) + math.log1p(-error_rate), x.new_tensor(math.log(error_rate / 2)))


def _mean_per(value: Tensor, index: Tensor, count: int) -> Tensor:
    total = value.new_zeros(count).index_add(0, index, value)
    return total / torch.bincount(index, minlength=count).clamp(min=1)


def _segment_logsumexp(value: Tensor, index: Tensor, count: int) -> Tensor:
    """(count,) log Σ e^value over the entries of each index."""
    peak = value.new_full((count,), -torch.inf).scatter_reduce(0, index, value.detach(), "amax")
    return peak + value.new_zeros(count).index_add(0, index, (value - peak[index]).exp()).log()
