"""Estimates of a policy's return from logs of other policies. Use them only beside other evidence.

    weighted importance sampling    Σ_i w_i G_i / Σ_i w_i,    w_i = Π_t π(a_t|s_t) / b(a_t|s_t)
    fitted Q evaluation             Q(s,a) ← r + γ · b · V(s′),    V(s) ← Σ_a π(a|s) · Q̄(s,a)

π is the distribution that the policy draws its tokens from in play, guidance and filters included. In the first line,
b(a|s) is the probability that the logs recorded for the token a, and G_i the undiscounted return of episode i. In the
second, the factor b is 0 after a terminal action and else 1, and Q̄ is a slowly updated copy of Q.

Weighted importance sampling (Precup, Sutton, Singh 2000) is consistent, but with long episodes a few of them carry all
the weight. The effective sample size shows how many episodes count, and the interval is valid only if they are many.
Fitted Q evaluation (Le, Voloshin, Yue 2019) has less variance, but if the logs or the fit do not cover what π would
do, nothing shows the error.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.value_model import log_encoder
from offline_lmrl.errors import InputError
from offline_lmrl.evaluation.metrics import Cells, Estimate
from offline_lmrl.evaluation.offline import acting_log_prob, measure_logs
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, with_own_token_ids
from offline_lmrl.models.adapters import run_metadata
from offline_lmrl.models.step_outputs import States, compute_step_outputs
from offline_lmrl.models.value_heads import ValueHeads, ValueHeadsConfig
from offline_lmrl.ops.value_learning import q_loss, td_target
from offline_lmrl.tokens.episodes import StepRule
from offline_lmrl.tokens.experience import Experience

STEP_COLUMNS = ("action", "reward", "discount", "bootstrap", "has_target")
ACTIONS = 64  # the expectation over π uses this many of the most probable tokens of a state, renormalised


@dataclass(frozen=True)
class WeightedReturn:
    """A weighted importance sampling estimate of the undiscounted return; `str` formats it.

    score: the estimate with its 95% interval, for which the episodes of one group (`Trajectory.group`) depend on each
      other.
    effective: effective sample size (Σw)² / Σw², in episodes.
    episodes: number of episodes.
    cut: number of episodes that were cut before their end; they count with the return that was logged.
    """

    score: Estimate
    effective: float
    episodes: int
    cut: int

    def __str__(self) -> str:
        text = f"{self.score}, effective sample size {self.effective:.1f} of {self.episodes} episodes"
        return text + (f" (cut episodes: {self.cut}, with their logged return)" if self.cut else "")


@dataclass(frozen=True)
class FitConfig:
    """The settings of fitted Q evaluation.

    steps: optimizer steps per fit, at least 1.
    fits: number of fits. For each, groups of trajectories (`Trajectory.group`) are drawn with replacement.
    batch_size: agent tokens per optimizer step.
    learning_rate: learning rate of Adam.
    target_rate: share of Q that moves into Q̄ after each optimizer step (Polyak averaging).
    seed: seed of the draws and of the heads' initial weights.
    """

    steps: int = 2000
    fits: int = 3
    batch_size: int = 256
    learning_rate: float = 2e-3
    target_rate: float = 0.05
    seed: int = 0


FIT = FitConfig()


@dataclass(frozen=True)
class FittedValue:
    """A fitted Q evaluation estimate of the discounted return from the logs' first states; `str` formats it.

    It has no interval: the spread of the fits does not show the error that all fits share, which is the larger one.

    value: mean of Σ_a π(a|s) · Q̄(s,a) over the first states of all episodes and over the fits, in reward units.
    fits: the same mean for each fit. Each was trained on another draw of the logs.
    td_error: root mean square of Q − (r + γ · b · V(s′)) on the logs, in reward units, mean over fits; 0 if each fit
      solves its equation.
    discount: the discounts of the return, per token and per turn.
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
    """Estimate the policy's undiscounted return by weighted importance sampling, with one weight per episode.

    Args:
      policy: the policy to evaluate, π.
      trajectories: logged episodes, sampled with the policy's tokenizer and chat format.
    Raises: InputError if a trajectory has no agent turn or its agent had to choose from given texts. InputError if an
      agent turn does not fit into the policy's window, or does not have one behaviour_log_prob per token of the
      policy's tokenizer. InputError if the policy is return-conditioned or was trained with few-shot demonstrations.
      InputError if all logs have probability 0 under π.
    """
    _require_plain(policy)
    own = [with_own_token_ids(t, policy.renderer.fingerprint).turns for t in trajectories]
    log_probs = [
        {i: turn.behaviour_log_prob or () for i, turn in enumerate(turns) if turn.is_trainable} for turns in own
    ]
    # If the environment restricted the agent to a choice of texts, it did not play from π over all tokens.
    whole = [bool(of) and not t.labels.get("options") for of, t in zip(log_probs, trajectories, strict=True)]
    _require_all(ok and all(of.values()) for ok, of in zip(whole, log_probs, strict=True))  # before the model runs
    steps = measure_logs(policy, trajectories)
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
    config: FitConfig = FIT,
    progress: Callable[[int, int], None] | None = None,
) -> FittedValue:
    """Estimate the policy's discounted return by fitting new Q and V heads on its frozen decoder.

    The input of the heads is the decoder's hidden state and the mean of the token embeddings up to this state, each
    dimension standardised. The embeddings are needed because a policy that acts alike in two states may have the same
    hidden state in both. Two states with equal inputs get the same Q. Context length and discounts are those of the
    policy's training.

    Args:
      policy: the policy to evaluate, π.
      trajectories: logged episodes.
      config: the settings of the fits.
      progress: called with (optimizer steps done, optimizer steps of all fits); None = not called.
    Raises: InputError if `steps` is below 1, if the policy is return-conditioned or was trained with few-shot
      demonstrations, or if no agent turn fits into the policy's window.
    """
    _require_plain(policy)
    if config.steps < 1:
        raise InputError(f"steps: found {config.steps}, expected at least 1")
    logs = _Logs(policy, trajectories)
    vocabulary, device = policy.model.get_output_embeddings().weight.shape[0], policy.model.device
    groups = [t.group or index for index, t in enumerate(trajectories)]
    values, errors = [], []
    for fit in range(config.fits):
        rng = np.random.default_rng([config.seed, fit])
        torch.manual_seed(int(rng.integers(2**31)))  # for the initial weights of the heads
        form = ValueHeadsConfig("mlp", heads=1, initial_value=logs.mean_return)
        heads = ValueHeads(form, vocabulary, logs.columns["features"].shape[1]).to(device)
        for head in heads.children():
            head.reset()
        heads.update_targets(1.0)
        optimizer = torch.optim.Adam([*heads.q.parameters(), *heads.v.parameters()], config.learning_rate)
        drawn = logs.drawn(groups, rng)
        for step in range(config.steps):
            loss = logs.losses(heads, rng.choice(drawn, config.batch_size))[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            heads.update_targets(config.target_rate)
            if progress is not None:
                progress(fit * config.steps + step + 1, config.fits * config.steps)
        value, error = logs.first_values(heads, config.batch_size)
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
    """The N steps (agent tokens) of the logs with all that a fit needs; the decoder runs over the logs once.

    encoder: turns the logs into token rows (windows) and their steps, with a reward scale fitted to these logs.
    episode: (N,), index of the trajectory of each step.
    mean_return: mean return in scaled reward units, the heads' initial output.
    columns: by name: `action`, `reward`, `discount`, `bootstrap` and `has_target` of `ActionSteps`, each (N,);
      `features` and `next_features`, (N, 2d), the heads' input at the state and at the next state; `actions`, (N, K),
      ids of the K tokens that are most probable under π; `probability`, (N, K), π of these tokens, divided by its sum.
    """

    def __init__(self, policy: LanguagePolicy, trajectories: Sequence[Trajectory]):
        scale = RewardScale.fit(trajectories, discounted=True)  # without a shift, whatever the run had
        self.encoder = replace(log_encoder(policy), scale=scale)
        experience = Experience.of(trajectories, self.encoder, Counter(), policy.renderer.close_id)
        self.episode, self.mean_return = experience.episode, experience.windows.mean_return
        found = compute_step_outputs(policy.model, experience.windows, measure=partial(_step_columns, policy)).measured
        self.columns = {name: experience.column(name) for name in STEP_COLUMNS}
        self.columns |= {name: torch.from_numpy(values) for name, values in found.items()}
        self.columns = {name: values.to(policy.model.device) for name, values in self.columns.items()}
        spread, mean = torch.std_mean(self.columns["features"], dim=0, correction=0)
        for name in ("features", "next_features"):
            self.columns[name] = (self.columns[name] - mean) / spread.clamp(min=1e-6)

    def drawn(self, groups: Sequence[Hashable], rng: np.random.Generator) -> np.ndarray:
        """Draw as many groups as there are, with replacement; return the indices of all their steps, (n,).

        Args:
          groups: group of each trajectory.
          rng: source of the draw.
        """
        members: dict[Hashable, list[int]] = {}
        for step, episode in enumerate(self.episode.tolist()):
            members.setdefault(groups[episode], []).append(step)
        lists = list(members.values())
        return np.concatenate([lists[i] for i in rng.integers(len(lists), size=len(lists))])

    def losses(self, heads: ValueHeads, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of Q and V, the target of V and the TD error of Q at n steps.

        Args:
          heads: the heads that are fitted.
          index: (n,), indices of steps.
        Returns: three tensors (n,): the loss; Σ_a π(a|s) · Q̄(s,a), and Q − (r + γ · b · V(s′)), both in scaled reward
          units. The TD error is 0 where the next state is unknown.
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
        """Return the value of each episode's first state and the root mean square TD error of all steps.

        Args:
          heads: the fitted heads.
          batch_size: steps per batch.
        Returns: index of the trajectory -> Σ_a π(a|s) · Q̄(s,a) at its first agent token; and the TD error; both in
          reward units.
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


def _step_columns(policy: LanguagePolicy, states: States) -> dict[str, Tensor]:
    """Return those of `_Logs.columns` that a model computes, for n steps, not yet standardised."""
    ids, steps = states.input_ids, states.steps
    embedded = states.model.get_input_embeddings()(ids).float()
    so_far = embedded.cumsum(1) / torch.arange(1, ids.shape[1] + 1, device=ids.device).unsqueeze(-1)  # (B,T,d)
    best, actions = acting_log_prob(policy, states).topk(min(ACTIONS, states.logits.shape[-1]))
    columns = {"actions": actions, "probability": best.softmax(-1)}
    for place in ("", "next_"):
        seen = so_far[steps[f"{place}row"], steps[f"{place}state"]]
        columns[f"{place}features"] = torch.cat([states.at(place).float(), seen], dim=-1)
    return columns
