"""A guided model as a plain checkpoint: Q is added to the LM head, returns become rows of the model's own embedding.

Terms that depend on the state alone, such as V, cancel in the softmax. Heads that are linear in the hidden state h are
a matrix over the vocabulary, Q(s,a) = W_Q[a] · h + (a term of the state). If the base's logits are s · W h, then
log π + β · Q are, up to such a term, the logits of an LM head with the matrix W + β/s · W_Q. The number s is measured
on the model, because families of models scale in many places. If logits are no such multiple (there is a transform
before the LM head or a soft cap after it), Q cannot be added in this way.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from offline_lmrl.decoding.distribution import reduce_q
from offline_lmrl.errors import InputError
from offline_lmrl.models.adapters import has_adapter
from offline_lmrl.models.guided import remove_heads
from offline_lmrl.models.lm_head import post_of
from offline_lmrl.models.value_heads import QHead


def q_matrix(head: QHead, matrix: Tensor, q_reduce: str) -> Tensor:
    """Return W_Q (V,d), fp32, for which reduce(Q)(s,a) = W_Q[a] · h + a term of the state alone.

    Args:
      head: H Q heads of the kind "tied" or "linear" (models/value_heads.py).
      matrix: the weight of the LM head, (V,d).
      q_reduce: how the H heads become one Q, "mean" or "first".
    """
    # The head is linear, so its features of the unit vectors are the columns of its map.
    unit = torch.eye(matrix.shape[1], device=matrix.device)
    with torch.no_grad():
        return reduce_q(torch.einsum("hnk,hvk->hvn", head.features(unit), head.rows(matrix)), q_reduce)


@torch.no_grad()
def head_scale(model: PreTrainedModel) -> float:
    """Measure s in logits = s · W h + a constant, where h are the decoder's last hidden states of a guided model.

    Raises: InputError if the LM head's output is no multiple of W h, or the logits none of its output.
    """
    head, from_head = model.get_output_embeddings(), []
    handle = head.register_forward_hook(lambda module, args, output: from_head.append(output))
    try:
        ids = torch.arange(1, 4, device=head.weight.device).unsqueeze(0)
        hidden = model.forward_with_hidden(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[1]
    finally:
        handle.remove()
    before = _multiple(from_head[0] - from_head[0][:, :1], F.linear(hidden - hidden[:, :1], head.weight))
    after = post_of(model)
    if before is None or after is None or after.cap is not None:
        found = "a transform before its LM head" if before is None else "a soft cap or similar after its LM head"
        raise InputError(
            f"run: found {model.config.model_type} with {found}, expected logits that are a multiple of the LM head "
            "times the hidden states, as Q is added to the LM head's weights; give --beta 0 to export the policy "
            "without Q, or play the run itself (evaluate, generate)"
        )
    return before * after.scale


def _multiple(x: Tensor, y: Tensor) -> float | None:
    """Return the number c for which x = c · y; None if there is none, if a value is nan, or if shapes differ."""
    if x.shape != y.shape:
        return None
    x, y = x.flatten().double(), y.flatten().double()
    scale = x @ y / (y @ y)
    return scale.item() if (x - scale * y).abs().max() < 1e-4 * (scale * y).abs().max() else None


@torch.no_grad()
def add_to_lm_head(model: PreTrainedModel, rows: Tensor) -> None:
    """Add `rows` (V,d) to the weight of the LM head, in place; all tied weights of the model are untied."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight + rows.to(head.weight.dtype))
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    # The flag also unties other shared weights, such as the layers of Zamba, so give each place a copy of its own.
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in seen:
                setattr(module, name, nn.Parameter(parameter.clone()))
            seen.add(parameter)


@torch.no_grad()
def spell_returns(model: PreTrainedModel, returns: Tensor, ids: Sequence[int]) -> None:
    """Store a return embedding in the model's own embedding, and keep `generate` from emitting its ids.

    An untied LM head gets the mean row of the ordinary tokens for these ids. Their logits are then never the largest,
    also in engines that ignore `suppress_tokens`.

    Args:
      model: changed in place; its embedding is enlarged if necessary.
      returns: rows of the return embedding, (n, width).
      ids: the n token ids under which to store the rows, in this order; all ids below the least of them are ordinary
        tokens.
    Raises: InputError if the model's embedding does more than look up rows and scale them.
    """
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    known = torch.arange(min(ids), device=embedding.weight.device)
    read, stored = embedding(known).float(), embedding.weight[known].float()
    # `returns` are outputs of the embedding module, which scales stored rows in some families.
    scale = (read * stored).sum() / stored.square().sum()
    if not torch.allclose(read, scale * stored, rtol=1e-4, atol=1e-6):
        raise InputError(
            f"run: found {type(embedding).__name__}, which does more than look up rows and scale them, expected an "
            "embedding that does only this"
        )
    embedding.weight[list(ids)] = (returns / scale).to(embedding.weight.dtype)
    if head.weight.data_ptr() != embedding.weight.data_ptr():
        for table in (head.weight, head.bias):
            if table is not None:
                table[list(ids)] = table[: len(known)].mean(0)
    model.generation_config.suppress_tokens = [*(model.generation_config.suppress_tokens or ()), *ids]


def plain(model: nn.Module) -> PreTrainedModel:
    """Turn a guided model into a plain causal LM, in place.

    Merge the adapter, if any, and remove the heads, the embedding of returns and the run metadata in the config.

    Returns: the model; for a PeftModel, the model inside it.
    """
    model = remove_heads(merged(model))
    del model.config.offline_lmrl
    return model


def merged(model: nn.Module) -> PreTrainedModel:
    """Merge the adapter, if any, of a guided model into its weights, in place; heads stay as they are.

    Returns: the model; for a PeftModel, the model inside it.
    """
    if not has_adapter(model):
        return model
    _untie(model)
    return model.merge_and_unload()


def _untie(model: nn.Module) -> None:
    """Untie the LM head of a PeftModel from the embedding if either has an adapter.

    An adapter that is merged into a shared matrix would act on both.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, BaseTunerLayer) or isinstance(embedding, BaseTunerLayer):
        bare = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        bare.weight = nn.Parameter(bare.weight.detach().clone(), bare.weight.requires_grad)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
