"""A folder for transformers under `transformers serve`, through the openai client, and loaded by a hub name."""

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest
from transformers import AutoTokenizer

from tests.export.test_plain import SPECS, valued_run
from tests.export.test_transformers import FORM, Folder

pytestmark = pytest.mark.slow
MESSAGES = [{"role": "user", "content": "you are at 1, 2"}]  # the first of PROMPTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    return Folder(valued_run(path / "run", "tied", SPECS["llama"], **FORM, temperature=0.0), path / "out")


@contextmanager
def served(folder, **flags):
    """The openai client of a server in this process."""
    openai, serve = pytest.importorskip("openai"), pytest.importorskip("transformers.cli.serve")
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = serve.Serve(str(folder), device="cpu", host="127.0.0.1", port=port, non_blocking=True, **flags)
    try:
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        server.kill_server()


def reply(client, folder, **settings):
    answer = client.chat.completions.create(
        model=str(folder), messages=MESSAGES, **{"temperature": 0, "max_tokens": 6} | settings
    )
    return answer.choices[0].message.content


def texts(folder, **changes):
    """The run's own greedy reply, as the server decodes it."""
    tokenizer = AutoTokenizer.from_pretrained(folder.folder)
    return tokenizer.decode(folder.replies(**changes)[0], skip_special_tokens=True)


def test_serve_plays_the_run_and_streams_it(folder):
    with served(folder.folder, trust_remote_code=True) as client:
        assert reply(client, folder.folder) == texts(folder) != texts(folder, beta=0.0)
        stream = client.chat.completions.create(
            model=str(folder.folder), messages=MESSAGES, temperature=0, max_tokens=6, stream=True
        )
        parts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
        assert "".join(part or "" for part in parts) == texts(folder) and len(parts) > 3
        other = {"generation_config": json.dumps({"beta": -2.0, "do_sample": False, "max_new_tokens": 6})}
        assert reply(client, folder.folder, extra_body=other) == texts(folder, beta=-2.0)
        prompt = folder.policy.renderer.tokenizer.decode(folder.prompts()[0])
        text = client.completions.create(model=str(folder.folder), prompt=prompt, temperature=0, max_tokens=6)
        assert text.choices[0].text == texts(folder)
        first = texts(folder)[2]
        stopped = reply(client, folder.folder, stop=[first])
        assert texts(folder).startswith(stopped) and len(stopped) < len(texts(folder))


SMALL = {"cb_num_blocks": 4, "cb_block_size": 32, "cb_max_batch_tokens": 64}  # else the cache takes all memory


@pytest.mark.parametrize("flags", [{}, {"trust_remote_code": True, "continuous_batching": True} | SMALL])
def test_serve_plays_the_base_model_without_an_error_where_the_card_says_so(folder, flags):
    card = "\n".join(folder.written.card)
    assert "Without `trust_remote_code`, and with `--continuous-batching`, the base model replies" in card
    with served(folder.folder, **flags) as client:
        assert reply(client, folder.folder) == texts(folder, beta=0.0) != texts(folder)


def test_heads_are_found_under_a_hub_name(folder, tmp_path):
    home, commit = tmp_path / "hub", "0" * 40
    snapshot = home / "hub" / "models--me--mine" / "snapshots" / commit
    shutil.copytree(folder.folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    ids = folder.prompts()[0]
    code = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/mine", trust_remote_code=True).eval()
print(model.generate(torch.tensor([{ids}]), do_sample=False)[0, {len(ids)}:].tolist())
"""
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == folder.replies()[0]
