"""Real chat templates, those in the wheel of trl, and their probe dialogues: rendered as printed, or said."""

import functools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from offline_lmrl.decoding.policy import LanguagePolicy, generate_texts
from offline_lmrl.logs.scale import RewardScale
from offline_lmrl.logs.trajectory import Trajectory, Turn
from offline_lmrl.tokens.episodes import EpisodeEncoder, StepRule
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.template_check import MISMATCH, cells
from offline_lmrl.tokens.templates import TemplateText
from offline_lmrl.tokens.windows import WindowRule, policy_window
from tests.smollm2 import FOLDER, needs_smollm2
from tests.tiny import byte_level

trl = pytest.importorskip("trl")
FILES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
TOKEN = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜]+｜>|\[/?[A-Z_]+\]|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|"
    r"</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn|end_of_utterance)>"
)
# Their tool results lose the text, and keep the turn around it.
OTHERWISE = {"cohere2": {"tools"}, "cohere2_training": {"tools"}}
REFUSED = "the template refuses this dialogue"


@functools.cache
def tokenizer_for(path):
    """A small tokenizer with the template and every token that it prints."""
    source = path.read_text(encoding="utf-8")
    return byte_level(source, sorted({match.group() for match in TOKEN.finditer(source)}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dialogues_are_rendered_as_the_template_prints_them_or_the_kind_is_named(path):
    view = Renderer(tokenizer_for(path))
    differ = {}
    for kind, name, turns, prompt in cells():
        difference = view.check.difference(turns, prompt)
        if difference is not None and REFUSED not in difference:
            differ.setdefault(kind, name)
    assert set(differ) == OTHERWISE.get(path.stem, set())
    for kind, difference in view.check.mismatches.items():
        assert kind in differ or REFUSED in difference
    roles = ("user", "assistant", "tool", "assistant")
    turns = [Turn(role, "text") for role in roles]
    named = any(line.startswith(MISMATCH) for line in view.check.faults_in(turns))
    assert named == ("tools" in view.check.mismatches or view.check.text_difference(turns, False) is not None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_window_is_the_prompt_of_the_template_with_the_reply_behind_it(path):
    view = Renderer(tokenizer_for(path))
    dialogue = [Turn("user", "Hello"), Turn("assistant", "So it is"), Turn("user", "Well"), Turn("assistant", "Yes")]
    encoded = view.encode(dialogue)
    for i in (1, 3):
        pieces = view.window_ids(dialogue, encoded, 0, i + 1, live=True)
        ids = [*view.preamble_of(dialogue), *(token for piece in pieces for token in piece)]
        assert ids == view.tokens(dialogue[: i + 1])
        own, start = encoded[i], len(ids) - len(pieces[-1]) + encoded[i].action_start
        assert tuple(ids[start : start + len(own.actions) - 1]) == own.actions[:-1]
        if view.check.prompt_mismatch is None:
            assert ids[:start] == view.tokens(dialogue[:i], prompt=True)


CALL = [{"id": "call00000", "function": {"name": "look_up", "arguments": {"key": "a"}}}]
ANSWER = Turn("tool", "12", name="look_up", tool_call_id="call00000")


@pytest.mark.parametrize(
    "stem, turns, named",
    [
        # Words beside a call move behind the tool's answer; a second answer in a row has no opening of its own.
        ("gemma4", [Turn("user", "q"), Turn("assistant", "I look", tool_calls=CALL), ANSWER], True),
        ("gemma4", [Turn("user", "q"), Turn("assistant", "", tool_calls=CALL), ANSWER], False),
        ("deepseekv3", [Turn("user", "q"), *[Turn("assistant", "", tool_calls=CALL), ANSWER] * 2], True),
        ("gptoss", [Turn("user", "q"), Turn("assistant", "", thinking="hm", tool_calls=CALL), ANSWER], False),
        ("phi3_5", [Turn("system", ""), Turn("user", "q"), Turn("assistant", "a")], True),
        ("gemma", [Turn("user", "q"), Turn("user", "and"), Turn("assistant", "a")], True),
        ("qwen2_5", [Turn("user", "q"), Turn("user", "and"), Turn("assistant", "a")], False),
    ],
)
def test_rarer_dialogues_are_compared_one_by_one_and_named(stem, turns, named):
    view = Renderer(tokenizer_for(next(path for path in FILES if path.stem == stem)))
    assert (view.check.difference(turns) is not None) == named
    assert any(line.startswith(MISMATCH) for line in view.check.faults_in(turns)) == named


@pytest.mark.parametrize("stem", ["lfm2_2_5", "glm4moe", "nemotron_3_nano", "qwen3", "gptoss"])
def test_every_agent_turn_is_trained_behind_what_play_sees(stem):
    view = Renderer(tokenizer_for(next(path for path in FILES if path.stem == stem)))
    turns = (
        Turn("user", "q"),
        Turn("assistant", "", thinking="hm", tool_calls=CALL),
        ANSWER,
        Turn("assistant", "ok"),
        Turn("user", "more"),
        Turn("assistant", "fine", reward=1.0),
    )
    encoder = EpisodeEncoder(view, WindowRule(), StepRule(), RewardScale())
    for window in encoder.encode(Trajectory(turns), Counter()):
        for trained in window.turns:
            if view.check.prompt_mismatch is None:
                seen = window.input_ids[: trained.open_state + 1]
                assert seen == policy_window(turns[: trained.turn], view, WindowRule())


def test_words_of_the_probes_may_stand_in_a_log():
    for stem in ("llama3", "qwen3"):
        view = Renderer(tokenizer_for(next(path for path in FILES if path.stem == stem)))
        for text in (" Held0Word", "Probe0Word", " Held0Word <|eot_id|> Probe1Word ", "</think>Probe2Word"):
            for dialogue in (
                [Turn("user", text), Turn("assistant", text)],
                [Turn("user", "q"), Turn("assistant", text, thinking=text), Turn("user", text)],
                [Turn("system", text, tools=CALL), Turn("user", text)],
            ):
                assert view.check.text_difference(dialogue, dialogue[-1].role == "user") is None


def test_a_dated_template_keeps_the_date_it_was_derived_on():
    path = next(path for path in FILES if path.stem == "gptoss")
    today = Renderer(tokenizer_for(path))
    later = Renderer(today.tokenizer, text=replace(today.text, date="2031-01-02"))
    assert later.fingerprint != today.fingerprint
    again = Renderer(today.tokenizer, text=TemplateText.from_dict(json.loads(json.dumps(today.text.to_dict()))))
    assert again.fingerprint == today.fingerprint and again.text == today.text
    call = Turn("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {"b": 1, "a": "<|end|>"}}}])
    result = Turn("tool", 'say "x"', name="f")
    printed = again.printer.printed([Turn("user", "<|end|>?"), call, result, Turn("user", "so")])
    assert f"Current date: {today.text.date}" in printed and '"say \\"x\\""' in printed
    # A control token typed in a call or a result stays text.
    ids = again.encode([Turn("user", "q"), call])[1].ids
    end = today.tokenizer.convert_tokens_to_ids("<|end|>")
    assert end not in ids and '{"b": 1, "a": "<|end|>"}' in today.tokenizer.decode(ids)


@needs_smollm2
def test_real_model_obeys_a_system_turn_as_with_the_stock_template():
    policy = LanguagePolicy.load(FOLDER, temperature=0.0, max_new_tokens=24)
    asked = [Turn("user", "What is the capital of Italy?")]
    for turns in ([Turn("system", "Always answer in French."), *asked], asked):
        chat = [{"role": turn.role, "content": turn.content} for turn in turns]
        stock = policy.renderer.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        ids = stock["input_ids"]
        assert policy_window(turns, policy.renderer, policy.window) == ids[0].tolist()
        expected = policy.model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        ((reply,),) = generate_texts(policy, [turns])
        assert list(reply.token_ids) == expected.tolist()[: len(reply.token_ids)]
        print(reply.text)
    assert policy.renderer.check.mismatches == {} and policy.renderer.check.prompt_mismatch is None
