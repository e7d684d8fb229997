"""A guided model as a plain checkpoint: values folded into the LM head, returns as rows of the model's own embedding.

V and all that depends on the state alone cancel in the softmax, and heads that are linear in the hidden state h are a
matrix over the vocabulary, Q(s,a) = W_Q[a] · h + …, so that log π + β · Q are the logits of W + β/s · W_Q where the
base's logits are s · W h. The number s is measured on the model, as families scale in many places. Where the way from
h to the logits is no such scale (a transform before the LM head, a soft cap after it) Q does not fold.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
def head_scale(model: PreTrainedModel) -> float:
    """Measure s in logits = s · W h + a constant, h being the decoder's last hidden states, on a guided model.

    The LM head's output is compared with W h, and then replaced by made-up numbers, small and large, with which the
    logits are compared, as a soft cap does not show in small ones. Raises: InputError where either is no multiple.
    """
    head = model.get_output_embeddings()
    step = torch.linspace(-SMALL, SMALL, head.weight.shape[0], device=head.weight.device)
    made_up = torch.stack([torch.zeros_like(step), step, LARGE / SMALL * step]).unsqueeze(0)  # (1,3,V)
    said: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        said.append(output)
        return made_up

    handle = head.register_forward_hook(replace)
    try:
        ids = torch.arange(1, 4, device=step.device).unsqueeze(0)
        outputs, hidden = model.forward_with_hidden(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        )
    finally:
        handle.remove()
    before = _multiple(said[0] - said[0][:, :1], F.linear(hidden - hidden[:, :1], head.weight))
    after = _multiple(outputs.logits - outputs.logits[:, :1], made_up)
    if before is None or after is None:
        found = "a transform before its LM head" if before is None else "a soft cap or the like after its LM head"
        raise InputError(
            f"run: found {model.config.model_type} with {found}, through which Q does not fold, expected "
            "logits that are a multiple of the LM head times the hidden states; give --beta 0 for the "
            "policy without values, or play the run itself (evaluate, generate)"
        )
    return before * after


def _multiple(x: Tensor, y: Tensor) -> float | None:
    """The number c in x = c · y; None where there is none, as where one holds nan or they differ in shape."""
    if x.shape != y.shape:
        return None
    x, y = x.flatten().double(), y.flatten().double()
    scale = x @ y / (y @ y)
    return scale.item() if (x - scale * y).abs().max() < 1e-4 * (scale * y).abs().max() else None


@torch.no_grad()
def fold(model: PreTrainedModel, rows: Tensor) -> None:
    """Adds rows (V,d) to the LM head's matrix, which is its own from now on where it was the embedding's."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight + rows.to(head.weight.dtype))
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    # The flag unties whatever else a family shares, such as layers of Zamba: each place gets weights of its own.
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in seen:
                setattr(module, name, nn.Parameter(parameter.clone()))
            seen.add(parameter)


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
    if hasattr(model, "peft_config"):
        _untie(model)
        model = model.merge_and_unload()
    model = detach(model)
    del model.config.offline_lmrl
    return model


def _untie(model: nn.Module) -> None:
    """Gives a PeftModel's LM head a matrix of its own where the embedding's has an adapter on either side: merged into
    a shared matrix it would act on both."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if hasattr(head, "base_layer") or hasattr(embedding, "base_layer"):
        bare = getattr(head, "base_layer", head)
        bare.weight = nn.Parameter(bare.weight.detach().clone(), bare.weight.requires_grad)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
