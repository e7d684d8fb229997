"""A real chat model behind the server: the same replies as `generate`, alone and together, and what that saves."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.policy import LanguagePolicy, generate_texts
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.models.guided import add_value_heads
from offline_lmrl.models.loading import load_model
from offline_lmrl.models.renderers import renderer_of
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tokens.tokenizers import load_tokenizer
from tests.export.server.running import call, running
from tests.smollm2 import FOLDER, needs_smollm2

ABOUT = "order refund price colour size box label driver door phone email account password help agent parcel".split()


@pytest.fixture(scope="module")
def policy():
    model = add_value_heads(load_model(str(FOLDER)), ValueHeadsConfig("linear"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.value_heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    renderer = renderer_of(load_tokenizer(str(FOLDER)), model, str(FOLDER))
    form = DecodingConfig(max_new_tokens=16, support=0.05, beta=1.0)
    return LanguagePolicy(model.eval(), renderer, form, max_length=512)


def bodies():
    forms = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.7), (4.0, 1.0)]
    return [
        {
            "messages": [{"role": "user", "content": f"Write a few sentences about my {word}."}],
            "seed": i,
            "beta": forms[i % 4][0],
            "temperature": forms[i % 4][1],
        }
        for i, word in enumerate(ABOUT)
    ]


@needs_smollm2
def test_16_requests_at_once_are_those_of_generate_at_three_times_the_speed_of_one_at_a_time(policy):
    with running(policy, cache_bytes=0) as server:

        def ask(body):
            status, _, answer = call(server, body=body)
            assert status == 200
            return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]

        def measured(run):
            start = time.process_time()  # of all threads, so that other load on the machine matters little
            found = run()
            return [text for text, _ in found], sum(n for _, n in found) / (time.process_time() - start)

        ask(bodies()[0])
        with ThreadPoolExecutor(16) as pool:
            together, fast = measured(lambda: list(pool.map(ask, bodies())))
        alone, slow = measured(lambda: [ask(body) for body in bodies()])
    assert together == alone
    for body, text in zip(bodies()[::3], alone[::3], strict=True):
        turns = [Turn("user", body["messages"][0]["content"])]
        player = policy.with_decoding(beta=body["beta"], temperature=body["temperature"])
        assert generate_texts(player, [turns], 1, [body["seed"]])[0][0].text == text
    print(f"{slow:.1f} tokens per second one at a time, {fast:.1f} with 16 at once")
    assert fast >= 3 * slow
