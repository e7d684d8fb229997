"""generate(beta=...) and forward(beta=...) against step-by-step recomputation without a cache."""

import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationConfig

from offline_lmrl.errors import InputError
from offline_lmrl.models.guided import as_guided
from offline_lmrl.models.value_heads import forward_with_q
from tests.tiny_models import FAMILIES, VOCABULARY, guided_model, tiny_model

PROMPTS = [[5, 17, 30, 8], [22, 9], [41, 3, 12]]
CASES = [(family, "tied") for family in FAMILIES] + [("gpt2", "linear"), ("llama", "mlp")]
NEW = 5


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def slow_greedy(model, prompt, beta, form=None):
    """The whole prompt again for every token, all of Q, and the formula log π + β · clip(min Q̄ − V) spelt out."""
    form, ids = form or {}, list(prompt)
    for _ in range(NEW):
        outputs, hidden = model.forward_with_hidden(input_ids=torch.tensor([ids]))
        log_prob = outputs.logits[0, -1].log_softmax(-1)
        advantage = model.q_values(hidden[0, -1]).min(0).values - model.v_values(hidden[0, -1])
        if form.get("clip") is not None:
            advantage = advantage.clamp(max=form["clip"])
        kept = log_prob.exp() >= form.get("support", 0.0) * log_prob.exp().max()
        if form.get("candidates"):
            kept &= log_prob >= log_prob.sort(descending=True).values[form["candidates"] - 1]
        ids.append(int(torch.where(kept, log_prob + beta * advantage, -torch.inf).argmax()))
    return ids[len(prompt) :]


def greedy(model, prompts, **options):
    inputs = left_padded(prompts)
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "eos_token_id": None} | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_guidance_generate_is_the_base_models(family):
    plain, guided = tiny_model(family), guided_model(family)
    assert greedy(guided, PROMPTS, beta=0) == greedy(guided, PROMPTS) == greedy(plain, PROMPTS)


@pytest.mark.parametrize("family, kind", CASES)
def test_guided_greedy_equals_recomputation_row_by_row(family, kind):
    # Left padding: the rows differ in length, so a lost attention mask or position would show.
    model = guided_model(family, kind)
    expected = [slow_greedy(model, prompt, 3.0) for prompt in PROMPTS]
    assert greedy(model, PROMPTS, beta=3.0) == expected
    assert expected != greedy(model, PROMPTS, beta=0)


@pytest.mark.parametrize("form", [{"clip": 0.0}, {"support": 0.3}, {"candidates": 4}, {"candidates": 6, "clip": 0.1}])
def test_the_stored_sampling_form_applies(form):
    model = guided_model()
    model.config.offline_lmrl["decoding"] = form
    expected = [slow_greedy(model, prompt, 4.0, form) for prompt in PROMPTS]
    assert greedy(model, PROMPTS, beta=4.0) == expected
    model.config.offline_lmrl["decoding"] = form | {"beta": 4.0}
    assert greedy(model, PROMPTS) == expected
    assert greedy(model, PROMPTS, beta=0.0) == greedy(tiny_model(), PROMPTS)
    assert greedy(model, PROMPTS, generation_config=GenerationConfig(pad_token_id=0)) == expected


@pytest.mark.parametrize("kind", ["tied", "linear", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_computes_q_for_the_tokens_that_the_support_leaves(monkeypatch, dtype, kind):
    model = guided_model(kind=kind).to(dtype)
    model.config.offline_lmrl["decoding"] = {"support": 0.8}
    inputs, asked, q_values = left_padded(PROMPTS), [], model.q_values
    with torch.no_grad():
        outputs, hidden = model.forward_with_hidden(**inputs)
        logits = outputs.logits.float()
        kept = logits >= logits.amax(-1, keepdim=True) + torch.tensor(0.8).log()
        expected = (logits + 2 * q_values(hidden).amin(0)).masked_fill(~kept, -torch.inf)
        monkeypatch.setattr(model, "q_values", lambda states, ids: asked.append(ids) or q_values(states, ids))
        assert_close(model(**inputs, beta=2.0, logits_to_keep=1).logits, expected[:, -1:])
    assert [ids.shape for ids in asked] == [(3, 1, 1 << (int(kept[:, -1].sum(-1).max()) - 1).bit_length())]


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_one_beta_per_row_equals_separate_runs(family):
    model, betas = guided_model(family), [0.0, 1.0, 5.0]
    expected = [greedy(model, [prompt], beta=beta)[0] for prompt, beta in zip(PROMPTS, betas, strict=True)]
    assert greedy(model, PROMPTS, beta=torch.tensor(betas)) == expected
    beams = [greedy(model, [p], beta=b, num_beams=2)[0] for p, b in zip(PROMPTS, betas, strict=True)]
    assert greedy(model, PROMPTS, beta=torch.tensor(betas), num_beams=2) == beams


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_static_cache_and_prompt_lookup_equal_the_default(family):
    model = guided_model(family)
    expected = greedy(model, PROMPTS, beta=3.0)
    assert greedy(model, PROMPTS, beta=3.0, cache_implementation="static") == expected
    assert greedy(model, PROMPTS[:1], beta=3.0, prompt_lookup_num_tokens=2) == expected[:1]


@pytest.mark.parametrize("family", FAMILIES)
def test_guided_logits_are_the_policys_plus_beta_times_the_advantage(family):
    model, ids = guided_model(family), torch.tensor(PROMPTS[:1])
    outputs, hidden = model.forward_with_hidden(input_ids=ids)
    expected = outputs.logits + 2.0 * model.q_values(hidden).min(0).values
    assert_close(model(input_ids=ids, beta=2.0).logits, expected)
    assert_close(model(input_ids=ids, beta=2.0, logits_to_keep=2).logits, expected[:, -2:])
    assert_close(model(input_ids=ids, beta=2.0, logits_to_keep=torch.tensor([1, 3])).logits, expected[:, [1, 3]])
    for unguided in (None, 0, 0.0):
        assert torch.equal(model(input_ids=ids, beta=unguided).logits, outputs.logits)


def test_tied_heads_need_no_further_pass_over_the_lm_head():
    model, ids = guided_model("gpt2", "tied"), torch.tensor(PROMPTS[:1] * 2)
    shapes = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: shapes.append(inputs[0].shape))
    model(input_ids=ids, beta=2.0, logits_to_keep=1)
    assert shapes == [(2 * 3, 1, 16)]  # two rows, each with its hidden state and the features of two heads
    assert model(input_ids=ids).logits.shape == (2, 4, VOCABULARY) and shapes[1:] == [(2, 4, 16)]


@pytest.mark.parametrize("family", FAMILIES)
def test_q_beside_the_logits_is_q_to_the_rounding_of_the_models_dtype(family):
    model, ids = guided_model(family).to(torch.bfloat16), torch.tensor(PROMPTS[:1])
    outputs, hidden, q = forward_with_q(model, input_ids=ids, logits_to_keep=2)
    expected = model.q_values(hidden[:, -2:])
    assert q.dtype == torch.float32 and q.shape == expected.shape == (2, 1, 2, VOCABULARY)
    spread = (expected - expected.mean(-1, keepdim=True)).abs().max()
    assert (q - expected).abs().max() < 0.02 * spread
    assert_close(outputs.logits, model(input_ids=ids, logits_to_keep=2).logits, atol=0.05, rtol=0.02)


def test_all_candidates_equal_no_candidates_and_few_leave_minus_infinity():
    model, ids = guided_model(kind="mlp"), torch.tensor(PROMPTS[:1])
    everything = model(input_ids=ids, beta=2.0).logits
    model.config.offline_lmrl["decoding"] = {"candidates": VOCABULARY + 7}
    assert_close(model(input_ids=ids, beta=2.0).logits, everything)
    model.config.offline_lmrl["decoding"] = {"candidates": 3}
    assert (model(input_ids=ids, beta=2.0).logits > -torch.inf).sum() == 3 * ids.numel()
    assert (model(input_ids=ids).logits > -torch.inf).all()  # what a likelihood reads is never filtered


def test_online_heads_can_be_asked_for():
    model = guided_model()
    hidden, picks = torch.randn(2, 3, 16), torch.randint(VOCABULARY, (2, 3, 4))
    target, online = model.q_values(hidden), model.q_values(hidden, target=False)
    assert target.shape == online.shape == (2, 2, 3, VOCABULARY) and not torch.equal(target, online)
    assert_close(model.q_values(hidden, picks), target.gather(-1, picks.expand(2, -1, -1, -1)))
    assert model.v_values(hidden).shape == (2, 3)


def test_guidance_without_heads_is_an_error_not_silence():
    model = as_guided(tiny_model())
    with pytest.raises(InputError, match="beta: found 2.0, expected 0, as this model has no value heads"):
        greedy(model, PROMPTS, beta=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "cohere"])
def test_the_guided_forward_compiles_as_one_graph(family):
    model, inputs = guided_model(family), {"input_ids": torch.tensor(PROMPTS[:1]), "beta": 2.0, "use_cache": False}
    with torch.no_grad():
        compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
        assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_a_row_whose_beta_is_0_is_the_base_models_whatever_the_form():
    model = guided_model()
    model.config.offline_lmrl["decoding"] = {"support": 0.5, "candidates": 2}
    inputs = left_padded(PROMPTS)
    alone, guided = model(**inputs).logits, model(**inputs, beta=2.0).logits
    mixed = model(**inputs, beta=torch.tensor([2.0, 0.0, 2.0])).logits
    assert torch.equal(mixed[1], alone[1]) and torch.equal(mixed[0], guided[0]) and torch.equal(mixed[2], guided[2])
    assert guided[1].isinf().any() and mixed[1].isfinite().all()
