"""The token loop: rows that come and go at any time get what they get alone."""

import gc
import math
import random
import weakref
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.decoding import loop as loop_module
from offline_lmrl.decoding.cache import CacheMemory, ReservingLayer
from offline_lmrl.decoding.loop import Request, SamplingLoop
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.decoding.prompts import CachedModel
from offline_lmrl.decoding.sampler import DecodingConfig, Sampler
from offline_lmrl.errors import InputError
from offline_lmrl.tokens.rendering import Renderer
from offline_lmrl.tokens.tokenizers import train_tokenizer
from tests.decoding.test_sampler import Letters, WithValues, llama, mistral, tiny
from tests.families import small_model
from tests.smollm2 import FOLDER, needs_smollm2

MODELS = {"gpt2": lambda: tiny(WithValues), "llama": llama, "mistral": mistral}


def sampler_of(model):
    return Sampler(model, Letters(model.config.vocab_size), DecodingConfig())


def random_request(rng, guided=True):
    choices = {
        "temperature": (0.0, 0.7, 1.0, 1.5),
        "support": (0.0, 0.1, 0.3),
        "top_p": (None, 0.8),
        "min_p": (None, 0.05),
        "max_new_tokens": (1, 3, 8, 15),
        "stop": ((), ("ab", "q"), ("c",)),
    }
    if guided:
        choices |= {"beta": (0.0, 1.0, -0.5), "clip": (None, 0.0), "candidates": (None, 4)}
        choices["top_k"] = (None, None, 5, 30)
    config = DecodingConfig(**{name: rng.choice(values) for name, values in choices.items()})
    prompt = [rng.randrange(20) for _ in range(rng.choice((1, 2, 5, 20)))]
    return Request(prompt, rng.randrange(10**6), config, counter=rng.choice((0, 7)), top=rng.choice((0, 0, 3)))


def run(loop, arrivals):
    """Add each list of requests before the next step; return the events of each request."""
    keys, events = [], {}
    arrivals = list(arrivals)
    while arrivals or len(loop):
        if arrivals:
            keys += loop.add(arrivals.pop(0))
        for event in loop.step():
            events.setdefault(event.row, []).append(event)
    return [events[key] for key in keys]


def assert_as_alone(sampler, requests, found):
    for request, events in zip(requests, found, strict=True):
        one = Sampler(sampler.model, sampler.renderer, request.config)
        (reply,) = one.sample([request.prompt], [request.seed], [request.counter])
        assert "".join(event.text for event in events) == reply.text
        assert [event.finished for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].finished == ("stop" if reply.token_ids is None or reply.closed else "length")
        if reply.token_ids is not None:
            assert [event.token for event in events] == list(reply.token_ids)
        for name in ("log_prob", "policy_log_prob"):
            numbers = torch.tensor([getattr(event, name) for event in events])
            assert_close(numbers, torch.tensor(getattr(reply, name)), atol=1e-4, rtol=0)


def waves_of(requests, rng):
    waves, rest = [], list(requests)
    while rest:
        n = rng.choice((0, 0, 1, 2, 9))
        waves.append(rest[:n])
        rest = rest[n:]
    return waves


@pytest.mark.parametrize(
    "family, count", [("gpt2", 25), ("llama", 15), ("mistral", 15), pytest.param("gpt2", 200, marks=pytest.mark.slow)]
)
def test_rows_that_join_at_any_time_with_any_settings_get_what_they_get_alone(family, count):
    rng, sampler = random.Random(count), sampler_of(MODELS[family]())
    requests = [random_request(rng, guided=family == "gpt2") for _ in range(count)]
    loop = SamplingLoop(sampler, CacheMemory(2**20), join_every=rng.choice((1, 4)))
    assert_as_alone(sampler, requests, run(loop, waves_of(requests, rng)))
    assert not loop.batches and not loop.waiting


@pytest.mark.parametrize("family", MODELS)
def test_replies_and_caches_do_not_depend_on_when_finished_rows_leave(family, monkeypatch):
    sampler, found = sampler_of(MODELS[family]()), {}
    lengths = [9, 1, 4, 4, 2, 12, 7, 1]
    prompts = [[n % 5 + 1] * (1 + n % 3) for n in range(len(lengths))]
    for cost in (0.0, 0.5, 1e9):
        monkeypatch.setattr(loop_module, "LEAVING_COST", cost)
        loop = SamplingLoop(sampler, CacheMemory(2**20))
        first = run(loop, [[request(p, n, max_new_tokens=lengths[n]) for n, p in enumerate(prompts)]])
        longer = [[*p, *(event.token for event in events), 7] for p, events in zip(prompts, first, strict=True)]
        second = run(loop, [[request(p, n, max_new_tokens=6) for n, p in enumerate(longer)]])
        found[cost] = [event for events in first + second for event in events]
    for cost in (0.5, 1e9):
        assert [event.token for event in found[cost]] == [event.token for event in found[0.0]]
        numbers, expected = ([event.log_prob for event in found[key]] for key in (cost, 0.0))
        assert_close(torch.tensor(numbers), torch.tensor(expected), atol=1e-4, rtol=0)


def test_finished_rows_leave_before_their_idle_steps_cost_what_leaving_costs(monkeypatch):
    monkeypatch.setattr(loop_module, "LEAVING_COST", 0.5)
    loop = SamplingLoop(never_closing(tiny()))
    keys = loop.add([request([1, 2], n, max_new_tokens=2 if n == 1 else 9) for n in range(6)])
    sizes = []
    for _ in range(6):
        loop.step()
        (batch,) = loop.batches.values()
        sizes.append(len(batch.rows))
    # Finished after 2 draws; after 4 it has taken 2 idle steps, and the next would be the third: half of 6.
    assert sizes == [6, 6, 6, 5, 5, 5]
    assert [row.key for row in batch.rows] == [keys[n] for n in (0, 5, 2, 3, 4)]  # the last has taken its place


def request(prompt, seed=0, **settings):
    return Request(prompt, seed, DecodingConfig(**settings))


def never_closing(model):
    """The same model, which gives the closing token no probability."""
    sampler = sampler_of(model)
    sampler.ends = torch.tensor([-1])
    return sampler


def reads_of(monkeypatch):
    """Record the shape of the ids of every pass through the model."""
    shapes, forward = [], CachedModel.forward
    monkeypatch.setattr(
        CachedModel,
        "forward",
        lambda self, ids, *rest: (shapes.append(tuple(ids.shape)), forward(self, ids, *rest))[1],
    )
    return shapes


def test_rows_of_one_kind_run_in_one_batch_and_equal_prompts_are_read_once(monkeypatch):
    shapes = reads_of(monkeypatch)
    loop = SamplingLoop(never_closing(tiny(WithValues)))
    loop.add([request([1, 2, 3], seed, beta=seed / 2, temperature=1 + seed, max_new_tokens=9) for seed in range(4)])
    loop.step()
    assert shapes == [(1, 3)]
    loop.add([request([5] * 7, support=0.1, max_new_tokens=9)])
    loop.step()
    assert shapes == [(1, 3), (4, 1)]  # it waits, as the batch has only just started
    loop.step(), loop.step()
    events = loop.step()
    assert shapes[4:] == [(1, 7), (4, 1)] and len(events) == 5  # read by itself, and drawn with the others
    loop.step()
    assert shapes[6:] == [(5, 1)]


def test_a_longer_prompt_joins_to_the_left_and_its_columns_leave_with_it():
    loop = SamplingLoop(never_closing(tiny()), join_every=1)
    loop.add([request([1], max_new_tokens=20)])
    loop.step()
    (long,) = loop.add([request([2] * 30, max_new_tokens=3)])
    loop.step()
    (batch,) = loop.batches.values()
    assert batch.read.width == 30 and batch.read.padded
    assert batch.read.mask[:, :30].sum(-1).tolist() == [2, 30]
    assert batch.read.length.tolist() == [2, 30]
    while any(event.row == long for event in loop.step()):
        pass
    assert [len(row.tokens) for row in batch.rows] == [5]
    assert batch.read.width == 5 and not batch.read.padded  # 1 of the prompt, and 4 that were read of the reply
    assert batch.read.cache.layers[0].keys.shape[:3] == (1, 2, 5)


def test_only_the_last_rows_of_a_cache_move_to_free_places_and_the_first_columns_go():
    keys, values = torch.arange(24.0).view(4, 1, 3, 2), -torch.arange(24.0).view(4, 1, 3, 2)  # 6 numbers per row
    layer = ReservingLayer(reserve=2)
    layer.update(keys, values)
    memory = layer.buffers[0].data_ptr()
    layer.keep(torch.tensor([0, 3]), first=1)  # rows 1 and 2 leave
    expected = torch.tensor([[[[2.0, 3.0], [4.0, 5.0]]], [[[20.0, 21.0], [22.0, 23.0]]]])
    assert torch.equal(layer.keys, expected) and torch.equal(layer.values, -expected)
    new = torch.ones(2, 1, 1, 2)
    found, _ = layer.update(new, new)
    assert torch.equal(found, torch.cat([expected, new], dim=2))
    assert layer.buffers[0].data_ptr() == memory + 2 * 4  # the second column of the same memory


def test_cancelled_rows_leave_and_their_memory_is_freed():
    loop = SamplingLoop(never_closing(tiny()), CacheMemory(2**20))
    keys = loop.add([request([1, 2, 3], seed, max_new_tokens=50) for seed in range(4)])
    loop.step()
    (batch,) = loop.batches.values()
    caches = [weakref.ref(layer) for layer in batch.read.cache.layers]
    loop.cancel(keys[:2])
    assert len(loop) == 2 and batch.read.cache.layers[0].keys.shape[0] == 2
    (waiting,) = loop.add([request([7], max_new_tokens=50)])
    loop.cancel([waiting])
    assert {event.row for event in loop.step()} == set(keys[2:])
    loop.cancel(keys)
    assert len(loop) == 0 and loop.step() == [] and not loop.batches and not loop.memory.rows
    del batch
    gc.collect()
    assert not any(cache() for cache in caches)


def test_rows_beyond_the_limit_wait_for_others_to_leave():
    sampler = never_closing(tiny())
    loop = SamplingLoop(sampler, most_rows=3)
    requests = [request([n + 1], n, max_new_tokens=3 + n) for n in range(8)]
    sizes, found, keys = [], {}, loop.add(requests)
    while len(loop):
        for event in loop.step():
            found.setdefault(event.row, []).append(event)
        sizes += [len(batch.live) for batch in loop.batches.values()]
    assert max(sizes) == 3
    assert [len(found[key]) for key in keys] == [3 + n for n in range(8)]
    assert [found[key][-1].finished for key in keys] == ["length"] * 8


def test_a_second_turn_reads_only_what_its_cache_lacks(monkeypatch):
    shapes, loop = reads_of(monkeypatch), SamplingLoop(never_closing(tiny()), CacheMemory(2**20))
    first = run(loop, [[request([1, 2, 3, 4], max_new_tokens=5), request([9, 8], max_new_tokens=5)]])
    said = [event.token for event in first[0]]
    shapes.clear()
    again = request([1, 2, 3, 4, *said, 7, 7], 1, max_new_tokens=4)
    (events,) = run(loop, [[again]])
    assert shapes[0] == (1, 3)  # the last sampled token, which was not read yet, and two new ones
    assert len(loop.memory.rows) == 2  # the cache that was continued is dropped
    assert_as_alone(loop.sampler, [], [])
    alone = run(SamplingLoop(loop.sampler), [[again]])
    assert [event.token for event in events] == [event.token for event in alone[0]]


def test_the_least_recently_used_cache_is_dropped_first():
    sampler = never_closing(tiny())
    prompts = [[n] * 5 for n in range(1, 5)]
    loop = SamplingLoop(sampler, CacheMemory(2**20))
    for prompt in prompts[:3]:
        run(loop, [[request(prompt, max_new_tokens=2)]])
    one = loop.memory.bytes // 3
    loop.memory.max_bytes = 3 * one
    run(loop, [[request([*prompts[0], 9], max_new_tokens=1)]])  # uses the first, and continues only its prompt
    run(loop, [[request(prompts[3], max_new_tokens=2)]])
    assert loop.memory.bytes <= 3 * one
    held = [max(loop.memory.reusable(key, [*prompt, 0]) for key in loop.memory.rows) for prompt in prompts]
    assert held == [5, 0, 0, 5] or held == [5, 0, 5, 5]


def test_a_row_whose_probabilities_are_not_numbers_fails_alone():
    model = tiny(WithValues)
    others = [request([n], n, max_new_tokens=6) for n in range(3)]
    loop = SamplingLoop(never_closing(model))
    alone = run(loop, [others])
    for broken in ({"temperature": 1e-40}, {"beta": 2.0, "clip": -3e38}):
        found = run(loop, [[*others, request([5], stop=("q",), **broken)]])
        assert [event.finished for event in found[-1]] == ["failed"] and math.isnan(found[-1][0].log_prob)
        for first, second in zip(alone, found, strict=False):
            assert [event.token for event in first] == [event.token for event in second]
        with pytest.raises(InputError, match="^decoding: found probabilities that are not numbers"):
            Sampler(model, loop.sampler.renderer, DecodingConfig(**broken)).sample([[5], [6]], [0, 1])
    assert len(loop) == 0 and not loop.batches


def test_a_row_without_guidance_does_not_depend_on_values_that_are_not_finite():
    model = tiny(WithValues)
    loop = SamplingLoop(never_closing(model))
    (alone,) = run(loop, [[request([1])]])
    with torch.no_grad():
        model.q_rows.fill_(torch.nan)
    found, failed = run(loop, [[request([1]), request([2], beta=1.0)]])
    assert [event.token for event in found] == [event.token for event in alone] and failed[-1].finished == "failed"


def test_a_cache_that_is_too_large_leaves_the_others_where_they_are():
    loop = SamplingLoop(never_closing(tiny()), CacheMemory(2**20))
    run(loop, [[request([1, 2, 3], max_new_tokens=2)]])
    loop.memory.max_bytes = loop.memory.bytes
    held = dict(loop.memory.rows)
    run(loop, [[request([5] * 40, max_new_tokens=2)]])
    assert held and loop.memory.rows == held


def test_a_head_is_applied_where_the_cache_of_a_later_prompt_is_dropped_before_it_is_read(monkeypatch):
    sampler, prompts = sampler_of(tiny(WithValues)), [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    head = lambda hidden, logits: logits[:, 0]  # noqa: E731
    expected = sampler.apply_head(head, prompts)
    memory = CacheMemory(2**20)
    sampler.apply_head(head, prompts, memory)
    memory.max_bytes = memory.bytes
    monkeypatch.setattr("offline_lmrl.decoding.prompts.MOST_TOKENS", 1)  # one prompt per chunk
    longer = [[*prompt, 1, 2] for prompt in prompts]
    torch.testing.assert_close(sampler.apply_head(head, longer, memory), sampler.apply_head(head, longer))
    assert expected == sampler.apply_head(head, prompts)


def test_a_request_that_the_model_lacks_something_for_adds_no_row():
    loop = SamplingLoop(sampler_of(tiny()))
    with pytest.raises(InputError, match="^beta: found 1.0, expected 0, as GPT2LMHeadModel has no value heads"):
        loop.add([request([1]), request([2], beta=1.0)])
    with pytest.raises(InputError, match="^prompt: found no token"):
        loop.add([request([1]), request([])])
    assert len(loop) == 0 and loop.step() == []


def test_the_most_probable_tokens_are_those_of_the_distribution_drawn_from():
    model = tiny(WithValues)
    one = Request([1, 2], 0, DecodingConfig(beta=1.0, support=0.3, temperature=0.0, max_new_tokens=3), top=4)
    (events,) = run(SamplingLoop(never_closing(model)), [[one, request([3], beta=2.0)]])[:1]
    for event in events:
        assert event.top[0] == (event.token, event.log_prob)
        assert 1 <= len(event.top) <= 4
        assert sorted((value for _, value in event.top), reverse=True) == [value for _, value in event.top]
    assert sum(math.exp(value) for _, value in events[0].top) <= 1.0001


def test_several_tokens_per_step_give_the_same_events():
    rng, sampler = random.Random(1), sampler_of(tiny(WithValues))
    requests = [random_request(rng) for _ in range(10)]
    one, three = SamplingLoop(sampler), SamplingLoop(sampler)
    keys, events = three.add(requests), []
    while len(three):
        events += three.step(3)
    found = [[event for event in events if event.row == key] for key in keys]
    for first, second in zip(run(one, [requests]), found, strict=True):
        assert [(e.token, e.text, e.finished) for e in first] == [(e.token, e.text, e.finished) for e in second]


def test_replies_to_requests_that_want_the_most_probable_tokens_are_those_of_others():
    sampler = never_closing(tiny())
    plain = [request([n], n, max_new_tokens=3 + n) for n in range(6)]
    loops = SamplingLoop(sampler), SamplingLoop(sampler)
    keys = loops[0].add(plain), loops[1].add([replace(one, top=3) for one in plain])
    assert keys[0] == keys[1] and dict(loops[0].replies()) == dict(loops[1].replies())


def test_the_loop_leaves_the_model_in_its_mode():
    model = tiny()
    model.train()
    (events,) = run(SamplingLoop(sampler_of(model)), [[request([1], max_new_tokens=4)]])
    assert model.training
    model.eval()
    assert events == run(SamplingLoop(sampler_of(model)), [[request([1], max_new_tokens=4)]])[0]  # dropout was off


# Families, and the real model


def dialogue_sampler(model_type):
    model = small_model(model_type)
    return Sampler(model, Renderer(train_tokenizer(["move left", "you are at 1 2"], 290)), DecodingConfig())


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma3_text", "mamba", "falcon_h1"])
def test_families_whose_caches_cannot_be_joined_run_in_whole_batches(model_type):
    rng, sampler = random.Random(0), dialogue_sampler(model_type)
    prompts = [[rng.randrange(10, 290) for _ in range(n)] for n in (3, 9, 1, 5)]
    requests = [request(p, n, temperature=1 + n / 2, max_new_tokens=4 + n) for n, p in enumerate(prompts)]
    loop = SamplingLoop(sampler, CacheMemory(2**20), join_every=1)
    keys = loop.add(requests[:2])
    events = loop.step()
    keys += loop.add(requests[2:])
    joined = loop.step()
    assert {event.row for event in joined} == set(keys if model_type in ("gpt2", "llama") else keys[:2])
    events += joined
    while len(loop):
        events += loop.step()
    assert_as_alone(sampler, requests, [[event for event in events if event.row == key] for key in keys])


@needs_smollm2
def test_a_greedy_chat_of_the_real_model_is_what_generate_writes():
    policy = LanguagePolicy.load(FOLDER, device="cpu", temperature=0.0, max_new_tokens=24)
    messages = [{"role": "user", "content": "Write naïve, 日本 and 🎉 in one line."}]
    pieces = list(policy.stream(messages))
    tokenizer = policy.renderer.tokenizer
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = policy.model.generate(**ids, do_sample=False, max_new_tokens=24)[0, ids["input_ids"].shape[1] :]
    assert "".join(pieces) == tokenizer.decode(said, skip_special_tokens=True) and len(pieces) > 5
    loop = SamplingLoop(policy.sampler, CacheMemory(2**28), join_every=1)
    others = [policy.request(text, n) for n, text in enumerate(("Hi", "What is your name? Say it twice.", "Why?"))]
    found = run(loop, [[policy.request(messages)], *([other] for other in others)])
    assert "".join(event.text for event in found[0]) == "".join(pieces)
    for other, events in zip(others, found[1:], strict=True):
        (reply,) = policy.sampler.sample([other.prompt], [other.seed])
        assert [event.token for event in events] == list(reply.token_ids)
