"""Estimates of a policy's return from logs of other policies. Use them beside other evidence, never as a headline.

    weighted importance sampling    Σ_i w_i G_i / Σ_i w_i,    w_i = Π_t π(a_t|s_t) / b(a_t|s_t)
    fitted Q evaluation             Q(s,a) ← r + γ · b · V(s′),    V(s) ← Σ_a π(a|s) · Q̄(s,a)

π is the distribution that the policy's play draws from, guidance and filters included. In the first line b is the
behaviour policy's distribution, as the logs recorded it; in the second, b is 1 where V(s′) counts and 0 after a
terminal action.

Weighted importance sampling (Precup, Sutton, Singh 2000) is consistent, but with long episodes a few of them carry all
the weight. Its effective sample size shows how few, and its interval holds only if there are many. Fitted Q evaluation
(Le, Voloshin, Yue 2019) has less variance, but its error stays invisible if the fit or the logs do not cover what π
would do.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.value_model import log_encoder
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.metrics import Cells, Estimate
from offline_lmrl.evaluation.offline import acting_log_prob, compute_step_outputs, values_at
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, with_own_token_ids
from offline_lmrl.models.adapters import run_metadata
from offline_lmrl.models.value_heads import ValueHeads, ValueHeadsConfig
from offline_lmrl.ops.value_learning import q_loss, td_target
from offline_lmrl.tokens.batching import TokenBatch
from offline_lmrl.tokens.episodes import StepRule
from offline_lmrl.tokens.experience import Experience

WINDOWS = 32  # windows per forward pass
ACTIONS = 64  # the expectation over π uses this many of the most probable tokens of a state, renormalised


@dataclass(frozen=True)
class WeightedReturn:
    """A weighted importance sampling estimate of the undiscounted score; `str` formats it.

    score: the estimate with its interval over groups.
    effective: effective sample size (Σw)² / Σw², in episodes.
    episodes: number of episodes.
    cut: number of episodes whose log was cut; they count with the return that was logged.
    """

    score: Estimate
    effective: float
    episodes: int
    cut: int

    def __str__(self) -> str:
        text = f"{self.score}, effective sample size {self.effective:.1f} of {self.episodes} episodes"
        return text + (f" (cut episodes: {self.cut}, with their logged return)" if self.cut else "")


@dataclass(frozen=True)
class FittedValue:
    """A fitted Q evaluation estimate of the discounted return from the logs' first states; `str` formats it.

    It has no interval: the spread of the fits does not show the error that all fits share, which is the larger one.

    value: mean over fits, in reward units.
    fits: the value of each fit, on its own bootstrap draw of groups.
    td_error: root mean square of Q − (r + γ · b · V(s′)) on the logs, in reward units; 0 if the fit solves its
      equation. Mean over fits.
    discount: the discounts of the return.
    """

    value: float
    fits: tuple[float, ...]
    td_error: float
    discount: StepRule

    def __str__(self) -> str:
        rule = self.discount
        by = f"γ {rule.discount_per_token:g} per token and {rule.discount_per_turn:g} per turn"
        each = " ".join(f"{value:.2f}" for value in self.fits)
        fits = f"(fits: {each}; they do not show an error that all share)"
        return f"{self.value:.2f} {fits}, {by}, TD error {self.td_error:.3g}"


def importance_sampling(policy: LanguagePolicy, trajectories: Sequence[Trajectory]) -> WeightedReturn:
    """Estimate the policy's score by weighted importance sampling, with one weight per episode.

    Raises: InputError if an agent turn has no behaviour_log_prob for each of the policy's tokens, or does not fit in
      its window; if the policy is return-conditioned or was trained with demonstrations; or if π gives every log
      probability 0.
    """
    _require_plain(policy)
    own = [with_own_token_ids(t, policy.renderer.fingerprint).turns for t in trajectories]
    log_probs = [
        {i: turn.behaviour_log_prob or () for i, turn in enumerate(turns) if turn.is_trainable} for turns in own
    ]
    # If the environment restricted the agent to a choice of texts, it did not play from π over all tokens.
    whole = [bool(of) and not t.labels.get("options") for of, t in zip(log_probs, trajectories, strict=True)]
    _require_all(ok and all(of.values()) for ok, of in zip(whole, log_probs, strict=True))  # before the model runs
    steps = compute_step_outputs(policy, trajectories)
    tokens = Counter(zip(steps.trajectory.tolist(), steps.turn.tolist(), strict=True))
    _require_all(all(len(known) == tokens[i, turn] for turn, known in of.items()) for i, of in enumerate(log_probs))
    behaviour = [sum(map(sum, of.values())) for of in log_probs]
    log_weight = np.bincount(steps.trajectory, steps.acting_log_prob, minlength=len(trajectories)) - behaviour
    if not np.isfinite(log_weight.max()):
        raise InputError("found only trajectories of probability 0 under this policy, expected at least one other")
    weight = np.exp(log_weight - log_weight.max())  # a common factor cancels in ΣwG / Σw; this one avoids overflow
    groups = [t.group or index for index, t in enumerate(trajectories)]
    returns = [t.total_return for t in trajectories]
    score = Cells.summed((0, *row) for row in zip(groups, weight * returns, weight, strict=True)).estimate()
    effective = weight.sum() ** 2 / np.square(weight).sum()
    cut = sum(not t.terminated for t in trajectories)
    return WeightedReturn(score._replace(n=len(trajectories)), float(effective), len(trajectories), cut)


def fitted_q_evaluation(
    policy: LanguagePolicy,
    trajectories: Sequence[Trajectory],
    steps: int = 2000,
    *,
    fits: int = 3,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    target_rate: float = 0.05,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> FittedValue:
    """Estimate the policy's return by fitting fresh Q and V heads on its frozen trunk.

    The input of the heads is the hidden state and the mean of the token embeddings so far, each dimension
    standardised. The embeddings are needed because the hidden states of a policy that acts alike in two states need
    not differ. Q cannot distinguish states that are alike in both. Windows and discounts are those of the policy's
    run.

    Args:
      steps: optimizer steps per fit.
      fits: number of fits, each on groups drawn anew with replacement.
      batch_size: agent tokens per optimizer step.
      learning_rate: of Adam.
      target_rate: Polyak step of Q̄ per optimizer step.
      seed: seed of the draws and of the heads' initial weights.
      progress: called with (steps done, steps in all); None = not called.
    Raises: InputError if the policy is return-conditioned or was trained with demonstrations, or if no agent turn
      fits.
    """
    _require_plain(policy)
    if steps < 1:
        raise InputError(f"steps: found {steps}, expected at least 1")
    logs = _Logs(policy, trajectories)
    vocabulary, device = policy.model.get_output_embeddings().weight.shape[0], policy.model.device
    groups = [t.group or index for index, t in enumerate(trajectories)]
    values, errors = [], []
    for fit in range(fits):
        rng = np.random.default_rng([seed, fit])
        torch.manual_seed(int(rng.integers(2**31)))  # for the initial weights of the heads
        config = ValueHeadsConfig("mlp", heads=1, initial_value=logs.mean_return)
        heads = ValueHeads(config, vocabulary, logs.columns["features"].shape[1]).to(device)
        for head in heads.children():
            head.reset()
        heads.update_targets(1.0)
        optimizer = torch.optim.Adam([*heads.q.parameters(), *heads.v.parameters()], learning_rate)
        drawn = logs.drawn(groups, rng)
        for step in range(steps):
            loss = logs.losses(heads, rng.choice(drawn, batch_size))[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            heads.update_targets(target_rate)
            if progress is not None:
                progress(fit * steps + step + 1, fits * steps)
        value, error = logs.first_values(heads, batch_size)
        values.append(float(np.mean(list(value.values()))))
        errors.append(error)
    return FittedValue(float(np.mean(values)), tuple(values), float(np.mean(errors)), logs.encoder.step_rule)


def _require_all(known: Iterable[bool]) -> None:
    known = list(known)
    if unknown := known.count(False):
        raise InputError(
            f"found {unknown} of {len(known)} trajectories without behaviour_log_prob for each of this "
            "policy's tokens (or in which the agent chose from given texts), expected none"
        )


def _require_plain(policy: LanguagePolicy) -> None:
    if policy.return_tokens is not None:
        raise InputError(
            "found a policy that is conditioned on returns, expected one that is not: the logs contain "
            "no requested returns"
        )
    if run_metadata(policy.model.config).get("few_shot") is not None:
        raise InputError("found a policy trained with few-shot demonstrations, expected one trained without them")


class _Logs:
    """The N steps of the logs with everything that a fit needs; the trunk runs over them once.

    encoder: makes windows and steps of the logs, with a reward scale fitted to them.
    episode: (N,), index of the trajectory of each step.
    mean_return: scaled, the initial value of the heads.
    columns: by name: action, reward, discount, bootstrap and has_target of `ActionSteps`, each (N,); features and
      next_features, (N, d), the heads' input at the state and at the next state; actions, (N, K), ids of the K tokens
      that are most probable under π; probability, (N, K), their probabilities, which sum to 1.
    """

    def __init__(self, policy: LanguagePolicy, trajectories: Sequence[Trajectory]):
        self.encoder = log_encoder(policy)
        self.encoder.scale = RewardScale.fit(trajectories, discounted=True)  # without a shift, whatever the run had
        experience = Experience.of(trajectories, self.encoder, Counter(), policy.renderer.close_id)
        if not len(experience.windows):
            raise InputError("data: found no agent turn that fits, expected at least one")
        self.episode, self.mean_return = experience.episode, experience.windows.mean_return
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(experience.windows), WINDOWS):
            index = np.arange(start, min(start + WINDOWS, len(experience.windows)))
            for name, values in _step_columns(policy, experience.windows.batch(index)).items():
                parts.setdefault(name, []).append(values)
        self.columns = {name: torch.cat(values) for name, values in parts.items()}
        spread, mean = torch.std_mean(self.columns["features"], dim=0, correction=0)
        for name in ("features", "next_features"):
            self.columns[name] = (self.columns[name] - mean) / spread.clamp(min=1e-6)

    def drawn(self, groups: Sequence[Hashable], rng: np.random.Generator) -> np.ndarray:
        """Return the indices of all steps in a bootstrap draw of groups: as many as there are, with replacement.

        Args:
          groups: group of each trajectory.
        """
        members: dict[Hashable, list[int]] = {}
        for step, episode in enumerate(self.episode.tolist()):
            members.setdefault(groups[episode], []).append(step)
        lists = list(members.values())
        return np.concatenate([lists[i] for i in rng.integers(len(lists), size=len(lists))])

    def losses(self, heads: ValueHeads, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, Σ_a π(a|s) · Q̄(s,a) and the TD error at these steps.

        Args:
          index: (n,), indices of steps.
        Returns: three tensors (n,), in scaled reward units.
        """
        steps = {name: column[index] for name, column in self.columns.items()}
        features = steps["features"]
        q = heads.q(features, None, steps["action"].unsqueeze(-1)).squeeze(-1)  # (1,n)
        with torch.no_grad():
            target_q = heads.target_q(features, None, steps["actions"])[0]
            expected = (steps["probability"] * target_q).sum(-1)
            next_v = heads.v(steps["next_features"])[0]
        target = td_target(steps["reward"], next_v, steps["bootstrap"], steps["discount"])
        known = steps["has_target"]  # False for the last action of a cut log: its next state is unknown
        loss = q_loss(q, target) * known + (heads.v(features)[0] - expected).square()
        return loss, expected, (q[0] - target).detach() * known

    @torch.no_grad()
    def first_values(self, heads: ValueHeads, batch_size: int) -> tuple[dict[int, float], float]:
        """Return the value of each episode's first state, by episode, and the root mean square TD error.

        Both are in reward units.
        """
        chunks = np.array_split(np.arange(len(self.episode)), -(-len(self.episode) // batch_size))
        v, error = (
            torch.cat(part).cpu().numpy()
            for part in zip(*(self.losses(heads, chunk)[1:] for chunk in chunks), strict=True)
        )
        unit = self.encoder.scale.scale
        episodes, first = np.unique(self.episode, return_index=True)
        value = dict(zip(episodes.tolist(), (unit * v[first]).tolist(), strict=True))
        return value, unit * float(np.sqrt(np.square(error).mean()))


@torch.no_grad()
def _step_columns(policy: LanguagePolicy, batch: TokenBatch) -> dict[str, Tensor]:
    """Return the columns of `_Logs` for the steps of a batch."""
    model, windows = policy.model.eval(), batch["windows"]
    ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    steps = {name: value.to(model.device) for name, value in batch["steps"].items()}
    place = steps["row"], steps["state"]
    logits, hidden = model.packed_logits(*place, input_ids=ids[:windows], attention_mask=mask[:windows])
    read, embedded = hidden, model.get_input_embeddings()(ids).float()
    if windows < len(ids):  # rows after the windows hold next states only, so they need no logits
        following = model.get_decoder()(input_ids=ids[windows:], attention_mask=mask[windows:], use_cache=False)[0]
        read = torch.cat([hidden, following])
    log_prob = acting_log_prob(policy, logits.float(), *values_at(policy, hidden[place]))
    best, actions = log_prob.topk(min(ACTIONS, log_prob.shape[-1]))
    so_far = embedded.cumsum(1) / torch.arange(1, ids.shape[1] + 1, device=ids.device).unsqueeze(-1)
    features = torch.cat([read.float(), so_far], dim=-1)  # (B,T,2d)
    columns = {
        "features": features[place],
        "next_features": features[steps["next_row"], steps["next_state"]],
        "actions": actions,
        "probability": best.softmax(-1),
    }
    return columns | {name: steps[name] for name in ("action", "reward", "discount", "bootstrap", "has_target")}
