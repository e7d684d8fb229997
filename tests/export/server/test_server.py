"""The server from outside: OpenAI's client, equality with `generate`, refusals, limits, disconnects, and its log."""

import asyncio
import gc
import json
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from offline_lmrl.decoding.loop import JOIN_EVERY
from offline_lmrl.decoding.policy import SAMPLE_STRIDE, generate_texts
from offline_lmrl.decoding.reranking import BestOfN
from offline_lmrl.decoding.scorers import FunctionScorer
from offline_lmrl.errors import InputError
from offline_lmrl.export.server.engine import Job
from offline_lmrl.export.server.exchange import Exchange
from offline_lmrl.logs.io import read_trajectories
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.tokens.checks import score_columns
from tests.decoding.test_conditioned_play import policy as conditioned_policy
from tests.export.server.running import call, running, tiny_policy
from tests.export.server.test_bodies import FIELDS, HELLO, MALFORMED

LONGEST = FunctionScorer(lambda context, option: float(len(option[-1].content)))
TURNS = [Turn("user", "hello")]


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


@pytest.fixture(scope="module")
def server(policy):
    with running(policy, scorer=LONGEST) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def generated(policy, turns=TURNS, seed=0, n=1, **decoding):
    (replies,) = generate_texts(policy.with_decoding(**decoding), [turns], n, [seed])
    return [reply.text for reply in replies]


def idle(server):
    """Wait until nothing is left of any request; return what would be left."""
    engine, end = server.service.engine, time.monotonic() + 60
    while time.monotonic() < end and (engine.open_rows or engine.jobs or engine.worker.rows or engine.worker.waiting):
        time.sleep(0.01)
    return engine.open_rows, len(engine.jobs), len(engine.worker.rows), len(engine.worker.loop)


# What is written


def test_a_reply_is_that_of_generate(policy, client):
    for form in ({"beta": 0.0}, {"beta": 4.0}, {"temperature": 0.0}, {"top_k": 3, "beta": -1.0}, {"support": 0.2}):
        for seed in range(3):
            reply = client.chat.completions.create(model="tiny", messages=HELLO, seed=seed, extra_body=form)
            assert reply.choices[0].message.content == generated(policy, seed=seed, **form)[0]
            usage = reply.usage
            assert (
                usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens <= 12
            )
            expected = "length" if usage.completion_tokens == 12 else "stop"
            assert reply.choices[0].finish_reason == expected


def test_beta_0_is_the_base_model(policy, client):
    plain = tiny_policy()
    plain.model.value_heads = None
    for seed in range(5):
        reply = client.chat.completions.create(model="tiny", messages=HELLO, seed=seed, extra_body={"beta": 0})
        (expected,) = generate_texts(policy.with_decoding(beta=0.0), [TURNS], 1, [seed])
        assert reply.choices[0].message.content == expected[0].text


def test_several_turns_and_replies_are_those_of_generate(policy, client):
    turns = [Turn("system", "be brief"), Turn("user", "hi"), Turn("assistant", "yes?"), Turn("user", "book")]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    reply = client.chat.completions.create(model="tiny", messages=messages, seed=3, n=4, max_tokens=8)
    assert [choice.message.content for choice in reply.choices] == generated(policy, turns, 3, 4, max_new_tokens=8)


def test_best_of_is_that_of_generate(policy, client):
    (expected,) = generate_texts(BestOfN(policy, LONGEST, 4), [TURNS], 2, [5])
    for stream in (False, True):
        found = client.chat.completions.create(
            model="tiny", messages=HELLO, seed=5, n=2, stream=stream, extra_body={"best_of": 4}
        )
        texts = ["", ""]
        if not stream:
            texts = [choice.message.content for choice in found.choices]
        for chunk in found if stream else ():
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == [reply.text for reply in expected]


def test_a_stream_adds_up_to_the_whole_reply(policy, client):
    for n in (1, 3):
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=HELLO, seed=1, n=n, stream=True, stream_options={"include_usage": True}
            )
        )
        *parts, last = chunks
        texts, ends = [""] * n, [None] * n
        for part in parts:
            assert part.usage is None and part.object == "chat.completion.chunk"
            (choice,) = part.choices
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
        whole = client.chat.completions.create(model="tiny", messages=HELLO, seed=1, n=n)
        assert texts == [choice.message.content for choice in whole.choices] == generated(policy, seed=1, n=n)
        assert ends == [choice.finish_reason for choice in whole.choices]
        assert last.choices == [] and last.usage == whole.usage


def test_stop_texts_end_a_reply(policy, client):
    (text,) = generated(policy, seed=1)
    stop = text[2:4]
    reply = client.chat.completions.create(model="tiny", messages=HELLO, seed=1, stop=stop).choices[0]
    assert (reply.message.content, reply.finish_reason) == (text[: text.index(stop)], "stop")


def test_log_probs_are_those_of_the_reply(policy, client):
    (reply,) = generate_texts(policy, [TURNS], 1, [2])[0]
    choice = client.chat.completions.create(
        model="tiny", messages=HELLO, seed=2, logprobs=True, top_logprobs=3
    ).choices[0]
    shown = [value for value, token in zip(reply.log_prob, reply.token_ids, strict=True)]
    found = [one.logprob for one in choice.logprobs.content]
    np.testing.assert_allclose(found, shown[: len(found)], atol=1e-4)
    assert len(shown) - len(found) == (choice.finish_reason == "stop")
    assert all(len(one.top_logprobs) == 3 for one in choice.logprobs.content)
    text = client.completions.create(model="tiny", prompt="hello", seed=2, logprobs=2).choices[0]
    assert len(text.logprobs.tokens) == len(text.logprobs.token_logprobs) == len(text.logprobs.text_offset)
    assert "".join(text.logprobs.tokens) == text.text or "\ufffd" in text.text + "".join(text.logprobs.tokens)


def test_texts_and_ids_are_continued_as_they_are(policy, client):
    ids = policy.renderer.tokenizer("hello")["input_ids"]
    reply = policy.sampler.sample([ids, ids], [0, 1])
    both = client.completions.create(model="tiny", prompt=["hello", "hello"], seed=0)
    assert [choice.text for choice in both.choices] == [one.text for one in reply]
    assert client.completions.create(model="tiny", prompt=ids, seed=0).choices[0].text == reply[0].text
    assert both.usage.prompt_tokens == 2 * len(ids)


def test_the_async_client_and_models_and_health(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="-") as client:
            whole = await client.chat.completions.create(model="tiny", messages=HELLO, seed=4)
            stream = await client.chat.completions.create(model="tiny", messages=HELLO, seed=4, stream=True)
            parts = [part.choices[0].delta.content or "" async for part in stream]
            return whole.choices[0].message.content, "".join(parts), await client.models.list()

    whole, streamed, models = asyncio.run(ask())
    assert whole == streamed and [model.id for model in models.data] == ["tiny"]
    assert call(server, "/v1/models/tiny", method="GET")[2]["max_model_len"] == 256
    assert call(server, "/health", method="GET")[::2] == (200, {"status": "ok", "replies": 0})


@pytest.mark.parametrize("n", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_requests_at_once_are_those_of_single_ones(policy, server, n):
    rng = random.Random(0)
    bodies = [
        {
            "messages": [
                {"role": "user", "content": rng.choice(["hello", "book", "hats?", "I would like two hats."])}
            ],
            "seed": i,
            "beta": rng.choice([0, 1, 2.5, 8]),
            "temperature": rng.choice([0, 0.7, 1, 1.3]),
            "support": rng.choice([0, 0.05]),
            "top_p": rng.choice([1, 0.9]),
            "max_tokens": rng.choice([1, 3, 7, 12]),
        }
        for i in range(n)
    ]
    with ThreadPoolExecutor(n) as pool:
        found = list(pool.map(lambda body: call(server, body=body), bodies))
    for body, (status, _, reply) in zip(bodies, found, strict=True):
        turns = [Turn("user", body["messages"][0]["content"])]
        form = {name: body[name] for name in ("beta", "temperature", "support", "top_p")}
        expected = generated(policy, turns, body["seed"], max_new_tokens=body["max_tokens"], **form)
        assert status == 200 and [one["message"]["content"] for one in reply["choices"]] == expected
    assert idle(server) == (0, 0, 0, 0)


def test_a_requested_return_is_asked_for_as_in_generate():
    player = conditioned_policy(ask=2, condition_scale=0.5, beta=1.0)  # in two streams, in batches of their own kind
    with running(player) as server:
        for ask in (None, 0, 3.5, "max", "auto"):
            status, _, answer = call(server, body={"messages": HELLO, "seed": 1, "ask": ask})
            assert status == 200
            assert answer["choices"][0]["message"]["content"] == generated(player, seed=1, ask=ask)[0]
        status, _, answer = call(server, "/v1/completions", {"prompt": "hello"})
        assert status == 400 and "expected messages" in answer["error"]["message"]


# What is refused


def test_every_malformed_request_is_answered_4xx_with_a_reason(server):
    bodies = [*MALFORMED, *({"messages": HELLO, name: value} for name in FIELDS for value in FIELDS[name])]
    assert len(bodies) >= 50
    for body in bodies:
        status, _, answer = call(server, body=body)
        assert 400 <= status < 500, (body, answer)
        assert answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"
    assert idle(server) == (0, 0, 0, 0)


def test_a_refusal_names_the_field_for_openais_client(client):
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'") as error:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"temprature": 1})
    assert error.value.param == "temprature"
    with pytest.raises(openai.NotFoundError, match="model: found 'gpt', expected 'tiny'"):
        client.chat.completions.create(model="gpt", messages=HELLO)


def test_what_the_run_cannot_do_is_refused(server):
    for fields, reason in (
        ({"ask": "max"}, "ask: found 'max', expected null, as this model was not trained with returns"),
        ({"ask": "auto:/tmp/other"}, "ask: found 'auto:/tmp/other', expected no other run"),
        ({"n": 33}, "n: found 33 replies in all"),
        ({"max_tokens": 300}, "max_tokens: found 300, expected fewer than 256"),
        ({"messages": [{"role": "user", "content": "hats " * 400}]}, "messages: found a last message that does not"),
        ({"messages": [{"role": "system", "content": "hats " * 400}]}, "max_length: found 256"),
        ({"condition_scale": 2}, "condition_scale: found 2"),
    ):
        status, _, answer = call(server, body={"messages": HELLO} | fields)
        assert (status, answer["error"]["message"][: len(reason)]) == (400, reason)
    for body, reason in (
        ({"prompt": [999_999]}, "outside the vocabulary"),
        ({"prompt": "a b " * 300}, "at most 244"),
        ({"prompt": [1, 2], "best_of": 2}, "prompt: found token ids together with best_of"),
    ):
        status, _, answer = call(server, "/v1/completions", body)
        assert status == 400 and reason in answer["error"]["message"]


def test_old_turns_are_dropped_by_the_windows_rule_as_in_generate(policy, server):
    turns = [Turn("assistant" if i % 2 else "user", f"{i} hats and a book") for i in range(41)]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    status, _, answer = call(server, body={"messages": messages, "seed": 1})
    assert status == 200 and answer["choices"][0]["message"]["content"] == generated(policy, turns, 1)[0]
    assert answer["usage"]["prompt_tokens"] <= 244


def test_http_mistakes_are_answered_in_openais_form(server):
    for path, method, expected in (("/v1/nothing", "GET", 404), ("/v1/chat/completions", "GET", 405)):
        status, _, answer = call(server, path, method=method)
        assert status == expected and answer["error"]["message"]
    headers = {"Content-Type": "text/plain"}
    assert call(server, body=b"{}", **headers)[0] == 415


def test_tokens_and_limits(policy):
    with running(policy, key="secret", max_body_bytes=200, max_prompt_tokens=30) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            for path, method in (("/v1/chat/completions", "POST"), ("/v1/models", "GET"), ("/load_model", "POST")):
                status, answered, answer = call(server, path, {"messages": HELLO}, method, **headers)
                assert status == 401 and answered["WWW-Authenticate"] == "Bearer"
                assert answer["error"]["type"] == "authentication_error"
        right = {"Authorization": "Bearer secret"}
        assert call(server, body={"messages": HELLO}, **right)[0] == 200
        assert call(server, "/health", method="GET")[0] == 200
        status, _, answer = call(server, body={"messages": HELLO * 20}, **right)
        assert status == 413 and "max_body_bytes" in answer["error"]["message"]
        long = [{"role": "user", "content": "hats " * 30}]
        status, _, answer = call(server, body={"messages": long}, **right)
        assert status == 400 and "max_prompt_tokens" in answer["error"]["message"]
    with running(policy, key="naïve") as server:
        token = "Bearer naïve".encode().decode("latin-1")  # http.client sends latin-1
        assert call(server, "/v1/models", method="GET", Authorization=token)[0] == 200


def test_a_full_queue_is_answered_429(policy):
    with running(policy, max_replies=2, max_waiting=1) as server:
        hold = threading.Event()
        server.service.engine.worker.loop.step = lambda step=server.service.engine.worker.loop.step: (
            hold.wait(),
            step(),
        )[1]
        with ThreadPoolExecutor(3) as pool:
            running_ones = [pool.submit(call, server, body={"messages": HELLO}) for _ in range(3)]
            while server.service.engine.open_rows < 3:
                time.sleep(0.01)
            status, headers, answer = call(server, body={"messages": HELLO})
            assert (status, headers["Retry-After"]) == (429, "1") and "max_waiting" in answer["error"]["message"]
            hold.set()
            assert [one.result()[0] for one in running_ones] == [200] * 3


# Disconnects, failures, the log


def leave(server, body, wait):
    """Send a request and close the connection after `wait` seconds, or after the first bytes of the answer."""
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
        connection.sendall("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
        if wait is None:
            connection.recv(100)
        else:
            time.sleep(wait)


def test_50_disconnects_leave_nothing(policy):
    with running(policy, max_replies=8, max_waiting=100) as server:
        call(server, body={"messages": HELLO})
        worker = server.service.engine.worker
        loop, step = worker.loop, worker.loop.step
        loop.step = lambda: (time.sleep(0.05), step())[1]  # so that every client leaves first
        threads = threading.active_count()
        for i in range(50):
            body = {"messages": HELLO, "n": 1 + i % 3, "stream": i % 2 == 0, "max_tokens": 200}
            leave(server, body, None if i % 2 == 0 and i % 4 else 0.01 * (i % 3))
        loop.step = step

        def left():
            gc.collect()
            objects = sum(type(one) in (Job, Exchange) for one in gc.get_objects())
            return *idle(server), threading.active_count() - threads, objects

        end = time.monotonic() + 20  # a busy machine reads the last requests after their clients have left
        while any(left()) and time.monotonic() < end:
            time.sleep(0.1)
        assert left() == (0, 0, 0, 0, 0, 0)
        assert call(server, body={"messages": HELLO})[0] == 200


def test_a_failure_of_the_model_ends_its_requests_and_not_the_server(policy, caplog):
    with running(policy) as server:

        def fail():
            raise RuntimeError("out of memory")

        server.service.engine.worker.loop.step = fail
        status, _, answer = call(server, body={"messages": HELLO})
        assert status == 500 and answer["error"]["type"] == "server_error"
        assert call(server, body={"messages": HELLO})[0] == 200
        server.service.engine.worker.loop.step = fail
        status, _, answer = call(server, body={"messages": HELLO, "stream": True})
        assert status == 200 and '"type": "server_error"' in answer and "[DONE]" not in answer
        assert idle(server) == (0, 0, 0, 0)


def test_an_extreme_setting_of_one_request_does_not_end_the_others(policy, server):
    expected = [generated(policy, seed=i, max_new_tokens=60)[0] for i in range(3)]
    with pytest.raises(InputError, match="found probabilities that are not numbers"):
        policy.chat("hello", temperature=1e-40)
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(call, server, body={"messages": HELLO, "seed": i, "max_tokens": 60}) for i in range(3)]
        broken = [{"temperature": 1e-40}, {"clip": -3e38, "beta": 4}, {"clip": -3e38, "stream": True}]
        found = [pool.submit(call, server, body={"messages": HELLO, **fields}) for fields in broken]
        for one, status in zip(found, (400, 400, 200), strict=True):
            answered, _, answer = one.result()
            assert answered == status and "found probabilities that are not numbers" in json.dumps(answer)
        assert [one.result()[2]["choices"][0]["message"]["content"] for one in others] == expected
    assert idle(server) == (0, 0, 0, 0)


def test_a_failure_while_a_request_is_given_up_does_not_end_the_thread(policy):
    with running(policy) as server:
        worker, given_up = server.service.engine.worker, threading.Event()

        def fail(rows):
            given_up.set()
            raise RuntimeError("out of memory")

        step, worker.loop.cancel = worker.loop.step, fail
        worker.loop.step = lambda: (time.sleep(0.05), step())[1]
        # With another seed the reply may end before the server sees that its client has left.
        leave(server, {"messages": HELLO, "max_tokens": 200, "stream": True, "seed": 2}, None)
        assert given_up.wait(60)
        assert call(server, body={"messages": HELLO})[0] == 200
        assert idle(server) == (0, 0, 0, 0)


def test_a_client_that_leaves_amid_its_body_is_no_failure_of_the_server(policy, tmp_path, caplog):
    log = tmp_path / "served.jsonl"
    with running(policy, log=log) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
            connection.sendall("\r\n".join([*head, "Content-Length: 100", "", '{"mess']).encode())
            time.sleep(0.2)
        end = time.monotonic() + 10
        while not log.read_text() and time.monotonic() < end:
            time.sleep(0.01)
    assert json.loads(log.read_text())["served"]["status"] == 499 and not caplog.records


def test_a_newcomer_gets_its_first_token_within_one_step_of_joining(policy):
    with running(policy, max_replies=64) as server:
        worker, steps, joined, first = server.service.engine.worker, 0, {}, {}
        add, step = worker.loop.add, worker.loop.step

        def added(requests):
            rows = add(requests)
            joined.update(dict.fromkeys(rows, steps))
            return rows

        def stepped():
            nonlocal steps
            time.sleep(0.01)  # so that requests arrive while others are written
            steps += 1
            found = step()
            for event in found:
                first.setdefault(event.row, steps)
            return found

        worker.loop.add, worker.loop.step = added, stepped
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: call(server, body={"messages": HELLO, "seed": i}), range(24)))
        assert len(first) == 24 and steps > JOIN_EVERY
        assert max(first[row] - joined[row] for row in first) <= JOIN_EVERY


def test_the_log_is_data_for_training_if_it_has_texts(policy, tmp_path):
    log = tmp_path / "served.jsonl"
    with running(policy, scorer=LONGEST, log=log, log_texts=True) as server:
        call(server, body={"messages": HELLO, "seed": 1, "user": "u", "beta": 3, "n": 2})
        call(server, body={"messages": HELLO, "seed": 2, "best_of": 2})
        call(server, body={"messages": HELLO, "temprature": 2})
        call(server, "/v1/completions", {"prompt": "hello"})
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["served"]["status"] for line in lines] == [200, 200, 200, 400, 200]
    assert "did you mean" in lines[3]["served"]["error"] and "messages" not in lines[3]
    counts = Counter()
    first, second, chosen = read_trajectories(log, counts=counts)
    assert counts["dropped: a served request without messages and a reply"] == 2
    (expected,) = generate_texts(policy.with_decoding(beta=3.0), [TURNS], 2, [1])
    for row, reply in zip((first, second), expected, strict=True):
        assert (row.turns[-1].content, row.turns[-1].token_ids) == (reply.text, reply.token_ids)
        np.testing.assert_allclose(row.turns[-1].behaviour_log_prob, reply.log_prob, atol=1e-4)
        assert row.terminated == reply.closed and row.labels["decoding"]["beta"] == 3.0 and row.labels["user"] == "u"
        assert row.labels["tokenizer"] == policy.renderer.fingerprint
        assert row.labels["served"]["seconds"] >= row.labels["served"]["first_token_seconds"]
    assert first.labels["id"] == second.labels["id"] and second.labels["decoding"]["seed"] == 1 + SAMPLE_STRIDE
    assert first.group == second.group == chosen.group
    assert chosen.labels["best_of"] == {"score": float(len(chosen.turns[-1].content)), "n": 2}
    assert score_columns([first, second, chosen]) == []
    assert chosen.turns[-1].behaviour_log_prob is None and chosen.turns[-1].token_ids


def test_a_log_without_texts_holds_none(policy, tmp_path):
    log = tmp_path / "served.jsonl"
    with running(policy, log=log) as server:
        answer = call(server, body={"messages": [{"role": "user", "content": "secret"}], "seed": 1})[2]
    (line,) = map(json.loads, log.read_text().splitlines())
    assert "secret" not in log.read_text() and "token_ids" not in log.read_text()
    assert line["id"] == answer["id"] and line["served"]["completion_tokens"] == answer["usage"]["completion_tokens"]
