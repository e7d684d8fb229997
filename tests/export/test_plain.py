"""Runs as plain checkpoints: what they play against the run's own formula, and what is refused."""

import shutil
from dataclasses import replace

import pytest
import torch
import transformers
import yaml
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from offline_lmrl.cli import main
from offline_lmrl.decoding.distribution import Form, filter_policy
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError
from offline_lmrl.export.prompts import HeldOut
from offline_lmrl.export.run import export_run as export_any_run
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.models.adapters import save_heads, unfreeze_heads
from offline_lmrl.models.guided import add_returns, add_value_heads, as_guided, remove_heads
from offline_lmrl.models.loading import build_model, load_model
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tokens.conditioning import ReturnScale
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer
from tests.tiny import TOKENIZERS

TOKENIZER = train_tokenizer(["move left", "move right", "you are at 1, 2"], 270)
RENDERER = Renderer(TOKENIZER)
SPEC = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
SPECS = {
    "gpt2": SPEC,
    "llama": {"model_type": "llama"} | SIZES,
    "cohere": {"model_type": "cohere"} | SIZES,
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 8} | SIZES,
}
CAPPED = {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0} | SIZES
LOGS = [
    Trajectory((Turn("user", "at"), Turn("assistant", text, reward=float(r))))
    for r, text in enumerate(["go", "left", "right", "move", "up"])
]
HISTORY = [Turn("user", "you are at 1, 2")]
PROMPTS = [HISTORY, [Turn("user", "left")], [Turn("user", "at"), Turn("assistant", "go"), Turn("user", "up")]]
EXACT = {"beta": 1.5, "q_reduce": "mean", "support": 0.0, "candidates": None, "clip": None}


def export_run(run, output, **settings):
    return export_any_run(run, output, held_out=HeldOut(PROMPTS), **{"max_new_tokens": 6} | settings)


def shaken(model):
    """Weights far from uniform, so that mistakes show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def save_run(folder, model, tokenizer=TOKENIZER, **blocks):
    renderer = Renderer(tokenizer, blocks.get("template", "auto"))
    model.config.offline_lmrl = (
        (getattr(model.config, "offline_lmrl", None) or {})
        | {
            "algorithm": "ilql",
            "tokenizer": renderer.fingerprint,
        }
        | blocks
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def valued_run(folder, kind="tied", spec=SPEC, **form):
    model = shaken(add_value_heads(build_model(spec, TOKENIZER), ValueHeadsConfig(kind)))
    return save_run(folder, model, decoding=EXACT | form)


def told_run(folder, tokenizer=TOKENIZER, heads=None, template="auto", text=None, logs=LOGS, per="global", **form):
    """A run that is told returns 0..4, one bin each."""
    base = build_model(SPEC, tokenizer)
    model = shaken(as_guided(base) if heads is None else add_value_heads(base, heads))
    scale, renderer = ReturnScale.fit(logs, per=per), Renderer(tokenizer, template)
    block = {
        "condition": "text" if text else "embedding",
        "text": text or "",
        "bins": scale.bins,
        "discount_per_turn": 1.0,
        "scale": scale.to_dict(),
        "opening": list(renderer.agent_opening),
    }
    decoding = {"ask": 3.0} | form
    return save_run(
        folder,
        add_returns(model, block),
        tokenizer,
        algorithm="return_conditioned",
        template=template,
        decoding=decoding,
    )


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
    report = export_run(run, tmp_path / "plain")
    model, _ = plain(tmp_path / "plain")
    assert_close(next_log_prob(model, prompt_of()), guided(run, prompt_of(), 1.5), atol=1e-4, rtol=0)
    assert 0 <= report.written.difference < 1e-4 and report.written.states > 64 and "\nexact: " in str(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "run"]  # nothing half written
    assert (tmp_path / "plain" / "model.safetensors").exists()


def test_a_temperature_acts_on_the_policy_alone(tmp_path):
    run = valued_run(tmp_path / "run")
    export_run(run, tmp_path / "plain", temperature=0.5)
    model, _ = plain(tmp_path / "plain")
    assert (model.generation_config.do_sample, model.generation_config.temperature) == (True, 0.5)
    found = (next_log_prob(model, prompt_of()) / 0.5).log_softmax(-1)
    assert_close(found, guided(run, prompt_of(), 1.5, temperature=0.5), atol=1e-4, rtol=0)


def test_the_checkpoint_replies_as_the_run_does(tmp_path):
    run = valued_run(tmp_path / "run")
    report = export_run(run, tmp_path / "plain", temperature=0.0)
    policy = LanguagePolicy.load(run, temperature=0.0, max_new_tokens=8)
    (expected,) = policy.start([0]).reply([0], [HISTORY])
    model, tokenizer = plain(report.folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": HISTORY[0].content}], tokenize=False, add_generation_prompt=True
    )
    read = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    written = model.generate(**read, max_new_tokens=8)[0, read["input_ids"].shape[1] :]
    assert tuple(written.tolist()) == expected.token_ids
    assert model.generation_config.eos_token_id == RENDERER.close_id


@pytest.mark.parametrize(
    "form, settings",
    [
        ({"q_reduce": "min"}, "--q_reduce mean"),
        ({"support": 0.3, "clip": 0.0}, "--support 0 --clip null"),
        ({"candidates": 4}, "--candidates null"),
        ({"top_k": 3}, "--top_k null"),
        ({"top_p": 0.9}, "--top_p null"),
        ({"min_p": 0.1, "temperature": 0.0}, "--min_p null"),
    ],
)
def test_guidance_that_does_not_fold_is_refused_before_the_model_is_read(tmp_path, monkeypatch, form, settings):
    run, path = valued_run(tmp_path / "run", **form), tmp_path / "plain"
    found = ", ".join(f"{name} {value}" for name, value in form.items() if name != "temperature")
    with monkeypatch.context() as patch:
        patch.setattr(LanguagePolicy, "load", None)
        with pytest.raises(InputError) as error:
            export_run(run, path)
    assert str(error.value).startswith(f"beta: found 1.5 with {found}, expected guidance that folds")
    assert f"with {settings}, or with --beta 0" in str(error.value)
    assert sorted(tmp_path.iterdir()) == [run]
    words = settings.replace("--", "").split()
    given = {name: yaml.safe_load(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    assert export_run(run, path, **given).decoding.beta == 1.5  # what the line says to give is enough


def test_settings_that_filter_nothing_fold(tmp_path):
    run = valued_run(tmp_path / "run", top_p=1.0, min_p=0.0)
    export_run(run, tmp_path / "plain")
    model, _ = plain(tmp_path / "plain")
    assert_close(next_log_prob(model, prompt_of()), guided(run, prompt_of(), 1.5), atol=1e-4, rtol=0)


def test_of_one_head_the_minimum_folds(tmp_path):
    model = shaken(add_value_heads(build_model(SPEC, TOKENIZER), ValueHeadsConfig("linear", heads=1)))
    run = save_run(tmp_path / "run", model, decoding=EXACT | {"q_reduce": "min"})
    export_run(run, tmp_path / "plain")
    found = next_log_prob(plain(tmp_path / "plain")[0], prompt_of())
    assert_close(found, guided(run, prompt_of(), 1.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "form",
    [
        {"support": 0.3},
        {"support": 0.3, "temperature": 0.5, "top_k": 4},
        {"support": 0.2, "min_p": 0.4},
        {"top_p": 0.7, "top_k": 9},
    ],
)
def test_filters_of_a_policy_without_guidance_are_those_of_generate(tmp_path, form):
    run = valued_run(tmp_path / "run", beta=0.0, **form)
    export_run(run, tmp_path / "plain")
    model, _ = plain(tmp_path / "plain")
    prompt = torch.tensor([prompt_of()])
    written = model.generate(prompt, max_new_tokens=1, output_scores=True, return_dict_in_generate=True).scores[0]
    logits = next_log_prob(load_model(run).eval(), prompt_of())
    expected = filter_policy(logits, Form(**form)).log_softmax(-1)
    assert 1 < expected.isfinite().sum() < 250  # something is left out
    assert_close(written[0].log_softmax(-1), expected, atol=1e-4, rtol=0)


def test_the_base_models_own_way_of_decoding_does_not_come_along(tmp_path):
    model = shaken(add_value_heads(build_model(SPEC, TOKENIZER), ValueHeadsConfig("tied")))
    model.generation_config.update(
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        do_sample=True,
        top_k=2,
        eos_token_id=[2, 7],
        suppress_tokens=[40],
    )
    run = save_run(tmp_path / "run", model, decoding=EXACT | {"temperature": 0.0})
    export_run(run, tmp_path / "plain")
    model, _ = plain(tmp_path / "plain")
    expected, written = prompt_of(), model.generate(torch.tensor([prompt_of()]), max_new_tokens=12)[0].tolist()
    while len(expected) < len(written):
        expected.append(int(guided(run, expected, 1.5).argmax()))
    assert written == expected and len(set(written)) < len(written)
    assert set(model.generation_config.eos_token_id) == {2, 7, RENDERER.close_id}


def test_support_before_top_p_is_refused(tmp_path):
    run = valued_run(tmp_path / "run", beta=0.0, support=0.1, top_p=0.9)
    with pytest.raises(InputError, match="^support: found 0.1 with top_p 0.9, expected one of them.*top_p null"):
        export_run(run, tmp_path / "plain")
    export_run(run, tmp_path / "plain", temperature=0.0)  # the best token is the same


def test_through_a_soft_cap_nothing_folds(tmp_path):
    run = valued_run(tmp_path / "run", spec=CAPPED)
    with pytest.raises(InputError, match="^run: found gemma2 with a soft cap .* give --beta 0"):
        export_run(run, tmp_path / "plain")
    assert sorted(tmp_path.iterdir()) == [run]
    export_run(run, tmp_path / "plain", beta=0.0)
    model, _ = plain(tmp_path / "plain")
    assert model.config.final_logit_softcapping == 2.0
    assert_close(next_log_prob(model, prompt_of()), guided(run, prompt_of(), 0.0), atol=1e-4, rtol=0)


def test_heads_that_do_not_fold_are_refused_and_go_without_guidance(tmp_path):
    run = valued_run(tmp_path / "run", "mlp")
    with pytest.raises(InputError, match="^beta: found 1.5 on mlp heads"):
        export_run(run, tmp_path / "plain")
    report = export_run(run, tmp_path / "plain", beta=0.0)
    assert str(report).startswith("plays: the policy without value guidance\nexact: ")
    assert_close(next_log_prob(plain(report.folder)[0], prompt_of()), guided(run, prompt_of(), 0.0))
    with pytest.raises(InputError, match="^ask: found 3, expected none"):
        export_run(run, tmp_path / "asked", beta=0.0, ask=3)


# Returns


def test_returns_become_tokens_that_say_the_same(tmp_path):
    run = told_run(tmp_path / "run")
    report = export_run(run, tmp_path / "plain")
    model, tokenizer = plain(tmp_path / "plain")
    policy, rows = LanguagePolicy.load(run), len(TOKENIZER)
    assert (
        report.written.returns == ["<return_none>", *(f"<return_{b}>" for b in range(1, 6))]
        and report.written.readable
    )
    for b, name in enumerate(report.written.returns):
        reserved = [*prompt_of()[: -len(RENDERER.agent_opening)], rows + b, *RENDERER.agent_opening]
        text = tokenizer.decode(prompt_of()).replace("<assistant>", name + "<assistant>")
        read = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = next_log_prob(policy.model.eval(), reserved)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([read])).logits[0, -1]
        assert_close(logits[:rows].log_softmax(-1), expected, atol=1e-4, rtol=0)
    assert "return" not in tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "How are you?<eos><return_5><assistant>" in card
    assert "|  | `<return_1>` | 0 | 0.5 | 1 |" in card and "The run requests: 3.0, `<return_4>`." in card


def test_ten_thousand_sampled_tokens_hold_no_reserved_id(tmp_path):
    run = told_run(tmp_path / "run")
    export_run(run, tmp_path / "plain")
    model, tokenizer = plain(tmp_path / "plain")
    rows = len(TOKENIZER)
    # Made likely, so that only what suppresses them keeps them out.
    model.get_output_embeddings().register_forward_hook(
        lambda module, read, logits: logits + 50.0 * (torch.arange(logits.shape[-1]) >= rows)
    )
    prompt = torch.tensor([[*prompt_of()[: -len(RENDERER.agent_opening)], rows + 3, *RENDERER.agent_opening]] * 2_000)
    torch.manual_seed(0)
    written = model.generate(prompt, max_new_tokens=5, min_new_tokens=5)[:, prompt.shape[1] :]
    assert written.shape == (2_000, 5) and int(written.max()) < rows
    assert model(input_ids=prompt[:1]).logits[0, -1].argmax() >= rows  # they would have been
    assert len(set(written[:, 0].tolist())) > 20  # drawn, not the best


def test_returns_per_task_are_all_there_whatever_the_run_asks_for(tmp_path):
    tasks = [replace(log, task="long" if i < 3 else "short") for i, log in enumerate(LOGS)]  # 0, 1, 2 and 3, 4
    run = told_run(tmp_path / "run", logs=tasks, per="task", ask="max")
    report = export_run(run, tmp_path / "plain")
    policy, (model, _) = LanguagePolicy.load(run, task="short"), plain(tmp_path / "plain")
    assert (
        policy.return_tokens.ids(4.0, "short") == (len(TOKENIZER) + 2,) and report.written.returns[2] == "<return_2>"
    )
    told = [*prompt_of()[: -len(RENDERER.agent_opening)], len(TOKENIZER) + 2, *RENDERER.agent_opening]
    found = next_log_prob(model, told)[: len(TOKENIZER)].log_softmax(-1)
    assert_close(found, next_log_prob(policy.model.eval(), told), atol=1e-4, rtol=0)
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "The run requests: max of the task." in card and "| short | `<return_2>` | 3.5 | 4 | 1 |" in card


def test_a_run_that_asks_a_critic_is_exported_without_it(tmp_path):
    export_run(told_run(tmp_path / "run", ask=f"auto:{tmp_path}/gone"), tmp_path / "plain")
    assert "gone, which is computed by heads" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize("name", ["chatml", "brackets", "stripping", "labels"])
def test_a_prompt_with_a_return_is_read_as_in_training_or_said_not_to_be(tmp_path, name):
    report = export_run(told_run(tmp_path / "run", TOKENIZERS[name]()), tmp_path / "plain")
    readable = name != "labels"  # which marks the start of what follows a special token
    assert (
        report.written.readable
        == readable
        == ("token ids, not text" not in (tmp_path / "plain" / "README.md").read_text())
    )


def test_returns_as_text_leave_a_plain_base(tmp_path):
    run = told_run(tmp_path / "run", text="quality: {bin}/{bins}\n")
    report = export_run(run, tmp_path / "plain")
    model, tokenizer = plain(tmp_path / "plain")
    assert report.written.returns == [] and len(tokenizer) == len(TOKENIZER) == model.config.vocab_size
    assert_close(next_log_prob(model, prompt_of()), next_log_prob(load_model(run).eval(), prompt_of()))
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "`'quality: 5/5\\n'`" in card and "quality: 5/5\n    <assistant>" in card


# Other runs, LoRA


def test_the_plain_template_takes_a_chat_template_away_that_was_not_used(tmp_path):
    model = shaken(as_guided(build_model(SPEC, TOKENIZER)))
    run = save_run(tmp_path / "run", model, algorithm="bc", template="plain", window={"context": 3})
    export_run(run, tmp_path / "plain")
    assert plain(tmp_path / "plain")[1].chat_template is None
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "    <bos>User: How are you?\n    Assistant:\n" in card and "own: at most 3;" in card


def test_an_adapter_is_merged(tmp_path):
    peft = pytest.importorskip("peft")
    shaken(build_model(SPEC, TOKENIZER)).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", value_heads=ValueHeadsConfig("linear"))
    model.config.offline_lmrl |= {"algorithm": "ilql", "tokenizer": RENDERER.fingerprint, "decoding": EXACT}
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    unfreeze_heads(model)
    torch.nn.init.normal_(model.value_heads.target_q.weight, std=0.3)
    model.save_pretrained(tmp_path / "run")
    save_heads(model, tmp_path / "run")
    TOKENIZER.save_pretrained(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "plain")
    shutil.rmtree(tmp_path / "base")
    found = next_log_prob(plain(tmp_path / "plain")[0], prompt_of())
    hidden = model.eval().forward_with_hidden(input_ids=torch.tensor([prompt_of()]))
    q = model.q_values(hidden[1][0, -1]).mean(0)
    expected = (hidden[0].logits[0, -1] + 1.5 * q).log_softmax(-1).detach()
    assert_close(found, expected, atol=1e-4, rtol=0)


# What is refused


def test_what_is_no_run_is_refused(tmp_path):
    model = remove_heads(as_guided(build_model(SPEC, TOKENIZER)))
    model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="^run: found a model that no run of this project wrote in .*base"):
        export_run(tmp_path / "base", tmp_path / "plain")
    run = save_run(tmp_path / "judge", model, algorithm="reward_model")
    with pytest.raises(InputError, match="^run: found a reward model"):
        export_run(run, tmp_path / "plain")
    with pytest.raises(InputError, match="nothing: found no such folder"):
        export_run(tmp_path / "nothing", tmp_path / "plain")
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match="^output: found .*plain, which exists already, expected a new folder"):
        export_run(run, tmp_path / "plain")


def test_what_takes_two_passes_is_refused(tmp_path):
    run = told_run(tmp_path / "run", heads=ValueHeadsConfig("linear"))
    with pytest.raises(InputError, match="^beta: found 2 on a return-conditioned model"):
        export_run(run, tmp_path / "plain", beta=2.0)
    with pytest.raises(InputError, match="^condition_scale: found 0.5, expected 0"):
        export_run(run, tmp_path / "plain", condition_scale=0.5)
    assert len(export_run(run, tmp_path / "plain", ask="auto").written.returns) == 6  # the values stay behind
    assert "The run requests: auto, which is computed by heads" in (tmp_path / "plain" / "README.md").read_text()


def test_a_token_of_the_same_name_is_refused(tmp_path):
    tokenizer = train_tokenizer(["move left"], 270)
    tokenizer.add_tokens(["<return_2>"])
    run = told_run(tmp_path / "run", tokenizer)
    with pytest.raises(InputError, match=r"^tokenizer: found the token <return_2>, expected no tokens"):
        export_run(run, tmp_path / "plain")


def test_a_checkpoint_that_differs_from_the_run_is_not_kept(tmp_path, monkeypatch):
    run = valued_run(tmp_path / "run")
    monkeypatch.setattr("offline_lmrl.export.plain.head_scale", lambda model: 2.0)
    with pytest.raises(InputError, match="^run: found an export of gpt2 that differs from the run by"):
        export_run(run, tmp_path / "plain")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command_prints_the_report_and_the_folder_or_one_line_about_what_is_wrong(tmp_path, capsys):
    transformers.logging.disable_progress_bar()  # as a shell without a terminal has it
    run, output = valued_run(tmp_path / "run", q_reduce="min"), str(tmp_path / "plain")
    capsys.readouterr()

    def refused(*arguments):
        assert main(["export", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err.removeprefix("error: ")

    assert refused(run).startswith("output: missing, expected `offline-lmrl export RUN --output OUTPUT")
    assert refused(run, "--output", output).startswith("beta: found 1.5 with q_reduce min, expected guidance that")
    assert refused(run, "--output", output, "--beta", "0").startswith("prompts: missing, as the config of ")
    assert refused(run, "--output", output, "--to", "pt").startswith("to: found 'pt', expected ")
    assert refused(run, "--output", output, "--n", "1").startswith("n: found 1, expected at least 2 prompts")
    assert refused(tmp_path / "none", "--output", output).startswith(f"{tmp_path / 'none'}: found no such folder")
    assert refused(run, "--output", run).startswith("output: found ")
    blocked = run / "config.json" / "plain"
    assert str(blocked) in refused(run, "--output", blocked, "--q_reduce", "mean")
    (tmp_path / "prompts.txt").write_text("left\nyou are at 1, 2\n")
    words = ["--q_reduce", "mean", "--beta", "2", "--max_new_tokens", "6", "--prompts", str(tmp_path / "prompts.txt")]
    assert main(["export", str(run), "--output", output, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "plays: log π + 2 · Q (mean of the Q heads), folded into the LM head"
    assert lines[1].startswith("exact: ") and lines[-1] == output
    (row,) = [line for line in lines if line.startswith(" identical greedy replies")]
    assert row.split()[3] == "1" and row.endswith(" met")
    assert_close(next_log_prob(plain(output)[0], prompt_of()), guided(run, prompt_of(), 2.0), atol=1e-4, rtol=0)
