"""Small configs of every family that transformers has a causal LM of: its default config with all sizes shrunk."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES  # noqa: F401

VOCABULARY = 300
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NAMES = {  # size -> names of fields
    32: """hidden_size d_model n_embd embedding_size dim model_dim emb_dim embed_dim word_embed_proj_dim d_embed
        vision_embed_dim rnn_width lru_width decoder_hidden_size output_dim vision_output_dim encoder_hidden_size
        out_hidden_size projection_dim proj_dim cross_hidden_size adapter_hidden_size ple_embed_dim""",
    2: """num_hidden_layers n_layer n_layers num_layers num_decoder_layers decoder_layers encoder_layers
        num_encoder_layers depth num_attention_heads n_head n_heads num_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads num_key_value_heads n_head_kv
        num_experts_per_tok num_experts_per_token top_k_experts moe_topk moe_k attention_heads num_attention_groups
        num_global_layers num_blocks""",
    48: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner moe_intermediate_size
        shared_expert_intermediate_size ffn_hidden_size shared_intermediate_size dff d_ff expert_ffn_hidden_size
        moe_shared_expert_intermediate_size intermediate_size_mlp ffn_intermediate_size mlp_dim""",
    4: "n_routed_experts num_experts num_local_experts moe_num_experts",
    16: """head_dim attention_head_dim v_head_dim q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim
        linear_key_head_dim linear_value_head_dim global_head_dim swa_head_dim hidden_size_per_layer_input
        rotary_dim""",
    1: "n_group topk_group num_expert_group",
    VOCABULARY: "vocab_size_per_layer_input",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
OTHERWISE = {  # what the sizes alone leave inconsistent, by model type, inner configs' included
    "bailing_hybrid": LINEAR_FIRST | {"mlp_layer_types": ["dense", "sparse"]},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "codegen": {"n_head": 4, "rotary_dim": 4, "n_ctx": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
                     "laurel_rank": 8, "intermediate_size": [48, 48], "activation_sparsity_pattern": [0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2, "num_shared_expert": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LINEAR_FIRST | {"mlp_layer_types": ["dense", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "mimo_v2_flash": {"head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_5_moe_text": LINEAR_FIRST,
    "qwen3_5_text": LINEAR_FIRST,
    "qwen3_next": LINEAR_FIRST,
    "qwen4_exp_text": INDEXER | {"layer_types": ["linear_attention", "indexed_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False,
                 "max_position_embeddings": 128, "local_attn_chunk_length": 4},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "zamba": {"num_hidden_layers": 5, "n_mamba_heads": 2, "attention_hidden_size": 64, "attention_head_dim": 32,
              "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "n_mamba_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 32,
               "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 8, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
for _name in (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
):
    OTHERWISE[_name] = OTHERWISE.get(_name, {}) | {"is_decoder": True}


def _shrunk(values: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = dict(TOKENS) if "vocab_size" in values else {}
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("_config") and name != "per_layer_config" and value:
            kept = {"model_type": value["model_type"]} if value.get("model_type") else {}
            changed[name] = kept | _shrunk(value)
        elif name in SIZES and type(value) is int and value > 0:
            changed[name] = SIZES[name]
    return changed | OTHERWISE.get(values.get("model_type", ""), {})


def small_config(model_type: str, spread: float = 0.1) -> PreTrainedConfig:
    """spread: standard deviation of fresh weights, large enough that tokens and positions differ clearly."""
    config = AutoConfig.for_model(model_type, **TOKENS | _shrunk(AutoConfig.for_model(model_type).to_dict()))
    for part in (config, config.get_text_config()):
        if isinstance(getattr(part, "initializer_range", None), float):
            part.initializer_range = spread
    return config


def small_model(model_type: str) -> PreTrainedModel:
    """With fresh weights, in eval mode."""
    return AutoModelForCausalLM.from_config(small_config(model_type)).eval()
