"""A LoRA trunk under trained heads: what trains, what is saved, what comes back."""

import copy
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from offline_lmrl.errors import InputError
from offline_lmrl.models.adapters import save_heads, unfreeze_heads
from offline_lmrl.models.guided import add_value_heads, remove_heads
from offline_lmrl.models.loading import load_model
from offline_lmrl.models.value_heads import ValueHeads, ValueHeadsConfig
from tests.tiny_models import guided_model, packed_of, tiny_batch, tiny_model

peft = pytest.importorskip("peft")
CASES = [("gpt2", "tied"), ("llama", "linear"), ("gemma2", "mlp"), ("cohere", "tied")]


def with_lora(model, **options):
    options = {"target_modules": "all-linear", "r": 2, "task_type": "CAUSAL_LM"} | options
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    unfreeze_heads(model)
    return model


def train_one_step(model):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    packed = packed_of(model, tiny_batch(), windows=2, conservative=True)
    loss = sum(packed[name].square().sum() for name in ("log_prob", "q", "v", "logsumexp_q"))
    loss.backward()
    optimizer.step()
    model.update_targets(0.5)


@pytest.mark.parametrize("family, kind", CASES)
def test_adapter_and_heads_train_are_saved_and_come_back(family, kind, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "base")
    model = with_lora(load_model(tmp_path / "base", value_heads=ValueHeadsConfig(kind, initial_value=0.5)))
    model.config.offline_lmrl["decoding"] = {"beta": 1.5}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_one_step(model)
    train_one_step(model)  # LoRA's second matrix starts at zero, so the first moves only now
    for name, parameter in model.named_parameters():
        moves = "lora_" in name or "value_heads" in name and "hidden_" not in name
        still = "lora_" not in name and "value_heads" not in name
        assert not moves or not torch.equal(parameter, before[name]), name
        assert not still or torch.equal(parameter, before[name]), name
        assert parameter.requires_grad == ("lora_" in name or "value_heads" in name and "target" not in name), name

    model.save_pretrained(tmp_path / "run")
    save_heads(model, tmp_path / "run")
    loaded = load_model(tmp_path / "run")
    assert loaded.config.offline_lmrl == model.config.offline_lmrl
    expected = packed_of(model.eval(), tiny_batch())
    for name, values in packed_of(loaded.eval(), tiny_batch()).items():
        assert torch.equal(values, expected[name]), name
    for (name, parameter), other in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert parameter.requires_grad == other.requires_grad, name
    train_one_step(loaded)

    inputs = {"input_ids": torch.tensor([[4, 9, 30]]), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(load_model(tmp_path / "run").generate(**inputs), model.generate(**inputs, beta=1.5))
    _, hidden = model.forward_with_hidden(input_ids=inputs["input_ids"])
    assert model.q_values(hidden).shape[0] == 2 and model.v_values(hidden).shape == (1, 3)


def test_the_base_class_loads_the_adapter_folder_as_the_plain_policy(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = with_lora(load_model(tmp_path / "base", value_heads=ValueHeadsConfig()))
    train_one_step(model)
    model.save_pretrained(tmp_path / "run")
    save_heads(model, tmp_path / "run")
    ids = tiny_batch()["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert_close(plain(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_lora_never_lands_on_a_head():
    model = with_lora(guided_model(kind="mlp", utterance=True))
    names = [name for name, _ in model.named_modules() if "lora_A" in name]
    assert names and not any("value_heads" in name for name in names)
    assert isinstance(model.value_heads, ValueHeads)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_packed_outputs_survive_a_trained_copy_of_the_lm_head(family):
    model = with_lora(guided_model(family, "linear"), modules_to_save=["lm_head"])
    batch = tiny_batch()
    expected = packed_of(guided_model(family, "linear"), batch)
    for name, values in packed_of(model, batch).items():
        assert_close(values, expected[name], msg=name)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)  # the copy that is trained
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    steps = batch["steps"]
    dense = logits.log_softmax(-1)[steps["row"], steps["state"], steps["action"]]
    assert_close(packed_of(model, batch)["log_prob"], dense)
    copied = copy.deepcopy(model)
    assert torch.equal(packed_of(copied, batch)["q"], packed_of(model, batch)["q"])


def test_a_tied_head_reads_the_copy_of_the_lm_head_that_is_trained():
    model = with_lora(guided_model("llama", "tied"), modules_to_save=["lm_head"])
    _, hidden = model.forward_with_hidden(input_ids=torch.tensor([[4, 9, 30]]))
    before = model.q_values(hidden)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] += 1.0
    after = model.q_values(hidden)
    changed = (after - before).abs().amax((0, 1, 2)) > 0
    assert changed.nonzero().flatten().tolist() == [7]


def test_heads_as_a_module_to_save_are_refused():
    with pytest.raises(InputError, match="lora.modules_to_save: found value_heads"):
        with_lora(guided_model(), modules_to_save=["value_heads"])


def test_a_policy_without_heads_needs_no_heads_file(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    policy = load_model(tmp_path / "base")
    policy.config.offline_lmrl = {"algorithm": "bc"}
    model = with_lora(policy)
    model.save_pretrained(tmp_path / "run")
    save_heads(model, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if "heads" in path.name) == []
    loaded = load_model(tmp_path / "run")
    assert loaded.value_heads is None and loaded.config.offline_lmrl == {"algorithm": "bc"}


def test_heads_go_on_the_model_inside_an_adapter_and_come_back(tmp_path):
    guided_model(kind="linear").save_pretrained(tmp_path / "base")
    policy = with_lora(remove_heads(load_model(tmp_path / "base")))
    policy.save_pretrained(tmp_path / "policy")
    save_heads(policy, tmp_path / "policy")
    loaded = load_model(tmp_path / "policy")
    assert loaded.value_heads is None  # whatever the base model carries
    model = add_value_heads(loaded, ValueHeadsConfig("mlp", initial_value=0.5))
    assert model is loaded and isinstance(model, peft.PeftModel)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_one_step(model)
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert {name.split(".value_heads.")[-1].split(".")[0] for name in moved if "lora_" not in name} == {
        "q",
        "target_q",
        "v",
    }
    assert any("lora_" in name for name in moved)
    model.save_pretrained(tmp_path / "run")
    save_heads(model, tmp_path / "run")
    again = load_model(tmp_path / "run")
    expected = packed_of(model.eval(), tiny_batch())
    for name, values in packed_of(again.eval(), tiny_batch()).items():
        assert torch.equal(values, expected[name]), name


def test_a_missing_heads_file_and_a_missing_base_are_one_line_errors(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = with_lora(load_model(tmp_path / "base", value_heads=ValueHeadsConfig()))
    model.save_pretrained(tmp_path / "run")
    save_heads(model, tmp_path / "run")
    (tmp_path / "run" / "value_heads.safetensors").unlink()
    with pytest.raises(InputError, match="value_heads.safetensors: not found"):
        load_model(tmp_path / "run")
    scratch = with_lora(add_value_heads(tiny_model(), ValueHeadsConfig()))
    scratch.save_pretrained(tmp_path / "scratch")
    save_heads(scratch, tmp_path / "scratch")
    with pytest.raises(InputError, match="names no base model"):
        load_model(tmp_path / "scratch")


def test_without_peft_a_lora_folder_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "offline_lmrl.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'offline_lmrl\[peft\]'"):
        load_model(tmp_path)


def test_an_adapter_of_another_library_plays_and_heads_without_their_metadata_are_refused(tmp_path):
    base = tiny_model("gpt2")
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False),
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 2, 3]])
    assert_close(load_model(tmp_path / "adapter").eval()(input_ids=ids).logits, adapted(input_ids=ids).logits)
    (tmp_path / "adapter" / "value_heads.safetensors").touch()
    with pytest.raises(InputError, match="offline_lmrl.json: not found, but it describes value_heads.safetensors"):
        load_model(tmp_path / "adapter")
