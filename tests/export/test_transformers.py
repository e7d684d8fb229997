"""Runs as folders for transformers with a `custom_generate`: what they play against the run's own sampler."""

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import offline_lmrl
from offline_lmrl.cli import main
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError
from offline_lmrl.export.forms import Request
from offline_lmrl.export.prompts import HeldOut, encode_prompts
from offline_lmrl.export.returns import without_requests
from offline_lmrl.export.run import export_run
from offline_lmrl.export.transformers import Transformers, generate_code
from offline_lmrl.models.adapters import save_heads, saved_run_metadata, unfreeze_heads
from offline_lmrl.models.loading import build_model, load_model
from offline_lmrl.models.step_outputs import compute_step_outputs
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tokens.batching import token_rows
from tests.export.test_plain import CAPPED, LOGS, PROMPTS, RENDERER, SPECS, TOKENIZER, shaken, told_run, valued_run

FORM = {"beta": 1.5, "q_reduce": "min", "support": 0.1, "max_new_tokens": 6}
LINES = 80  # of glue


class Folder:
    """A run and its export, opened as somebody without this project does."""

    def __init__(self, run, folder, **changes):
        self.run, self.folder, self.changes = run, folder, changes
        saved = saved_run_metadata(run)
        policy = LanguagePolicy.load(run, device="cpu", **{**changes, "ask": None})
        decoding = replace(policy.decoding, **changes, ask=changes.get("ask", saved["decoding"].get("ask")))
        self.decoding, request = decoding, Request(run, folder, saved, decoding, changes, PROMPTS, "cpu")
        Transformers().check(request)
        self.written = Transformers().write(policy, request, folder)
        self.policy = LanguagePolicy.load(run, device="cpu", **{**changes, "ask": None})
        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        self.base = AutoModelForCausalLM.from_pretrained(folder).eval()

    def prompts(self, ask=None):
        return [ids.asked for ids in encode_prompts(self.policy, PROMPTS, ask)]

    def batch(self):
        rows = [without_requests(ids, self.policy.return_tokens, RENDERER.agent_opening) for ids in self.prompts()]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def replies(self, ask=None, **changes):
        """The run's own greedy replies."""
        sampler = self.policy.with_decoding(temperature=0.0, **changes).sampler
        return [list(reply.token_ids) for reply in sampler.sample(self.prompts(ask), [0] * len(PROMPTS))]

    def generated(self, model=None, **arguments):
        batch = self.batch()
        greedy = {} if "generation_config" in arguments else {"do_sample": False}
        new = (model or self.model).generate(**batch, **greedy | arguments)
        ends, found = self.policy.renderer.close_ids, []
        for reply in new[:, batch["input_ids"].shape[1] :].tolist():
            stop = next((i + 1 for i, token in enumerate(reply) if token in ends), len(reply))
            found.append(reply[:stop])
        return found


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    return Folder(valued_run(folder / "run", "tied", SPECS["llama"], **FORM), folder / "out")


def test_the_code_is_the_formula_byte_for_byte_and_a_little_glue():
    root = Path(offline_lmrl.__file__).parent
    formula, glue = ((root / name).read_bytes() for name in ("decoding/distribution.py", "export/glue.py"))
    code = generate_code()
    assert code.startswith(formula)
    rest = code[len(formula) :].decode()
    own = [line for line in glue.decode().splitlines() if "from offline_lmrl" not in line and line.strip()]
    assert [line for line in rest.splitlines() if line.strip()] == own and len(own) <= LINES
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers", "safetensors"}


@pytest.mark.parametrize("kind", ["tied", "linear", "mlp"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "cohere", "gemma2"])
def test_greedy_replies_are_those_of_the_run(tmp_path, family, kind):
    spec = SPECS.get(family, CAPPED)
    found = Folder(valued_run(tmp_path / "run", kind, spec, **FORM | {"clip": 0.3}), tmp_path / "out")
    assert found.generated() == found.replies() != found.replies(beta=0.0)


def test_beta_is_an_argument_for_all_prompts_or_one_for_each(tied):
    assert tied.generated(beta=-2.0) == tied.replies(beta=-2.0) != tied.replies()
    expected = [tied.replies(beta=beta)[i] for i, beta in enumerate((0.0, 1.5, -2.0))]
    assert tied.generated(beta=torch.tensor([0.0, 1.5, -2.0])) == expected == tied.generated(beta=[0, 1.5, -2])
    assert tied.generated(beta=None) == tied.replies()
    twice = tied.generated(
        beta=torch.tensor([0.0, 1.5, -2.0]), num_return_sequences=2, do_sample=True, temperature=1e-6
    )
    assert len(twice) == 6 and [*map(len, twice[::2])] == [*map(len, twice[1::2])]


def test_beta_0_is_the_base_model_and_so_is_a_folder_without_trust(tied):
    assert tied.generated(beta=0.0) == tied.generated(tied.base) == tied.replies(beta=0.0)


def test_this_package_refuses_the_folder_whose_values_it_does_not_read(tied):
    with pytest.raises(InputError, match="found an export for transformers, .* expected the run"):
        LanguagePolicy.load(tied.folder)


def test_the_base_class_is_guided_by_an_argument(tied):
    given = {"custom_generate": str(tied.folder), "trust_remote_code": True}
    assert tied.generated(tied.base, **given) == tied.replies()
    assert tied.generated(tied.base, **given, beta=-2.0) == tied.replies(beta=-2.0)
    ids = tied.batch()["input_ids"][:1]
    assert torch.equal(tied.model.generate(ids, do_sample=False), tied.model.generate(inputs=ids, do_sample=False))


@pytest.mark.parametrize(
    "form",
    [
        {"temperature": 0.7},
        {"support": 0.3, "q_reduce": "mean"},
        {"q_reduce": "first", "top_k": 5, "temperature": 1.3},
        {"top_p": 0.6, "clip": 0.1},
        {"min_p": 0.2, "temperature": 2.0},
        {"candidates": 4, "clip": 0.0},
        {"candidates": 40, "top_k": 7, "support": 0.05},
        {"beta": 0.0, "support": 0.4},
    ],
)
def test_tokens_are_drawn_from_the_distribution_of_the_run(tmp_path, form):
    run = valued_run(tmp_path / "run", "tied", SPECS["llama"], **{"beta": 1.5, "q_reduce": "min"} | form)
    found = Folder(run, tmp_path / "out")
    rows = found.prompts()
    expected = compute_step_outputs(
        found.policy.model,
        token_rows(rows, [[len(row) - 1] for row in rows]),
        measure=lambda states: {"log_prob": states.distribution(found.decoding)},
    )
    out = found.model.generate(
        **found.batch(), max_new_tokens=1, output_scores=True, return_dict_in_generate=True
    )  # as stored: sampled
    drawn, known = out.scores[0].log_softmax(-1), torch.from_numpy(expected.measured["log_prob"])
    assert_close(drawn, known, atol=1e-4, rtol=0)
    config = json.loads((found.folder / "generation_config.json").read_text())
    assert config["do_sample"] and config["temperature"] == form.get("temperature", 1.0)


def test_a_seed_of_torch_repeats_samples_which_are_others_than_the_runs(tied):
    def drawn(seed):
        torch.manual_seed(seed)
        return tied.generated(do_sample=True)

    assert drawn(0) == drawn(0) != drawn(1)


def test_the_stored_settings_are_those_of_the_run(tied):
    config = tied.model.generation_config
    assert (config.max_new_tokens, config.beta, config.do_sample) == (6, 1.5, True)
    assert config.eos_token_id == RENDERER.close_id and config.pad_token_id is not None
    given = GenerationConfig(
        beta=-2.0, do_sample=False, max_new_tokens=6
    )  # what `transformers serve` makes of a request
    assert tied.generated(generation_config=given) == tied.replies(beta=-2.0)


def test_several_ids_end_a_reply_where_they_do_so_in_the_run(tmp_path):
    run = valued_run(tmp_path / "run", "tied", SPECS["llama"], **FORM | {"max_new_tokens": 30})
    first = Folder(run, tmp_path / "out").replies()[0][2]
    config = GenerationConfig.from_pretrained(run)
    config.eos_token_id = [RENDERER.close_id, first]
    config.save_pretrained(run)
    found = Folder(run, tmp_path / "again")
    assert found.model.generation_config.eos_token_id == sorted([RENDERER.close_id, first])
    assert found.generated() == found.replies() and found.replies()[0][-1] == first
    ids = torch.tensor([found.prompts()[0]])
    given = GenerationConfig(do_sample=False, max_new_tokens=30)  # without ids that end a reply
    whole = found.model.generate(ids, generation_config=given)
    assert whole[0, ids.shape[1] :].tolist() == found.replies()[0]


def test_stop_texts_end_a_reply_without_a_tokenizer_and_those_of_a_request_replace_them(tmp_path):
    run = valued_run(tmp_path / "run", "linear", SPECS["llama"], **FORM | {"max_new_tokens": 12})
    reply = Folder(run, tmp_path / "out").replies()[0]
    texts = [RENDERER.decode(reply[i : i + 1]) for i in range(len(reply))]
    place = next(i for i, text in enumerate(texts) if text.strip() and text not in "".join(texts[:i]) and i > 0)
    found = Folder(run, tmp_path / "stopped", stop=(texts[place],))
    assert found.generated()[0][: place + 1] == reply[: place + 1]
    ids = found.batch()["input_ids"][:1]
    new = found.model.generate(ids, attention_mask=found.batch()["attention_mask"][:1], do_sample=False)
    assert new[0, ids.shape[1] :].tolist() == reply[: place + 1]
    other = {"stop_strings": "not in any reply", "tokenizer": AutoTokenizer.from_pretrained(found.folder)}
    assert found.generated(**other)[0] == reply
    assert len(found.base.generate(ids, do_sample=False)) == 1  # the stock class needs no tokenizer for it


def test_a_prompt_may_be_embeddings_and_an_ask_needs_a_run_with_returns(tied):
    ids = torch.tensor([tied.prompts()[0]])
    read = {"inputs_embeds": tied.model.get_input_embeddings()(ids), "attention_mask": torch.ones_like(ids)}
    assert tied.model.generate(**read, do_sample=False)[0].tolist() == tied.replies()[0]
    with pytest.raises(ValueError, match="found ask 3, .*; none for a run without returns"):
        tied.model.generate(ids, ask=3)


def test_a_streamer_gets_each_token(tied):
    class Recorder:
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    recorder, ids = Recorder(), torch.tensor([tied.prompts()[0]])
    whole = tied.model.generate(ids, do_sample=False, streamer=recorder)
    assert sum(recorder.parts, []) == whole[0].tolist() and recorder.ended
    assert [len(part) for part in recorder.parts[1:]] == [1] * (len(recorder.parts) - 1)


@pytest.mark.parametrize("given", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"assistant_early_exit": 1}])
def test_what_scores_tokens_otherwise_is_refused(tied, given):
    with pytest.raises(ValueError, match="found beams or assisted decoding, expected greedy"):
        tied.generated(**given)


def test_repetition_penalties_and_processors_act_before_and_after_guidance(tied):
    banned = tied.replies()[0][0]
    assert banned not in tied.generated(suppress_tokens=[banned])[0]

    def last(ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[-1]) != 7, -torch.inf)

    assert set(sum(tied.generated(logits_processor=[last]), [])) == {7}


def test_the_lm_head_is_cast_to_fp32_once(tied):
    model = AutoModelForCausalLM.from_pretrained(tied.folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    first = tied.generated(model)
    rows = model.guidance_heads.rows
    assert rows.dtype == torch.float32 and tied.generated(model) == first and model.guidance_heads.rows is rows
    assert tied.model.guidance_heads.rows.data_ptr() == tied.model.get_output_embeddings().weight.data_ptr()


def test_heads_follow_the_matrix_that_the_run_reads_where_an_adapter_changes_the_lm_head(tmp_path):
    peft = pytest.importorskip("peft")
    shaken(build_model(SPECS["llama"], TOKENIZER)).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", value_heads=ValueHeadsConfig("tied"))
    model.config.offline_lmrl |= {"algorithm": "ilql", "tokenizer": RENDERER.fingerprint, "decoding": FORM}
    targets = ["q_proj", "lm_head"]
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    unfreeze_heads(model)
    shaken(model.value_heads.target_q)
    model.save_pretrained(tmp_path / "run")
    save_heads(model, tmp_path / "run")
    TOKENIZER.save_pretrained(tmp_path / "run")
    found = Folder(tmp_path / "run", tmp_path / "out")
    assert found.generated() == found.replies() != found.replies(beta=0.0)


# Returns


@pytest.mark.parametrize("text", [None, "quality: {bin}/{bins}\n"])
def test_a_requested_return_is_inserted_before_each_agent_turn(tmp_path, text):
    found = Folder(told_run(tmp_path / "run", text=text, max_new_tokens=6), tmp_path / "out")
    assert found.decoding.ask == 3.0
    assert found.generated() == found.replies(3.0)
    assert text or found.replies(3.0) != found.replies(0.0)
    assert found.generated(ask=0.0) == found.replies(0.0) and found.generated(ask=9) == found.replies(4.0)
    assert found.generated(ask="max") == found.replies("max") and found.generated(ask="p0") == found.replies("p0")
    ids = found.batch()["input_ids"]
    out = found.model.generate(**found.batch(), do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids)  # the caller's prompts, without the inserted ids
    with pytest.raises(ValueError, match="found ask 'best', expected a number, max or p0 to p100"):
        found.generated(ask="best")
    with pytest.raises(ValueError, match="without the agent's opening at its end: use add_generation_prompt"):
        found.model.generate(ids[:, :-1])


def test_a_run_that_requests_none_plays_the_null_condition(tmp_path):
    found = Folder(told_run(tmp_path / "run", ask=None, max_new_tokens=6), tmp_path / "out")
    assert found.generated() == found.replies(None) != found.replies(4.0)
    assert found.generated(ask=4.0) == found.replies(4.0)
    torch.manual_seed(0)
    drawn = found.model.generate(**found.batch(), do_sample=True, temperature=5.0, max_new_tokens=100)
    assert drawn.max() < len(TOKENIZER)  # ids of returns are never drawn


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"beta": 2.0}, "beta: found 2 on a return-conditioned model, expected 0: it needs a second pass"),
        ({"condition_scale": 0.5}, "condition_scale: found 0.5 on a return-conditioned model"),
        ({"ask": "auto"}, "ask: found auto, which is computed anew for every dialogue, expected a number, max or p90"),
    ],
)
def test_forms_of_return_conditioned_runs_that_need_more_are_refused(tmp_path, changes, said):
    run = told_run(tmp_path / "run", heads=ValueHeadsConfig("linear"))
    with pytest.raises(InputError, match=f"^{said}"):
        export_run(run, tmp_path / "out", "transformers", held_out=HeldOut(PROMPTS), **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_returns_per_task_values_without_heads_and_asks_without_returns_are_refused(tmp_path):
    def refused(run, **changes):
        with pytest.raises(InputError) as error:
            export_run(run, tmp_path / "out", "transformers", held_out=HeldOut(PROMPTS), **changes)
        return str(error.value)

    logs = [replace(log, task="a") for log in LOGS]
    run = told_run(tmp_path / "tasks", logs=logs, per="task", ask=None)
    assert refused(run).startswith("returns: found bins of returns per task, expected the same for all")
    assert refused(told_run(tmp_path / "told"), beta=1.0).startswith(
        "beta: found 1, expected 0: this run has no value"
    )
    assert refused(valued_run(tmp_path / "valued", **FORM), ask=3).startswith("ask: found 3, expected none")


# The command


def test_the_command_prints_how_to_serve_and_a_probe_that_tells(tmp_path, capsys):
    run, output = valued_run(tmp_path / "run", "tied", SPECS["llama"], **FORM), tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("left\nyou are at 1, 2\n")
    assert main(["export", str(run), "--to", "transformers", "--output", str(output), "--prompts",
                 str(tmp_path / "prompts.txt")]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert out.startswith(
        "plays: log π + 1.5 · Q (min of the Q heads) on the tokens that support 0.1 leave, at temperature 1\n"
    )
    assert f"play: transformers serve {output} --trust-remote-code" in out
    card = (output / "README.md").read_text()
    assert "with `--continuous-batching`, the base model replies, without any error" in card and "| met |" in card
    (curl,) = [line for line in card.splitlines() if line.startswith("curl ")]
    body = json.loads(curl.split(" -d ")[1].strip("'"))
    tokenizer = AutoTokenizer.from_pretrained(output)
    read = tokenizer.apply_chat_template(
        body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answers = [line.partition(": ")[2] for line in card.splitlines() if " answers: " in line]
    for trust, answer in zip((True, False), answers, strict=True):
        model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=trust)
        whole = model.generate(**read, do_sample=False, max_new_tokens=body["max_tokens"])[0]
        new = whole[read["input_ids"].shape[1] :]
        assert repr(tokenizer.decode(new, skip_special_tokens=True)) == answer
    assert answers[0] != answers[1]
