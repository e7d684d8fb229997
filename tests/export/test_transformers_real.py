"""A real chat model with an adapter and values as a folder for transformers: 200 greedy replies, token for token."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.export.beside import RunPlayer, Trial
from offline_lmrl.export.playing import GeneratePlayer
from offline_lmrl.export.prompts import HeldOut, Prompts, encode_prompts
from offline_lmrl.export.run import export_run
from offline_lmrl.models.adapters import save_heads, unfreeze_heads
from offline_lmrl.models.loading import load_model
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tasks.support import Support
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import load_tokenizer
from tests.smollm2 import FOLDER, needs_smollm2

PROMPTS, TOKENS = 200, 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the kind that configs/support/ilql.yaml trains, whose adapter and values change replies."""
    peft, folder = pytest.importorskip("peft"), tmp_path_factory.mktemp("real") / "run"
    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(FOLDER), load_model(FOLDER, value_heads=ValueHeadsConfig("tied"))
    form = {"beta": 4.0, "q_reduce": "min", "support": 0.02, "max_new_tokens": TOKENS, "temperature": 0.0}
    model.config.offline_lmrl |= {"algorithm": "ilql", "tokenizer": Renderer(tokenizer).fingerprint, "decoding": form}
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
        model.value_heads.target_q.map.normal_(std=0.01)
    unfreeze_heads(model)
    model.save_pretrained(folder)
    save_heads(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


@needs_smollm2
def test_200_greedy_replies_are_those_of_the_run_and_beta_0_is_the_base_model(run, tmp_path):
    histories = [list(Support().reset(seed)) for seed in range(PROMPTS)]
    report = export_run(run, tmp_path / "out", "transformers", held_out=HeldOut(histories[:4]), device="cpu")
    assert "probe: curl" in str(report) and not report.beside.missed
    policy = LanguagePolicy.load(run, device="cpu")
    ids = encode_prompts(policy, histories, None)
    asked = [prompt.asked for prompt in ids]
    guided = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    mine = RunPlayer(policy).play(asked, policy.decoding, 0)
    found = GeneratePlayer(guided, list).play(asked, policy.decoding, 0)
    trial = Trial(policy, Prompts("support", histories), ids, policy.decoding, policy.decoding)
    row = trial.identical(mine, found)
    print(f"identical: {row.export:.1%}; {row.bound}")
    assert row.met
    few = asked[:20]
    zero = GeneratePlayer(guided, list, beta=0.0).play(few, policy.decoding, 0)
    assert zero == GeneratePlayer(base, list).play(few, policy.decoding, 0) != mine[:20]
    assert zero == RunPlayer(policy).play(few, replace(policy.decoding, beta=0.0), 0)
