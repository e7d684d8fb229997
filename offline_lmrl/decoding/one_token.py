"""The step of one token per row through the decoder of a family that is trained from scratch, in few Python calls.

In a model of two layers, the forward of transformers spends more time on masks, arguments and outputs, which it makes
anew for every token, than on arithmetic. The functions here call the parts of a decoder that hold weights (embeddings,
norms, linear layers) in the same order, so the hidden states are the same bit for bit, and an adapter or a hook in
such a part acts as it does there. The modules around these parts are not called. If anything was changed about one of
them, or if the family is another one, `one_token_step` returns None, and the model's own forward has to run.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2LMHeadModel, GPT2Model, LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
)

from offline_lmrl.models.guided import guided_class, keep_hidden

Step = Callable[[Tensor, Tensor | None, Tensor, DynamicCache], Tensor]


def llama_step(decoder: LlamaModel, x: Tensor, mask: Tensor | None, position: Tensor, cache: DynamicCache) -> Tensor:
    """Run a Llama decoder in eval mode on one token per row, which follows the cached ones.

    Args:
      decoder: the decoder.
      x: (B, 1, d) embeddings of the tokens.
      mask: (B, 1, 1, cached + 1) bool, True at real tokens; None = no padding anywhere.
      position: (B, 1) position ids.
      cache: the cache of the B rows, which is extended in place.
    Returns: the last hidden states, (B, 1, d).
    """
    cos, sin = decoder.rotary_emb.forward(x, position)
    cos, sin, half = cos.unsqueeze(1), sin.unsqueeze(1), cos.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # so that halves need only be swapped
    for layer, cached in zip(decoder.layers, cache.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        h = layer.input_layernorm.forward(x)
        heads = (x.shape[0], -1, 1, attention.head_dim)
        query = attention.q_proj.forward(h).view(heads)
        key = attention.k_proj.forward(h).view(heads)
        value = attention.v_proj.forward(h).view(heads)
        both = torch.cat([query, key], dim=1)
        both = both * cos + both.roll(half, -1) * sin
        query, key = both.split([query.shape[1], key.shape[1]], dim=1)
        x = x + attention.o_proj.forward(_attended(attention, query, *cached.update(key, value), mask))
        h = layer.post_attention_layernorm.forward(x)
        h = mlp.act_fn.forward(mlp.gate_proj.forward(h)) * mlp.up_proj.forward(h)
        x = x + mlp.down_proj.forward(h)
    return decoder.norm.forward(x)


def gpt2_step(decoder: GPT2Model, x: Tensor, mask: Tensor | None, position: Tensor, cache: DynamicCache) -> Tensor:
    """Run a GPT-2 decoder in eval mode on one token per row; arguments and result are those of `llama_step`."""
    x = x + decoder.wpe.forward(position)
    for layer, cached in zip(decoder.h, cache.layers, strict=True):
        attention, mlp = layer.attn, layer.mlp
        heads = (x.shape[0], -1, 1, attention.head_dim)
        parts = attention.c_attn.forward(layer.ln_1.forward(x)).split(attention.split_size, dim=-1)
        query, key, value = (part.view(heads) for part in parts)
        x = x + attention.c_proj.forward(_attended(attention, query, *cached.update(key, value), mask))
        x = x + mlp.c_proj.forward(mlp.act.forward(mlp.c_fc.forward(layer.ln_2.forward(x))))
    return decoder.ln_f.forward(x)


def _attended(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with queries (B, heads, 1, width); return (B, 1, heads · width)."""
    found, _ = sdpa_attention_forward(attention, query, key, value, mask, scaling=attention.scaling)
    return found.flatten(2)


class Family(NamedTuple):
    """What is known of a family.

    step: its one-token step.
    decoder: the class of its decoder.
    layers: the attribute of the decoder that holds the layers.
    layer: the class of a layer.
    parts: the modules of a layer that a step does not call as a whole, and their classes.
    """

    step: Callable[..., Tensor]
    decoder: type[nn.Module]
    layers: str
    layer: type[nn.Module]
    parts: Mapping[str, type[nn.Module]]


FAMILIES = {
    LlamaForCausalLM: Family(
        llama_step, LlamaModel, "layers", LlamaDecoderLayer, {"self_attn": LlamaAttention, "mlp": LlamaMLP}
    ),
    GPT2LMHeadModel: Family(gpt2_step, GPT2Model, "h", GPT2Block, {"attn": GPT2Attention, "mlp": GPT2MLP}),
}


def one_token_step(model: PreTrainedModel) -> Step | None:
    """Return the one-token step of a model's decoder, whose arguments after the decoder are those of `llama_step`.

    Args:
      model: a causal LM, guided or not.
    Returns: the step; None if the model is in a wrapper, such as a PeftModel, if its family is not in FAMILIES, if it
      attends by another function than PyTorch's, if any part of the decoder has a hook, or if one that the step does
      not run as a whole has another class or a forward of its own.
    """
    base = next((base for base in FAMILIES if type(model) in (base, guided_class(base))), None)
    if base is None or model.config._attn_implementation != "sdpa":
        return None
    family, decoder = FAMILIES[base], model.get_decoder()
    hooks = (
        hook
        for part in (model, *decoder.modules())
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
    )
    known = (
        all(hook is keep_hidden for hook in hooks)
        and _is_plain(model, type(model))
        and _is_plain(decoder, family.decoder)
    )
    for layer in getattr(decoder, family.layers) if known else ():
        if not _is_plain(layer, family.layer):
            return None
        known = known and all(_is_plain(getattr(layer, name), kind) for name, kind in family.parts.items())
    return functools.partial(family.step, decoder) if known else None


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if a module is of this very class and has no forward of its own."""
    return type(module) is kind and "forward" not in vars(module)
