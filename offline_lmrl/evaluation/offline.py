"""Measurements at the agent tokens of logs: likelihood, Q and V, and how far guidance of weight β moves the policy π.

offline_report.py makes an evaluation of them. A window is a row of token ids cut from a logged dialogue: some of the
agent's turns and the earlier turns that the policy sees before them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from offline_lmrl.decoding.distribution import Form, reduce_q
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.value_model import log_encoder
from offline_lmrl.errors import InputError
from offline_lmrl.logs.io import read_trajectories
from offline_lmrl.logs.trajectory import Trajectory
from offline_lmrl.models.adapters import run_metadata
from offline_lmrl.models.step_outputs import TOKEN_BUDGET, States, compute_step_outputs
from offline_lmrl.ops.policy_gradient import kl_exact
from offline_lmrl.tokens.episodes import ReturnIdsFor
from offline_lmrl.tokens.experience import Experience
from offline_lmrl.tokens.few_shot import Ids, encode_few_shot


@dataclass(frozen=True)
class LoggedTokens:
    """Measurements at each of the N agent tokens in logs, in the order of the logs. Arrays are (N,) unless noted.

    q, v and return_to_go are in reward units. If the policy's reward scale has a shift (`RewardScale`), they count the
    reward of each scored turn minus the shift.

    trajectory: index of the token's trajectory.
    turn: index of the token's turn in that trajectory.
    token: id of the token.
    log_prob: log π of the token at temperature 1, in nats.
    acting_log_prob: log-probability of the token under the distribution that the policy draws from in play, in nats.
    q: Q of the token by the target heads, combined as `DecodingConfig.q_reduce` sets; None without value heads.
    v: V of the state before the token; None without value heads.
    return_to_go: return that the log earned from this token on, discounted as in training; NaN if the log was cut.
    kl: (B, N) for B values of β, KL(guided ‖ π) over the vocabulary at the state before the token, in nats; π is at
      the policy's temperature and without filters.
    changed: (B, N), 1 if guidance changes the most probable token, else 0.
    counts: description of a fault -> number of cases, for example of agent turns that do not fit into a window.
    betas: the B values of β.
    unguided_log_prob: acting_log_prob without value guidance.
    guided_log_prob: (B, N), acting_log_prob under guidance of weight β.
    """

    trajectory: np.ndarray
    turn: np.ndarray
    token: np.ndarray
    log_prob: np.ndarray
    acting_log_prob: np.ndarray
    q: np.ndarray | None
    v: np.ndarray | None
    return_to_go: np.ndarray
    kl: np.ndarray
    changed: np.ndarray
    counts: Counter[str]
    betas: tuple[float, ...]
    unguided_log_prob: np.ndarray
    guided_log_prob: np.ndarray


def measure_logs(
    policy: LanguagePolicy,
    trajectories: Sequence[Trajectory],
    betas: Sequence[float] = (),
    demonstrations: Sequence[Trajectory] | None = None,
    token_budget: int = TOKEN_BUDGET,
    ask: float | str | None = None,
) -> LoggedTokens:
    """Run the model over the logs once, with the context length, reward scale and discounts of its training.

    Args:
      policy: the policy.
      trajectories: the logs.
      betas: values of β at which guidance is measured; other decoding settings are the policy's. () = none.
      demonstrations: trajectories from which the few-shot demonstrations before each log are drawn, of the log's
        task. None = the demonstrations with which the policy was loaded. If it was loaded with none, but trained with
        demonstrations, new ones are drawn for every log as in training; other policies get none.
      token_budget: largest number of tokens of a forward pass, padding included.
      ask: for a return-conditioned policy, the return requested in every log, a number in reward units or a name such
        as "p90"; later turns request what the log's rewards leave of it. None = no return is requested.
    Raises: InputError if betas are given for a policy without value heads, if no agent turn fits into a window, or if
      the task of a log has too few demonstrations.
    """
    if any(betas) and policy.model.value_heads is None:
        raise InputError(f"betas: found {list(betas)}, expected none: this policy has no value heads")
    encoder = log_encoder(policy)
    if ask is not None:
        encoder = replace(encoder, return_ids_for=partial(_requested, policy, ask))
    counts: Counter[str] = Counter()
    few_shot = few_shot_of_logs(policy, trajectories, demonstrations, encoder.return_ids_for)
    logs = Experience.of(trajectories, encoder, counts, policy.renderer.close_id, next_rows=False, few_shot=few_shot)
    measured = compute_step_outputs(
        policy.model, logs.windows, measure=partial(_measured, policy, betas), token_budget=token_budget
    ).measured
    unit, column = encoder.scale.scale, logs.steps
    ended = np.array([t.terminated for t in trajectories])[logs.episode] & column["has_target"]
    return LoggedTokens(
        trajectory=logs.episode,
        turn=column["turn"],
        token=column["action"],
        log_prob=measured["log_prob"],
        acting_log_prob=measured["acting_log_prob"],
        q=unit * measured["q"] if "q" in measured else None,
        v=unit * measured["v"] if "v" in measured else None,
        return_to_go=np.where(ended, unit * column["return_to_go"], np.nan),
        kl=measured["kl"].T,
        changed=measured["changed"].T,
        counts=+counts,
        betas=tuple(betas),
        unguided_log_prob=measured["unguided_log_prob"],
        guided_log_prob=measured["guided_log_prob"].T,
    )


def _requested(policy: LanguagePolicy, ask: float | str, trajectory: Trajectory) -> list[Ids]:
    """Return the ids of the requested return for each agent turn of a log, and for the turn that would follow it."""
    returns = policy.return_tokens
    rewards = [turn.reward for turn in trajectory.turns if turn.is_trainable]
    remaining = returns.remaining(returns.scale.value_of(ask, policy.task), rewards)
    return [returns.ids(value, policy.task) for value in remaining]


def few_shot_of_logs(
    policy: LanguagePolicy,
    trajectories: Sequence[Trajectory],
    demonstrations: Sequence[Trajectory] | None,
    return_ids_for: ReturnIdsFor | None,
) -> Iterator[Ids]:
    """Return the token ids of the few-shot demonstrations before each log, in the order of the logs.

    Args:
      policy: the policy.
      trajectories: the logs.
      demonstrations: trajectories from which few-shot demonstrations are drawn; None = those of the policy, see
        `measure_logs`.
      return_ids_for: function from a trajectory to the ids that encode returns, put before each of its agent turns;
        None = no such ids.
    """
    without = run_metadata(policy.model.config).get("few_shot") is None
    if demonstrations is None and (policy.few_shot is not None or without):
        return iter([policy.shared_few_shot.without_returns] * len(trajectories))
    spec = replace(policy.spec, drop=0.0)
    if demonstrations is None and spec.demonstrations is not None:
        demonstrations = read_trajectories(spec.demonstrations)
    return encode_few_shot(spec, trajectories, demonstrations, policy.renderer, return_ids_for)


def acting_log_prob(policy: LanguagePolicy, states: States) -> Tensor:
    """Return the log-probabilities that the policy draws its next token from in play, (n, vocabulary).

    At temperature 0 (greedy play), they are 0 at the best token and −∞ elsewhere.
    """
    return _drawn_from(policy.decoding, states.distribution(policy.decoding))


def _drawn_from(form: Form, log_prob: Tensor) -> Tensor:
    """Return the log-probabilities that tokens are drawn with, given the distribution of a form, (n, vocabulary)."""
    if form.temperature > 0:
        return log_prob
    best = log_prob.argmax(-1, keepdim=True)
    return torch.full_like(log_prob, -torch.inf).scatter(-1, best, 0.0)


def _measured(policy: LanguagePolicy, betas: Sequence[float], states: States) -> dict[str, Tensor]:
    """Return fields of `LoggedTokens` at n states, in scaled reward units: (n,), or (n, B) for fields of each β.

    Args:
      policy: the policy.
      betas: B values of β.
      states: the model's outputs.
    """
    form, log_prob = policy.decoding, states.logits.log_softmax(-1)
    plain = (states.logits / (form.temperature or 1.0)).log_softmax(-1)
    kl, changed, guided_log_prob = log_prob.new_zeros(3, len(log_prob), len(betas))
    acting: dict[float, Tensor] = {}
    # A distribution covers the vocabulary, so that of each β is computed once, also where β is the policy's own or 0.
    for beta in dict.fromkeys([*betas, 0.0, form.beta]):
        guided = states.distribution(replace(form, beta=beta))
        acting[beta] = states.of_action(_drawn_from(form, guided))
        for i in (i for i, one in enumerate(betas) if one == beta):
            kl[:, i] = kl_exact(guided, plain)
            changed[:, i] = (guided.argmax(-1) != log_prob.argmax(-1)).float()
            guided_log_prob[:, i] = acting[beta]
    found = {
        "log_prob": states.of_action(log_prob),
        "acting_log_prob": acting[form.beta],
        "kl": kl,
        "changed": changed,
        "unguided_log_prob": acting[0.0],
        "guided_log_prob": guided_log_prob,
    }
    if policy.model.value_heads is not None:
        found |= {"q": reduce_q(states.q_of_action(), form.q_reduce), "v": states.v()}
    return found


def guidance_by_beta(steps: LoggedTokens, betas: Sequence[float]) -> list[dict[str, float]]:
    """Return, for each β, how far value guidance moves the policy, averaged over logged agent tokens.

    Args:
      steps: measurements at these tokens.
      betas: the values that `measure_logs` was given.
    Returns: one mapping per β: `beta`; `kl`, the mean KL(guided ‖ π) in nats per token, with π at the policy's
      temperature and without filters; and `changed`, the share of tokens at which guidance changes the most probable
      token. Both are computed over the whole vocabulary, not sampled.
    """
    means = zip(betas, steps.kl.mean(-1), steps.changed.mean(-1), strict=True)
    return [{"beta": float(beta), "kl": float(kl), "changed": float(changed)} for beta, kl, changed in means]


def show(policy: LanguagePolicy, trajectory: Trajectory, demonstrations: Sequence[Trajectory] | None = None) -> str:
    """Return one logged dialogue as text, with the agent's turns token by token.

    Each token is printed with its log π and, with value heads, Q, V and the advantage Q − V in reward units. A turn
    that does not fit into the policy's window is printed without its tokens.

    Args:
      policy: the policy.
      trajectory: the logged dialogue.
      demonstrations: trajectories from which few-shot demonstrations are drawn; None = those of the policy, see
        `measure_logs`.
    """
    steps = measure_logs(policy, [trajectory], demonstrations=demonstrations)
    lines = [f"return {trajectory.total_return:g}" + ("" if trajectory.terminated else " (partial: the log was cut)")]
    for number, turn in enumerate(trajectory.turns):
        lines.append(f"{turn.role}: {turn.content}")
        if turn.is_trainable and turn.reward is not None:
            lines[-1] += f"   [reward {turn.reward:g}]"
        for i in np.flatnonzero(steps.turn == number):
            text = policy.renderer.tokenizer.decode([int(steps.token[i])])
            line = f"    {text!r:<20} log π {steps.log_prob[i]:8.3f}"
            if steps.q is not None:
                line += f"   Q {steps.q[i]:9.3f}   V {steps.v[i]:9.3f}   Q − V {steps.q[i] - steps.v[i]:+9.3f}"
            lines.append(line)
    return "\n".join(lines)
