"""Runs as plain checkpoints: what they play against the run's own formula, what is converted and measured, and what is
refused."""

import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from offline_lmrl import cli
from offline_lmrl.data.conditioning import ReturnScale
from offline_lmrl.data.errors import InputError
from offline_lmrl.data.io import write_trajectories
from offline_lmrl.data.rendering import Renderer
from offline_lmrl.data.tokenizers import train_tokenizer
from offline_lmrl.data.trajectory import Trajectory, Turn
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.evaluation.export import export
from offline_lmrl.models.adapters import save_heads, unfreeze_heads
from offline_lmrl.models.guided import attach, attach_returns, build_model, detach, load_model
from offline_lmrl.models.value_heads import ValueHeadsConfig
from tests.tiny import TOKENIZERS

TOKENIZER = train_tokenizer(["move left", "move right", "you are at 1, 2"], 270)
RENDERER = Renderer(TOKENIZER)
SPEC = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 128}  # fmt: skip
SPECS = {"gpt2": SPEC, "llama": {"model_type": "llama"} | SIZES, "cohere": {"model_type": "cohere"} | SIZES,
         "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 8} | SIZES}  # fmt: skip
CAPPED = {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0} | SIZES
LOGS = [Trajectory((Turn("user", "at"), Turn("assistant", text, reward=float(r))))
        for r, text in enumerate(["go", "left", "right", "move", "up"])]  # fmt: skip
HISTORY = [Turn("user", "you are at 1, 2")]
EXACT = {"beta": 1.5, "q_reduce": "mean", "support": 0.0, "candidates": None, "clip": None}


def shaken(model):
    """Weights far from uniform, so that mistakes show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def save_run(folder, model, tokenizer=TOKENIZER, **blocks):
    renderer = Renderer(tokenizer, blocks.get("template", "auto"))
    model.config.offline_lmrl = (getattr(model.config, "offline_lmrl", None) or {}) | {
        "algorithm": "ilql",
        "tokenizer": renderer.fingerprint,
    } | blocks  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def valued_run(folder, kind="tied", spec=SPEC, **form):
    model = shaken(attach(build_model(spec, TOKENIZER), ValueHeadsConfig(kind)))
    return save_run(folder, model, sampling=EXACT | form)


def told_run(folder, tokenizer=TOKENIZER, heads=None, template="auto", text=None, logs=LOGS, per="global", **form):
    """A run that is told returns 0..4, one bin each."""
    model = shaken(attach(build_model(SPEC, tokenizer), heads))
    scale, renderer = ReturnScale.fit(logs, per=per), Renderer(tokenizer, template)
    block = {"condition": "text" if text else "embedding", "text": text or "", "bins": scale.bins,
             "discount_per_turn": 1.0, "scale": scale.to_dict(), "opening": list(renderer.agent_opening)}  # fmt: skip
    sampling = {"ask": 3.0} | form
    return save_run(folder, attach_returns(model, block), tokenizer, algorithm="return_conditioned",
                    template=template, sampling=sampling)  # fmt: skip


@pytest.fixture
def logs(tmp_path):
    write_trajectories(tmp_path / "logs.jsonl", LOGS)
    return tmp_path / "logs.jsonl"


def plain(folder):
    """What somebody without this project loads."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not type(model).__name__.startswith("Guided") and not hasattr(model.config, "offline_lmrl")
    return model, AutoTokenizer.from_pretrained(folder)


def prompt_of(history=HISTORY):
    turns = [token for turn in history for token in RENDERER.encode_turn(turn).ids]
    return [*RENDERER.preamble_of(()), *turns, *RENDERER.agent_opening]


@torch.no_grad()
def next_log_prob(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


@torch.no_grad()
def guided(run, ids, beta, temperature=1.0):
    """log π / T + β · (mean Q − V), normalised, from the run itself."""
    model = load_model(run).eval()
    outputs, hidden = model.forward_with_hidden(input_ids=torch.tensor([ids]))
    advantage = model.q_values(hidden[0, -1]).mean(0) - model.v_values(hidden[0, -1])
    return (outputs.logits[0, -1].log_softmax(-1) / temperature + beta * advantage).log_softmax(-1)


# Values


@pytest.mark.parametrize(
    "family, kind", [("gpt2", "tied"), ("llama", "linear"), ("cohere", "tied"), ("qwen3", "linear")]
)
def test_a_run_with_values_becomes_one_matrix(tmp_path, family, kind):
    run = valued_run(tmp_path / "run", kind, SPECS[family])
    report = export(run, tmp_path / "plain")
    model, _ = plain(tmp_path / "plain")
    assert_close(next_log_prob(model, prompt_of()), guided(run, prompt_of(), 1.5), atol=1e-4, rtol=0)
    assert report.converted == {} and report.divergence is None and "\nexact" in str(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "run"]  # nothing half written
    assert (tmp_path / "plain" / "model.safetensors").exists()


def test_a_temperature_acts_on_the_policy_alone(tmp_path):
    run = valued_run(tmp_path / "run")
    export(run, tmp_path / "plain", temperature=0.5)
    model, _ = plain(tmp_path / "plain")
    assert (model.generation_config.do_sample, model.generation_config.temperature) == (True, 0.5)
    found = (next_log_prob(model, prompt_of()) / 0.5).log_softmax(-1)
    assert_close(found, guided(run, prompt_of(), 1.5, temperature=0.5), atol=1e-4, rtol=0)


def test_the_checkpoint_replies_as_the_run_does(tmp_path):
    run = valued_run(tmp_path / "run")
    report = export(run, tmp_path / "plain", temperature=0.0)
    policy = LanguagePolicy.load(run, temperature=0.0, max_new_tokens=8)
    (expected,) = policy.start([0]).reply([0], [HISTORY])
    model, tokenizer = plain(report.folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": HISTORY[0].content}], tokenize=False,
                                           add_generation_prompt=True)  # fmt: skip
    read = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    written = model.generate(**read, max_new_tokens=8)[0, read["input_ids"].shape[1] :]
    assert tuple(written.tolist()) == expected.token_ids
    assert model.generation_config.eos_token_id == RENDERER.close_id


@pytest.mark.parametrize("form", [{"q_reduce": "min"}, {"support": 0.3, "clip": 0.0}, {"candidates": 4}, {"top_k": 3}])
def test_another_form_is_refused_or_converted_and_measured(tmp_path, logs, form):
    run = valued_run(tmp_path / "run")
    name, found = next(iter(form.items()))
    with pytest.raises(InputError, match=rf"^{name}: found {found!r}, expected .* give --data"):
        export(run, tmp_path / "plain", **form)
    assert not (tmp_path / "plain").exists()
    report = export(run, tmp_path / "plain", logs, **form)
    model, _ = plain(tmp_path / "plain")
    assert_close(next_log_prob(model, prompt_of()), guided(run, prompt_of(), 1.5), atol=1e-4, rtol=0)
    assert report.converted == form
    assert report.divergence.between > 1e-3 and f"converted: {name} {found} to" in str(report)


def test_divergences_are_means_over_logged_agent_tokens(tmp_path, logs):
    run = valued_run(tmp_path / "run", q_reduce="min")
    report = export(run, tmp_path / "plain", logs)
    model, expected, count = load_model(run).eval(), torch.zeros(3), 0
    for log in LOGS:
        prompt = prompt_of(log.turns[:1])
        ids = [*prompt, *RENDERER.encode_content(log.turns[1].content), RENDERER.close_id]
        for n in range(len(prompt), len(ids)):
            with torch.no_grad():
                outputs, hidden = model.forward_with_hidden(input_ids=torch.tensor([ids[:n]]))
                policy, q = outputs.logits[0, -1].log_softmax(-1), model.q_values(hidden[0, -1])
            before = (policy + 1.5 * torch.minimum(q[0], q[1])).log_softmax(-1)
            after = (policy + 1.5 * (q[0] + q[1]) / 2).log_softmax(-1)
            expected += torch.stack([(p.exp() * (p - r)).sum() for p, r in
                                     [(before, policy), (after, policy), (before, after)]])  # fmt: skip
            count += 1
    kl = report.divergence
    assert_close(torch.tensor([kl.before, kl.after, kl.between]), expected / count, atol=1e-4, rtol=0)
    assert kl.agent_tokens == count
    assert f"checkpoint to π {kl.after:.4g}" in (tmp_path / "plain" / "README.md").read_text()


def test_an_exact_export_is_at_no_distance(tmp_path, logs):
    kl = export(valued_run(tmp_path / "run"), tmp_path / "plain", logs).divergence
    assert kl.before == pytest.approx(kl.after, abs=1e-4) and abs(kl.between) < 1e-5 < kl.after


def test_through_a_soft_cap_nothing_folds_exactly(tmp_path, logs):
    run = valued_run(tmp_path / "run", spec=CAPPED)
    with pytest.raises(InputError, match="^run: found a base with a soft cap .* give --data"):
        export(run, tmp_path / "plain")
    report = export(run, tmp_path / "plain", logs)
    assert "not exact: the base caps its logits" in str(report)
    assert report.divergence.between > 1e-3
    export(run, tmp_path / "without", beta=0.0)
    bent, _ = plain(tmp_path / "plain")
    assert bent.config.final_logit_softcapping == 2.0
    expected = guided(run, prompt_of(), 0.0)
    assert_close(next_log_prob(plain(tmp_path / "without")[0], prompt_of()), expected, atol=1e-4, rtol=0)


def test_heads_that_do_not_fold_are_refused_and_go_without_guidance(tmp_path):
    run = valued_run(tmp_path / "run", "mlp")
    with pytest.raises(InputError, match="^beta: found 1.5 on mlp heads"):
        export(run, tmp_path / "plain")
    report = export(run, tmp_path / "plain", beta=0.0)
    assert str(report).startswith("plays: the policy as it is\nexact")
    assert_close(next_log_prob(plain(report.folder)[0], prompt_of()), guided(run, prompt_of(), 0.0))
    with pytest.raises(InputError, match="^ask: found 3, expected none"):
        export(run, tmp_path / "asked", beta=0.0, ask=3)


# Returns


def test_returns_become_tokens_that_say_the_same(tmp_path, logs):
    run = told_run(tmp_path / "run")
    report = export(run, tmp_path / "plain", logs)
    model, tokenizer = plain(tmp_path / "plain")
    policy, rows = LanguagePolicy.load(run), len(TOKENIZER)
    assert report.returns == ["<return_none>", *(f"<return_{b}>" for b in range(1, 6))] and report.readable
    for b, name in enumerate(report.returns):
        reserved = [*prompt_of()[: -len(RENDERER.agent_opening)], rows + b, *RENDERER.agent_opening]
        text = tokenizer.decode(prompt_of()).replace("<assistant>", name + "<assistant>")
        read = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = next_log_prob(policy.model.eval(), reserved)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([read])).logits[0, -1]
        assert_close(logits[:rows].log_softmax(-1), expected, atol=1e-4, rtol=0)
    assert "return" not in tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    assert report.divergence.before == 0.0 and abs(report.divergence.between) < 1e-5
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "How are you?<eos><return_5><assistant>" in card
    assert "|  | `<return_1>` | 0 | 0.5 | 1 |" in card and "asks for 3.0, `<return_4>`." in card


def test_ten_thousand_sampled_tokens_hold_no_reserved_id(tmp_path):
    run = told_run(tmp_path / "run")
    export(run, tmp_path / "plain")
    model, tokenizer = plain(tmp_path / "plain")
    rows = len(TOKENIZER)
    # Made likely, so that only what suppresses them keeps them out.
    model.get_output_embeddings().register_forward_hook(
        lambda module, read, logits: logits + 50.0 * (torch.arange(logits.shape[-1]) >= rows))  # fmt: skip
    prompt = torch.tensor([[*prompt_of()[: -len(RENDERER.agent_opening)], rows + 3, *RENDERER.agent_opening]] * 2_000)
    torch.manual_seed(0)
    written = model.generate(prompt, max_new_tokens=5, min_new_tokens=5)[:, prompt.shape[1] :]
    assert written.shape == (2_000, 5) and int(written.max()) < rows
    assert model(input_ids=prompt[:1]).logits[0, -1].argmax() >= rows  # they would have been
    assert len(set(written[:, 0].tolist())) > 20  # drawn, not the best


def test_returns_per_task_are_all_there_whatever_the_run_asks_for(tmp_path):
    tasks = [replace(log, task="long" if i < 3 else "short") for i, log in enumerate(LOGS)]  # 0, 1, 2 and 3, 4
    run = told_run(tmp_path / "run", logs=tasks, per="task", ask="max")
    report = export(run, tmp_path / "plain")
    policy, (model, _) = LanguagePolicy.load(run, task="short"), plain(tmp_path / "plain")
    assert policy.slots.ids(4.0, "short") == (len(TOKENIZER) + 2,) and report.returns[2] == "<return_2>"
    told = [*prompt_of()[: -len(RENDERER.agent_opening)], len(TOKENIZER) + 2, *RENDERER.agent_opening]
    found = next_log_prob(model, told)[: len(TOKENIZER)].log_softmax(-1)
    assert_close(found, next_log_prob(policy.model.eval(), told), atol=1e-4, rtol=0)
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "asks for max of the task." in card and "| short | `<return_2>` | 3.5 | 4 | 1 |" in card


def test_a_run_that_asks_a_critic_is_exported_without_it(tmp_path):
    export(told_run(tmp_path / "run", ask=f"auto:{tmp_path}/gone"), tmp_path / "plain")
    assert "gone, which is read from heads" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize("name", ["chatml", "brackets", "stripping", "labels"])
def test_a_prompt_with_a_return_is_read_as_in_training_or_said_not_to_be(tmp_path, name):
    report = export(told_run(tmp_path / "run", TOKENIZERS[name]()), tmp_path / "plain")
    readable = name != "labels"  # which marks the start of what follows a special token
    assert report.readable == readable == ("serve ids, not text" not in (tmp_path / "plain" / "README.md").read_text())


def test_returns_as_text_leave_a_plain_base(tmp_path):
    run = told_run(tmp_path / "run", text="quality: {bin}/{bins}\n")
    report = export(run, tmp_path / "plain")
    model, tokenizer = plain(tmp_path / "plain")
    assert report.returns == [] and len(tokenizer) == len(TOKENIZER) == model.config.vocab_size
    assert_close(next_log_prob(model, prompt_of()), next_log_prob(load_model(run).eval(), prompt_of()))
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "`'quality: 5/5\\n'`" in card and "quality: 5/5\n    <assistant>" in card


# Other runs, LoRA


def test_the_plain_template_takes_a_chat_template_away_that_was_not_used(tmp_path):
    model = shaken(attach(build_model(SPEC, TOKENIZER), None))
    run = save_run(tmp_path / "run", model, algorithm="bc", template="plain", window={"context": 3})
    export(run, tmp_path / "plain")
    assert plain(tmp_path / "plain")[1].chat_template is None
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "    <bos>User: How are you?\n    Assistant:\n" in card and "own: at most 3;" in card


def test_an_adapter_is_merged(tmp_path):
    peft = pytest.importorskip("peft")
    shaken(build_model(SPEC, TOKENIZER)).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", value_heads=ValueHeadsConfig("linear"))
    model.config.offline_lmrl |= {"algorithm": "ilql", "tokenizer": RENDERER.fingerprint, "sampling": EXACT}
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    unfreeze_heads(model)
    torch.nn.init.normal_(model.value_heads.target_q.weight, std=0.3)
    model.save_pretrained(tmp_path / "run")
    save_heads(model, tmp_path / "run")
    TOKENIZER.save_pretrained(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "plain")
    shutil.rmtree(tmp_path / "base")
    found = next_log_prob(plain(tmp_path / "plain")[0], prompt_of())
    hidden = model.eval().forward_with_hidden(input_ids=torch.tensor([prompt_of()]))
    q = model.q_values(hidden[1][0, -1]).mean(0)
    expected = (hidden[0].logits[0, -1] + 1.5 * q).log_softmax(-1).detach()
    assert_close(found, expected, atol=1e-4, rtol=0)


# What is refused


def test_what_is_no_run_is_refused(tmp_path):
    model = detach(attach(build_model(SPEC, TOKENIZER), None))
    model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="^run: found a model that no run of this project wrote in .*base"):
        export(tmp_path / "base", tmp_path / "plain")
    run = save_run(tmp_path / "judge", model, algorithm="reward_model")
    with pytest.raises(InputError, match="^run: found a reward model"):
        export(run, tmp_path / "plain")
    with pytest.raises(InputError, match="nothing: found no such folder"):
        export(tmp_path / "nothing", tmp_path / "plain")
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match="^output: found .*plain, which is there already, expected a new folder"):
        export(run, tmp_path / "plain")


def test_what_takes_two_passes_is_refused(tmp_path):
    run = told_run(tmp_path / "run", heads=ValueHeadsConfig("linear"))
    with pytest.raises(InputError, match="^beta: found 2 on a model that is told returns"):
        export(run, tmp_path / "plain", beta=2.0)
    with pytest.raises(InputError, match="^condition_scale: found 0.5, expected 0"):
        export(run, tmp_path / "plain", condition_scale=0.5)
    assert len(export(run, tmp_path / "plain", ask="auto").returns) == 6  # the values stay behind
    assert "asks for auto, which is read from heads" in (tmp_path / "plain" / "README.md").read_text()


def test_a_token_of_the_same_name_is_refused(tmp_path):
    tokenizer = train_tokenizer(["move left"], 270)
    tokenizer.add_tokens(["<return_2>"])
    run = told_run(tmp_path / "run", tokenizer)
    with pytest.raises(InputError, match=r"^tokenizer: found <return_2> among its tokens"):
        export(run, tmp_path / "plain")


def test_a_checkpoint_that_differs_from_the_run_is_not_kept(tmp_path, monkeypatch):
    run = valued_run(tmp_path / "run")
    monkeypatch.setattr("offline_lmrl.evaluation.export.logit_scale", lambda model: (2.0, True))
    with pytest.raises(InputError, match="^run: found an export of gpt2 that differs from the run by"):
        export(run, tmp_path / "plain")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command_prints_the_report_and_the_folder_or_one_line_about_what_is_wrong(tmp_path, logs, capsys):
    transformers.logging.disable_progress_bar()  # as a shell without a terminal has it
    run, output = valued_run(tmp_path / "run", q_reduce="min"), str(tmp_path / "plain")
    capsys.readouterr()

    def refused(*arguments):
        assert cli.main(["export", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err.removeprefix("error: ")

    assert refused(run).startswith("output: missing, expected `offline-lmrl export RUN --output DIR")
    assert refused(run, "--output", output).startswith("q_reduce: found 'min', expected 'mean'")
    assert refused(run, "--output", output, "--stop", "x").startswith("--stop: found a setting that does not exist")
    assert refused(run, "--output", output, "--data", tmp_path / "none.jsonl").startswith(str(tmp_path / "none.jsonl"))
    assert refused(tmp_path / "none", "--output", output).startswith(f"{tmp_path / 'none'}: found no such folder")
    assert refused(run, "--output", run).startswith("output: found ")
    blocked = logs / "plain"
    assert str(blocked) in refused(run, "--output", blocked, "--q_reduce", "mean")
    assert cli.main(["export", str(run), "--output", output, "--data", str(logs), "--beta", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["plays: log π + 2 · Q, mean of the Q heads, folded into the LM head",
                         "converted: q_reduce min to mean"]  # fmt: skip
    assert lines[2].startswith("KL per token over ") and lines[-1] == output
    assert_close(next_log_prob(plain(output)[0], prompt_of()), guided(run, prompt_of(), 2.0), atol=1e-4, rtol=0)
