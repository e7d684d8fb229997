"""A server in a thread of the test process, over a tiny guided policy."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import uvicorn

from offline_lmrl.decoding.config import DecodingConfig
from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.export.server.app import build_app
from offline_lmrl.export.server.request_log import RequestLog
from offline_lmrl.export.server.service import Service
from offline_lmrl.export.server.settings import ServerSettings
from offline_lmrl.models.guided import add_value_heads
from offline_lmrl.models.loading import build_model
from offline_lmrl.models.value_heads import ValueHeadsConfig
from offline_lmrl.tokens.rendering import Renderer
from tests.tiny import TOKENIZERS

SPEC = {
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 256,
    "tie_word_embeddings": False,
}
FORM = {"beta": 2.0, "support": 0.001, "max_new_tokens": 12}


def tiny_policy(**window) -> LanguagePolicy:
    """Weights far from uniform, so that mistakes show; letters that need several tokens occur."""
    renderer = Renderer(TOKENIZERS["chatml"]())
    model = add_value_heads(build_model(SPEC, renderer.tokenizer), ValueHeadsConfig("linear"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return LanguagePolicy(model.eval(), renderer, DecodingConfig(**FORM), **window)


@contextmanager
def running(policy, *, scorer=None, key=None, log="/dev/null", **settings) -> Iterator[SimpleNamespace]:
    """Yield the port, the service, and the event loop of a server."""
    settings = ServerSettings(log=str(log), **settings)
    bound = socket.create_server(("127.0.0.1", 0))
    found, ready = SimpleNamespace(port=bound.getsockname()[1]), threading.Event()

    async def main(lines: RequestLog) -> None:
        found.service, found.events = Service(policy, scorer, settings, "tiny", lines), asyncio.get_running_loop()
        app = build_app(found.service, key)
        found.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        ready.set()
        await found.server.serve([bound])
        found.service.stop()

    def run() -> None:
        with RequestLog(settings.log) as lines:
            asyncio.run(main(lines))

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    try:
        yield found
    finally:
        found.server.should_exit = True
        thread.join()


def call(server, path="/v1/chat/completions", body=None, method="POST", **headers):
    """The status, the headers and the parsed body of one request; `body` is sent as it is if it is bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, answer.headers, json.loads(text) if text[:1] in (b"{", b"[") else text.decode()
