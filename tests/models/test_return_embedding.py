"""Reserved ids in every family: what they read, what stays as it was, and what comes back from disk."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.adapters import save_heads, unfreeze_heads
from offline_lmrl.models.guided import add_returns, add_value_heads, as_guided, remove_heads
from offline_lmrl.models.loading import load_model
from offline_lmrl.models.return_embedding import ReturnEmbedding
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tokens.conditioning import ReturnScale
from tests.tiny_models import FAMILIES, VOCABULARY, packed_of, tiny_batch, tiny_model

LOGS = [Trajectory((Turn("user", "at"), Turn("assistant", "go", reward=float(r)))) for r in range(4)]
BLOCK = {"condition": "embedding", "bins": 4, "discount_per_turn": 1.0, "scale": ReturnScale.fit(LOGS).to_dict()}
NULL = VOCABULARY
REWARDS = torch.tensor([[NULL + 1, 5, 9, NULL + 4, 7, 30]])


def conditioned(family="gpt2", heads=None):
    model = as_guided(tiny_model(family)) if heads is None else add_value_heads(tiny_model(family), heads)
    return add_returns(model, BLOCK).eval()


def conditioned_batch():
    """`tiny_batch` with a return in the prompt of each row."""
    batch = tiny_batch()
    batch["input_ids"][:, 0] = torch.tensor([NULL + 2, NULL + 4])
    return batch


def test_bins_are_sums_of_small_steps_from_one_base():
    table = ReturnEmbedding(3, 2)
    with torch.no_grad():
        table.null.copy_(torch.tensor([9.0, 9.0]))
        table.base.copy_(torch.tensor([1.0, 0.0]))
        table.delta.copy_(torch.tensor([[0.5, 0.0], [0.25, 1.0]]))
    assert table.rows().tolist() == [[9.0, 9.0], [1.0, 0.0], [1.5, 0.0], [1.75, 1.0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_that_nothing_refers_to_changes_no_bit(family):
    plain, model, batch = tiny_model(family), conditioned(family), tiny_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model(batch["input_ids"]).logits, plain(batch["input_ids"]).logits)
    assert torch.equal(packed_of(model, batch)["log_prob"], packed_of(as_guided(plain), batch)["log_prob"])


@pytest.mark.parametrize("family", FAMILIES)
def test_reserved_ids_read_their_rows_and_are_never_emitted(family):
    model = conditioned(family)
    embedding = model.get_input_embeddings()
    expected = embedding(REWARDS.clamp(max=VOCABULARY - 1)).detach()
    expected[0, 0], expected[0, 3] = model.return_embedding.rows()[1], model.return_embedding.rows()[4]
    logits = model(input_ids=REWARDS).logits
    assert_close(logits, tiny_model(family)(inputs_embeds=expected).logits)
    assert logits.shape[-1] == VOCABULARY
    # fresh rows look like the model's own, whatever the family makes of its embeddings on the way
    own = embedding(torch.arange(VOCABULARY))
    assert_close(model.return_embedding.null, own.mean(0))
    assert (model.return_embedding.rows().norm(dim=-1) < 2 * own.norm(dim=-1).mean()).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_steps_caches_and_generate_read_the_rows_too(family):
    model, batch = conditioned(family), conditioned_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    steps = batch["steps"]
    logits = model(**inputs).logits.log_softmax(-1)
    assert_close(packed_of(model, batch)["log_prob"], logits[steps["row"], steps["state"], steps["action"]])
    first = model(input_ids=REWARDS[:, :3], use_cache=True)
    rest = model(input_ids=REWARDS[:, 3:], past_key_values=first.past_key_values)
    assert_close(rest.logits, model(input_ids=REWARDS).logits[:, 3:], atol=1e-4, rtol=0)
    written = model.generate(REWARDS, do_sample=False, max_new_tokens=3, eos_token_id=None)[0].tolist()
    for n in range(6, 9):
        assert written[n] == int(model(input_ids=torch.tensor([written[:n]])).logits[0, -1].argmax())


def test_padding_and_the_order_of_rows_change_no_loss():
    model, batch = conditioned(), conditioned_batch()
    expected = packed_of(model, batch)["log_prob"]
    padded = tiny_batch(padding=3) | {"steps": batch["steps"]}
    padded["input_ids"][:, 0] = batch["input_ids"][:, 0]
    assert_close(packed_of(model, padded)["log_prob"], expected)
    swapped = {name: batch[name].flip(0) for name in ("input_ids", "attention_mask")}
    swapped["steps"] = batch["steps"] | {"row": 1 - batch["steps"]["row"]}
    assert_close(packed_of(model, swapped)["log_prob"], expected)


def test_values_of_extra_rows_read_the_rows_of_returns():
    model, batch = conditioned(heads=ValueHeadsConfig("mlp")), conditioned_batch()
    torch.nn.init.normal_(model.value_heads.v.weight)
    everything = packed_of(model, batch)
    batch["steps"] |= {"next_row": torch.ones(7, dtype=torch.long), "next_state": torch.full((7,), 3)}
    alone = {name: index[batch["steps"]["row"] == 0] for name, index in batch["steps"].items()}
    packed = packed_of(model, batch | {"steps": alone}, windows=1)
    _, hidden = model.forward_with_hidden(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert_close(packed["next_v"], model.v_values(hidden[1, 3]).expand(4))
    assert_close(packed["log_prob"], everything["log_prob"][:4])


def test_condition_dropout_makes_whole_rows_null_in_training_only():
    model, batch = conditioned(), conditioned_batch()
    as_null = batch | {"input_ids": batch["input_ids"].clamp(max=NULL)}
    told, null = packed_of(model, batch)["log_prob"], packed_of(model, as_null)["log_prob"]
    assert not torch.isclose(told, null).any()
    assert torch.equal(packed_of(model, batch, condition_dropout=1.0)["log_prob"], told)
    model.train()
    assert torch.equal(packed_of(model, batch, condition_dropout=1.0)["log_prob"], null)
    torch.manual_seed(0)
    row = batch["steps"]["row"]
    kinds = set()
    for _ in range(20):
        log_prob = packed_of(model, batch, condition_dropout=0.5)["log_prob"]
        dropped = torch.isclose(log_prob, null)
        assert_close(log_prob, torch.where(dropped, null, told))
        assert all(len(set(dropped[row == r].tolist())) == 1 for r in (0, 1))
        kinds.add((bool(dropped[0]), bool(dropped[-1])))
    assert len(kinds) == 4  # rows are drawn one by one


def test_all_rows_of_the_table_learn():
    model = conditioned()
    batch = conditioned_batch()
    batch["input_ids"][1, 1] = NULL
    packed_of(model, batch)["log_prob"].sum().backward()
    for name, parameter in model.return_embedding.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    # bin 2 of 0..3 is the highest that a row shows below the top: its step is in both sums, the last in one
    assert (model.return_embedding.delta.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_comes_back_from_disk_and_the_base_class_loads_the_rest(family, tmp_path):
    model = conditioned(family, ValueHeadsConfig("linear"))
    torch.nn.init.normal_(model.return_embedding.null)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).eval()
    assert loaded.config.offline_lmrl["returns"] == BLOCK
    assert torch.equal(loaded(input_ids=REWARDS).logits, model(input_ids=REWARDS).logits)
    ids = REWARDS.clamp(max=9)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    assert_close(copy.deepcopy(loaded)(input_ids=REWARDS).logits, model(input_ids=REWARDS).logits)
    detached = remove_heads(loaded)
    assert detached.return_embedding is None and "returns" not in detached.config.offline_lmrl


def test_a_larger_vocabulary_moves_the_reserved_ids_behind_it():
    model = conditioned()
    before = model(input_ids=REWARDS).logits
    model.resize_token_embeddings(VOCABULARY + 7)
    moved = torch.where(REWARDS >= NULL, REWARDS + 7, REWARDS)
    assert_close(model(input_ids=moved).logits[..., :VOCABULARY], before)


def test_the_table_stays_in_fp32_under_a_cast_model():
    model = conditioned().to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.return_embedding.parameters())
    assert model(input_ids=REWARDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_lora_trains_the_table_in_full_and_merging_keeps_it(family, tmp_path):
    peft = pytest.importorskip("peft")
    tiny_model(family).save_pretrained(tmp_path / "base")
    model = conditioned_lora(peft, tmp_path / "base")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    fresh = model.return_embedding.rows().detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        packed_of(model, conditioned_batch())["log_prob"].sum().backward()
        optimizer.step()
    assert not torch.equal(model.return_embedding.rows(), fresh)
    model.save_pretrained(tmp_path / "run")
    save_heads(model, tmp_path / "run")
    assert (tmp_path / "run" / "return_embedding.safetensors").exists()
    expected = model.eval()(input_ids=REWARDS).logits
    loaded = load_model(tmp_path / "run").eval()
    assert torch.equal(loaded(input_ids=REWARDS).logits, expected)
    assert all(p.requires_grad for p in loaded.return_embedding.parameters())
    merged = loaded.merge_and_unload()
    assert_close(merged(input_ids=REWARDS).logits, expected, atol=1e-4, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(load_model(tmp_path / "merged").eval()(input_ids=REWARDS).logits, expected, atol=1e-4, rtol=0)


def conditioned_lora(peft, folder):
    model = add_returns(load_model(folder), BLOCK)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
    unfreeze_heads(model)
    return model
