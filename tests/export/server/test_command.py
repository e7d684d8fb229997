"""The command serve: what it refuses before it loads a run, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from offline_lmrl.cli.main import main
from offline_lmrl.decoding.policy import LanguagePolicy, generate_texts
from offline_lmrl.export.server.settings import KEY_VARIABLE
from offline_lmrl.logs.io import read_trajectories
from offline_lmrl.logs.trajectory import Turn
from offline_lmrl.models.renderers import rendering_block
from tests.export.server.running import FORM, call, tiny_policy
from tests.export.server.test_bodies import HELLO

ROOT = Path(__file__).parents[3]
LONG = {"messages": HELLO, "n": 32, "max_tokens": 200, "temperature": 2.0, "beta": 0}


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)

    def run(*arguments):
        assert main(["serve", str(tmp_path), *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err.removeprefix("error: ").strip()

    return run


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_extra_is_named(refused, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert refused() == f"serve: found no package {package}; install it with `pip install 'offline_lmrl[serve]'`"


def test_what_cannot_be_served_is_refused_before_the_run_is_loaded(refused, tmp_path, monkeypatch):
    taken = socket.create_server(("127.0.0.1", 0))
    for arguments, reason in (
        (("--host", "0.0.0.0"), "api_key: missing, expected a token in OFFLINE_LMRL_API_KEY or --api_key"),
        (("--host", "::"), "api_key: missing"),
        (("--api_key", ""), "api_key: found an empty text"),
        (("--port", taken.getsockname()[1]), f"port: found {taken.getsockname()[1]} on 127.0.0.1, expected one that"),
        (("--port", 70000), "port: found 70000, expected 0 to 65535"),
        (("--log", tmp_path / "missing" / "log"), f"{tmp_path}/missing/log: found No such file or directory"),
        (("--scorer", "no_such:scorer"), "scorer.function: found 'no_such:scorer'"),
        (("--max_replies", 0), "max_replies: found 0, expected at least 1"),
        (("--drain_seconds", -1), "drain_seconds: found -1.0, expected at least 0"),
        (("--top_p", 3), "top_p: found 3.0"),
        (("--max_queue", 3), "max_queue: found a setting that does not exist"),
        (("--port", 0), f"{tmp_path}: found a folder whose"),
    ):
        assert refused(*arguments).startswith(reason)
    monkeypatch.setenv(KEY_VARIABLE, " ")
    assert refused().startswith("api_key: found an empty text")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, policy = tmp_path_factory.mktemp("runs") / "mine", tiny_policy()
    policy.model.config.offline_lmrl |= {"decoding": FORM, **rendering_block(policy.renderer)}
    policy.model.save_pretrained(folder)
    policy.renderer.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def start(run):
    """Starts the command in a process of its own; returns when it answers."""
    processes = []

    def started(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "offline_lmrl.cli", "serve", run, "--port", "0", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        line = ""
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)):
            line = process.stderr.readline()
            assert line, process.wait()
        server = SimpleNamespace(process=process, port=int(found[1]), first=line)
        for _ in range(100):
            try:
                assert call(server, "/health", method="GET")[0] == 200
                return server
            except ConnectionRefusedError:
                time.sleep(0.05)
        raise AssertionError("the server does not answer")

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def health(server):
    status, _, state = call(server, "/health", method="GET")
    return status, state["replies"]


def until(server, expected):
    end = time.monotonic() + 30
    while health(server) != expected:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_the_first_lines_say_what_is_served_and_stdout_is_the_log(start, run):
    server = start("--temperature", 0.5)
    assert f"serving {run} as model 'mine' on http://127.0.0.1:{server.port}/v1" in server.first
    policy = LanguagePolicy.load(run, device="cpu", temperature=0.5)
    reply = call(server, body={"messages": HELLO, "seed": 3, "model": "mine"})[2]
    assert (
        reply["choices"][0]["message"]["content"]
        == generate_texts(policy, [[Turn("user", "hello")]], 1, [3])[0][0].text
    )
    server.process.send_signal(signal.SIGINT)
    out, err = server.process.communicate(timeout=30)
    assert server.process.returncode == 0
    assert (
        "temperature 0.5" in err and "export" in err and "--to vllm" in err and err.endswith("requests are finished\n")
    )
    (line,) = out.splitlines()
    assert json.loads(line)["id"] == reply["id"]


@pytest.mark.slow
def test_a_signal_lets_running_requests_finish_and_refuses_new_ones(start):
    server = start()
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(call, server, body=LONG)
        streamed = pool.submit(call, server, body=LONG | {"n": 1, "stream": True})
        until(server, (200, 33))
        server.process.terminate()
        until(server, (503, 33))
        status, headers, answer = call(server, body={"messages": HELLO})
        assert (status, headers["Retry-After"]) == (503, "1") and answer["error"]["type"] == "server_error"
        assert whole.result()[0] == 200 and len(whole.result()[2]["choices"]) == 32
        assert streamed.result()[2].rstrip().endswith("data: [DONE]")
    assert server.process.wait(30) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seconds, signals", [(0, 1), (60, 2)])
def test_requests_that_take_too_long_are_cut_off_and_counted(start, seconds, signals):
    server = start("--drain_seconds", seconds)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(call, server, body=LONG)
        until(server, (200, 32))
        for _ in range(signals):
            server.process.terminate()
            time.sleep(0.1)
        assert whole.result()[0] == 503
    assert server.process.wait(30) == 143
    assert f"1 requests were cut off after drain_seconds ({seconds})" in server.process.stderr.read()


@pytest.mark.slow
def test_after_kill_9_the_server_starts_again_and_the_log_is_whole(start, run, tmp_path):
    log = tmp_path / "served.jsonl"
    answered = []
    for _ in range(2):
        server = start("--log", log, "--log_texts")
        for seed in range(3):
            answered.append(call(server, body={"messages": HELLO, "seed": seed})[2])
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(call, server, body=LONG)
            until(server, (200, 32))
            server.process.kill()
            assert isinstance(lost.exception(), OSError)
        server.process.wait()
        with log.open("a") as file:
            file.write('{"messages": [{"role": "us')  # what a machine without power leaves
    server = start("--log", log, "--log_texts")
    server.process.terminate()
    assert server.process.wait(30) == 0
    rows = read_trajectories(log)
    assert [row.labels["id"] for row in rows] == [answer["id"] for answer in answered]
    assert [row.turns[-1].content for row in rows[:3]] == [row.turns[-1].content for row in rows[3:]]
