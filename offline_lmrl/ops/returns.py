"""Returns of reward sequences by plain recursion; time is the last axis.

The discount of a step is the factor of V after that step: 0 after a terminal action, else γ per token, multiplied by γ
per turn if the step closes a turn. Training computes the same returns in tokens/episodes.py, for packed steps and by a
recursion over turns instead of tokens.
"""

import torch
from torch import Tensor

from offline_lmrl.ops.inputs import check_shapes


def return_to_go(reward: Tensor, discount: Tensor, end_value: Tensor | None = None) -> Tensor:
    """Compute the return from every step on:  G_t = r_t + γ_t · G_{t+1},  G_T = end_value.

    Args:
      reward: (B,T) r.
      discount: (B,T) γ_t between step t and step t+1, 0 after a terminal action.
      end_value: (B,) V of the state after the last step, for episodes that were cut; None = 0.
    Returns: (B,T) in reward units.
    """
    following = torch.zeros_like(reward) if end_value is None else end_value[:, None].expand_as(reward)
    # With λ = 1, all columns of V but the last have weight 0.
    return lambda_return(reward, following, discount, 1.0)


def lambda_return(reward: Tensor, next_v: Tensor, discount: Tensor, mix: float) -> Tensor:
    """Compute the λ-return:  G_t = r_t + γ_t · ((1−λ) V_{t+1} + λ G_{t+1}),  with G_T = V_T.

    Sutton & Barto 2018, section 12.1. λ = 0 gives the one-step target, λ = 1 the Monte-Carlo return with V at the end
    of the log.

    Args:
      reward: (B,T) r.
      next_v: (B,T) V(s_{t+1}).
      discount: (B,T) γ_t, 0 after a terminal action.
      mix: λ in [0, 1].
    Returns: (B,T) detached, in reward units.
    """
    check_shapes("b t, b t, b t", reward, next_v, discount)
    following = next_v[:, -1]
    columns = []
    for t in reversed(range(reward.shape[1])):  # over time only; every row at once
        following = reward[:, t] + discount[:, t] * ((1 - mix) * next_v[:, t] + mix * following)
        columns.append(following)
    return torch.stack(columns[::-1], dim=1).detach()


def monte_carlo_mixture(td_target: Tensor, monte_carlo: Tensor, share: float) -> Tensor:
    """Mix two targets:  (1 − share) · TD target + share · Monte-Carlo return.

    With share = 1, Q and V become those of the behaviour policy, which never combine parts of different episodes.

    Args:
      td_target: (N,), in reward units.
      monte_carlo: (N,), in reward units.
      share: in [0, 1].
    Returns: (N,) detached, in reward units.
    """
    check_shapes("n, n", td_target, monte_carlo)
    return ((1 - share) * td_target + share * monte_carlo).detach()


def qdt_returns_to_go(reward: Tensor, next_v: Tensor, discount: float = 1.0) -> Tensor:
    """Relabel the return-to-go per agent turn:  R_t = r_t + γ · max(R_{t+1}, V(s_{t+1})),  R_{T+1} = V(s_{T+1}).

    Yamagata et al. 2023 (Q-learning Decision Transformer), after d3rlpy's reproduction. After turn t, the better of
    two continuations is assumed: the logged one, or the policy whose value is V. A logged return that is high by luck
    is therefore kept.

    Args:
      reward: (B,T), one per agent turn; shorter rows are padded on the left.
      next_v: (B,T) V of the state in which the agent speaks next. The last entry is 0 after a terminal turn, and V of
        the final state if the log was cut.
      discount: γ per turn.
    Returns: (B,T) detached, in the units of the rewards.
    """
    check_shapes("b t, b t", reward, next_v)
    following = next_v[:, -1]
    columns = []
    for t in reversed(range(reward.shape[1])):  # over turns only; every row at once
        following = reward[:, t] + discount * torch.maximum(following, next_v[:, t])
        columns.append(following)
    return torch.stack(columns[::-1], dim=1).detach()
