"""The token loop: rows that come and go at any time get what they get alone."""

import random

import pytest
import torch
from torch.testing import assert_close

from offline_lmrl.decoding.cache import CacheMemory
from offline_lmrl.decoding.loop import Request, SamplingLoop
from offline_lmrl.decoding.sampler import DecodingConfig, Sampler
from tests.decoding.test_sampler import Letters, WithValues, llama, mistral, tiny

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


@pytest.mark.parametrize("family", MODELS)
def test_rows_that_join_at_any_time_with_any_settings_get_what_they_get_alone(family):
    model, rng = MODELS[family](), random.Random(0)
    count = 200 if family == "gpt2" else 40
    requests = [random_request(rng, guided=family == "gpt2") for _ in range(count)]
    waves, rest = [], list(requests)
    while rest:
        n = rng.choice((0, 0, 1, 2, 9))
        waves.append(rest[:n])
        rest = rest[n:]
    sampler = sampler_of(model)
    loop = SamplingLoop(sampler, CacheMemory(2**20))
    assert_as_alone(sampler, requests, run(loop, waves))
    assert not loop.batches and not loop.waiting
