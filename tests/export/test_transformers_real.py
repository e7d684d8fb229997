"""A real chat model with an adapter and values as a folder for transformers: 200 greedy replies, token for token."""

from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.export.beside import RunPlayer, Trial
from offline_lmrl.export.playing import GeneratePlayer
from offline_lmrl.export.prompts import HeldOut, Prompts, encode_prompts
from offline_lmrl.export.run import export_run
from offline_lmrl.tasks.support import Support
from tests.export.real_run import save_real_run
from tests.smollm2 import needs_smollm2

PROMPTS, TOKENS = 200, 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "run"
    save_real_run(folder, adapter=True, max_new_tokens=TOKENS, temperature=0.0)
    return folder


@needs_smollm2
def test_200_greedy_replies_are_those_of_the_run_and_beta_0_is_the_base_model(run, tmp_path):
    histories = [list(Support().reset(seed)) for seed in range(PROMPTS)]
    report = export_run(run, tmp_path / "out", "transformers", held_out=HeldOut(histories[:4]), device="cpu")
    assert "probe: curl" in str(report) and not report.beside.unmet
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
