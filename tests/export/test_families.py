"""Exact export of every causal LM of transformers that a small config builds: written and equal to the run, or refused
in one line."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError
from offline_lmrl.export.prompts import HeldOut
from offline_lmrl.export.run import export_run
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.models.guided import as_guided
from offline_lmrl.models.loading import load_model
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer

TOKENIZER = train_tokenizer(["left right up down", "you are at 1 2 3 4 5 6 7 8 9"], 300)
TOKENS = {
    "vocab_size": 300,
    "vocab_size_per_layer_input": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {
    32: "hidden_size d_model n_embd embedding_size dim embed_dim word_embed_proj_dim attention_hidden_size lru_width",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_attention_heads n_head "
    "n_heads num_heads decoder_attention_heads encoder_attention_heads num_key_value_heads num_experts_per_tok "
    "num_experts_per_token moe_topk top_k_experts",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner moe_intermediate_size ffn_hidden_size "
    "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size",
    4: "n_routed_experts num_experts num_local_experts moe_num_experts",
    16: "head_dim v_head_dim q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim linear_key_head_dim "
    "linear_value_head_dim global_head_dim rotary_dim hidden_size_per_layer_input",
}
SIZES = {name: value for value, names in SMALL.items() for name in names.split()}
SCALES = {"logit_scale": 0.3, "logits_scaling": 3.0, "lm_head_multiplier": 0.5}
BETA = 4.0
PROMPTS = HeldOut([[Turn("user", "you are at 1 2 3")], [Turn("user", "left")]])


def shrunk(values):
    """The fields of a config as a dict that make it small; configs inside it too."""
    fields = {}
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("config") and "model_type" in value:
            fields[name] = {"model_type": value["model_type"], **shrunk(value)}
        elif name in SIZES | SCALES | TOKENS and isinstance(value, int | float) and value is not True and value > 0:
            fields[name] = (SIZES | SCALES | TOKENS)[name]
    return fields


def tiny_run(family, folder):
    """A run with values, as training would save it; None where transformers or the guided class cannot make one that
    reads text."""
    torch.manual_seed(0)
    try:
        config = AutoConfig.for_model(family, **shrunk(AutoConfig.for_model(family).to_dict()) | TOKENS)
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            if isinstance(getattr(part, "initializer_range", None), float):
                part.initializer_range = 0.1
        as_guided(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
        model = load_model(folder, value_heads=ValueHeadsConfig("tied")).eval()
        with torch.no_grad():
            for parameter in model.value_heads.parameters():
                parameter.normal_(std=0.3)
            outputs, hidden = model.forward_with_hidden(input_ids=torch.arange(3, 9).unsqueeze(0), use_cache=False)
            finite = outputs.logits.isfinite().all() and model.q_values(hidden).shape[-1] == outputs.logits.shape[-1]
    except Exception:
        return None
    model.config.offline_lmrl |= {"algorithm": "ilql", "tokenizer": Renderer(TOKENIZER).fingerprint}
    model.config.offline_lmrl |= {"decoding": {"beta": BETA, "q_reduce": "mean", "temperature": 0.0}}
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return model if finite else None


@torch.no_grad()
def guided(model, ids):
    """log π + β · mean Q, normalised, from the run itself."""
    outputs, hidden = model.forward_with_hidden(input_ids=ids, use_cache=False)
    return (outputs.logits.float() + BETA * model.q_values(hidden).mean(0)).log_softmax(-1)


@pytest.mark.slow
def test_every_family_is_exported_exactly_or_refused(tmp_path):
    exact, refused, wrong = set(), {}, {}
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(5))
    for family in CAUSAL_LMS:
        model = tiny_run(family, run := tmp_path / family / "run")
        if model is None:
            continue
        try:
            export_run(run, tmp_path / family / "plain", held_out=PROMPTS, device="cpu", max_new_tokens=4)
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / family / "plain").eval()
            AutoTokenizer.from_pretrained(tmp_path / family / "plain")
            with torch.no_grad():
                found = plain(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            difference = (found - guided(model, ids)).abs().max().item()
            exact.add(family)
            if not difference < 1e-3:
                wrong[family] = difference
        except InputError as error:
            refused[family] = str(error)
            assert "\n" not in str(error) and sorted(path.name for path in (tmp_path / family).iterdir()) == ["run"]
    print(f"{len(exact)} exact: {' '.join(sorted(exact))}")
    print("\n".join(f"refused: {family}: {reason}" for family, reason in refused.items()))
    assert wrong == {}
    assert len(exact) >= 90
    assert {"cohere", "cohere2", "granite", "granitemoe", "opt", "gpt2", "llama", "qwen3", "gemma3_text"} <= exact
    assert {"gemma2", "nanochat", "roberta", "bert"} <= set(refused)


@pytest.mark.slow
@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_every_family_plays_from_a_folder_for_transformers_as_the_run_does(family, tmp_path):
    if tiny_run(family, tmp_path / "run") is None:
        pytest.skip("transformers or the guided class makes none that reads text")
    try:
        LanguagePolicy.load(tmp_path / "run", device="cpu")
    except InputError as error:
        pytest.skip(f"no run of it plays: {error}")
    form = {"support": 0.05, "q_reduce": "min", "max_new_tokens": 4}
    report = export_run(tmp_path / "run", tmp_path / "out", "transformers", held_out=PROMPTS, device="cpu", **form)
    assert report.beside.rows[0].met
