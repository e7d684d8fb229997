"""Preferences and scores: losses of reward models, their normalisation, best-of-n, combined scores, abstention.

A comparison is a set of K alternative replies (options) to one prompt, with people's preference among them. A batch of
comparisons is packed: `score` (M,) of all options of all C comparisons, and `comparison` (M,) long, the index in
0..C−1 of each option's comparison. The options of a comparison may be anywhere in the M, and K may differ between
comparisons. Losses return one number per comparison, (C,), for any K: all pairs of one prompt are one element of the
batch (Ouyang et al. 2022, InstructGPT, on reward modelling). Labels are `target` (M,), the probability that each
option is the best of its comparison, or `rank` (M,) long, 0 = best, equal = tied.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from offline_lmrl.ops.inputs import at_least_float32, check_shapes


class Pairs(NamedTuple):
    """P pairs of options to compare. They do not depend on scores, so they are made once per batch.

    Args:
      first: (P,) long, the index of the pair's first option among the M options of the batch.
      second: (P,) long, the index of the pair's second option among the M.
      prob: (P,), the probability that `first` is preferred; ½ = a tie.
      comparison: (P,) long, the index of the pair's comparison.
      comparisons: C, the number of comparisons.
    """

    first: Tensor
    second: Tensor
    prob: Tensor
    comparison: Tensor
    comparisons: int


def known_pairs(target: Tensor, rank: Tensor, comparison: Tensor) -> Pairs:
    """Return the unordered pairs within comparisons whose order is known.

    If one of the two options has a target above 0, prob = t_i / (t_i + t_j) (Luce 1959, the choice axiom); in a
    comparison of two options this is t_i. If both targets are 0, prob is 1 or 0, by the ranks. Two options with
    targets of 0 and equal ranks make no pair, since this is also how options of unknown order are stored.

    Args:
      target: t, (M,).
      rank: (M,) long, 0 = best.
      comparison: (M,) long.
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
    """Compute −[p log P̃ + (1 − p) log(1 − P̃)]  with  P̃ = (1 − ε) σ(Δ − m) + ε/2.

    Bradley & Terry 1952. Probabilities p other than 0 and 1, for ties and uncertain labels, and the share ε of random
    labels (0.1 in the paper), are from Christiano et al. 2017, on fitting the reward function. With ε > 0, the loss is
    at most −log(ε/2), and the gradient vanishes for a label that the scores clearly contradict.

    Args:
      difference: Δ, (P,), the score of the first option minus that of the second.
      prob: p, (P,), the probability that the first is preferred.
      margin: m, the lead that the first option should have, negative if the second should lead: (P,) or one number.
      error_rate: ε in [0, 1).
    Returns: (P,) nats.
    """
    check_shapes("p, p", difference, prob)
    lead = difference - margin
    return -(prob * _log_sigmoid(lead, error_rate) + (1 - prob) * _log_sigmoid(-lead, error_rate))


def all_pairs_loss(score: Tensor, pairs: Pairs, margin: Tensor | None = None, error_rate: float = 0.0) -> Tensor:
    """Compute the mean of `bradley_terry_loss` over the pairs of each comparison.

    Ouyang et al. 2022 (InstructGPT), their factor 1 / C(K,2). A comparison without pairs gives 0.

    Args:
      score: (M,).
      pairs: the pairs to compare, such as from `known_pairs`.
      margin: (M,), in units of the score. In a pair, the lead m that the first option should have is its margin minus
        the margin of the second. None = 0.
      error_rate: ε in [0, 1), as in `bradley_terry_loss`.
    Returns: (C,) nats.
    """
    check_shapes("m", score)
    if margin is not None:
        check_shapes("m, m", score, margin)
        score = score - margin
    loss = bradley_terry_loss(score[pairs.first] - score[pairs.second], pairs.prob, error_rate=error_rate)
    return _mean_per(loss, pairs.comparison, pairs.comparisons)


def best_of_k_loss(score: Tensor, target: Tensor, comparison: Tensor) -> Tensor:
    """Compute −Σ_i t_i log softmax_i(score) over the options of each comparison.

    Ziegler et al. 2019, the loss of their reward model on the best of four. For two options it is Bradley–Terry.

    Args:
      score: (M,).
      target: t, (M,).
      comparison: (M,) long.
    Returns: (C,) nats.
    """
    check_shapes("m, m, m", score, target, comparison)
    count = _count(comparison)
    loss = target * (_segment_logsumexp(score, comparison, count)[comparison] - score)
    return loss.new_zeros(count).index_add(0, comparison, loss)


def regression_loss(score: Tensor, rating: Tensor) -> Tensor:
    """Compute ½ (score − rating)². Ziegler et al. 2019, their code, the label type of a scalar rating.

    Args:
      score: (M,).
      rating: (M,), the rating that the score should predict, in the same unit.
    Returns: (M,).
    """
    check_shapes("m, m", score, rating)
    return 0.5 * (score - rating).square()


def plackett_luce_loss(score: Tensor, rank: Tensor, comparison: Tensor) -> Tensor:
    """Compute −log P(ranking) = Σ_i [ log Σ_{j not above i} e^{s_j} − s_i ].

    The best option is chosen from all, the next from the remaining ones, and so on (Plackett 1975, Luce 1959). For two
    options it is Bradley–Terry.

    Each of several tied options is chosen from all options that are not ranked above it, the tied ones included (as
    Breslow 1974 does for survival times), which draws the scores of tied options together. If g options tie as the
    last, the loss counts g − 1 choices among them and not g, because in any order of them the last choice is forced. A
    tie of two options is then Bradley–Terry at p = ½. If only the best option is known, and the order of the others is
    unknown rather than tied, use `best_of_k_loss`.

    Args:
      score: s, (M,).
      rank: (M,) long, 0 = best, equal = tied.
      comparison: (M,) long.
    Returns: (C,) nats.
    """
    check_shapes("m, m, m", score, rank, comparison)
    # All ordered pairs (option, other) within a comparison, each option with itself included.
    option, other = torch.nonzero(comparison[:, None] == comparison, as_tuple=True)
    left, tied = rank[other] >= rank[option], rank[other] == rank[option]
    size = torch.bincount(option[tied], minlength=len(score))
    is_last = torch.bincount(option[left], minlength=len(score)) == size
    chosen_from = _segment_logsumexp(score[other[left]], option[left], len(score))
    loss = at_least_float32(chosen_from - score)
    loss = torch.where(is_last, 1 - 1 / size.to(loss.dtype), 1.0) * loss
    return loss.new_zeros(_count(comparison)).index_add(0, comparison, loss)


def gain_and_bias(score: Tensor, mean: float = 0.0, std: float = 1.0) -> tuple[float, float]:
    """Return two numbers (g, b) for which g · score + b has the given mean and standard deviation.

    g = std / σ and b = mean − g · μ, with the mean μ and the population standard deviation σ of the scores. Ziegler et
    al. 2019 normalise on samples of the reference policy, so that one KL weight means the same for all reward models.

    Args:
      score: (M,), scores of sample texts.
      mean: the mean that the normalised scores shall have.
      std: their population standard deviation.
    Raises: ValueError if the scores do not vary.
    """
    check_shapes("m", score)
    score = score.detach().double()
    spread = score.std(correction=0).item()
    if not spread > 0:
        raise ValueError(f"score: found {len(score)} scores with spread {spread}, expected scores that differ")
    gain = std / spread
    return gain, mean - gain * score.mean().item()


def centring_bias(score: Tensor) -> float:
    """Return the number b for which score + b has mean 0 on reference texts (Stiennon et al. 2020: human summaries).

    Bradley–Terry losses do not determine b, because they depend only on differences of scores.

    Args:
      score: (M,), of the reference texts.
    """
    check_shapes("m", score)
    return -score.detach().double().mean().item()


def best_of_n(prob: Tensor, score: Tensor, n: int) -> Tensor:
    """Compute the distribution of the best of n draws:  P(y) = F(y)^n − F(y⁻)^n.

    F is the distribution function of the score. Beirami et al. 2024, section on the derivation of the best-of-n
    policy, for distinct scores. Among equal scores the first draw wins, so that they share their mass in proportion to
    `prob`.

    Args:
      prob: (V,), the policy's probabilities of all V possible answers.
      score: (V,), the scores of these answers.
      n: the number of draws.
    Returns: (V,) fp64.
    """
    check_shapes("v, v", prob, score)
    prob = prob.double()
    ordered, order = score.contiguous().sort()
    mass = F.pad(prob[order].cumsum(0), (1, 0))  # mass[k]: probability of the k worst
    below = mass[torch.searchsorted(ordered, score.contiguous())]
    up_to = mass[torch.searchsorted(ordered, score.contiguous(), right=True)]
    won = (up_to / mass[-1]) ** n - (below / mass[-1]) ** n
    # Equal scores share the mass of their score; prob = 0 would divide 0 by 0.
    return torch.where(prob > 0, prob / (up_to - below) * won, 0.0)


def best_of_n_kl(prob: Tensor, score: Tensor, n: int) -> Tensor:
    """Compute the exact KL of the distribution `best_of_n` to the policy `prob`, in nats, as a scalar fp64 tensor.

    Args: see `best_of_n`.
    """
    best = best_of_n(prob, score, n)
    return (torch.xlogy(best, best) - torch.xlogy(best, prob.double())).sum()


def best_of_n_kl_bound(n: int) -> float:
    """Return log n − (n − 1)/n, in nats, an upper bound of `best_of_n_kl` (Beirami et al. 2024).

    The bound is reached only if every single answer is improbable. It is far too large if there are few answers.
    """
    return math.log(n) - (n - 1) / n


def rule_adjusted_score(preference: Tensor, average: Tensor | float, kept: Tensor) -> Tensor:
    """Compute e^R / (e^R + e^{average}) · (Π_i p_i)^{1/n}.

    This is the probability of being preferred to an average answer, times the geometric mean of the probabilities that
    the rules are kept. A rule that is certainly broken gives 0. Glaese et al. 2022 (Sparrow), their reranking score.

    Args:
      preference: R, (K,), the scores that a preference model gives to K answers.
      average: the preference model's score of an average answer, one number or (K,).
      kept: p, (K,n), the probability that each of n ≥ 1 rules is kept.
    Returns: (K,) in [0, 1].
    """
    check_shapes("k, k r", preference, kept)
    return torch.sigmoid(preference - average) * kept.log().mean(-1).exp()


def calibration_error(prob: Tensor, outcome: Tensor, bins: int = 10) -> Tensor:
    """Compute the expected calibration error  Σ_b (n_b / N) · |mean p − mean outcome|  over equally wide bins of p.

    Guo et al. 2017.

    Args:
      prob: p, (N,), the predictions in [0, 1].
      outcome: (N,), the true outcomes: 0, 1, or a share such as ½ for a tie.
      bins: the number of bins.
    Returns: scalar in [0, 1].
    """
    check_shapes("n, n", prob, outcome)
    index = (prob * bins).long().clamp(max=bins - 1)  # p = 1 belongs to the last bin
    gap = prob.new_zeros(bins).index_add(0, index, prob - outcome.to(prob.dtype))
    return gap.abs().sum() / len(prob)


def abstention_threshold(score: Tensor, coverage: float) -> float:
    """Return the threshold that the best share `coverage` of scores reach; a model answers if score ≥ threshold.

    Menick et al. 2022 (GopherCite), one threshold for all questions. If several scores equal the threshold, a larger
    share reaches it. If coverage · N rounds to 0, the threshold is infinite, so no question is answered.

    Args:
      score: (N,), of answers to held-out questions.
      coverage: the share of questions to answer, in [0, 1].
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
    """Compute log((1 − ε) σ(x) + ε/2), also if σ(x) underflows."""
    if error_rate == 0:
        return F.logsigmoid(x)
    return torch.logaddexp(F.logsigmoid(x) + math.log1p(-error_rate), x.new_tensor(math.log(error_rate / 2)))


def _mean_per(value: Tensor, index: Tensor, count: int) -> Tensor:
    total = value.new_zeros(count).index_add(0, index, value)
    return total / torch.bincount(index, minlength=count).clamp(min=1)


def _segment_logsumexp(value: Tensor, index: Tensor, count: int) -> Tensor:
    """Return log Σ e^value over the entries of each index, (count,)."""
    # The peak only prevents overflow. It cancels, so no gradient has to pass through it.
    peak = value.new_full((count,), -torch.inf).scatter_reduce(0, index, value.detach(), "amax")
    return peak + value.new_zeros(count).index_add(0, index, (value - peak[index]).exp()).log()
