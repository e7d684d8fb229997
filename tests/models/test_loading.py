"""Guided models come back from disk as they were, and the base class reads the same folder as the plain policy."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from offline_lmrl.errors import InputError
from offline_lmrl.models.guided import add_value_heads, as_guided, guided_class, remove_heads
from offline_lmrl.models.loading import build_model, load_model
from offline_lmrl.models.value_heads import ValueHeadsConfig
from tests.families import small_model
from tests.tiny_models import FAMILIES, VOCABULARY, guided_model, packed_of, tiny_batch, tiny_model

KINDS = ["tied", "linear", "mlp"]
CASES = [(family, "tied") for family in FAMILIES] + [("gpt2", "linear"), ("llama", "mlp")]


class Tokenizer:
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __len__(self):
        return VOCABULARY


def logits(model):
    batch = tiny_batch()
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def assert_targets_frozen(model, equal):
    heads = model.value_heads
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("target" not in name), name
    for online, target in zip(heads.q.parameters(), heads.target_q.parameters(), strict=True):
        assert torch.equal(online, target) == equal
        assert online.data_ptr() != target.data_ptr()


@pytest.mark.parametrize("family, kind", CASES)
def test_save_and_load_gives_the_same_model(family, kind, tmp_path):
    model = guided_model(family, kind, utterance=True)
    model.config.offline_lmrl |= {"decoding": {"beta": 2.0, "clip": None}, "reward_scale": {"shift": 1.0}}
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.offline_lmrl == model.config.offline_lmrl
    saved = model.state_dict()
    assert saved.keys() == loaded.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    assert_targets_frozen(loaded, equal=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_class_loads_a_guided_folder_as_the_plain_policy(family, tmp_path):
    guided_model(family).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(tiny_model(family))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(plain).__name__]
    assert torch.equal(logits(plain), logits(tiny_model(family)))


@pytest.mark.parametrize("kind", KINDS)
def test_targets_start_equal_and_frozen_however_heads_are_made(kind, tmp_path):
    config = ValueHeadsConfig(kind, initial_value=0.25, utterance=True)
    tiny_model().save_pretrained(tmp_path)
    attached = add_value_heads(tiny_model(), config)
    loaded = load_model(tmp_path, value_heads=config)
    small = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
    from_scratch = add_value_heads(build_model(small, Tokenizer()), config)
    named = AutoConfig.from_pretrained(tmp_path)
    named.offline_lmrl = attached.config.offline_lmrl
    by_class = guided_class(type(tiny_model())).from_pretrained(tmp_path, config=named)
    constructed = guided_class(type(tiny_model()))(named)
    for model in (attached, loaded, from_scratch, by_class, constructed, copy.deepcopy(attached)):
        assert_targets_frozen(model, equal=True)
        packed = packed_of(model, tiny_batch())
        for name in ("q", "target_q", "v", "next_v", "utterance_q", "utterance_v"):
            assert_close(packed[name], torch.full_like(packed[name], 0.25), atol=1e-3, rtol=0)
        assert model.config.offline_lmrl["value_heads"]["initial_value"] == 0.25


def test_a_tied_head_knows_the_scale_of_the_lm_head_however_it_is_made(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for model in (
        add_value_heads(tiny_model(), ValueHeadsConfig()),
        load_model(tmp_path, value_heads=ValueHeadsConfig()),
    ):
        expected = 1 / model.lm_head.weight.square().sum(1).mean().sqrt()
        assert_close(model.value_heads.q.row_scale, expected)
        assert_close(model.value_heads.target_q.row_scale, expected)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        model.update_targets(0.005)
        assert_close(model.value_heads.q.row_scale, expected / 2)


@pytest.mark.parametrize("missing", ["target_q", "utterance_target_q"])
def test_targets_that_are_not_on_disk_are_copied_from_the_online_heads(missing, tmp_path):
    model = guided_model(kind="mlp", utterance=True)
    model.save_pretrained(tmp_path)
    tensors = {name: t for name, t in load_file(tmp_path / "model.safetensors").items() if "target" not in name}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_targets_frozen(load_model(tmp_path), equal=True)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_fp32_in_a_bf16_model(kind, tmp_path):
    guided_model(kind=kind, utterance=True).save_pretrained(tmp_path / "guided")
    tiny_model().save_pretrained(tmp_path / "plain")
    fresh = load_model(tmp_path / "plain", value_heads=ValueHeadsConfig(kind), dtype=torch.bfloat16)
    for model in (load_model(tmp_path / "guided", dtype=torch.bfloat16), fresh, guided_model(kind=kind).bfloat16()):
        assert model.lm_head.weight.dtype == torch.bfloat16
        for name, tensor in model.value_heads.state_dict().items():
            assert tensor.dtype == torch.float32, name
        packed = packed_of(model, tiny_batch(), conservative=True)
        assert {values.dtype for name, values in packed.items() if name != "counted"} == {torch.float32}
    reread = load_model(tmp_path / "guided", dtype=torch.bfloat16).value_heads.state_dict()
    for name, tensor in load_model(tmp_path / "guided").value_heads.state_dict().items():
        assert torch.equal(tensor, reread[name]), name


def test_updates_of_targets_are_not_lost_in_a_bf16_model():
    model = guided_model().bfloat16()
    gap = (model.value_heads.q.map - model.value_heads.target_q.map).detach().clone()
    for _ in range(200):
        model.update_targets(0.005)  # .995²⁰⁰ = .36696
    assert_close(model.value_heads.q.map - model.value_heads.target_q.map, 0.36696 * gap, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_copy_is_independent_and_decodes_alike(family):
    model = guided_model(family)
    logits(model)  # leaves nothing behind that cannot be copied
    copied = copy.deepcopy(model)
    batch = tiny_batch()
    before = packed_of(copied, batch)["q"]
    assert_close(before, packed_of(model, batch)["q"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(packed_of(copied, batch)["q"], before)
    assert copied.get_decoder() is not model.get_decoder()
    model.config.offline_lmrl["decoding"] = {"beta": 9.0}
    assert "decoding" not in copied.config.offline_lmrl


@pytest.mark.parametrize("family, kind", CASES)
def test_resizing_the_vocabulary_resizes_the_heads(family, kind, tmp_path):
    model, batch = guided_model(family, kind), tiny_batch()
    before = packed_of(model, batch)
    model.resize_token_embeddings(VOCABULARY + 3)
    after = packed_of(model, batch, conservative=True)
    assert_close(after["v"], before["v"])
    if kind != "tied":  # the scale of a tied head follows the new matrix
        assert_close(after["q"], before["q"])
    _, hidden = model.forward_with_hidden(input_ids=batch["input_ids"])
    assert model.q_values(hidden).shape == (2, 2, 9, VOCABULARY + 3)
    model.save_pretrained(tmp_path)
    assert_close(packed_of(load_model(tmp_path), batch)["q"], after["q"])


def test_detached_heads_leave_the_plain_policy_also_on_disk(tmp_path):
    model = guided_model()
    model.config.offline_lmrl |= {"decoding": {"beta": 2.0}, "template": "plain"}
    assert remove_heads(model) is model and set(packed_of(model, tiny_batch())) == {"log_prob"}
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.value_heads is None and loaded.config.offline_lmrl == {"template": "plain"}
    assert torch.equal(logits(loaded), logits(tiny_model()))


def test_attach_keeps_the_object_and_its_weights():
    plain = tiny_model()
    expected = logits(plain)
    guided = add_value_heads(plain, ValueHeadsConfig())
    assert guided is plain and torch.equal(logits(guided), expected)
    assert type(guided).__name__ == "GuidedGPT2LMHeadModel"
    assert guided_class(type(guided)) is type(guided)
    assert as_guided(guided) is guided and guided.value_heads is not None


def test_a_plain_policy_gets_fresh_heads_and_keeps_its_settings(tmp_path):
    policy = as_guided(tiny_model())
    policy.config.offline_lmrl = {"algorithm": "bc", "window": {"context": 1}}
    policy.save_pretrained(tmp_path)
    assert load_model(tmp_path).value_heads is None
    loaded = load_model(tmp_path, value_heads=ValueHeadsConfig("linear"))
    assert loaded.config.offline_lmrl["window"] == {"context": 1}
    assert loaded.config.offline_lmrl["value_heads"]["kind"] == "linear"


def test_a_folder_without_its_heads_is_never_silently_unguided(tmp_path):
    guided_model().save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)  # keeps the config block, not the heads
    with pytest.raises(InputError, match="config.json names value heads, but value_heads"):
        load_model(tmp_path)


def test_other_heads_than_those_on_disk_are_refused(tmp_path):
    guided_model(kind="tied").save_pretrained(tmp_path)
    load_model(tmp_path, value_heads=ValueHeadsConfig("tied", initial_value=3.0))
    with pytest.raises(InputError, match="value_heads.kind: found 'mlp', but .* has heads with 'tied'"):
        load_model(tmp_path, value_heads=ValueHeadsConfig("mlp"))


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError) as caught:
        load_model(tmp_path / "nothing")
    assert "nothing: found no such folder, expected the folder or hub name of a model" in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 16, "n_head": 2}))
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_that_was_cut_is_one_line(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{tmp_path}: found a folder whose model cannot be read .*not fully covered"):
        load_model(tmp_path)


def test_weights_with_the_names_of_an_old_checkpoint_are_read(tmp_path):
    base = tiny_model("gpt_neox")
    base.save_pretrained(tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")  # as the checkpoints of Pythia
    assert_close(logits(load_model(tmp_path).eval()), logits(base))


def test_a_model_from_scratch_has_its_gelu_in_one_kernel_unless_another_is_named():
    small = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
    named = {**small, "activation_function": "gelu_new"}
    models = []
    for spec in (small, named):
        torch.manual_seed(0)
        models.append(build_model(spec, Tokenizer()).eval())
    assert [model.config.activation_function for model in models] == ["gelu_pytorch_tanh", "gelu_new"]
    assert_close(*map(logits, models), atol=1e-6, rtol=1e-5)


def test_a_model_from_scratch_takes_its_sizes_from_the_tokenizer():
    model = build_model(
        {
            "model_type": "llama",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        },
        Tokenizer(),
    )
    assert model.config.vocab_size == VOCABULARY and model.config.pad_token_id == 0
    assert model.value_heads is None and set(packed_of(model, tiny_batch())) == {"log_prob"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"model_type": "lama"}, "model.scratch.model_type: found 'lama', expected a causal LM"),
        ({"n_layer": 2}, "model.scratch.model_type: found None"),
        ({"model_type": "gpt2", "n_layers": 2}, "model.scratch.n_layers: gpt2 has no such field; did you mean 'n_l"),
        ({"model_type": "gpt2", "n_embd": 16, "n_head": 3}, "model.scratch: "),
        ({"model_type": "t5"}, "model.scratch.model_type: found 't5', expected a causal LM"),
    ],
)
def test_a_wrong_specification_names_its_field(spec, message):
    with pytest.raises(InputError) as caught:
        build_model(spec, Tokenizer())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama4_text", "mllama", "gemma3", "opt", "mamba", "modernbert-decoder"])
def test_the_decoder_is_the_part_whose_output_the_lm_head_reads(family):
    model = as_guided(small_model(family))
    read = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0]))
    ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    _, hidden = model.forward_with_hidden(input_ids=ids)
    between = model.lm_head if family == "modernbert-decoder" else torch.nn.Identity()
    assert torch.equal(read[0], between(hidden))
    assert torch.equal(model.get_decoder()(input_ids=ids)[0], hidden)


def test_a_model_without_a_part_before_its_lm_head_is_refused():
    model = tiny_model()
    model.set_output_embeddings(model.transformer.wte)
    with pytest.raises(InputError, match="found GPT2LMHeadModel, expected a causal LM with a decoder"):
        as_guided(model)


def test_buffers_that_lie_in_no_file_are_the_bases(tmp_path):
    small_model("falcon_h1").save_pretrained(tmp_path)
    plain, guided = AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)
    expected = dict(plain.named_buffers())
    assert expected.keys() - plain.state_dict().keys()
    for name, buffer in guided.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    assert not type(guided).is_custom_code()


def test_the_text_part_of_a_model_for_images_comes_back(tmp_path):
    model = add_value_heads(small_model("mllama"), ValueHeadsConfig())
    model.save_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is type(model)
