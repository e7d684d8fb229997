"""A saved model as a player: what it sees, what it keeps, and what it refuses."""

import json

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.decoding.policy import LanguagePolicy, generate_texts
from offline_lmrl.decoding.sampler import DecodingConfig
from offline_lmrl.errors import InputError
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.models.guided import add_value_heads
from offline_lmrl.models.loading import build_model
from offline_lmrl.models.renderers import rendering_block
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer
from offline_lmrl.tokens.windows import policy_window

TEXTS = ["move left", "move right", "there is a wall above", "you are at 1, 2"]
FORM = {"temperature": 1.0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


def scramble(model):
    """Weights far from uniform, so that mistakes show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(scope="module")
def model(tokenizer):
    model = build_model({"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}, tokenizer)
    return scramble(add_value_heads(model, ValueHeadsConfig("linear"))).eval()


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


@pytest.fixture
def run(tmp_path, model, renderer):
    model.config.offline_lmrl = model.config.offline_lmrl | {
        "decoding": FORM | {"beta": 2.0, "top_k": 20},
        "window": {"context": 3, "stride": 1, "max_length": 100},
        **rendering_block(renderer),
    }
    model.save_pretrained(tmp_path)
    renderer.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def dialogue(*texts):
    return [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def test_a_run_loads_with_its_form_and_window(run):
    policy = LanguagePolicy.load(run, device="cpu")
    assert (policy.decoding.beta, policy.decoding.top_k, policy.window.context) == (2.0, 20, 3)
    override = LanguagePolicy.load(run, device="cpu", beta=0.0, temperature=0.0)
    assert (override.decoding.beta, override.decoding.top_k, override.decoding.temperature) == (0.0, 20, 0.0)
    history = dialogue("you are at 1, 2")
    assert generate_texts(policy, [history]) == generate_texts(LanguagePolicy.load(run, device="cpu"), [history])


def test_a_wrong_override_names_the_setting(run):
    with pytest.raises(InputError, match="decoding.betta: found .*did you mean 'beta'"):
        LanguagePolicy.load(run, betta=3.0)


def test_another_tokenizer_is_refused(run):
    train_tokenizer(["something else"], 270).save_pretrained(run)
    with pytest.raises(InputError, match="trained with another tokenizer") as error:
        LanguagePolicy.load(run)
    assert str(run) in str(error.value) and "\n" not in str(error.value)


def test_a_run_of_another_rendering_scheme_is_rendered_anew_and_said(run, caplog):
    config = json.loads((run / "config.json").read_text())
    config["offline_lmrl"] = {k: v for k, v in config["offline_lmrl"].items() if k != "template_text"} | {
        "tokenizer": "0123456789abcdef"
    }
    (run / "config.json").write_text(json.dumps(config))
    policy = LanguagePolicy.load(run, device="cpu")
    assert f"{run}: trained under rendering scheme 1, now 2" in caplog.text
    assert policy.renderer.agent_opening


def test_the_text_that_was_derived_is_used_from_the_run(run):
    config = json.loads((run / "config.json").read_text())
    text = config["offline_lmrl"]["template_text"]
    assert text["prompt"] == "<assistant>" and text["preamble"] == {"system": "<bos>", "default": "<bos>"}
    # A template that prints something else by now is not the run's.
    (run / "chat_template.jinja").write_text((run / "chat_template.jinja").read_text() + ".")
    with pytest.raises(InputError, match="trained with another tokenizer or chat template"):
        LanguagePolicy.load(run)


def test_every_token_that_ends_a_reply_of_the_model_ends_one(run, model):
    generation = json.loads((run / "generation_config.json").read_text())
    ((before,),) = generate_texts(LanguagePolicy.load(run, device="cpu", temperature=1.0), [dialogue("you are")])
    assert len(before.token_ids) > 2
    ends = [2, before.token_ids[1]]  # the second token sampled ends a reply from now on
    (run / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": ends}))
    policy = LanguagePolicy.load(run, device="cpu", temperature=1.0)
    ((reply,),) = generate_texts(policy, [dialogue("you are")])
    assert policy.renderer.close_ids == set(ends) and reply.token_ids == before.token_ids[:2] and reply.closed
    turns = [*dialogue("you are"), Turn("assistant", reply.text, token_ids=reply.token_ids), Turn("user", "on")]
    ids = policy_window(turns, policy.renderer, policy.window)
    assert ids.count(policy.renderer.close_id) == 3  # history has the template's own closing


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError):
        LanguagePolicy.load(tmp_path / "nothing")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="found no tokenizer files, expected those"):
        LanguagePolicy.load(tmp_path)


def test_greedy_guided_play_equals_generate(model, renderer):
    policy = LanguagePolicy(model, renderer, DecodingConfig(temperature=0.0, beta=3.0, max_new_tokens=8))
    ((reply,),) = generate_texts(policy, [dialogue("you are at 1, 2")])
    asked = renderer.encode_turn(Turn("user", "you are at 1, 2")).ids
    prompt = [*renderer.preamble_of(()), *asked, *renderer.agent_opening]
    ids = model.generate(
        torch.tensor([prompt]),
        beta=3.0,
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=renderer.close_id,
        pad_token_id=0,
    )
    assert list(reply.token_ids) == ids[0, len(prompt) :].tolist()
    assert reply.text == renderer.decode(reply.token_ids)


def play(policy, turns, fresh):
    """Two rows, each told another text; fresh: every turn gets a new session, so nothing is cached."""
    histories = [dialogue("you are at 1, 2"), dialogue("there is a wall above you")]
    session = policy.start([5, 6])
    everything = []
    for turn in range(turns):
        if fresh:
            drawn, session = session.drawn, policy.start([5, 6])
            session.drawn = drawn
        replies = session.reply([0, 1], histories)
        for history, reply in zip(histories, replies, strict=True):
            history += [Turn("assistant", reply.text, token_ids=reply.token_ids), Turn("user", "move " * (turn + 1))]
        everything += replies
    return everything


WINDOWS = [{}, {"context": 1}, {"context": 3}, {"context": 4, "stride": 2}, {"max_length": 40}]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_session_with_caches_plays_as_without(model, renderer, window):
    policy = LanguagePolicy(model, renderer, DecodingConfig(**FORM, beta=1.0), **window)
    for cached, uncached in zip(play(policy, 4, False), play(policy, 4, True), strict=True):
        assert cached.token_ids == uncached.token_ids
        assert_close(torch.tensor(cached.log_prob), torch.tensor(uncached.log_prob), atol=1e-4, rtol=0)


def test_a_session_of_one_turn_windows_keeps_no_cache(model, renderer):
    assert LanguagePolicy(model, renderer, context=1).start([0]).memory is None
    assert LanguagePolicy(model, renderer).start([0]).memory is not None


def test_a_rows_reply_does_not_depend_on_the_other_rows(model, renderer):
    policy = LanguagePolicy(model, renderer, DecodingConfig(**FORM))
    histories = [dialogue("you are at 1, 2"), dialogue("a", "b", "c")]
    session = policy.start([1, 2, 3])
    later = session.reply([2], histories[1:])
    assert later[0].token_ids == policy.start([3]).reply([0], histories[1:])[0].token_ids


def test_n_samples_differ_and_do_not_depend_on_n(model, renderer):
    policy = LanguagePolicy(model, renderer, DecodingConfig(**FORM))
    histories = [dialogue("you are at 1, 2"), dialogue("a", "b", "c")]
    five = generate_texts(policy, histories, n=5)
    assert [len(replies) for replies in five] == [5, 5]
    assert len({reply.token_ids for reply in five[0]}) > 1
    two = generate_texts(policy, histories, n=2)
    for more, less in zip(five, two, strict=True):
        assert [reply.token_ids for reply in more[:2]] == [reply.token_ids for reply in less]
    (one,) = generate_texts(policy, histories[1:], seeds=[1])
    assert one[0].token_ids == five[1][0].token_ids


def test_options_come_back_as_they_were_given(model, renderer):
    policy = LanguagePolicy(model, renderer, DecodingConfig(max_new_tokens=32))
    allowed = ["move left", "move right", " spaced  out "]
    replies = policy.start(range(30)).reply(range(30), [dialogue("go")] * 30, [allowed] * 30)
    assert {reply.text for reply in replies} <= set(allowed)
    assert all(reply.closed and reply.token_ids[-1] == renderer.close_id for reply in replies)


def test_a_reply_that_leaves_no_room_for_the_system_turn_is_refused(model, renderer):
    policy = LanguagePolicy(model, renderer, DecodingConfig(max_new_tokens=60), max_length=64)
    with pytest.raises(InputError, match="max_length: found 64"):
        policy.start([0]).reply([0], [[Turn("system", "x" * 30), Turn("user", "hi")]])


def test_guidance_without_heads_is_refused(tokenizer, renderer):
    plain = build_model({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}, tokenizer)
    with pytest.raises(InputError, match="has no value heads"):
        LanguagePolicy(plain, renderer, DecodingConfig(beta=1.0))
    assert generate_texts(LanguagePolicy(plain, renderer, DecodingConfig(**FORM)), [dialogue("hi")])


def test_a_lora_policy_plays_guided(tokenizer, renderer):
    peft = pytest.importorskip("peft")
    base = build_model({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}, tokenizer)
    guided = scramble(add_value_heads(base, ValueHeadsConfig("linear")))
    form = DecodingConfig(**FORM, beta=1.0)
    before = generate_texts(LanguagePolicy(guided, renderer, form), [dialogue("hi")])
    lora = peft.get_peft_model(guided, peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM"))
    after = generate_texts(LanguagePolicy(lora, renderer, form), [dialogue("hi")])
    assert after[0][0].token_ids == before[0][0].token_ids  # a fresh adapter changes nothing


# Requests and chats


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"beta": 0.0, "top_k": None, "stop": ("e",)}])
def test_a_chat_streams_the_text_that_a_session_replies(run, settings):
    policy = LanguagePolicy.load(run, device="cpu")
    turns = [Turn("user", "move left"), Turn("assistant", "move right"), Turn("user", "you are at 1, 2")]
    (reply,) = policy.with_decoding(**settings).start([3]).reply([0], [turns])
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    pieces = list(policy.stream(messages, seed=3, **settings))
    assert "".join(pieces) == reply.text == policy.chat(turns, seed=3, **settings) != ""
    assert all(pieces)
    alone = policy.start([0]).reply([0], [turns[:1]])[0].text
    assert policy.chat("move left") == policy.chat(turns[:1]) == alone


def test_a_request_sees_what_a_session_sees(run):
    policy = LanguagePolicy.load(run, device="cpu")
    turns = (Turn("system", "there is a wall above"), Turn("user", "you are at 1, 2"))
    request = policy.request(turns, seed=5, max_new_tokens=7)
    assert request.prompt == policy.null_window(turns, reserve=7)
    assert (request.seed, request.config.max_new_tokens, request.config.beta) == (5, 7, 2.0)


@pytest.mark.parametrize(
    "dialogue, changes, message",
    [
        ([], {}, "^dialogue: messages: found .*expected text or a list of messages"),
        ([{"role": "user"}], {}, "dialogue: messages"),
        ("move left", {"temperature": -1.0}, "^temperature: found -1.0"),
        ("move left", {"ask": 3.0}, "^ask: found 3.0, expected null"),
        ("move left", {"condition_scale": 1.0}, "^condition_scale: found 1.0, expected 0"),
    ],
)
def test_a_request_that_the_model_cannot_serve_is_refused(run, dialogue, changes, message):
    with pytest.raises(InputError, match=message):
        LanguagePolicy.load(run, device="cpu").request(dialogue, **changes)
