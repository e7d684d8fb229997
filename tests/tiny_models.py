"""Causal LMs of each family that the guided model is tested on: two layers, random weights, no dropout."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY, WIDTH = 50, 16
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "max_position_embeddings": 64}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 1, "head_dim": 8}

FAMILIES = {
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": _SIZES,
    "llama": {**_GROUPED, "tie_word_embeddings": False},
    "qwen3": _GROUPED,
    "gemma2": {**_GROUPED, "final_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},  # a cap that bends tiny logits
    "cohere": {**_SIZES, "logit_scale": 0.25},
}  # fmt: skip


def tiny_model(family: str = "gpt2", seed: int = 0) -> PreTrainedModel:
    """In eval mode; weights are ten times the usual so that positions and tokens differ clearly."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **_TOKENS, **FAMILIES[family], initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()
