"""Models that read a row otherwise in a batch, with padding or from a cache are refused; all others are not."""

import pytest
import torch

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.probe import check_plays, check_scores, check_trains
from offline_lmrl.errors import InputError
from offline_lmrl.models.guided import as_guided
from offline_lmrl.models.reward_model import build_reward_model
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer
from tests.families import small_model
from tests.tiny_models import FAMILIES, guided_model

TOKENIZER = train_tokenizer(["left right up down"], 300)
RENDERER = Renderer(TOKENIZER, "auto")


@pytest.mark.parametrize("family", ["bamba", "gemma3", "mamba", "mamba2", "mistral", "qwen3_next", "xglm"])
def test_models_that_read_alike_pass(family):
    model = as_guided(small_model(family)).train()
    check_trains(model, RENDERER)
    check_plays(model, RENDERER)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("family", "check", "found"),
    [
        ("roberta", check_plays, "found RobertaForCausalLM, whose outputs in a batch with a cache differ by up to"),
        ("bart", check_plays, "found BartForCausalLM, whose outputs in a batch with a cache differ by up to"),
        ("recurrent_gemma", check_plays, "found RecurrentGemmaForCausalLM, whose outputs in a batch with a cache"),
        ("cpmant", check_trains, "found CpmAntForCausalLM, whose outputs in a batch differ by up to"),
        ("reformer", check_trains, "found ReformerModelWithLMHead, which fails on a test text .*sequence length 11"),
        ("minimax", check_plays, "found MiniMaxForCausalLM, which fails on a test text .*cache of its own"),
    ],
)
def test_models_that_do_not_are_named(family, check, found):
    torch.manual_seed(1)  # with some weights CPM-Ant's padding changes nothing that can be measured
    model = as_guided(small_model(family))
    with pytest.raises(InputError, match=f"^model: {found}"):
        check(model, RENDERER)


def test_a_model_that_reads_both_ways_is_refused(tmp_path):
    model = small_model("bert")
    model.config.is_decoder = False
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="found BertLMHeadModel, "):
        LanguagePolicy.load(tmp_path)


def test_weights_that_are_no_numbers_are_refused():
    model = as_guided(small_model("llama"))
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(InputError, match="differ by up to nan from"):
        check_trains(model, RENDERER)


def test_tokens_that_a_model_never_says_are_no_difference():
    model = as_guided(small_model("llama"))
    never = torch.tensor([7])
    model.lm_head.register_forward_hook(lambda module, args, output: output.index_fill(-1, never, -torch.inf))
    check_trains(model, RENDERER)
    check_plays(model, RENDERER)


def test_of_several_processes_on_a_machine_the_first_looks(monkeypatch):
    model = as_guided(small_model("roberta"))
    monkeypatch.setenv("LOCAL_RANK", "1")  # its weights may not have been read yet
    check_plays(model, RENDERER)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError):
        check_plays(model, RENDERER)


def test_reward_models_are_read_in_batches():
    model = build_reward_model({"model_type": "llama", **FAMILIES["llama"]}, TOKENIZER, "token")
    check_scores(model, RENDERER)
    model.model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] + args[0].mean((0, 1)), *args[1:]))
    with pytest.raises(InputError, match="found LlamaForTokenClassification, whose outputs in a batch differ"):
        check_scores(model, RENDERER)


def test_heads_wider_than_the_decoder_say_so():
    model = guided_model("opt")
    with pytest.raises(InputError, match="a decoder with hidden states of width 16 before an LM head of width 8"):
        model.v_values(torch.zeros(1, 16))
