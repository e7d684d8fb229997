"""What a request may ask for: every field is honoured, or refused by name."""

import json

import pytest

from offline_lmrl.errors import InputError
from offline_lmrl.export.server.bodies import read_chat, read_text
from offline_lmrl.logs.trajectory import Turn

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields):
    return read_chat(json.dumps({"messages": HELLO} | fields).encode())


def text(**fields):
    return read_text(json.dumps({"prompt": "once"} | fields).encode())


def test_openais_fields_and_the_runs_own_are_read_together():
    asked = chat(
        model="m", n=2, best_of=3, seed=7, stop="END", temperature=0, top_p=0.5, max_tokens=9, beta=4, support=0.1,
        clip=None, top_k=5, min_p=0.02, candidates=8, ask="max", stream=True, stream_options={"include_usage": True},
        logprobs=True, top_logprobs=2, user="u1",
    )  # fmt: skip
    assert asked.decoding == {
        "stop": ("END",), "temperature": 0.0, "top_p": 0.5, "max_new_tokens": 9, "beta": 4.0, "support": 0.1,
        "clip": None, "top_k": 5, "min_p": 0.02, "candidates": 8, "ask": "max",
    }  # fmt: skip
    assert (asked.n, asked.best_of, asked.seed, asked.top, asked.model, asked.replies) == (2, 3, 7, 2, "m", 6)
    assert asked.stream and asked.include_usage and asked.labels == {"user": "u1"}
    assert asked.prompts == ([Turn("user", "hello")],)


def test_null_means_not_given_for_openais_fields_and_off_for_the_runs_own():
    asked = chat(temperature=1, stop=None, top_p=None, seed=None, n=None, top_k=None, tools=None, response_format=None)
    assert asked.decoding == {"temperature": 1.0, "top_k": None} and (asked.n, asked.seed) == (1, None)
    assert chat(temperature=None, beta=None, max_new_tokens=None, clip=None).decoding == {"clip": None}


def test_fields_that_ask_for_nothing_are_accepted():
    asked = chat(
        tools=[], tool_choice="none", response_format={"type": "text"}, logit_bias={}, presence_penalty=0,
        frequency_penalty=0.0, store=False, service_tier="auto", parallel_tool_calls=True, prompt_cache_key="k",
    )  # fmt: skip
    assert asked == chat()


def test_messages_are_read_as_logs_are_and_sampled_ids_are_not_taken_from_a_sender():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "yes", "token_ids": [1, 10**6]},
            {"role": "user", "content": "and?"},
        ]
    )
    turns = [Turn("system", "be brief"), Turn("user", "ab"), Turn("assistant", "yes"), Turn("user", "and?")]
    assert asked.prompts == (turns,)


def test_prompts_are_texts_or_token_ids_or_lists_of_them():
    assert text().prompts == ("once",)
    assert text(prompt=["a", "b"]).prompts == ("a", "b")
    assert text(prompt=[5, 6]).prompts == ([5, 6],)
    assert text(prompt=[[5], [6, 7]], logprobs=0).prompts == ([5], [6, 7])
    assert text(logprobs=3).top == 3 and text(logprobs=0).top == 0 and text().top is None


def test_the_settings_of_transformers_chat_are_read():
    assert chat(
        generation_config='{"do_sample": true, "max_new_tokens": 256, "transformers_version": "5"}'
    ).decoding == {"max_new_tokens": 256}
    config = '{"do_sample": false, "temperature": 0.7, "stop_strings": ["."], "top_k": null}'
    assert chat(generation_config=config).decoding == {"temperature": 0.0, "stop": (".",)}
    with pytest.raises(InputError, match="generation_config.num_beams: found a setting that does not exist"):
        chat(generation_config='{"num_beams": 4}')


# body -> a part of the one line that answers it; each names the field
MALFORMED = {
    b"": "body: found text that is not JSON",
    b"{": "body: found text that is not JSON",
    b"[]": "body: found [], expected a JSON object",
    b"null": "body: found None",
    b'"text"': "body: found 'text'",
    b"\xff\xfe": "body: found text that UTF-8 cannot hold",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}': "body: found text that UTF-8 cannot hold",
    b"[" * 100_000: "body: found text that is not JSON (nested too deep)",
    b'{"messages": ' + b"[" * 300 + b"]" * 300 + b"}": "body: found text that is not JSON (nested deeper",
    b"{}": "messages: missing",
    b'{"messages": null}': "messages: missing",
    b'{"messages": []}': "messages: found []",
    b'{"messages": "hello"}': "messages: found 'hello'",
    b'{"messages": ["hello"]}': "messages[0]: found 'hello'",
    b'{"messages": [{}]}': "messages: found message without content",
    b'{"messages": [{"role": "user"}]}': "messages: found message without content",
    b'{"messages": [{"content": "x"}]}': "messages[0].role: found None",
    b'{"messages": [{"role": "wizard", "content": "x"}]}': "messages[0].role: found 'wizard'",
    b'{"messages": [{"role": "user", "content": 5}]}': "messages[0].content: found 5",
    b'{"messages": [{"role": "assistant", "content": ""}]}': "messages[0].content: found empty text",
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}': "image_url",
}
FIELDS = {
    "temperature": ["hot", -1, float("nan"), True, [1], 1e39],
    "top_p": [0, 1.5],
    "top_k": [0, 1.5],
    "min_p": [2],
    "beta": ["much", float("inf"), -1e39],
    "support": [-0.1, 7],
    "clip": ["x"],
    "candidates": [0],
    "ask": ["p200", [1]],
    "q_reduce": ["max"],
    "n": [0, "two", 1.5],
    "best_of": [0],
    "seed": [-1, 2**32, 10**400, "s"],
    "max_tokens": [0, -5, "many"],
    "stop": [[""], [1], "", ["."] * 17],
    "stream": ["yes"],
    "stream_options": [{"include": 1}, {"include_usage": True}],
    "top_logprobs": [3, 21],
    "logprobs": [5],
    "model": [5],
    "metadata": ["x"],
    "tools": [[{"type": "function"}]],
    "tool_choice": ["required"],
    "functions": [[{}]],
    "response_format": [{"type": "json_object"}],
    "logit_bias": [{"5": 1}],
    "presence_penalty": [0.5],
    "frequency_penalty": [-2],
    "modalities": [["audio"]],
    "store": [True],
    "reasoning_effort": ["high"],
}


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:40]))
def test_a_malformed_body_is_refused_with_its_reason(body):
    with pytest.raises(InputError) as error:
        read_chat(body)
    assert MALFORMED[body] in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(name):
    for value in FIELDS[name]:
        with pytest.raises(InputError, match=rf"^{name}"):
            chat(**{name: value})


def test_an_unknown_field_is_refused_with_the_nearest_right_one():
    for wrong, right in {"temprature": "temperature", "max_token": "max_tokens", "bets": "beta"}.items():
        with pytest.raises(InputError, match=f"^{wrong}: .*did you mean '{right}'"):
            chat(**{wrong: 1})


def test_two_different_limits_on_the_length_are_refused():
    with pytest.raises(InputError, match="max_completion_tokens and max_tokens: found different numbers"):
        chat(max_tokens=5, max_completion_tokens=6)


@pytest.mark.parametrize("prompt", [None, "", [], [""], 5, {"a": 1}, [[]], [1, "a"], [True]])
def test_a_prompt_that_is_none_is_refused(prompt):
    with pytest.raises(InputError, match="^prompt"):
        text(prompt=prompt)
