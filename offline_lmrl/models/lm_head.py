"""Logits at some states, and log π of actions from the inputs of a model's LM head, without logits of all tokens.

A model's forward calls its LM head, and may then scale or bend the result. What it does is measured once, on made-up
outputs of the head; where it is a scale and a soft cap, `action_log_prob` (ops/vocabulary.py) does the same in chunks.
Other heads (adapted, quantised) and other models compute logits at the states that are asked for, as they do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from offline_lmrl.ops.vocabulary import OutputHead, Post, action_log_prob

SMALL, LARGE = 1e-4, 1e4  # made-up outputs of the LM head: a soft cap changes only large ones


def scores_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of products with a weight: autocast's, else its own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def log_probs_at(
    model: PreTrainedModel, places: list[tuple[Tensor, Tensor, Tensor]], alike: bool, **inputs: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Compute log π of actions at some states, and the hidden states of all positions.

    Args:
      model: a guided model, not wrapped.
      places: groups of states: the batch row and the position of each, and its action, (n,) long each.
      alike: True if the loss is expected to weigh all states of a group alike.
      inputs: keyword arguments of the forward for the whole batch, such as `input_ids` and `attention_mask`.
    Returns: log π, (n,) fp32 in nats, of each group; the last hidden states (B,T,d); the LM head's weight (V,d),
      without gradient and in the dtype in which scores are computed.
    """
    head, counts = model.get_output_embeddings(), [len(action) for _, _, action in places]
    row, state, action = (torch.cat(columns) for columns in zip(*places, strict=True))
    post, table = post_of(model), head.weight.detach().to(scores_dtype(head.weight))
    with _reading(head, row, state, empty=post is not None) as read:
        outputs, hidden = model.forward_with_hidden(use_cache=False, **inputs)
    if post is None:
        log_prob = -F.cross_entropy(outputs.logits[0].float(), action, reduction="none")
        return list(log_prob.split(counts)), hidden, table
    form = OutputHead(head.weight, head.bias, post, table)
    groups = zip(read[0].split(counts), action.split(counts), strict=True)
    found = [action_log_prob(features, chosen, form, alike=alike) for features, chosen in groups]
    return found, hidden, table


def packed_logits(model: PreTrainedModel, row: Tensor, state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute logits at N states only, which saves memory, and the hidden states of all positions.

    Args:
      model: a guided model, or a PeftModel around one.
      row: (N,) long, the batch row of each state.
      state: (N,) long, the position of each state in its row: tokens 0..state have been read.
      inputs: keyword arguments of the forward for the whole batch, such as `input_ids` and `attention_mask`.
    Returns: logits (N,V) of the token after each state, and the last hidden states (B,T,d).
    """
    with _reading(model.get_output_embeddings(), row, state, empty=False):
        outputs, hidden = model.forward_with_hidden(use_cache=False, **inputs)
    return outputs.logits[0], hidden


def head_inputs(model: PreTrainedModel, row: Tensor, state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the LM head reads at N states, (N,d), and the hidden states of all positions, without any logits.

    Arguments are those of `packed_logits`.
    """
    with _reading(model.get_output_embeddings(), row, state, empty=True) as read:
        _, hidden = model.forward_with_hidden(use_cache=False, **inputs)
    return read[0], hidden


def logits_of(model: PreTrainedModel, features: Tensor) -> Tensor:
    """Compute the logits (N,V) of what the LM head reads at N states, (N,d); it does what the model does after it."""
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda *_: features.unsqueeze(0))
    try:  # one token takes the model to its LM head
        ids = torch.zeros(1, 1, dtype=torch.long, device=features.device)
        outputs, _ = model.forward_with_hidden(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        handle.remove()
    return outputs.logits[0]


def post_of(model: PreTrainedModel) -> Post | None:
    """Return what a guided model does after its LM head; None if chunks cannot do the same. It is measured once."""
    if type(model.get_output_embeddings()) is not nn.Linear:  # an adapter may have come since
        return None
    if "_post" not in vars(model):
        vars(model)["_post"] = _measured_post(model)
    return vars(model)["_post"]


@contextmanager
def _reading(head: nn.Module, row: Tensor, state: Tensor, empty: bool) -> Iterator[list[Tensor]]:
    """A context manager in which the LM head reads N states in place of all positions, as (1,N,d).

    Args:
      head: the LM head.
      row, state: (N,) long.
      empty: True: the head reads no state at all, as nobody wants its output.
    Yields: a list, which then holds what the head would have read, (N,d).
    """
    read: list[Tensor] = []

    def replace(_, args: tuple[Tensor, ...]) -> Tensor:
        read.append(args[0][row, state])
        return args[0][:1, :0] if empty else read[0].unsqueeze(0)

    handle = head.register_forward_pre_hook(replace)
    try:
        yield read
    finally:
        handle.remove()


@torch.no_grad()
def _measured_post(model: PreTrainedModel) -> Post | None:
    head = model.get_output_embeddings()
    count = head.weight.shape[0]
    step = torch.linspace(-1, 1, count, device=head.weight.device)
    made_up = torch.stack([SMALL * step, 10 * step, LARGE * step])  # (3,V), fp32 also for a model in half precision

    handle = head.register_forward_hook(lambda *_: made_up.unsqueeze(0))
    try:
        ids = torch.arange(1, 4, device=step.device).unsqueeze(0)
        with torch.random.fork_rng([step.device] if step.is_cuda else []):  # a resumed run measures it once more
            outputs, _ = model.forward_with_hidden(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        handle.remove()
    if outputs.logits.shape != (1, 3, count):
        return None
    x, y = made_up.double(), outputs.logits[0].double()
    scale, largest = ((y[0] @ x[0]) / (x[0] @ x[0])).item(), y[2].max().item()
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    cap = None if abs(largest / (scale * LARGE) - 1) < 1e-3 else largest
    expected = scale * x if cap is None else cap * torch.tanh(scale * x / cap)
    tolerance = 1e-4 * expected.abs().amax(-1, keepdim=True)
    return Post(scale, cap) if ((y - expected).abs() <= tolerance).all() else None
