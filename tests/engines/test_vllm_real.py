"""A real chat model with values inside vLLM: its export, 200 greedy replies, speed, and a server asked over HTTP."""

import json
import os
import socket
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import replace

import openai
import pytest

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.export.beside import RunPlayer, Trial
from offline_lmrl.export.prompts import HeldOut, Prompts, encode_prompts
from offline_lmrl.export.run import export_run
from offline_lmrl.export.vllm import VLLM, architecture_of, command_line
from offline_lmrl.logs.trajectory import Turn
from tests.engines.engine import ENGINES, PYTHON, needs_engines, play
from tests.export.real_run import save_real_run
from tests.smollm2 import FOLDER

THINGS = (
    "rain,tea,bread,a bicycle,the moon,a cat,a map,jazz,chess,a garden,ice,a violin,a bridge,salt,wool,paper,a ship,"
)
THINGS += "honey,a clock,snow"
ASKED = [
    "What is {}?",
    "Write one sentence about {}.",
    "Why do people like {}?",
    "Name two facts about {}.",
    "Explain {} to a child.",
    "How old is the idea of {}?",
    "What rhymes with {}?",
    "Tell me a joke about {}.",
    "Where do I find {}?",
    "Describe {} in three words.",
]
HISTORIES = [[Turn("user", text.format(thing))] for thing in THINGS.split(",") for text in ASKED]
TOKENS = 24  # of a greedy reply
BATCH, LENGTH, TIMES = 32, 32, 3  # of the measurement of speed
NEEDED = 0.8  # of the plain engine's speed


def needs_real(test):
    """Skip a test where the engines or SmolLM2 are missing."""
    present = (FOLDER / "config.json").exists()
    return needs_engines(pytest.mark.skipif(not present, reason="run make smollm2 first")(test))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A run with values that change replies."""
    run = tmp_path_factory.mktemp("real") / "run"
    save_real_run(run, adapter=False, max_new_tokens=TOKENS)
    policy = LanguagePolicy.load(run, device="cpu")
    policy.model.eval()
    return policy


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory):
    """The export of that run, which has been played beside it."""
    run, output = policy.model.config._name_or_path, tmp_path_factory.mktemp("export") / "vllm"
    report = export_run(run, output, VLLM(python=str(PYTHON)), held_out=HeldOut(prompts=HISTORIES[::20]))
    assert not report.beside.unmet and report.beside.prompts == 10
    assert "## Serve" in (output / "README.md").read_text()
    return output


def engine(folder, **settings):
    return {"model": str(folder), "dtype": "float32", "enforce_eager": True, "max_model_len": 512} | settings


@needs_real
def test_greedy_replies_to_200_prompts_are_the_runs_and_come_nearly_as_fast_as_plain_ones(policy, folder, tmp_path):
    ids = encode_prompts(policy, HISTORIES, None)
    prompts = [prompt.asked for prompt in ids]
    greedy = {"temperature": 0.0, "max_tokens": TOKENS, "stop_token_ids": sorted(policy.sampler.close_ids)}
    long = {"temperature": 0.0, "max_tokens": LENGTH, "ignore_eos": True}
    measured = [{"prompts": prompts[:BATCH], "sampling": [long] * BATCH}] * TIMES
    guided = engine(folder, hf_overrides={"architectures": [architecture_of(folder)]})
    jobs = {
        "plain": {"engine": engine(FOLDER), "batches": measured},
        "guided": {
            "engine": guided,
            "batches": [*measured, {"prompts": prompts, "sampling": [greedy] * len(prompts)}],
        },
        "plain again": {"engine": engine(FOLDER), "batches": measured},
    }
    answers, seconds = play(jobs, tmp_path)
    form = replace(policy.decoding, temperature=0.0)
    trial = Trial(policy, Prompts("questions", HISTORIES), ids, form, form)
    same = trial.identical(RunPlayer(policy).play(prompts, form, 0), answers["guided"][-1])
    assert same.met, same
    best = {name: min(times[:TIMES]) for name, times in seconds.items()}
    plain = min(best["plain"], best["plain again"])
    print(f"identical {same.export:.3f}; tokens/s at batch {BATCH}:", {n: BATCH * LENGTH / s for n, s in best.items()})
    assert plain / best["guided"] >= NEEDED, (best, statistics.median(seconds["guided"]))


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    """A client of a server that was started by the command that the export prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = command_line(folder, architecture_of(folder))
    command += f" --host 127.0.0.1 --port {port} --served-model-name run --enforce-eager --max-model-len 512"
    environment = os.environ | {"PATH": f"{ENGINES / 'bin'}:{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as messages:
        server = subprocess.Popen(f"exec env {command}", shell=True, env=environment, stdout=messages, stderr=messages)
    try:
        for _ in range(500):
            assert server.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        server.terminate()
        server.wait()


def ask(client, history, **settings):
    messages = [{"role": turn.role, "content": turn.content} for turn in history]
    arguments = {"temperature": 0, "max_tokens": TOKENS} | settings
    return client.chat.completions.create(model="run", messages=messages, **arguments).choices[0].message.content


@needs_real
def test_over_http_each_request_has_its_own_beta(client, policy):
    asked, replies = HISTORIES[::67], {}
    for beta in (None, 0.0, 8.0):
        own = {} if beta is None else {"extra_body": {"vllm_xargs": {"beta": beta}}}
        replies[beta] = [ask(client, history, **own) for history in asked]
        form = {"temperature": 0.0} | ({} if beta is None else {"beta": beta})
        session = policy.with_decoding(**form).start([0] * len(asked))
        assert replies[beta] == [reply.text for reply in session.reply(range(len(asked)), asked)]
    assert replies[None] != replies[0.0] != replies[8.0]


@needs_real
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.7, "top_p": 0.9}, "top_p: found 0.9 in a guided request"),
        ({"extra_body": {"vllm_xargs": {"beta": "much"}}}, "beta: found 'much', expected a finite number"),
        ({"extra_body": {"repetition_penalty": 1.2}}, "repetition_penalty: found 1.2 in a guided request"),
    ],
)
def test_what_the_server_would_play_otherwise_is_a_400_with_the_reason(client, settings, message):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, HISTORIES[0], **settings)
    assert message in json.dumps(refused.value.body, ensure_ascii=False)


@needs_real
def test_filters_of_the_policy_are_sent_beside_beta(client):
    args = {"temperature": 0.7, "seed": 1, "extra_body": {"vllm_xargs": {"beta": 8, "top_k": 1}}}
    # One token is left before guidance: the policy's best.
    assert ask(client, HISTORIES[5], **args) == ask(client, HISTORIES[5], extra_body={"vllm_xargs": {"beta": 0}})
