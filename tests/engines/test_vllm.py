"""Guided runs inside vLLM: families, forms, requests, and what is refused. Models are tiny; one process plays all."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.distribution import ModelOutputs, next_token
from offline_lmrl.decoding.sampler import Sampler
from offline_lmrl.export.vllm import write_vllm
from offline_lmrl.models.guided import add_value_heads
from offline_lmrl.models.value_heads import ValueHeadsConfig
from tests.engines.engine import needs_engines, play

CLOSE = 2
TOKENS = 16  # of a reply
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "vocab_size": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": CLOSE,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32, "final_logit_softcapping": 1.0},  # a cap that bends these logits
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "cohere": {"logit_scale": 0.25},
    "gptj": {"rotary_dim": 32, "n_inner": 96},  # its LM head has a bias, which is not part of Q
}
FORM = DecodingConfig(beta=2.0, support=0.02, temperature=0.0, max_new_tokens=TOKENS)
FORMS = {
    "linear": ("linear", FORM),
    "mlp": ("mlp", FORM),
    "mlp, all of Q": ("mlp", replace(FORM, support=0.0)),
    "linear, all of Q": ("linear", replace(FORM, support=0.0)),
    "all of Q": ("tied", replace(FORM, support=0.0)),
    "clip": ("tied", replace(FORM, clip=0.1)),
    "candidates": ("tied", replace(FORM, support=0.0, candidates=5)),
    "mean": ("tied", replace(FORM, q_reduce="mean")),
    "first": ("tied", replace(FORM, q_reduce="first")),
    "top_p": ("tied", replace(FORM, support=0.0, top_p=0.5)),
    "top_k": ("tied", replace(FORM, support=0.0, top_k=3)),
    "min_p": ("tied", replace(FORM, support=0.0, min_p=0.2)),
}
SHORT = [[3 + i, 10 + i, 20 + i] for i in range(8)]
SHARED = [[*range(3, 43), 50 + i, 60 + i] for i in range(6)]  # longer than a chunk and than a block of the cache
BETAS = [0.0, 2.0, 5.0, -3.0, 16.0, 2.0]
COUNTS = {"temperature": 0.7, "top_p": 0.8, "beta": 1.5}  # drawn often, from a vocabulary of 12
DRAWS = 6000
# Settings of the engine, each of which would play otherwise than the run -> what the refusal names.
REFUSED = {
    "speculative decoding": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2,
                                                    "prompt_lookup_max": 2}},
    "LoRA adapters": {"enable_lora": True},
    "quantization": {"quantization": "fp8"},
}  # fmt: skip


def tiny(family, kind="tied", **changes):
    """A guided model whose tokens and values differ clearly."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family] | changes)
    model = add_value_heads(AutoModelForCausalLM.from_config(config).eval(), ValueHeadsConfig(kind, initial_value=0.5))
    for parameter in [*model.value_heads.parameters(), model.get_output_embeddings().bias]:
        if parameter is not None:
            torch.nn.init.normal_(parameter, std=0.3)
    model.value_heads.follow(model.get_output_embeddings().weight)
    return model


def of_run(model, form, prompts):
    """The run's replies, as token ids."""
    renderer = SimpleNamespace(close_ids=frozenset({CLOSE}), decode=str, reply_frame=("", ""))
    return [list(reply.token_ids) for reply in Sampler(model, renderer, form).sample(prompts, range(len(prompts)))]


def batch(prompts, **sampling):
    """One batch of a job; `beta` may be one number per prompt, and None is what the folder stores."""
    betas = sampling.pop("beta", None)
    betas = betas if isinstance(betas, list) else [betas] * len(prompts)
    one = {"temperature": 0.0, "max_tokens": TOKENS, "stop_token_ids": [CLOSE]} | sampling
    extra = [{} if beta is None else {"extra_args": {"beta": beta} | sampling.get("extra_args", {})} for beta in betas]
    return {"prompts": prompts, "sampling": [one | own for own in extra]}


def job(folder, architecture, *batches, **engine):
    fixed = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 64}
    named = {} if architecture is None else {"hf_overrides": {"architectures": [architecture]}}
    return {"engine": {"model": str(folder), "max_num_seqs": 16} | fixed | named | engine, "batches": list(batches)}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """What vLLM answered and what the run says, by the name of the job."""
    folder = tmp_path_factory.mktemp("vllm")
    jobs, expected = {}, {}
    for family in FAMILIES:
        model = tiny(family)
        expected[family] = [of_run(model, replace(FORM, beta=beta), SHORT) for beta in (2.0, 0.0, 5.0)]
        architecture = write_vllm(model, FORM, CLOSE, folder / family)
        batches = [batch(SHORT, beta=beta) for beta in (None, 0.0, 5.0)]
        jobs[family] = job(folder / family, architecture, *batches)
        if family in ("llama", "qwen3", "gemma"):
            jobs[f"{family} as its base"] = job(folder / family, None)
    for name, (kind, form) in FORMS.items():
        model = tiny("llama", kind)
        expected[name] = [of_run(model, form, SHORT)]
        jobs[name] = job(folder / name, write_vllm(model, form, CLOSE, folder / name), batch(SHORT))
    llama, model = folder / "llama", tiny("llama")
    expected["mixed"] = [[of_run(model, replace(FORM, beta=b), [p])[0] for p, b in zip(SHARED, BETAS, strict=True)]]
    expected["mixed"] *= 2  # the second batch finds its prefixes in the cache
    chunked = {"max_num_batched_tokens": 16, "enable_prefix_caching": True, "enable_chunked_prefill": True}
    jobs["mixed"] = job(llama, "GuidedLlamaForCausalLM", *[batch(SHARED, beta=BETAS)] * 2, block_size=32, **chunked)
    for name, engine in REFUSED.items():
        jobs[name] = job(llama, "GuidedLlamaForCausalLM", **engine)
    jobs["top_p of vLLM"] = job(llama, "GuidedLlamaForCausalLM", batch(SHORT, temperature=0.7, top_p=0.9))
    small = tiny("llama", vocab_size=12)
    drawn = DecodingConfig(beta=COUNTS["beta"], temperature=COUNTS["temperature"], top_p=COUNTS["top_p"])
    expected["draws"] = first_token(small, drawn, SHORT[0][:1])
    often = batch([SHORT[0][:1]] * DRAWS, temperature=COUNTS["temperature"], max_tokens=1, stop_token_ids=[])
    jobs["draws"] = job(
        folder / "small", write_vllm(small, drawn, CLOSE, folder / "small"), often, max_num_seqs=256, seed=1
    )
    small.config.offline_lmrl = {}
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).eval()
    plain.save_pretrained(folder / "plain")
    expected["plain"] = [
        plain.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS)[0, 3:].tolist() for ids in SHORT
    ]
    jobs["plain"] = job(folder / "plain", None, batch(SHORT))
    jobs["no heads"] = job(folder / "plain", "GuidedLlamaForCausalLM")
    return play(jobs, folder)[0], expected


@torch.no_grad()
def first_token(model, form, prompt):
    """The probabilities of the first token under the run."""
    outputs, hidden = model.forward_with_hidden(input_ids=torch.tensor([prompt]), use_cache=False)
    last = hidden[:, -1]
    values = ModelOutputs(q=lambda ids: model.q_values(last, ids), v=lambda: model.v_values(last))
    return next_token(outputs.logits[:, -1], form, values).over_vocabulary(outputs.logits.shape[-1]).exp()[0].tolist()


@needs_engines
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_replies_as_the_run_does_with_the_beta_of_the_request(played, family):
    answers, expected = played
    assert answers[family] == expected[family]
    assert expected[family][0] != expected[family][1]  # guidance changes replies


@needs_engines
@pytest.mark.parametrize("name", FORMS)
def test_each_form_replies_as_the_run_does(played, name):
    answers, expected = played
    assert answers[name] == expected[name]


@needs_engines
def test_one_batch_mixes_betas_with_chunked_prefill_and_cached_prefixes(played):
    answers, expected = played
    assert answers["mixed"] == expected["mixed"]


@needs_engines
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_without_the_override_vllm_refuses_the_folder(played, family):
    assert "value_heads" in played[0][f"{family} as its base"]


@needs_engines
@pytest.mark.parametrize("name", REFUSED)
def test_an_engine_that_would_play_otherwise_is_refused(played, name):
    answer = played[0][name]
    assert f"value guidance: found {name}" in answer


@needs_engines
def test_a_filter_that_vllm_would_apply_after_guidance_is_refused(played):
    assert "top_p: found 0.9 in a guided request" in played[0]["top_p of vLLM"]


@needs_engines
def test_sampled_tokens_have_the_probabilities_of_the_run(played):
    answers, expected = played
    ((replies,),) = (answers["draws"],)
    counts = torch.bincount(torch.tensor([reply[0] for reply in replies]), minlength=12)
    probability = torch.tensor(expected["draws"], dtype=torch.float64)
    left = probability > 0
    assert counts[~left].sum() == 0 and 1 < left.sum() < 12  # top_p drops some tokens, and leaves some
    expected_counts = probability[left] * DRAWS
    statistic = ((counts[left] - expected_counts).square() / expected_counts).sum()  # of Pearson's chi-squared test
    freedom = torch.tensor((left.sum() - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, statistic / 2) > 1e-3


@needs_engines
def test_other_models_of_the_environment_play_as_ever(played):
    answers, expected = played
    assert answers["plain"] == [expected["plain"]]
    assert "found no value heads in config.json" in answers["no heads"]


@needs_engines
def test_the_v2_model_runner_is_refused_with_the_way_out(tmp_path):
    architecture = write_vllm(tiny("llama"), FORM, CLOSE, tmp_path / "llama")
    jobs = {"v2": job(tmp_path / "llama", architecture)}
    answer = play(jobs, tmp_path, VLLM_USE_V2_MODEL_RUNNER="1")[0]["v2"]
    assert "V2 model runner (start with VLLM_USE_V2_MODEL_RUNNER=0)" in answer
