"""Losses of Q and V over packed action steps.

A step is one token that the agent wrote; the N steps of a batch are one axis, without padding. Q has H twin heads.
Each loss returns one number per step, (N,). The caller sums them and divides by the number of agent tokens in the
optimizer step, so that every term has the same normaliser.
"""

import torch
from torch import Tensor

from offline_lmrl.ops.inputs import at_least_float32, check_shapes


def td_target(reward: Tensor, next_v: Tensor, bootstrap: Tensor, discount: Tensor | float) -> Tensor:
    """Compute the one-step target for Q:  y = r + γ · b · V(s′), without gradient.

    Kostrikov et al. 2021 (IQL), the Q loss of section 4.2; Snell et al. 2022 (ILQL) apply it per token.
    Deviation: γ may differ per step, so that a discount per turn can be 1 inside an utterance.

    Args:
      reward: (N,) r of this action token; zero except for tokens that close a turn.
      next_v: (N,) V(s′) of the state in which the agent acts next.
      bootstrap: (N,) b: 0.0 if the action ended the episode, else 1.0, also at the end of an episode that was cut.
      discount: γ of this step, one number for all or (N,).
    Returns: (N,) detached targets, in reward units.
    """
    check_shapes("n, n, n", reward, next_v, bootstrap)
    return (reward + discount * bootstrap * next_v).detach()


def q_loss(q: Tensor, target: Tensor) -> Tensor:
    """Compute Σ_i (Q_i(s,a) − y)², summed over the twin heads, without ½ (Snell et al. 2022).

    Args:
      q: (H,N) Q of the online heads for the action taken.
      target: (N,) y, detached.
    Returns: (N,).
    """
    check_shapes("h n, n", q, target)
    return (q - target).square().sum(0)


def expectile_loss(v: Tensor, target_q: Tensor, expectile: float) -> Tensor:
    """Compute the expectile loss  |τ − 1{u < 0}| · u²  with  u = Q̄(s,a) − V(s).

    Kostrikov et al. 2021 (IQL), section 4.1. τ = ½ gives half the squared error (SARSA); for τ → 1, V approaches the
    maximum over actions in the data.

    Args:
      v: (N,) online V.
      target_q: (N,) Q̄, the minimum over the target heads for the action taken.
      expectile: τ in (0, 1).
    Returns: (N,); no gradient reaches target_q.
    """
    check_shapes("n, n", v, target_q)
    error = at_least_float32(target_q.detach() - v)
    square = error.square()
    # Weights are plain numbers here: torch.where between two of them would round both to fp32.
    return torch.where(error < 0, (1 - expectile) * square, expectile * square)


def conservative_loss(logsumexp_q: Tensor, q: Tensor) -> Tensor:
    """Compute Σ_i [ logsumexp_a Q_i(s,a) − Q_i(s,a_data) ], the cross-entropy of Q on the data's token.

    Kumar et al. 2020 (CQL), as Snell et al. 2022 use it.

    Args:
      logsumexp_q: (H,N) log Σ_a e^Q over the vocabulary.
      q: (H,N) Q of the action taken.
    Returns: (N,).
    """
    check_shapes("h n, h n", logsumexp_q, q)
    return (logsumexp_q - q).sum(0)


def awr_weight(advantage: Tensor, inverse_temperature: float, max_weight: float = 100.0) -> Tensor:
    """Compute the weights  min(exp(β · A), max_weight). Peng et al. 2019 (AWR); the clip is IQL's (100).

    Args:
      advantage: (N,) A = Q̄ − V, in scaled reward units.
      inverse_temperature: β ≥ 0; 0 gives weights of 1.
      max_weight: the largest weight.
    Returns: (N,), detached.
    """
    return (inverse_temperature * advantage).exp().clamp(max=max_weight).detach()
