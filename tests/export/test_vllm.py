"""Export for vLLM, without vLLM: the settings of requests, guidance on its logits, an LM head that several processes
share, and the folder. tests/engines plays the same inside vLLM."""

import json
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.distribution import Form, ModelOutputs, next_token
from offline_lmrl.errors import InputError
from offline_lmrl.export.prompts import HeldOut
from offline_lmrl.export.run import export_run
from offline_lmrl.export.vllm import VLLM, VLLMPlayer, check_vllm, command_line, write_vllm
from offline_lmrl.export.vllm_guidance import (
    LMHead,
    PlayedHeads,
    check_request,
    guided_logits,
    request_form,
    stored_form,
)
from offline_lmrl.models.value_heads import ValueHeadsConfig
from tests.export.test_plain import PROMPTS, SPECS, told_run, valued_run
from tests.tiny_models import VOCABULARY, WIDTH, guided_model

KINDS = ("tied", "linear", "mlp")
NEUTRAL = {
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "extra_args": None,
}


def request(**changes):
    """vLLM's sampling parameters; those that are not its own go to extra_args."""
    own = {name: value for name, value in changes.items() if name in NEUTRAL}
    return SimpleNamespace(**NEUTRAL | own | {"extra_args": changes.get("extra")})


def heads_of(model):
    """The heads that play, with the weights of a guided model's."""
    kind = model.config.offline_lmrl["value_heads"]["kind"]
    heads = PlayedHeads(ValueHeadsConfig(kind), VOCABULARY, WIDTH)
    names = heads.state_dict()
    heads.load_state_dict({name: value for name, value in model.value_heads.state_dict().items() if name in names})
    return heads


def test_a_request_changes_the_stored_form_by_its_temperature_and_its_own_settings():
    stored = stored_form({"beta": 4.0, "support": 0.02, "clip": 1.0, "stop": [], "max_new_tokens": 9})
    assert stored == Form(beta=4.0, support=0.02, clip=1.0)
    assert request_form(stored, request()) == Form(beta=4.0, support=0.02, clip=1.0, temperature=0.7)
    greedy = request_form(stored, request(temperature=0.0, extra={"beta": 16, "top_k": 0, "other": "x"}))
    assert greedy == Form(beta=16, support=0.02, clip=1.0, temperature=0.0)
    own = request_form(stored, request(extra={"support": 0.1, "top_k": 5, "top_p": 0.5, "min_p": 0.1}))
    assert own == Form(beta=4.0, clip=1.0, temperature=0.7, support=0.1, top_k=5, top_p=0.5, min_p=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0.9}, "top_p: found 0.9 in a guided request.* send it as vllm_xargs .* top_p"),
        ({"top_k": 50}, "top_k: found 50"),
        ({"min_p": 0.1, "extra": {"beta": 2}}, "min_p: found 0.1"),
        ({"repetition_penalty": 1.1, "temperature": 0.0}, "repetition_penalty: found 1.1 .* expected 1, or beta 0"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"frequency_penalty": -1.0}, "frequency_penalty"),
        ({"extra": {"beta": "16"}}, "beta: found '16', expected a finite number"),
        ({"extra": {"beta": float("nan")}}, "beta: found nan"),
        ({"extra": {"beta": True}}, "beta: found True"),
        ({"extra": {"support": 1.5}}, "support: found 1.5, expected a share from 0 to 1"),
        ({"extra": {"top_p": 0}}, "top_p: found 0, "),
        ({"extra": {"top_k": 2.5}}, "top_k: found 2.5, expected a whole number"),
        ({"extra": {"beta": None}}, "beta: found None, expected a finite number"),
        ({"extra": {"beta": [1, 2]}}, "beta: found .1, 2., expected a finite number"),
        ({"extra": {"betta": 8}}, "betta: found it in extra_args, expected beta or .*; did you mean 'beta'"),
        ({"extra": {"clip": 0.3}}, "clip: found it in extra_args, expected beta or support"),
        ({"extra": {"beta": 0, "top_p": 0.5}}, "top_p: found it in extra_args with beta 0"),
    ],
)
def test_a_request_that_vllm_would_play_otherwise_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        check_request(request(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": -1},
        {"temperature": 0.0, "top_p": 0.9, "top_k": 50},
        {"extra": {"beta": 3, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "support": 0.0}},
        {"extra": {"kv_transfer_params": {"a": 1}}},
        {"extra": {"beta": 0}, "top_p": 0.9, "top_k": 50, "min_p": 0.1, "repetition_penalty": 1.2},
    ],
)
def test_a_request_that_vllm_plays_as_the_run_does_passes(changes):
    check_request(request(**changes))


def test_vllm_divides_by_the_temperature_what_the_formula_has_divided_already():
    torch.manual_seed(0)
    forms = [
        Form(temperature=0.5, beta=2.0, support=0.1),
        Form(temperature=2.0, beta=-1.0, clip=0.1),
        Form(temperature=0.0, beta=8.0, top_p=0.7),
        Form(temperature=1.5, beta=3.0, top_k=4, min_p=0.05),
    ]
    logits, q, v = torch.randn(4, 12) * 2, torch.randn(2, 4, 12), torch.randn(4)
    played = guided_logits(logits, forms, ModelOutputs(q=_looked_up(q), v=lambda: v))
    for row, form in enumerate(forms):
        own = ModelOutputs(q=_looked_up(q[:, row : row + 1]), v=lambda row=row: v[row : row + 1])
        expected = next_token(logits[row : row + 1], form, own).over_vocabulary(12)
        assert_close((played[row : row + 1] / (form.temperature or 1.0)).log_softmax(-1), expected)
        dropped = form.support > 0 or form.top_k is not None or form.top_p is not None
        assert (played[row] == -torch.inf).any() == dropped


def _looked_up(q):
    return lambda ids: q if ids is None else q.gather(-1, ids.expand(len(q), *ids.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_that_play_are_the_target_heads(kind):
    model = guided_model("llama", kind)
    heads, hidden = heads_of(model), torch.randn(3, WIDTH)
    lm_head = LMHead(model.get_output_embeddings().weight, VOCABULARY)
    ids = torch.randint(VOCABULARY, (3, 4))
    outputs = heads.outputs(hidden, lm_head)
    assert_close(outputs.q(ids), model.q_values(hidden, ids))
    assert_close(outputs.q(None), model.q_values(hidden))
    assert_close(outputs.v(), model.v_values(hidden))


class Processes:
    """Threads that share an LM head, as processes do under tensor parallelism."""

    def __init__(self, number):
        self.number, self.parts, self.barrier = number, [None] * number, threading.Barrier(number)

    def join(self, rank, part, how):
        self.parts[rank] = part
        self.barrier.wait(timeout=5)
        whole = how(self.parts)
        self.barrier.wait(timeout=5)
        return whole

    def run(self, work):
        found = [None] * self.number

        def run(rank):
            found[rank] = work(
                rank,
                lambda part: self.join(rank, part, lambda parts: torch.stack(parts).sum(0)),
                lambda part: self.join(rank, part, lambda parts: torch.cat(parts, -1)),
            )

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_processes_that_share_the_rows_of_the_lm_head_compute_the_same_q(kind):
    model = guided_model("llama", kind)
    heads, hidden, weight = heads_of(model), torch.randn(3, WIDTH), model.get_output_embeddings().weight
    each = 18  # 3 · 18 rows for a vocabulary of 50: the last process has 4 rows of padding, which vLLM zeroes
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 3 * each - VOCABULARY))
    ids = torch.randint(VOCABULARY, (3, 4))

    def work(rank, add, gather):
        shard = padded[rank * each : (rank + 1) * each]
        lm_head = LMHead(shard, VOCABULARY, rank * each, add, gather)
        assert lm_head.whole is None
        return heads.q(hidden, lm_head, ids), heads.q(hidden, lm_head, None)

    for some, every in Processes(3).run(work):
        assert_close(some, model.q_values(hidden, ids))
        assert_close(every, model.q_values(hidden))


def test_the_folder_has_the_base_architecture_and_the_heads_that_play(tmp_path):
    model = guided_model("llama", "mlp")
    architecture = write_vllm(model, DecodingConfig(beta=4.0, support=0.02), 2, tmp_path / "folder")
    assert architecture == "GuidedLlamaForCausalLM"
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert stored_form(config["offline_lmrl"]["decoding"]) == Form(beta=4.0, support=0.02)
    heads = {n for n in load_file(tmp_path / "folder" / "model.safetensors") if n.startswith("value_heads.")}
    assert heads == {f"value_heads.{name}" for name in heads_of(model).state_dict()}
    ids = torch.arange(3, 9).unsqueeze(0)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert_close(base(ids).logits, model(ids).logits)


def test_an_adapter_is_merged_and_the_heads_stay(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = guided_model("llama", "tied")
    before = model.value_heads.target_q.map.clone()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    ids = torch.arange(3, 9).unsqueeze(0)
    expected = adapted(input_ids=ids).logits
    write_vllm(adapted, DecodingConfig(beta=4.0), 2, tmp_path / "folder")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert_close(base(ids).logits, expected)
    assert_close(load_file(tmp_path / "folder" / "model.safetensors")["value_heads.target_q.map"], before)


def test_an_adapter_on_the_lm_head_would_change_q(tmp_path):
    peft = pytest.importorskip("peft")
    settings, guided = peft.LoraConfig(target_modules=["lm_head"], r=2), DecodingConfig(beta=4.0)
    settings.init_lora_weights = False
    own_rows, tied = (peft.get_peft_model(guided_model("llama", kind), settings) for kind in ("mlp", "tied"))
    write_vllm(own_rows, guided, 2, tmp_path / "mlp")
    with pytest.raises(InputError, match="found an adapter on the LM head"):
        write_vllm(tied, guided, 2, tmp_path / "tied")


def test_what_vllm_cannot_play_is_refused(tmp_path):
    heads, guided = {"value_heads": {"kind": "tied", "heads": 2}}, DecodingConfig(beta=2.0)
    check_vllm(heads, guided)
    with pytest.raises(InputError, match="beta: found 0, .*--to plain"):
        check_vllm(heads, DecodingConfig())
    plain, valued = told_run(tmp_path / "plain"), valued_run(tmp_path / "valued", beta=2.0)
    with pytest.raises(InputError, match="beta: found 2, expected 0: this run has no value heads"):
        export_run(plain, tmp_path / "out", "vllm", held_out=HeldOut(PROMPTS), force=True, beta=2.0)
    with pytest.raises(InputError, match="ask: found 3, expected none: this model was not trained with returns"):
        export_run(valued, tmp_path / "out", "vllm", held_out=HeldOut(PROMPTS), force=True, ask=3)
    with pytest.raises(InputError, match="found a return-conditioned run"):
        check_vllm(heads | {"returns": {}}, guided)
    with pytest.raises(InputError, match="run: found GPTNeoXForCausalLM, expected one of CohereForCausalLM"):
        write_vllm(guided_model("gpt_neox"), guided, 2, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_the_command_line_names_the_guided_architecture_in_a_form_that_a_shell_reads():
    line = command_line("exports/it's mine", "GuidedLlamaForCausalLM")
    assert line.startswith("VLLM_USE_V2_MODEL_RUNNER=0 python -m vllm.entrypoints.openai.api_server")
    assert line.endswith("""--hf-overrides '{"architectures": ["GuidedLlamaForCausalLM"]}'""")
    assert """'exports/it'"'"'s mine'""" in line


def test_without_vllm_the_export_is_refused_with_both_ways_out_and_force_writes_it_unplayed(tmp_path):
    run = valued_run(tmp_path / "run", spec=SPECS["llama"], beta=2.0)
    held_out = HeldOut(prompts=PROMPTS)
    with pytest.raises(InputError, match="form.python: found no vLLM .* give --form.python PYTHON.*, or --force"):
        export_run(run, tmp_path / "out", "vllm", held_out=held_out)
    with pytest.raises(InputError, match="form.python: found gone .No such file.*, expected an interpreter"):
        export_run(run, tmp_path / "out", VLLM(python="gone"), held_out=held_out)
    report = export_run(run, tmp_path / "out", "vllm", held_out=held_out, force=True)
    assert "\nThe export was not played beside the run\nserve it with:" in str(report)  # without an empty table
    greedy = export_run(run, tmp_path / "greedy", "vllm", held_out=held_out, force=True, temperature=0.0)
    assert "the run decodes greedily: send temperature 0" in str(greedy) and "greedily" not in str(report)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**It was not played, and was written by force.**" in card
    assert f"--model {tmp_path / 'out'} " in card and "<assistant>" in card
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["do_sample"], generation["top_k"]) == (1.0, True, 0)
    assert "top_p" not in generation and "min_p" not in generation  # vLLM would apply them after guidance


def test_a_vllm_that_ends_is_one_line_with_its_error(tmp_path):
    write_vllm(guided_model("llama", "tied"), DecodingConfig(beta=4.0), 2, tmp_path / "folder")
    with open(tmp_path / "log", "w+") as log:
        player = VLLMPlayer(sys.executable, tmp_path / "folder", frozenset({2}), log)
        with pytest.raises(InputError, match="does not play the export: ModuleNotFoundError: No module named 'vllm'"):
            player.play([[1, 2]], DecodingConfig(temperature=0.0, max_new_tokens=4), 0)
        player.close()
