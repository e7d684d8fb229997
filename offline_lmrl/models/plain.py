"""A guided model as a plain checkpoint: values folded into the LM head, returns as rows of the model's own embedding.

V and all that depends on the state alone cancel in the softmax, and heads that are linear in the hidden state h are a
matrix over the vocabulary, Q(s,a) = W_Q[a] · h + …, so that log π + β · Q are the logits of W + β/s · W_Q where the
base's logits are s times what its LM head says. A soft cap behind the LM head is no such scale, and there the fold is
near the guided distribution instead of equal to it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offline_lmrl.data.errors import InputError
from offline_lmrl.models.guided import detach
from offline_lmrl.models.value_heads import QHead
from offline_lmrl.ops.decoding import reduce_q

SMALL, LARGE = 0.01, 100.0  # outputs of the LM head at which logits are compared: a soft cap bends the large ones


def q_matrix(head: QHead, matrix: Tensor, q_reduce: str) -> Tensor:
    """W_Q (V,d) fp32 with reduce(Q)(s,a) = W_Q[a] · h + a term of the state alone.

    Args:
      head: tied or linear. matrix: the LM head's (V,d), which the head reads. q_reduce: mean or first.
    """
    unit = torch.eye(matrix.shape[1], device=matrix.device)
    with torch.no_grad():
        return reduce_q(torch.einsum("hnk,hvk->hvn", head.features(unit), head.rows(matrix)), q_reduce)


@torch.no_grad()
def logit_scale(model: PreTrainedModel) -> tuple[float, bool]:
    """s with logits = s · (output of the LM head) + a constant for small outputs, and whether it holds for large ones.

    The LM head's output is replaced by made-up numbers, so that the answer does not depend on weights or text.
    """
    head = model.get_output_embeddings()
    step = torch.linspace(-SMALL, SMALL, head.weight.shape[0], device=head.weight.device)
    outputs = torch.stack([torch.zeros_like(step), step, LARGE / SMALL * step]).unsqueeze(0)  # (1,3,V)
    handle = head.register_forward_hook(lambda *_: outputs)
    try:
        ids = torch.ones(1, 3, dtype=torch.long, device=step.device)
        logits = model(input_ids=ids, attention_mask=ids, use_cache=False).logits[0].float()
    finally:
        handle.remove()
    small, large = logits[1] - logits[0], logits[2] - logits[0]
    scale = (small @ step / (step @ step)).item()
    return scale, torch.allclose(large, LARGE / SMALL * scale * step, rtol=0, atol=1e-3 * LARGE * abs(scale))


@torch.no_grad()
def fold(model: PreTrainedModel, rows: Tensor) -> None:
    """Adds rows (V,d) to the LM head's matrix, which is its own from now on where it was the embedding's."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight + rows.to(head.weight.dtype))
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


@torch.no_grad()
def spell_returns(model: PreTrainedModel, returns: Tensor, ids: Sequence[int]) -> None:
    """Gives token ids the rows (n,d) of a table of returns, and keeps `generate` from emitting them.

    An LM head of its own gets their mean row, whose logit is never the largest: engines differ in what they suppress.
    Raises: InputError where the embedding does more than scale its rows.
    """
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    known = torch.arange(min(ids), device=embedding.weight.device)
    read, stored = embedding(known).float(), embedding.weight[known].float()
    # Rows of the table are what the embedding returns, and some families scale in there.
    scale = (read * stored).sum() / stored.square().sum()
    if not torch.allclose(read, scale * stored, rtol=1e-4, atol=1e-6):
        raise InputError(
            f"run: found {type(embedding).__name__}, which does more than look rows up and scale them, expected an "
            "embedding that does not"
        )
    embedding.weight[list(ids)] = (returns / scale).to(embedding.weight.dtype)
    if head.weight.data_ptr() != embedding.weight.data_ptr():
        for table in (head.weight, head.bias):
            if table is not None:
                table[list(ids)] = table[: len(known)].mean(0)
    model.generation_config.suppress_tokens = [*(model.generation_config.suppress_tokens or ()), *ids]


def plain(model: nn.Module) -> PreTrainedModel:
    """The model without its parts and settings, an adapter merged into it; in place."""
    model = detach(model.merge_and_unload() if hasattr(model, "peft_config") else model)
    del model.config.offline_lmrl
    return model
