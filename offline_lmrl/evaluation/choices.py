"""What each weight of value guidance (β), and each requested return, does to replies: measured from held-out logs.

A choice is a β with a requested return (ask). Every choice replies to the same prompts, contexts of agent turns in the
held-out logs, with the same random seeds as the plain policy, which is β 0 without a requested return. Nobody rates
these replies, so what they would earn is estimated by `HeldOutQ`, a regression that is fitted on the held-out logs
alone. Its features of a reply are the mean of its token embeddings and the decoder's hidden state after its last
token, both of the frozen policy without a requested return.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch

from offline_lmrl.decoding.cache import CacheMemory
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import CACHE_BYTES
from offline_lmrl.evaluation.held_out import HeldOutQ
from offline_lmrl.evaluation.metrics import Cells, Estimate, mean_interval
from offline_lmrl.evaluation.offline import LoggedTokens, guidance_by_beta, measure_logs
from offline_lmrl.evaluation.ranking import RankAgreement, rank_agreement
from offline_lmrl.evaluation.realised import ask_log_prob, realised_advantage
from offline_lmrl.logs.protocols import Reply
from offline_lmrl.logs.replies import distinct, is_broken, least_likely, repeats
from offline_lmrl.logs.trajectory import Trajectory, Turn, as_context, with_own_token_ids

PROMPTS = 50
MOST_FITTED = 600  # logged replies that the regression is fitted on; of more, so many are drawn

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Choice:
    """A way of decoding among which one is chosen; `str` names it.

    beta: the weight of value guidance.
    ask: the requested return; None = none.
    """

    beta: float = 0.0
    ask: float | str | None = None

    @property
    def is_plain(self) -> bool:
        return self.beta == 0 and self.ask is None

    def __str__(self) -> str:
        parts = [] if self.beta == 0 and self.ask is not None else [f"β {self.beta:g}"]
        return " ".join(parts if self.ask is None else [*parts, f"ask {_short(self.ask)}"])


PLAIN = Choice()


@dataclass(frozen=True)
class ChoiceRow:
    """What a choice does to replies. Intervals are 95% and treat the prompts of a group as dependent.

    choice: the choice.
    advantage: expected return of its replies minus that of the plain policy's replies to the same prompts, in reward
      units, by `HeldOutQ`; the interval includes the error of its fit. None if the logged returns do not differ.
    realised: its realised advantage at the states of the logs, in reward units per log (realised.py); None where that
      is not defined. The rule of choice reads it.
    kl_logged: exact KL(choice ‖ π) per token at the states of the logs, in nats, with π, the plain policy, at the
      temperature of the run and without filters; the filters alone give that of β 0. None with a requested return.
    changed: share of these states at which the most probable token differs; None with a requested return.
    kl_token: KL(choice ‖ π) per token on its own replies, in nats, from the sampled tokens. None if it is unknown (a
      requested return with stop texts).
    kl_reply: the same per reply.
    log_prob: log-probability per token of its replies under the plain policy, in nats; None as for kl_token.
    unlikely: share of replies that are less likely than the 1 % quantile of the plain policy's own; 0 if unknown.
    repeated: share of replies in which a sequence of four tokens occurs four times.
    unfinished: share of replies that reach max_new_tokens.
    empty: share of replies without text.
    broken: share of replies with at least one of these four faults.
    distinct_1, distinct_2: share of different tokens, and pairs of tokens, among all of its replies.
    tokens: length of a reply in tokens.
    texts: its replies, in the order of the prompts.
    """

    choice: Choice
    advantage: Estimate | None
    realised: Estimate | None
    kl_logged: float | None
    changed: float | None
    kl_token: Estimate | None
    kl_reply: Estimate | None
    log_prob: Estimate | None
    unlikely: float
    repeated: float
    unfinished: float
    empty: float
    broken: float
    distinct_1: float
    distinct_2: float
    tokens: Estimate
    texts: tuple[str, ...]


@dataclass(frozen=True)
class ChoiceTable:
    """The rows of all choices, and what they were measured on.

    rows: one row per choice; the first is the plain policy's.
    prompts: the contexts that all choices replied to.
    held_out: how well the regression orders logged replies that it was not fitted on by their returns; None if the
      returns do not differ.
    fitted: number of logged replies that it was fitted on.
    """

    rows: list[ChoiceRow]
    prompts: list[tuple[Turn, ...]]
    held_out: RankAgreement | None
    fitted: int


@dataclass(frozen=True)
class _LoggedReply:
    """A logged reply.

    context: the turns before it.
    tokens: its token ids, the closing one included.
    outcome: the return from it on, in reward units; NaN if the log was cut.
    group: the group of its log.
    """

    context: tuple[Turn, ...]
    tokens: list[int]
    outcome: float
    group: Hashable


@dataclass(frozen=True)
class _Replies:
    """The replies of a choice to P prompts.

    tokens: the token ids of each.
    log_prob: log-probability of each under the choice, in nats.
    plain: the same under the plain policy; None = unknown.
    features: (P, F).
    """

    choice: Choice
    replies: list[Reply]
    tokens: list[list[int]]
    log_prob: np.ndarray
    plain: np.ndarray | None
    features: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(reply.log_prob) for reply in self.replies])


def measure_choices(
    policy: LanguagePolicy,
    trajectories: Sequence[Trajectory],
    choices: Sequence[Choice],
    prompts: int = PROMPTS,
    steps: LoggedTokens | None = None,
    progress: Progress | None = None,
) -> ChoiceTable:
    """Let every choice reply to contexts of held-out logs, and measure the replies.

    Args:
      policy: the policy; other decoding settings than the choices are its own. It reads its own few-shot
        demonstrations, if it was loaded with any.
      trajectories: the held-out logs.
      choices: the choices; the plain policy is added first if it is missing.
      prompts: largest number of prompts; of more contexts, so many are drawn, always the same.
      steps: measurements at the logged tokens, made with the βs of the choices; None = measured here.
      progress: called with (replies drawn, replies of all choices); None = not called.
    Raises: InputError as `measure_logs` and `LanguagePolicy.with_decoding` do.
    """
    choices = list(dict.fromkeys([PLAIN, *choices]))
    if steps is None:
        steps = measure_logs(policy, trajectories, list(dict.fromkeys(one.beta for one in choices)))
    logged = _logged_replies(policy, trajectories, steps)
    asked = _drawn(list({repr((one.group, one.context)): one for one in logged}.values()), prompts)
    measured, drawn = _Measured(policy, asked), []
    for number, choice in enumerate(choices, start=1):
        drawn.append(measured.replies(choice))
        if progress is not None:
            progress(number * len(asked), len(choices) * len(asked))
    fitted = _drawn([one for one in logged if np.isfinite(one.outcome)], MOST_FITTED)
    held_out = None
    if len({one.outcome for one in fitted}) > 1:
        outcomes = np.array([one.outcome for one in fitted])
        held_out = HeldOutQ.fit(measured.logged_features(fitted), outcomes, [one.group for one in fitted])
    shifts = {entry["beta"]: entry for entry in guidance_by_beta(steps, steps.betas)}
    groups = [one.group for one in asked]
    rows = [
        _row(one, drawn[0], groups, held_out, shifts, _realised(policy, trajectories, one.choice, steps))
        for one in drawn
    ]
    agreement = held_out and rank_agreement(held_out.predicted, held_out.returns, held_out.groups)
    return ChoiceTable(rows, [one.context for one in asked], agreement, len(fitted) if held_out else 0)


class _Measured:
    """The prompts that all choices reply to, with the caches of their contexts.

    Args:
      policy: the policy.
      asked: the logged replies whose contexts are the prompts.
    """

    def __init__(self, policy: LanguagePolicy, asked: Sequence[_LoggedReply]):
        self.policy, self.asked = policy, asked
        self.memory = CacheMemory(CACHE_BYTES)

    def replies(self, choice: Choice) -> _Replies:
        """Let a choice reply to all prompts, with the seeds 0, 1, ..."""
        contexts, rows = [one.context for one in self.asked], range(len(self.asked))
        session = self.policy.with_decoding(beta=choice.beta, ask=choice.ask).start(rows)
        session.memory = self.memory  # the contexts are the same for every choice
        replies = session.reply(rows, contexts)
        # A stop text ends a reply without ids; those of its text are counted instead.
        renderer = self.policy.renderer
        tokens = [list(one.token_ids or (*renderer.encode_content(one.text), renderer.close_id)) for one in replies]
        log_prob = np.array([sum(one.log_prob) for one in replies])
        plain: np.ndarray | None = np.array([sum(one.policy_log_prob) for one in replies])
        if choice.ask is not None:  # `policy_log_prob` is then that with the requested return
            known = all(one.token_ids is not None for one in replies)
            plain = self._plain_log_prob(replies) if known else None
        return _Replies(
            choice, replies, tokens, log_prob, plain, _features(self.policy, contexts, tokens, self.memory)
        )

    def logged_features(self, logged: Sequence[_LoggedReply]) -> np.ndarray:
        """Return the features of logged replies, (n, F); of those to the prompts, the contexts are not read again."""
        own, asked = {}, set(map(id, self.asked))
        others = [one for one in logged if id(one) not in asked]
        for part, memory in ((self.asked, self.memory), (others, None)):
            if part:
                rows = _features(self.policy, [one.context for one in part], [one.tokens for one in part], memory)
                own |= {id(one): row for one, row in zip(part, rows, strict=True)}
        return np.stack([own[id(one)] for one in logged])

    def _plain_log_prob(self, replies: Sequence[Reply]) -> np.ndarray:
        """Return the log-probability of each reply, (P,), under the plain policy, which requests no return."""
        form = self.policy.decoding
        plain = self.policy.with_decoding(
            **{"beta": 0.0, "ask": None, "condition_scale": 0.0, "temperature": form.temperature or 1.0},
            **{"support": 0.0, "top_k": None, "top_p": None, "min_p": None},
        )
        labels = {"tokenizer": self.policy.renderer.fingerprint}
        logs = [
            Trajectory(
                (*as_context(one.context), Turn("assistant", reply.text, token_ids=reply.token_ids)),
                terminated=reply.closed,
                labels=labels,
            )
            for one, reply in zip(self.asked, replies, strict=True)
        ]
        steps = measure_logs(plain, logs)
        return np.bincount(steps.trajectory, steps.acting_log_prob, minlength=len(logs))


def _row(
    one: _Replies,
    plain: _Replies,
    groups: Sequence[Hashable],
    held_out: HeldOutQ | None,
    shifts: dict[float, dict[str, float]],
    realised: Estimate | None,
) -> ChoiceRow:
    """Return the row of a choice.

    Args:
      one: its replies.
      plain: the plain policy's replies to the same prompts.
      groups: the group of each prompt.
      held_out: the regression of returns; None = there is none.
      shifts: β -> its entry of `guidance_by_beta`.
      realised: its realised advantage.
    """
    limit = least_likely(plain.plain / plain.lengths)
    likely = np.full(len(groups), limit) if one.plain is None else one.plain / one.lengths
    faults = [
        is_broken(reply, tokens, number, limit)
        for reply, tokens, number in zip(one.replies, one.tokens, likely, strict=True)
    ]
    kl_token = kl_reply = log_prob = None
    if one.plain is not None:
        lengths = one.lengths.tolist()
        kl_token, log_prob = (
            Cells.summed((0, *row) for row in zip(groups, sums.tolist(), lengths, strict=True)).estimate()
            for sums in (one.log_prob - one.plain, one.plain)
        )
        kl_reply = mean_interval((one.log_prob - one.plain).tolist(), groups)
    shift = {} if one.choice.ask is not None else shifts.get(one.choice.beta, {})
    return ChoiceRow(
        choice=one.choice,
        advantage=held_out and held_out.difference(one.features, plain.features, groups),
        realised=realised,
        kl_logged=shift.get("kl"),
        changed=shift.get("changed"),
        kl_token=kl_token,
        kl_reply=kl_reply,
        log_prob=log_prob,
        unlikely=float(np.mean(likely < limit)),
        repeated=float(np.mean([repeats(tokens) for tokens in one.tokens])),
        unfinished=float(np.mean([not reply.closed for reply in one.replies])),
        empty=float(np.mean([not reply.text.strip() for reply in one.replies])),
        broken=float(np.mean(faults)),
        distinct_1=distinct(one.tokens, 1),
        distinct_2=distinct(one.tokens, 2),
        tokens=mean_interval(one.lengths.tolist(), groups),
        texts=tuple(reply.text for reply in one.replies),
    )


def _realised(
    policy: LanguagePolicy, trajectories: Sequence[Trajectory], choice: Choice, steps: LoggedTokens
) -> Estimate | None:
    """Return the realised advantage of a choice; None if it is not defined, as for β together with a request."""
    if choice.is_plain:
        log_prob = steps.unguided_log_prob
    elif choice.ask is None:
        log_prob = steps.guided_log_prob[steps.betas.index(choice.beta)]
    elif choice.beta == 0:
        log_prob = ask_log_prob(policy, trajectories, choice.ask, steps)
    else:
        log_prob = None
    return None if log_prob is None else realised_advantage(steps, log_prob, trajectories)


def _logged_replies(
    policy: LanguagePolicy, trajectories: Sequence[Trajectory], steps: LoggedTokens
) -> list[_LoggedReply]:
    """Return the agent turns of the logs that fit into the policy's window, in the order of the logs.

    Replies are cut to max_new_tokens tokens, as generated ones are.
    """
    own = [with_own_token_ids(trajectory, policy.renderer.fingerprint) for trajectory in trajectories]
    turns = np.stack([steps.trajectory, steps.turn])
    starts = np.flatnonzero(np.diff(turns, prepend=-1).any(0))
    found = []
    for start, stop in zip(starts, [*starts[1:], len(steps.token)], strict=True):
        index, turn = turns[:, start].tolist()
        context, tokens = own[index].turns[:turn], steps.token[start:stop].tolist()
        tokens = tokens[: policy.decoding.max_new_tokens]
        group = trajectories[index].group or index
        found.append(_LoggedReply(context, tokens, float(steps.return_to_go[stop - 1]), group))
    return found


def _drawn(replies: list[_LoggedReply], most: int) -> list[_LoggedReply]:
    """Return at most so many of these, drawn at random but always the same, in their order."""
    return [replies[i] for i in sorted(Random(0).sample(range(len(replies)), min(most, len(replies))))]


def _features(
    policy: LanguagePolicy,
    contexts: Sequence[Sequence[Turn]],
    tokens: Sequence[list[int]],
    memory: CacheMemory | None = None,
) -> np.ndarray:
    """Return the features of P replies for `HeldOutQ`, (P, 2d), float64.

    Args:
      policy: the policy.
      contexts: the turns before each reply.
      tokens: the token ids of each reply, at least one.
      memory: the caches of the contexts; None = none.
    """
    table = policy.model.get_input_embeddings().weight.detach()
    reserve = policy.decoding.max_new_tokens
    windows = [[*policy.null_window(context, reserve), *own] for context, own in zip(contexts, tokens, strict=True)]
    # Under these keys the sampler keeps the caches of contexts without a requested return.
    keys = [~row if policy.return_tokens is not None else row for row in range(len(windows))]
    hidden = policy.sampler.apply_head(lambda states, _: states.float(), windows, memory, keys)
    embedded = [table[torch.tensor(own, device=table.device)].float().mean(0).tolist() for own in tokens]
    return np.concatenate([np.array(embedded), np.array(hidden)], axis=1)


def _short(ask: Any) -> str:
    return f"{ask:g}" if isinstance(ask, float | int) else ask
