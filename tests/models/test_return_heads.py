"""Return heads by hand: bins, what they are read from, and that a condition keeps them from learning."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.models.adapters import save_heads, unfreeze_heads
from offline_lmrl.models.guided import add_return_heads, add_returns, as_guided, remove_heads
from offline_lmrl.models.loading import load_model
from offline_lmrl.models.return_heads import BinHead, fit_bins
from tests.models.test_return_embedding import BLOCK, NULL
from tests.tiny_models import FAMILIES, packed_of, tiny_batch, tiny_model

BINS = {
    "returns": {"edges": [0.5], "means": [0.0, 1.0]},
    "reward": {"edges": [0.1, 0.5], "means": [0.0, 0.3, 1.0]},
    "after": {"edges": [], "means": [0.0]},
    "ended": {"edges": [0.5], "means": [0.0, 1.0]},
    "discount_per_turn": 1.0,
}


def with_heads(family="gpt2"):
    model = add_return_heads(add_returns(as_guided(tiny_model(family)), BLOCK), BINS).eval()
    for parameter in model.return_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def turns_batch(told):
    """`tiny_batch` with a return id at the start of each row; its turns close with steps 1, 3 and 6 and open in states
    (0,1), (0,5), (1,2). They pay .3, 1 and 0; the first row ends with its episode, the second is cut."""
    batch = tiny_batch()
    batch["input_ids"][:, 0] = torch.tensor(told)
    batch["steps"] |= {
        "reward": torch.tensor([0.0, 0.3, 0.0, 1.0, 0.0, 0.0, 0.0]),
        "return_to_go": torch.tensor([1.3, 1.3, 1.0, 1.0, 0.0, 0.0, 0.0]),
        "discount": torch.ones(7),
        "bootstrap": torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]),
        "has_target": torch.ones(7, dtype=torch.bool),
    }
    return batch


def test_few_values_get_a_bin_each_and_many_get_equal_widths_without_empty_ones():
    assert fit_bins(np.array([0.0, 1.0, 0.3, 0.3]), 3) == {"edges": [0.15, 0.65], "means": [0.0, 0.3, 1.0]}
    assert fit_bins(np.array([2.0, 2.0]), 3) == {"edges": [], "means": [2.0]}
    # of 0-2.5, 2.5-5, 5-7.5 and 7.5-10 the third is empty; edges half-way from 2 to 3 and from 3 to 9
    fitted = fit_bins(np.array([0.0, 1.0, 2.0, 3.0, 9.0, 10.0]), 4)
    assert fitted == {"edges": [2.5, 6.0], "means": [1.0, 3.0, 9.5]}
    # in fp32 .7 - .1 and .6 are two numbers: they share a bin
    pair = np.array([0.7, 0.6], dtype=np.float32) - np.array([0.1, 0.0], dtype=np.float32)
    assert pair[0] != pair[1] and fit_bins(pair, 3)["edges"] == []


def test_a_number_is_the_mean_of_its_bins_and_all_are_equally_likely_at_first():
    head = BinHead({"edges": [0.5, 1.5], "means": [0.0, 1.0, 4.0]}, 2)
    head.reset()
    hidden = torch.randn(2, 2)
    assert_close(head.mean(hidden), torch.full((2,), 5 / 3))
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.5, 0.25, 0.25]).log())
    assert_close(head.mean(hidden), torch.full((2,), 1.25))
    # an edge belongs to the bin above it; values outside belong to the outermost bins
    values = torch.tensor([-9.0, 0.49, 0.5, 1.5, 9.0])
    expected = torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25]).log()
    assert_close(head.log_prob(hidden[:1].expand(5, 2), values), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_returns_are_read_before_a_turn_and_the_rest_behind_its_last_token(family):
    model, batch = with_heads(family), turns_batch([NULL, NULL])
    packed = packed_of(model, batch)
    _, hidden = model.forward_with_hidden(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    opening, closing = (
        torch.stack([hidden[r, s] for r, s in places])
        for places in ([(0, 1), (0, 5), (1, 2)], [(0, 3), (0, 7), (1, 5)])
    )
    heads, expected = model.return_heads, 0.0
    for name, states, values in (
        ("returns", opening, [1.3, 1.0, 0.0]),
        ("reward", closing, [0.3, 1.0, 0.0]),
        ("after", closing, [1.0, 0.0, 0.0]),
        ("ended", closing, [0.0, 1.0, 0.0]),
    ):
        expected = expected + getattr(heads, name).log_prob(states, torch.tensor(values))
    assert_close(packed["outcome_log_prob"], expected)
    assert packed["outcome_mask"].tolist() == [True, True, True]


def test_turns_under_a_condition_or_without_a_target_do_not_count():
    model, batch = with_heads(), turns_batch([NULL + 2, NULL])
    assert packed_of(model, batch)["outcome_mask"].tolist() == [False, False, True]
    batch["steps"]["has_target"][6] = False
    assert not packed_of(model, batch)["outcome_mask"].any()
    model.train()
    dropped = packed_of(model, turns_batch([NULL + 2, NULL + 1]), condition_dropout=1.0)["outcome_mask"]
    assert dropped.all()


def test_replies_of_the_environment_are_scored_beside_the_steps():
    model, batch = with_heads(), turns_batch([NULL, NULL])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    where = {"row": torch.tensor([0, 0]), "state": torch.tensor([3, 4])}
    packed = packed_of(model, batch, environment=where)
    assert_close(packed["environment_log_prob"], logits[0, [3, 4], batch["input_ids"][0, [4, 5]]])
    assert_close(packed["log_prob"], packed_of(model, batch)["log_prob"])


def test_heads_change_no_logit_and_leave_with_their_block():
    model, batch = with_heads(), turns_batch([NULL, NULL])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model(**inputs).logits
    detached = remove_heads(with_heads())
    assert detached.return_heads is None and "return_heads" not in detached.config.offline_lmrl
    model.return_heads = None
    assert torch.equal(model(**inputs).logits, expected)


def test_heads_come_back_from_disk_in_fp32(tmp_path):
    model = with_heads()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    assert loaded.config.offline_lmrl["return_heads"] == BINS
    for name, weight in model.return_heads.state_dict().items():
        assert loaded.return_heads.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.return_heads.state_dict()[name], weight)


def test_heads_beside_an_adapter_are_trained_and_saved(tmp_path):
    peft = pytest.importorskip("peft")
    base = as_guided(tiny_model())
    base.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    model.name_or_path = model.config._name_or_path = str(tmp_path / "base")
    add_return_heads(add_returns(model, BLOCK), BINS)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"]))
    unfreeze_heads(adapted)
    assert all(p.requires_grad for p in model.return_heads.parameters())
    torch.nn.init.normal_(model.return_heads.reward.weight)
    adapted.save_pretrained(tmp_path / "lora")
    save_heads(adapted, tmp_path / "lora")
    loaded = load_model(tmp_path / "lora")
    assert torch.equal(loaded.return_heads.reward.weight, model.return_heads.reward.weight)
