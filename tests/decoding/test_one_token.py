"""The one-token step against the model's own forward, bit for bit, and the models for which there is none."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from offline_lmrl.decoding import prompts as prompts_module
from offline_lmrl.decoding.cache import new_cache
from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.one_token import one_token_step
from offline_lmrl.decoding.prompts import CachedModel
from offline_lmrl.decoding.sampler import Sampler
from offline_lmrl.models.guided import add_returns, add_value_heads, as_guided
from offline_lmrl.models.value_heads import ValueHeadsConfig
from tests.decoding.test_sampler import Letters, WithValues, mistral, tiny

VOCABULARY = 24
SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}


def gpt2(**settings):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, **SIZES, **settings)).eval()


def llama(**settings):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, **SIZES, initializer_range=0.5, **settings)).eval()


MODELS = {
    "gpt2": gpt2,
    "gpt2 with other scales": lambda: gpt2(scale_attn_by_inverse_layer_idx=True, activation_function="relu"),
    "llama": llama,
    "llama with shared keys": lambda: llama(num_key_value_heads=2, tie_word_embeddings=True),
    "llama with biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama with scaled positions": lambda: llama(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "guided llama": lambda: as_guided(llama()),
}
NOTHING, HIDDEN, ALL_OF_Q = (frozenset(names) for names in ((), ("hidden states",), ("all of Q",)))


@torch.inference_mode()
def outputs_of(model, step, padded, reads=NOTHING, tokens=3):
    """The outputs after each of some tokens, which follow a prompt of five; rows differ in length if padded."""
    cached_model, cache = CachedModel(model), new_cache(model, tokens)
    ids = torch.randint(VOCABULARY, (3, 5 + tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[0, :2] = mask[1, :4] = False
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    given = mask if padded else None
    cached_model.forward(ids[:, :5], None if given is None else mask[:, :5], position[:, :5], cache, reads)
    cached_model.step = step
    found = []
    for at in range(5, 5 + tokens):
        part = slice(at, at + 1)
        seen = None if given is None else mask[:, : at + 1]
        found.append(cached_model.forward(ids[:, part], seen, position[:, part], cache, reads))
    return found


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        for mine, own in zip(one, other, strict=True):
            assert (mine is None) == (own is None)
            assert mine is None or torch.equal(mine, own)


@pytest.mark.parametrize("padded", [False, True], ids=["one length", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_the_models_own_forward(name, dtype, padded):
    model = MODELS[name]().to(dtype)
    assert_equal(outputs_of(model, one_token_step(model), padded), outputs_of(model, None, padded))


@pytest.mark.parametrize("kind", ["tied", "mlp"])
@pytest.mark.parametrize("reads", [HIDDEN, ALL_OF_Q], ids=["hidden states", "all of Q"])
def test_hidden_states_and_q_equal_those_of_the_models_own_forward(reads, kind):
    model = add_value_heads(llama(), ValueHeadsConfig(kind=kind)).eval()
    step = one_token_step(model)
    assert step is not None
    ours, theirs = outputs_of(model, step, True, reads), outputs_of(model, None, True, reads)
    assert ours[0].hidden is not None and (ours[0].q is not None) == (reads == ALL_OF_Q)
    assert_equal(ours, theirs)


def test_an_id_that_requests_a_return_is_embedded_as_by_the_models_own_forward():
    model = add_returns(as_guided(llama()), {"condition": "embedding", "bins": 3}).eval()
    cached_model, ids, position = CachedModel(model), torch.tensor([[VOCABULARY + 2]]), torch.tensor([[0]])
    with torch.inference_mode():
        theirs = cached_model.forward(ids, None, position, new_cache(model, 0), NOTHING)
        cached_model.step = one_token_step(model)
        ours = cached_model.forward(ids, None, position, new_cache(model, 0), NOTHING)
    assert_equal([ours], [theirs])


@pytest.mark.parametrize("name", ["gpt2", "llama", "guided llama"])
def test_replies_are_the_same_with_and_without_a_step(name, monkeypatch):
    model, prompts = MODELS[name](), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    sampler = Sampler(model, Letters(VOCABULARY), DecodingConfig(max_new_tokens=12))
    with_step = sampler.sample(prompts, range(3))
    assert sampler.cached_model.step is not None
    monkeypatch.setattr(prompts_module, "one_token_step", lambda model: None)
    assert sampler.sample(prompts, range(3)) == with_step


def hooked(path, register="register_forward_hook"):
    model = llama()
    getattr(model.get_submodule(path), register)(lambda *_: None)
    return model


def with_own_forward():
    model = llama()
    model.model.layers[1].mlp.forward = lambda h: 2 * h
    return model


def with_another_part():
    model = gpt2()
    model.transformer.h[0].mlp = torch.nn.Identity()
    return model


def with_attention(name):
    model = llama()
    model.set_attn_implementation(name)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: hooked(""),
        lambda: hooked("model"),
        lambda: hooked("model.layers.1.self_attn", "register_forward_pre_hook"),
        lambda: hooked("model.layers.0.mlp.up_proj"),
        with_own_forward,
        with_another_part,
        lambda: with_attention("eager"),
        lambda: tiny(WithValues),  # a subclass
        mistral,
    ],
    ids="model decoder attention linear forward mlp eager subclass family".split(),
)
def test_a_model_that_was_changed_or_is_not_known_has_no_step(make):
    assert one_token_step(make()) is None


def test_a_model_in_an_adapter_has_no_step_and_one_with_adapted_parts_has():
    peft = pytest.importorskip("peft")
    model = llama()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert one_token_step(adapted) is None
    assert_equal(outputs_of(model, one_token_step(model), True), outputs_of(model, None, True))


def test_a_copy_of_a_guided_model_has_a_step_of_its_own():
    model = as_guided(llama())
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.model.norm.weight)
    (first, *_), (second, *_) = (outputs_of(each, one_token_step(each), False) for each in (model, other))
    assert first.logits.abs().max() > 0 and second.logits.abs().max() == 0
