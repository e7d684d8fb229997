"""What a guided model computes at logged steps: Q, V, log π and what else losses and readers need.

A step is one token that the agent chose, its action, at a state (row, position) before it (tokens/batching.py).
Notation: B rows of T tokens, vocabulary size V, width d of the hidden states, H Q heads; N is the number of steps in a
batch, M that of the steps that close a turn, E that of the environment's tokens.

There are two ways to these numbers. Training asks for them by a `StepRequest`, the argument `request` of the guided
model's forward, which then returns the result of `packed_outputs`: everything that has parameters so runs inside the
forward of the model that DDP or FSDP wraps. All else calls `compute_step_outputs` for a whole data set.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel

from offline_lmrl.decoding.distribution import Form, ModelOutputs, next_token
from offline_lmrl.logs.terminal import tracked
from offline_lmrl.models.lm_head import log_probs_at, packed_logits, scores_dtype
from offline_lmrl.models.return_heads import outcomes
from offline_lmrl.models.value_heads import ValueHeads
from offline_lmrl.tokens.batching import ActionSteps, TokenBatch, WindowDataset, places_of, token_batches

TOKEN_BUDGET = 4096  # largest number of tokens of a batch, padding included
CHUNK = 2**24  # largest number of entries in a (states, vocabulary) tensor; limits memory


@dataclass(frozen=True)
class StepRequest:
    """What the forward of a guided model computes for a batch of logged steps.

    The result is a dict of tensors (those marked * have no gradient). "log_prob" is log π of the action in nats; Q, of
    the action, and V are in scaled reward units; "next" is the step's next state, "end" the end of a cut log. Which
    keys there are depends on the parts of the model, and "environment" on the field:

        always             "log_prob" (N,)
        value heads        "q" (H,N), "v" (N,), "target_q"* (N,) the minimum over heads, "next_v"* (N,), with `ends`
                           "end_v"* (N,), and with `conservative` "counted"* (C,) and "logsumexp_q" (H,C)
        utterance heads    "utterance_q" (H,M), "utterance_v" (M,), "utterance_target_q"* (M,),
                           "utterance_next_v"* (M,), for the M steps that close a turn
        return heads       "outcome_log_prob" (M,) and "outcome_mask" (M,); the latter is False for turns in rows
                           with a requested return, which would reveal the outcome, and for unknown outcomes
        environment        "environment_log_prob" (E,)

    steps: packed action steps (`ActionSteps` in tokens/batching.py), (N,) each.
    windows: number of leading rows that have steps; of the rows after them only V is computed, without gradient.
      None = all rows have steps.
    environment: "row" and "state", (E,) long: the state before each token of the environment's replies; None = no such
      outputs.
    value_grad_scale: factor on the gradient that Q and V pass on to the trunk, 0 to 1.
    conservative: share of the steps with a target at which "logsumexp_q", log Σ_a exp Q(s,a), is computed; "counted"
      are their places among the steps. They are drawn at random in training mode, and are all such steps in eval mode.
    ends: True: compute "end_v".
    alike: True if the loss weighs all steps alike, which saves time (ops/vocabulary.py).
    condition_dropout: share of rows whose requested returns become null in training mode, drawn anew in each call.
    """

    steps: ActionSteps
    windows: int | None = None
    environment: Mapping[str, Tensor] | None = None
    value_grad_scale: float = 1.0
    conservative: float = 0.0
    ends: bool = True
    alike: bool = True
    condition_dropout: float = 0.0

    @classmethod
    def of(cls, batch: TokenBatch, **options: Any) -> "StepRequest":
        """Return the request for all steps of a batch; `options` are the other fields."""
        return cls(batch["steps"], batch["windows"], batch.get("environment"), **options)


def packed_outputs(model: PreTrainedModel, request: StepRequest, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the per-step outputs that `StepRequest` describes.

    The LM head runs at the N states of the steps and the E states of `environment` only.

    Args:
      model: a guided model, not wrapped.
      request: what to compute.
      inputs: keyword arguments of the base class's forward, with `input_ids` and `attention_mask`, (B,T) each; or only
        `hidden`, hidden states (B,T,d) that are known, from which Q and V alone are computed.
    """
    steps, environment, extra = request.steps, request.environment, None
    if "hidden" in inputs:
        return _values(model, inputs["hidden"], inputs["hidden"], None, request)
    places = [(steps["row"], steps["state"], steps["action"])]
    if model.training and request.condition_dropout > 0:
        inputs = {**inputs, "input_ids": _without_conditions(model, inputs["input_ids"], request.condition_dropout)}
    if request.windows:
        extra = _extra_rows(model, inputs, request.windows)
        inputs = {name: value[: request.windows] for name, value in inputs.items()}
    if environment is not None:
        # The target of an environment state is the next token of its own row.
        row, state = environment["row"], environment["state"]
        places.append((row, state, inputs["input_ids"][row, state + 1]))
    found, hidden, table = log_probs_at(model, places, request.alike, **inputs)
    packed = dict(zip(("log_prob", "environment_log_prob"), found, strict=False))
    if model.return_heads is not None:
        packed |= _outcomes(model, inputs["input_ids"], hidden, steps)
    if model.value_heads is not None:
        read = hidden.detach() if extra is None else torch.cat([hidden.detach(), extra])
        packed |= _values(model, hidden, read, table, request)
    return packed


def _without_conditions(model: PreTrainedModel, input_ids: Tensor, share: float) -> Tensor:
    """Replace all ids of requested returns by null in a random share of the rows (B,T).

    The model is so trained under the null condition too.
    """
    null = model.get_input_embeddings().weight.shape[0]
    dropped = torch.rand(len(input_ids), 1, device=input_ids.device) < share
    # Bins have the ids above null, so that the clamp maps them to null and leaves all other ids as they are.
    return torch.where(dropped, input_ids.clamp(max=null), input_ids)


@torch.no_grad()
def _extra_rows(model: PreTrainedModel, inputs: Mapping[str, Tensor], windows: int) -> Tensor | None:
    """Return the hidden states of the rows of which only V is computed; None if there are none.

    All ranks of a sharded model must run the decoder equally often. With several ranks, a rank without such rows
    therefore runs it on the first row of the batch and discards the result. If the model has no value heads, no rank
    has such rows.

    Args:
      model: the guided model.
      inputs: `input_ids` and `attention_mask` of all rows, (B,T) each.
      windows: number of leading rows, which hold the trained tokens; the rows after them are read here.
    """
    extra = {name: value[windows:] for name, value in inputs.items()}
    wanted = len(extra["input_ids"]) > 0
    if not wanted:
        if model.value_heads is None or not _several_ranks():
            return None
        extra = {name: value[:1] for name, value in inputs.items()}
    hidden = model.hidden_states(**extra)
    return hidden if wanted else None


def _several_ranks() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _outcomes(
    model: PreTrainedModel, input_ids: Tensor, hidden: Tensor, steps: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Score the outcomes (reward, returns, end) of the M turns that close in the batch with the return heads.

    Args:
      model: the guided model.
      input_ids: (B,T).
      hidden: hidden states, (B,T,d).
      steps: the N packed action steps, (N,) each.
    Returns: "outcome_log_prob" (M,), nats, and "outcome_mask" (M,) bool, which is True for a turn with a known outcome
      in a row without a requested return.
    """
    turns = {name: column[steps["closes_turn"]] for name, column in steps.items()}
    row = turns["row"]
    # A state has not yet read its action: the closing token of a turn has been read at state + 1.
    log_prob = model.return_heads.log_prob(
        hidden[row, turns["open_state"]], hidden[row, turns["state"] + 1], outcomes(turns)
    )
    # Null is the first id after the vocabulary, and bins follow it: any id above null is a requested return.
    null = (input_ids <= model.get_input_embeddings().weight.shape[0]).all(1)[row] & turns["has_target"]
    return {"outcome_log_prob": log_prob, "outcome_mask": null}


def _values(
    model: PreTrainedModel, hidden: Tensor, read: Tensor, table: Tensor | None, request: StepRequest
) -> dict[str, Tensor]:
    """Compute Q, V and their targets at the N steps.

    Args:
      model: the guided model.
      hidden: hidden states of the rows with steps, (windows,T,d).
      read: hidden states of all rows, (B,T,d), without gradient, in which next states are looked up.
      table: the LM head's weight without gradient in the dtype of scores, (V,d); None = cast it if it is needed.
      request: what to compute.
    """
    steps, scale = request.steps, request.value_grad_scale
    heads, matrix = model.value_heads, model.get_output_embeddings().weight
    action = steps["action"].unsqueeze(1)
    states = _scale_gradient(hidden[steps["row"], steps["state"]], scale)  # (N,d)
    counted = _counted(request, model.training)
    if counted is not None and table is None:
        table = matrix.detach().to(scores_dtype(matrix))
    q, logsumexp = heads.q.logged(states, matrix, steps["action"], counted, table)
    packed = {"q": q, "v": heads.v(states)[0]}  # V has an axis of one head, (1,N)
    if counted is not None:
        packed |= {"counted": counted, "logsumexp_q": logsumexp}
    with torch.no_grad():
        packed["target_q"] = heads.target_q(states, matrix, action).squeeze(-1).amin(0)
        packed["next_v"] = _next_v(heads, packed["v"].detach(), read, steps)
        if request.ends:
            packed["end_v"] = heads.v(read[steps["end_row"], steps["end_state"]])[0]
    if heads.utterance:
        closing = {name: index[steps["closes_turn"]] for name, index in steps.items()}  # the M last actions
        packed |= _utterances(heads, hidden, read, closing, scale)
    return packed


def _next_v(heads: ValueHeads, v: Tensor, read: Tensor, steps: Mapping[str, Tensor]) -> Tensor:
    """Return V of the next states, (N,): mostly V of another step, (N,) `v`, else computed from `read`, (B,T,d)."""
    row, state, next_row, next_state = (steps[name] for name in ("row", "state", "next_row", "next_state"))
    step_at = torch.full(read.shape[:2], -1, device=row.device)
    step_at[row, state] = torch.arange(len(row), device=row.device)
    step = step_at[next_row, next_state]
    others = (step < 0).nonzero()[:, 0]
    return v[step.clamp(min=0)].index_copy(0, others, heads.v(read[next_row[others], next_state[others]])[0])


def _counted(request: StepRequest, training: bool) -> Tensor | None:
    """Return the places (C,) among the steps at which logsumexp Q is computed; None = nowhere.

    Steps without a target have no conservative loss. In evaluation all others count, in training a random share.
    """
    if request.conservative == 0:
        return None
    known = request.steps["has_target"].nonzero()[:, 0]
    if not training or request.conservative == 1 or len(known) == 0:
        return known
    drawn = max(1, round(request.conservative * len(known)))
    return known[torch.randperm(len(known), device=known.device)[:drawn]]


def _utterances(
    heads: ValueHeads, hidden: Tensor, read: Tensor, closing: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """Compute Q and V of whole turns: Q after the closing token of a turn, V before its first token.

    Args:
      heads: the value heads.
      hidden: hidden states of the rows with steps, (windows,T,d).
      read: hidden states of all rows, (B,T,d), without gradient.
      closing: the M steps that close a turn, (M,) each.
      scale: factor on the gradient that reaches the trunk, 0 to 1.
    """
    row = closing["row"]
    turns = _scale_gradient(hidden[row, closing["state"] + 1], scale)  # (M,d)
    opens = _scale_gradient(hidden[row, closing["open_state"]], scale)
    packed = {"utterance_q": heads.utterance_q(turns), "utterance_v": heads.utterance_v(opens)[0]}
    with torch.no_grad():
        packed["utterance_target_q"] = heads.utterance_target_q(turns).amin(0)
        packed["utterance_next_v"] = heads.utterance_v(read[closing["next_row"], closing["next_state"]])[0]
    return packed


def _scale_gradient(hidden: Tensor, scale: float) -> Tensor:
    """Return scale · h + (1 − scale) · h.detach(), which has the values of h and `scale` times its gradient."""
    # At 0 the graph is cut, so that no backward pass runs through the trunk for these terms.
    return hidden.detach() if scale == 0 else hidden.detach().lerp(hidden, scale)


@dataclass(frozen=True)
class States:
    """What a guided model has computed for n steps of a batch, from which functions compute what a caller wants.

    model: the guided model.
    input_ids: all rows of the batch, (B,T).
    hidden: hidden states of these rows, (B,T,d).
    steps: the n packed action steps (`ActionSteps`), (n,) each.
    logits: logits of the token after each state, (n,V), fp32; None if nobody wants what is computed from them.
    """

    model: PreTrainedModel
    input_ids: Tensor
    hidden: Tensor
    steps: Mapping[str, Tensor]
    logits: Tensor | None

    def at(self, place: str = "", offset: int = 0) -> Tensor:
        """Return the hidden states (n,d) at the steps' states; with `place` "next_" or "end_", at those states."""
        return self.hidden[self.steps[f"{place}row"], self.steps[f"{place}state"] + offset]

    @cached_property
    def _all_q(self) -> Tensor:
        return self.model.q_values(self.at())

    def q(self, ids: Tensor | None = None) -> Tensor:
        """Return Q of the target heads for token ids (n,K), (H,n,K), or for the whole vocabulary, (H,n,V)."""
        return self._all_q if ids is None else self.model.q_values(self.at(), ids)

    def q_of_action(self) -> Tensor:
        """Return Q of the target heads for the actions, (H,n)."""
        return self.q(self.steps["action"].unsqueeze(-1)).squeeze(-1)

    def of_action(self, table: Tensor) -> Tensor:
        """Return the entries (n,) of a table over all tokens, (n,V), for the actions."""
        return table.gather(-1, self.steps["action"].unsqueeze(-1)).squeeze(-1)

    def v(self) -> Tensor:
        return self.model.v_values(self.at())

    def distribution(self, form: Form, *, normalised: bool = True) -> Tensor:
        """Return the scores of all tokens, (n,V), which `next_token` (decoding/distribution.py) gives by a form."""
        scores = next_token(self.logits, form, ModelOutputs(q=self.q, v=self.v), normalised=normalised)
        return scores.over_vocabulary(self.logits.shape[-1])


# What each field of `StepOutputs` holds, as a function of the states.
WANTS: dict[str, Callable[[States], Tensor]] = {
    "log_prob": lambda states: -F.cross_entropy(states.logits, states.steps["action"], reduction="none"),
    "target_q": lambda states: states.q_of_action().amin(0),
    "v": lambda states: states.v(),
    "next_v": lambda states: states.model.v_values(states.at("next_")),
    "utterance_q": lambda states: states.model.value_heads.utterance_target_q(states.at(offset=1)).amin(0),
}
NEED_LOGITS = {"log_prob"}


@dataclass(frozen=True)
class StepOutputs:
    """What a guided model computed at the N steps of a data set, in their order: arrays (N,), None if not wanted.

    Q and V are in scaled reward units; Q is the minimum over the target heads.

    log_prob: log π of the action, in nats.
    target_q: Q of the action.
    v: V of the state.
    next_v: V of the next state, if the data set has `next_rows`.
    utterance_q: Q of a whole turn, for steps that close one.
    measured: what the caller's own function computed, by name, (N, ...).
    """

    log_prob: np.ndarray | None = None
    target_q: np.ndarray | None = None
    v: np.ndarray | None = None
    next_v: np.ndarray | None = None
    utterance_q: np.ndarray | None = None
    measured: Mapping[str, np.ndarray] = field(default_factory=dict)


@torch.inference_mode()
def compute_step_outputs(
    model: PreTrainedModel,
    dataset: WindowDataset,
    want: Sequence[str] = (),
    measure: Callable[[States], Mapping[str, Tensor]] | None = None,
    *,
    token_budget: int = TOKEN_BUDGET,
    share: tuple[int, int] = (0, 1),
) -> StepOutputs:
    """Run a model once over a data set and compute something at each of its N steps.

    The result for a step does not depend on the batches, but for rounding.

    Args:
      model: a guided model, or a PeftModel around one, which is left in eval mode.
      dataset: rows of tokens with steps (`WindowDataset`, `token_rows`).
      want: names of the fields of `StepOutputs` to compute.
      measure: function from the states of n steps to tensors by name, (n, ...); None = none.
      token_budget: largest number of tokens of a batch, padding included; a longer row is a batch of its own.
      share: (i, n): compute only every n-th batch, starting with batch i, and leave zeros in the fields elsewhere.
    Raises: ValueError for "next_v" if the data set has no rows for V of the next state (`next_rows`).
    """
    if "next_v" in want and not dataset.next_rows:
        raise ValueError("next_v needs a data set with next_rows: V of a next state in another window is read there")
    model.eval()
    with_logits = measure is not None or not NEED_LOGITS.isdisjoint(want)

    def compute(batch: TokenBatch) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for states in _states(model, batch, with_logits):
            found = {name: WANTS[name](states) for name in want} | dict(measure(states) if measure else {})
            for name, values in found.items():
                parts.setdefault(name, []).append(values)
        return {name: torch.cat(values) for name, values in parts.items()}

    batches = token_batches(dataset.lengths, token_budget)[share[0] :: share[1]]
    shown = tracked(batches, "computing log π, Q and V", len(batches))
    found = collect_outputs(dataset, compute, model.device, shown)
    fields = {name: found.pop(name, np.zeros(dataset.action_tokens, dtype=np.float32)) for name in want}
    return StepOutputs(**fields, measured=found)


def collect_outputs(
    dataset: WindowDataset,
    compute: Callable[[TokenBatch], Mapping[str, Tensor]],
    device: torch.device,
    batches: Iterable[np.ndarray],
) -> dict[str, np.ndarray]:
    """Call a function on batches of a data set and put what it returns in the order of the data set's N steps.

    Args:
      dataset: rows of tokens with steps.
      compute: function from a batch on `device` with n steps to tensors by name, (n, ...).
      device: the device of the batches.
      batches: indices of the rows of each batch, such as from `token_batches`; the steps of other rows get zeros.
    Returns: arrays by name, (N, ...), fp32 where `compute` returns floating-point numbers.
    """
    found: dict[str, np.ndarray] = {}
    for index in batches:
        outputs = compute(send_to_device(dataset.batch(index), device))
        places, _ = places_of(dataset.step_offsets, index)
        for name, values in outputs.items():
            values = (values.float() if values.is_floating_point() else values).cpu().numpy()
            if name not in found:
                found[name] = np.zeros((dataset.action_tokens, *values.shape[1:]), values.dtype)
            found[name][places] = values
    return found


def split_rows(batch: TokenBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return `input_ids` and `attention_mask` of a batch's windows, and those of the rows after them."""
    windows, inputs = batch["windows"], {name: batch[name] for name in ("input_ids", "attention_mask")}
    own, extra = ({name: x[part] for name, x in inputs.items()} for part in (slice(windows), slice(windows, None)))
    return own, extra


def _states(model: PreTrainedModel, batch: TokenBatch, with_logits: bool) -> Iterator[States]:
    """Run the model on a batch; yield the states of its steps in chunks that limit memory."""
    steps, logits, (own, extra) = batch["steps"], None, split_rows(batch)
    if with_logits:
        logits, hidden = packed_logits(model, steps["row"], steps["state"], **own)
    else:
        hidden = model.hidden_states(**own)
    if len(extra["input_ids"]):
        hidden = torch.cat([hidden, model.hidden_states(**extra)])
    vocabulary = model.get_output_embeddings().weight.shape[0]
    for chunk in torch.arange(len(steps["row"]), device=hidden.device).split(max(1, CHUNK // vocabulary)):
        part = {name: column[chunk] for name, column in steps.items()}
        yield States(model, batch["input_ids"], hidden, part, None if logits is None else logits[chunk].float())
