"""A reward model of each family reads what the plain classification class would."""

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.errors import InputError
from offline_lmrl.models.reward_model import build_reward_model, head_of, load_reward_model, rescale_head
from offline_lmrl.tokens.tokenizers import train_tokenizer
from tests.tiny_models import FAMILIES

TOKENIZER = train_tokenizer(["a b c"], 280)
IDS = torch.randint(10, 250, (2, 7), generator=torch.Generator().manual_seed(0))
IDS[1, 4:] = 0  # padding, as the tokenizer has it
MASK = IDS != 0
LAST = torch.tensor([6, 3])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "opt"])
def test_a_terminal_head_equals_the_plain_class_on_padded_rows(family):
    torch.manual_seed(0)
    model = build_reward_model({"model_type": family, **FAMILIES[family]}, TOKENIZER, "terminal").eval()
    with torch.no_grad():
        read = torch.arange(7) == LAST.unsqueeze(1)
        found = model(input_ids=IDS, attention_mask=MASK, read=read)
        assert_close(found, model(input_ids=IDS, attention_mask=MASK).logits[:, 0])
        longer = torch.nn.functional.pad(IDS, (0, 3)), torch.nn.functional.pad(MASK, (0, 3))
        more = model(input_ids=longer[0], attention_mask=longer[1], read=torch.nn.functional.pad(read, (0, 3)))
        assert_close(more, found, atol=1e-5, rtol=1e-5)


def test_a_fresh_head_is_as_wide_as_one_over_the_root_of_its_inputs():
    spec = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 1023, "n_positions": 8, "vocab_size": 280}
    head = head_of(build_reward_model(spec, TOKENIZER, "token"))
    # 1 / √1024, with the error of a spread from 1,023 draws
    assert head.weight.std().item() == pytest.approx(1 / 32, rel=0.1) and not head.bias.any()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3"])
def test_a_token_head_sums_what_is_read_and_folding_scales_it(family):
    torch.manual_seed(0)
    model = build_reward_model({"model_type": family, **FAMILIES[family]}, TOKENIZER, "token").eval()
    torch.nn.init.constant_(head_of(model).bias, 0.3)
    read = torch.zeros(2, 7, dtype=torch.bool)
    read[0, [2, 5]] = read[1, 3] = True
    with torch.no_grad():
        per_token = model(input_ids=IDS, attention_mask=MASK).logits[..., 0]
        expected = torch.stack([per_token[0, 2] + per_token[0, 5], per_token[1, 3]])
        assert_close(model(input_ids=IDS, attention_mask=MASK, read=read), expected)
        rescale_head(model, 3.0, 0.25)
        assert_close(model(input_ids=IDS, attention_mask=MASK, read=read), 3 * expected)
    assert model.config.offline_lmrl["reward"] == {"bias": 0.25, "head": "token"}


def test_a_plain_classifier_is_a_terminal_reward_model_and_other_folders_are_none(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=280, num_labels=1)
    plain = GPT2ForSequenceClassification(config).eval()
    plain.save_pretrained(tmp_path / "plain")
    found = load_reward_model(tmp_path / "plain").eval()
    assert torch.equal(head_of(found).weight, plain.score.weight)
    assert found.config.offline_lmrl["reward"] == {"bias": 0.0, "head": "terminal"}
    config.num_labels = 2
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "two")
    with pytest.raises(InputError, match="two: found a classifier with 2 labels, expected one label"):
        load_reward_model(tmp_path / "two")
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "policy")
    with pytest.raises(InputError, match="policy: found no reward model .GPT2LM.*: value_heads, run: .*policy}'"):
        load_reward_model(tmp_path / "policy")
    with pytest.raises(InputError, match="nothing: found no such folder, expected the folder or hub name of a model"):
        load_reward_model(tmp_path / "nothing")
    weights = tmp_path / "plain" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="plain: found a folder whose model cannot be read .*not fully covered"):
        load_reward_model(tmp_path / "plain")
