"""Distillation: the loss against a sum by hand, a state whose optimum is known, and what is written is read back."""

import copy
import json
import math

import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from offline_lmrl.cli import main
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.errors import InputError
from offline_lmrl.export import distill
from offline_lmrl.export.beside import IDENTICAL, LOG_PROB, Q_PER_TOKEN, REWARD, Row
from offline_lmrl.export.distill import _batch, _Pupil, bounded_distilled, distil, divergence, logged_texts
from offline_lmrl.export.plain import Plain
from offline_lmrl.export.prompts import HeldOut
from offline_lmrl.export.run import export_run
from offline_lmrl.logs.io import write_trajectories
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.guided import add_value_heads, as_guided
from offline_lmrl.models.loading import build_model
from offline_lmrl.models.plain import plain as plain_model
from offline_lmrl.models.value_heads import ValueHeadsConfig
from tests.export.test_plain import (
    CAPPED,
    LOGS,
    PROMPTS,
    RENDERER,
    SPECS,
    TOKENIZER,
    plain,
    prompt_of,
    shaken,
    valued_run,
)
from tests.families import small_model

LIKE_FOLDED = {"beta": 0.2, "clip": 1000.0}  # a clip that never acts: distilled, though a fold would be exact
FORM = {"q_reduce": "min", "support": 0.2, "temperature": 0.7, "beta": 1.5}


def with_data(run, rows=LOGS):
    """The run with a config that names its training data."""
    write_trajectories(run / "train.jsonl", rows)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"train": str(run / "train.jsonl")}}))
    return run


def by_hand(run, ids):
    """log p of the next token after `ids`, token by token in double precision; −inf for those that are dropped."""
    policy = LanguagePolicy.load(run, device="cpu")
    decoding, model = policy.decoding, policy.model.eval()
    with torch.no_grad():
        inputs = torch.tensor([ids])
        outputs, hidden = model.forward_with_hidden(input_ids=inputs, attention_mask=torch.ones_like(inputs))
        logits, q = outputs.logits[0, -1].double(), model.q_values(hidden[0, -1]).double()
        q = q.amin(0) if decoding.q_reduce == "min" else q.mean(0)
    scores = []
    for token, logit in enumerate(logits.tolist()):
        kept = math.exp(logit - float(logits.max())) >= decoding.support
        scores.append(logit / decoding.temperature + decoding.beta * float(q[token]) if kept else -math.inf)
    return torch.tensor(scores).double().log_softmax(-1)


def test_the_loss_is_the_divergence_of_the_played_distributions(tmp_path):
    run = valued_run(tmp_path / "run", "mlp", **FORM)
    policy, student = LanguagePolicy.load(run, device="cpu"), as_guided(shaken(build_model(SPECS["gpt2"], TOKENIZER)))
    texts = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9])]
    kl, _, log_p, _ = divergence(policy.model.eval(), student.eval(), policy.decoding, _batch(texts, student.device))
    states = [[1, 2, 3], [1, 2, 3, 4], [6], [6, 7], [6, 7, 8]]
    for found, mine, ids in zip(kl, log_p, states, strict=True):
        p = by_hand(run, ids)
        inputs = torch.tensor([ids])
        logits = student(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0, -1].double()
        q = (logits / 0.7).log_softmax(-1)
        assert 1 < (p > -torch.inf).sum() < len(p)
        expected = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > -math.inf)
        assert found.item() == pytest.approx(expected, rel=1e-4)
        assert_close(mine.double(), p, atol=1e-4, rtol=1e-4)
    assert kl.requires_grad


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("spec", [*SPECS.values(), CAPPED], ids=[*SPECS, "gemma2"])
def test_learning_from_kept_states_is_learning_from_the_replies(tmp_path, spec, layers):
    policy = LanguagePolicy.load(valued_run(tmp_path / "run", "mlp", spec, clip=0.5, **FORM), device="cpu")
    student = as_guided(plain_model(copy.deepcopy(policy.model))).eval()
    pupil, texts = _Pupil(student, layers), [([1, 2, 3], [4, 5]), ([6], [7, 8, 9]), ([3, 2, 5, 4, 7], [1])]
    pupil.try_skipping(policy, texts[:2])
    assert pupil.skips
    for weight in pupil.weights:  # a few steps later
        weight.data.add_(0.05 * torch.randn_like(weight))
    lessons = pupil.read(policy.model, texts)
    assert [lesson.text for lesson in lessons] == texts
    for chosen in ([0, 1, 2], [2, 0]):
        batch = _batch([texts[i] for i in chosen], student.device)
        expected = divergence(policy.model, student, policy.decoding, batch)[0]
        found = pupil.divergence(policy, [lessons[i] for i in chosen])
        assert expected.max() > 1e-3
        assert_close(found, expected, atol=1e-5, rtol=1e-4)
        gradients = [torch.autograd.grad(kl.sum(), pupil.weights) for kl in (found, expected)]
        assert all(gradient.any() for gradient in gradients[0])
        assert_close(*gradients, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", ["gemma4_text", "roberta", "modernbert-decoder"])
def test_a_norm_below_the_frozen_layers_is_frozen_too(family):
    model = shaken(add_value_heads(as_guided(small_model(family)), ValueHeadsConfig("mlp"))).eval()
    policy = LanguagePolicy(model, RENDERER, DecodingConfig(**FORM, max_new_tokens=4))
    student = as_guided(plain_model(copy.deepcopy(model))).eval()
    pupil, texts = _Pupil(student, 1), [([5, 6, 7], [8, 9]), ([10], [11, 12, 13])]
    before = len(pupil.weights)
    pupil.try_skipping(policy, texts)
    assert pupil.skips and len(pupil.weights) < before
    for weight in pupil.weights:
        weight.data.add_(0.05 * torch.randn_like(weight))
    expected = divergence(model, student, policy.decoding, _batch(texts, student.device))[0]
    assert_close(pupil.divergence(policy, pupil.read(model, texts)), expected, atol=1e-5, rtol=1e-4)


# Layers in no list, layers that return a tuple, layers that share weights with lower ones.
@pytest.mark.parametrize("family", ["longcat_flash", "gpt_neo", "zamba"])
def test_where_layers_cannot_be_skipped_the_whole_model_learns(family):
    model = shaken(add_value_heads(as_guided(small_model(family)), ValueHeadsConfig("mlp"))).eval()
    policy = LanguagePolicy(model, RENDERER, DecodingConfig(**FORM, max_new_tokens=4))
    texts = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13]), ([9, 8, 7], [4, 3])]
    student = distil(policy, texts, Plain(steps=3, batch_size=2, rounds=1, layers=1, prompts=2))
    kl = divergence(model, as_guided(student), policy.decoding, _batch(texts, student.device))[0]
    assert kl.isfinite().all()
    pupil = _Pupil(as_guided(plain_model(copy.deepcopy(model))).eval(), 1)
    pupil.try_skipping(policy, texts[:2])
    assert not pupil.skips and pupil.read(model, texts)[0].lower is None and pupil.weights


def distance(run, model, ids, temperature):
    """KL(p ‖ q) of the next token after `ids`."""
    with torch.no_grad():
        log_q = (model(torch.tensor([list(ids)])).logits[0, -1].double() / temperature).log_softmax(-1)
    p = by_hand(run, list(ids))
    return float((p.exp() * (p.masked_fill(p == -torch.inf, 0.0) - log_q)).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_state_is_learnt_as_it_is_played_at_the_temperature(tmp_path, temperature):
    run = with_data(valued_run(tmp_path / "run", **LIKE_FOLDED | {"temperature": temperature}), LOGS[:1])
    policy = LanguagePolicy.load(run, device="cpu", max_new_tokens=1)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    ((ids, reply),) = logged_texts(policy, LOGS[:1], 1)
    base = AutoModelForCausalLM.from_pretrained(run).eval()
    student = distil(policy, [(ids, reply)], Plain(steps=80, batch_size=1, learning_rate=3e-2, layers=None, rounds=1))
    assert distance(run, base, ids, temperature) > 0.1 and distance(run, student, ids, temperature) < 1e-4
    assert temperature == 1.0 or distance(run, student, ids, 1.0) > 0.01  # another temperature is another policy
    assert not any(name.startswith("value_heads") for name in student.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())


@pytest.fixture
def few(monkeypatch):
    """Bounds are measured on a few replies."""
    monkeypatch.setattr(distill, "MEASURED", 8)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_distilled_weights_are_read_back_by_the_plain_class(tmp_path, few, family):
    run = with_data(valued_run(tmp_path / "run", "mlp", SPECS[family], max_new_tokens=4, **FORM))
    settings = Plain(steps=3, batch_size=3, rounds=2, layers=1)
    report = export_run(run, tmp_path / "out", settings, held_out=HeldOut(PROMPTS), force=True)
    assert ", distilled into the weights in 3 steps, because it does not fold exactly\nnear: KL(" in str(report)
    base = AutoModelForCausalLM.from_pretrained(run)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.tie_word_embeddings == base.config.tie_word_embeddings
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    norm = {"gpt2": "transformer.ln_f", "qwen3": "model.norm"}[family]
    assert changed and all(".1." in name or name.startswith(norm) for name in changed)  # the last of two layers
    config = model.generation_config
    assert (config.temperature, config.do_sample, config.min_p, config.top_k) == (0.7, True, None, 0)
    numbers = {row["name"]: row for row in json.loads((tmp_path / "out" / "export.json").read_text())["rows"]}
    assert numbers[IDENTICAL]["met"] is None and LOG_PROB not in numbers
    assert numbers["KL(run ‖ export) per token"]["met"] is False


def test_an_adapter_is_merged_before_its_run_is_distilled():
    peft = pytest.importorskip("peft")
    model = add_value_heads(build_model(SPECS["qwen3"], TOKENIZER), ValueHeadsConfig("mlp"))
    model = peft.get_peft_model(shaken(model), peft.LoraConfig(target_modules=["q_proj"], r=2))
    policy = LanguagePolicy(shaken(model).eval(), RENDERER, DecodingConfig(**FORM, max_new_tokens=4))
    texts = logged_texts(policy, LOGS, 5)
    student = distil(policy, texts, Plain(steps=1, batch_size=1, learning_rate=1e-9))
    ids = torch.tensor([texts[0][0]])
    with torch.no_grad():
        assert_close(student(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in student.state_dict())


def test_an_export_outside_its_bounds_is_not_written(tmp_path, few):
    run = with_data(valued_run(tmp_path / "run", "mlp", max_new_tokens=4, **FORM))
    with pytest.raises(InputError, match=r"^export: found KL\(run ‖ export\) per token .*--force writes it all the"):
        export_run(run, tmp_path / "out", Plain(steps=1), held_out=HeldOut(PROMPTS))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_guidance_is_distilled_within_its_bounds(tmp_path, capsys):
    words = ["at", "left", "right", "move", "go", "you", "are", "up", "1", "2"]  # an interval needs several prompts
    rows = [Trajectory((Turn("user", word), Turn("assistant", "go", reward=1.0))) for word in words]
    run = with_data(valued_run(tmp_path / "run", max_new_tokens=3, **LIKE_FOLDED | {"temperature": 0.7}), rows)
    settings = "{steps: 400, batch_size: 10, learning_rate: 1.0e-2, layers: null, rounds: 4}"
    assert main(["export", str(run), "--output", str(tmp_path / "out"), "--form", settings]) == 0
    out = capsys.readouterr().out
    assert "KL(run ‖ export) per token" in out and "NOT MET" not in out
    assert distance(run, plain(tmp_path / "out")[0], prompt_of([rows[0].turns[0]]), 0.7) < 0.03


def test_sampled_rewards_and_q_are_bounded_by_the_spread_of_the_run():
    def met(low, high, name=REWARD, n=50):
        return bounded_distilled(Row(name, 1.0, 1.0, ((low + high) / 2, low, high), 1.0, n))

    for name in (REWARD, Q_PER_TOKEN):
        assert met(-0.04, 0.05, name).met is True
        assert met(0.06, 0.3, name).met is False
    wide = met(-0.1, 0.1)
    assert wide.met is None and wide.bound.endswith("to tell takes about 200 prompts")  # half the width twice
    assert wide.cells()[-1] == "UNDECIDED"
    unknown = met(-math.inf, math.inf, n=1)
    assert unknown.met is None and unknown.bound.endswith("standard deviation")
    assert met(-0.1, 0.1, Q_PER_TOKEN).bound == ""  # the expected Q per token decides
    assert bounded_distilled(Row("tokens per reply", 1.0, 2.0)) == Row("tokens per reply", 1.0, 2.0)


def test_logged_replies_are_those_of_every_agent_turn_cut_to_the_longest_reply(tmp_path):
    policy = LanguagePolicy.load(valued_run(tmp_path / "run", "mlp", **FORM), device="cpu", max_new_tokens=2)
    turns = (Turn("user", "at"), Turn("assistant", "move left"), Turn("user", "up"), Turn("assistant", "go"))
    found = logged_texts(policy, [Trajectory(turns)], 5)
    assert sorted(len(reply) for _, reply in found) == [2, 2]
    expected = [prompt_of(turns[:1]), prompt_of(turns[:3])]
    assert sorted(list(prompt) for prompt, _ in found) == sorted(expected)


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match="^form.steps: found 0, expected at least 1"):
        Plain(steps=0)
    with pytest.raises(InputError, match="^form.layers: found 0"):
        Plain(layers=0)
