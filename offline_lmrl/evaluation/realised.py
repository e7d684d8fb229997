"""What a way of decoding would have earned at the states of held-out logs, from their outcomes alone.

Let G_t be the return that a held-out log earned from the agent's token a_t on, and V_t a guess of it from the state
before this token. π is the policy without filters, guidance or a requested return, an estimate of how the logs were
written; π_c the distribution that a choice (a β, or a requested return) draws its tokens from; and π_0 that of the
plain policy. The realised advantage of the choice is the mean over logs of

    Σ_t (π_c(a_t|s_t) − π_0(a_t|s_t)) / π(a_t|s_t) · (G_t − V_t)

At every state, the expectation of a term over a_t ~ π is the return that is added if one token is the choice's
instead of the plain policy's. Q guides the choice, but does not rate it: where it learnt noise, the sum is 0 on
average, and its error grows with β. Ratios of single tokens keep this error small; with those of whole replies, a
handful of replies would have all the weight. The price is that the sum is one step of improvement: text that the
choice leads to, but the logs do not, counts nothing, so its size is no forecast of the gain.

V_t is the policy's V, or without value heads the mean return-to-go of the held-out logs from the same agent turn on.
A token of a log that was cut has no known return and adds nothing.
"""

from collections.abc import Sequence

import numpy as np

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.evaluation.metrics import Estimate, mean_interval
from offline_lmrl.evaluation.offline import LoggedTokens, measure_logs
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.tokens.conditioning import ASK_NAMES


def realised_advantage(
    steps: LoggedTokens, log_prob: np.ndarray, trajectories: Sequence[Trajectory]
) -> Estimate | None:
    """Return the realised advantage of a choice, in reward units per log.

    Args:
      steps: measurements at the N agent tokens of the logs, without a requested return.
      log_prob: (N,), log π_c of each token.
      trajectories: the logs.
    Returns: the mean with its 95% interval, in which logs of a group depend on each other; None if no return is known.
    """
    known = ~np.isnan(steps.return_to_go)
    if not known.any():
        return None
    surplus = np.where(known, steps.return_to_go - _expected(steps, known), 0.0)
    logged = steps.log_prob.astype(np.float64)  # ratios of tokens that π holds for impossible exceed fp32
    shift = np.exp(log_prob - logged) - np.exp(steps.unguided_log_prob - logged)
    per_log = np.bincount(steps.trajectory, shift * surplus, minlength=len(trajectories))
    seen = np.unique(steps.trajectory[known])
    return mean_interval(per_log[seen].tolist(), [trajectories[i].group or int(i) for i in seen])


def ask_log_prob(
    policy: LanguagePolicy, trajectories: Sequence[Trajectory], ask: float | str, steps: LoggedTokens
) -> np.ndarray | None:
    """Return log π_c of the logged tokens for a requested return, (N,), with the value guidance of no β.

    Args:
      policy: a return-conditioned policy.
      trajectories: the logs.
      ask: the requested return.
      steps: measurements at the same logs without a requested return.
    Returns: None if the request depends on the dialogue ("auto", "expert"), if a scale of return guidance is set, or
      if other windows are left once the returns are named.
    """
    if policy.decoding.condition_scale != 0 or (isinstance(ask, str) and not ASK_NAMES.fullmatch(ask)):
        return None
    asked = measure_logs(policy, trajectories, ask=ask)
    if not np.array_equal(asked.token, steps.token):
        return None
    return asked.unguided_log_prob


def _expected(steps: LoggedTokens, known: np.ndarray) -> np.ndarray:
    """Return V_t at the N tokens."""
    if steps.v is not None:
        return steps.v
    number = np.bincount(steps.turn[known], minlength=steps.turn.max() + 1)
    total = np.bincount(steps.turn[known], steps.return_to_go[known], minlength=steps.turn.max() + 1)
    return (total / np.maximum(number, 1))[steps.turn]
