"""Causal LMs of each family that the guided model is tested on: two layers, random weights, no dropout."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from offline_lmrl.models.guided import add_value_heads
from offline_lmrl.models.step_outputs import StepRequest
from offline_lmrl.models.value_heads import ValueHeadsConfig

VOCABULARY, WIDTH = 50, 16
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 1, "head_dim": 8}

FAMILIES = {
    "gpt2": {
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_neox": _SIZES,
    "llama": {**_GROUPED, "tie_word_embeddings": False},
    "qwen3": _GROUPED,
    "gemma2": {**_GROUPED, "final_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},  # a cap that bends tiny logits
    "cohere": {**_SIZES, "logit_scale": 0.25},
    "opt": {
        "hidden_size": WIDTH,
        "word_embed_proj_dim": 8,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
}


def tiny_model(family: str = "gpt2", seed: int = 0) -> PreTrainedModel:
    """In eval mode; weights are ten times the usual so that positions and tokens differ clearly."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **_TOKENS, **FAMILIES[family], initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_batch(padding: int = 0) -> dict:
    """Two dialogues, (p)rompt, (a)gent, (e)nvironment, "." padding: `ppaaeeaa.` and `pppaaa...`, then more padding."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 8 + [0], [1] * 6 + [0] * 3], dtype=torch.bool)
    ids[~mask] = 0
    row = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    state = torch.tensor([1, 2, 5, 6, 2, 3, 4])
    steps = {
        "row": row,
        "state": state,
        "action": ids[row, state + 1],
        "next_row": row,
        "next_state": torch.tensor([2, 5, 6, 7, 3, 4, 5]),
        "end_row": row,
        "end_state": torch.tensor([7, 7, 7, 7, 5, 5, 5]),
        "open_state": torch.tensor([1, 1, 5, 5, 2, 2, 2]),
        "closes_turn": torch.tensor([0, 1, 0, 1, 0, 0, 1], dtype=torch.bool),
        "has_target": torch.ones(7, dtype=torch.bool),
    }
    pad = torch.nn.functional.pad
    return {"input_ids": pad(ids, (0, padding)), "attention_mask": pad(mask, (0, padding)), "steps": steps}


def packed_of(model, batch, **options):
    """The guided model's outputs at the steps of a batch."""
    request = StepRequest(batch["steps"], **options)
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], request=request)


def guided_model(family: str = "gpt2", kind: str = "tied", utterance: bool = False) -> PreTrainedModel:
    """A guided model whose online and target heads differ and are far from constant."""
    config = ValueHeadsConfig(kind, initial_value=0.5, utterance=utterance)
    model = add_value_heads(tiny_model(family), config)
    for parameter in model.value_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model
