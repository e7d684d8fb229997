"""Folding values and spelling returns, family by family, against the guided model's own forward."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from offline_lmrl.errors import InputError
from offline_lmrl.models.guided import add_returns, add_value_heads, as_guided
from offline_lmrl.models.loading import load_model
from offline_lmrl.models.plain import add_to_lm_head, head_scale, plain, q_matrix, spell_returns
from offline_lmrl.models.value_heads import ValueHeadsConfig
from tests.models.test_return_embedding import BLOCK, NULL, REWARDS, conditioned
from tests.tiny_models import FAMILIES, VOCABULARY, guided_model, tiny_model

IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
BETA = 1.5
UNCAPPED = [family for family in FAMILIES if family != "gemma2"]


def folded(model, q_reduce="mean"):
    rows = q_matrix(model.value_heads.target_q, model.get_output_embeddings().weight, q_reduce)
    model = plain(model)
    add_to_lm_head(model, BETA / head_scale(model) * rows)
    return model


@torch.no_grad()
def guided_log_prob(model, q_reduce):
    """log_softmax(log π + β · (Q − V)), written out."""
    outputs, hidden = model.forward_with_hidden(input_ids=IDS)
    q = model.q_values(hidden)
    q = q[0] if q_reduce == "first" else (q[0] + q[1]) / 2
    advantage = q - model.v_values(hidden).unsqueeze(-1)
    return (outputs.logits.log_softmax(-1) + BETA * advantage).log_softmax(-1)


@pytest.mark.parametrize("kind", ["tied", "linear"])
@pytest.mark.parametrize("family", [*UNCAPPED, "qwen3, embeddings tied"])
def test_folded_logits_are_the_guided_distribution(family, kind, tmp_path, monkeypatch):
    family, _, ties = family.partition(",")
    if ties:
        monkeypatch.setitem(FAMILIES, family, FAMILIES[family] | {"tie_word_embeddings": True})
    q_reduce = "mean" if kind == "tied" else "first"
    expected = guided_log_prob(guided_model(family, kind), q_reduce)
    model = folded(guided_model(family, kind), q_reduce)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    base = tiny_model(family)
    assert type(loaded) is type(base) and not hasattr(loaded.config, "offline_lmrl")
    assert torch.equal(loaded.get_input_embeddings().weight, base.get_input_embeddings().weight)  # was tied, or not
    with torch.no_grad():
        found = loaded.eval()(input_ids=IDS).logits.log_softmax(-1)
    assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - base(input_ids=IDS).logits.log_softmax(-1)).abs().max() > 0.1  # guidance did something


def test_what_a_family_ties_beside_the_embeddings_is_saved_where_it_is_read(tmp_path):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_mamba_heads": 2,
        "attention_hidden_size": 32,
        "attention_head_dim": 16,
        "mamba_d_state": 4,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("zamba", **sizes))  # two layers share their weights
    model = add_value_heads(base, ValueHeadsConfig("tied")).eval()
    torch.nn.init.normal_(model.value_heads.target_q.map, std=0.3)
    expected = guided_log_prob(model, "mean")
    folded(model).save_pretrained(tmp_path)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(input_ids=IDS).logits.log_softmax(-1)
    assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family, scale", [("gpt2", 1.0), ("cohere", 0.25), ("granite", 1 / 3)])
def test_the_scale_of_logits_is_found(family, scale):
    if family == "granite":
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "logits_scaling": 3.0,
        }
        model = as_guided(AutoModelForCausalLM.from_config(AutoConfig.for_model("granite", **sizes)))
    else:
        model = as_guided(tiny_model(family))
    assert head_scale(model) == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize("place", ["before the head", "in the head"])
def test_a_scale_on_the_way_to_the_logits_is_found(place):
    model = as_guided(tiny_model("cohere"))
    head = model.get_output_embeddings()
    if place == "before the head":
        head.register_forward_pre_hook(lambda module, args: (args[0] / 4,))
    else:
        head.register_forward_hook(lambda module, args, output: output / 4)
    assert head_scale(model) == pytest.approx(0.25 / 4, rel=1e-5)


@pytest.mark.parametrize("cap", [1.0, 30.0])  # 30: that of Gemma 2, whose logits here stay below 2
def test_a_soft_cap_is_no_scale(cap):
    model = as_guided(tiny_model("gemma2"))
    model.config.final_logit_softcapping = cap
    with pytest.raises(InputError, match="^run: found gemma2 with a soft cap"):
        head_scale(model)


def test_a_transform_of_the_hidden_states_is_no_scale():
    model = as_guided(tiny_model("llama"))
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (torch.nn.functional.gelu(args[0]),))
    with pytest.raises(InputError, match="^run: found llama with a transform before its LM head"):
        head_scale(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_spelt_returns_read_the_rows_of_the_table(family, tmp_path):
    model = conditioned(family)
    torch.nn.init.normal_(model.return_embedding.delta)
    with torch.no_grad():
        expected = model(input_ids=REWARDS).logits.log_softmax(-1)
    table = model.return_embedding.rows()
    model = plain(model)
    spell_returns(model, table, range(NULL, NULL + 5))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = loaded(input_ids=REWARDS).logits
    assert logits.shape[-1] == loaded.config.vocab_size == NULL + 5
    assert_close(logits[..., :NULL].log_softmax(-1), expected, atol=1e-4, rtol=0)
    assert loaded.generation_config.suppress_tokens == list(range(NULL, NULL + 5))
    head = loaded.get_output_embeddings().weight
    if head.data_ptr() != loaded.get_input_embeddings().weight.data_ptr():
        assert (logits[..., NULL:].amax(-1) < logits.amax(-1)).all()  # also where nobody suppresses them


def test_an_embedding_that_scales_its_rows_is_given_what_it_scales_to_the_table():
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **sizes)).eval()
    embedding = base.get_input_embeddings()
    assert_close(embedding(IDS), 4 * embedding.weight[IDS])  # √16
    model = add_returns(as_guided(base), BLOCK)
    expected = model(input_ids=REWARDS).logits
    table = model.return_embedding.rows()
    model = plain(model)
    spell_returns(model, table, range(NULL, NULL + 5))
    assert_close(model(input_ids=REWARDS).logits[..., :NULL], expected, atol=1e-5, rtol=0)


def test_rows_that_are_there_already_are_taken_for_the_first_returns():
    # vocabularies are padded: the tokenizer's next ids may have rows
    model = conditioned()
    expected = model(input_ids=REWARDS).logits[..., : NULL - 2].log_softmax(-1)
    table = model.return_embedding.rows()
    model = plain(model)
    spell_returns(model, table, range(NULL - 2, NULL + 3))
    assert model.get_input_embeddings().weight.shape[0] == NULL + 3
    read = torch.where(REWARDS >= NULL, REWARDS - 2, REWARDS)
    assert_close(model(input_ids=read).logits[..., : NULL - 2].log_softmax(-1), expected)


def test_an_embedding_that_does_more_than_looking_up_is_refused():
    class Shifted(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1.0

    model = plain(conditioned())
    model.get_input_embeddings().__class__ = Shifted
    with pytest.raises(InputError, match="run: found Shifted"):
        spell_returns(model, torch.zeros(2, 16), [NULL, NULL + 1])


def test_lora_is_merged_and_a_tied_head_keeps_the_matrix_that_it_read(tmp_path):
    peft = pytest.importorskip("peft")
    model = guided_model("llama", "tied")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    expected = guided_log_prob(model, "mean")
    model = folded(model)
    model.save_pretrained(tmp_path)
    found = load_model(tmp_path).eval()(input_ids=IDS).logits.log_softmax(-1)
    assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["wte", "lm_head", "c_attn"]])
def test_adapters_on_either_side_of_a_tied_matrix_are_merged_apart(targets, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=targets, r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(as_guided(tiny_model()), config).eval()
    ids = torch.tensor([[5, 9, 30, 2]])
    expected = model(input_ids=ids).logits
    plain(model).save_pretrained(tmp_path)
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected, atol=1e-5, rtol=1e-5)
