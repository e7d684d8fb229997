"""Start the server, and end it without losing a request."""

import asyncio
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from offline_lmrl.decoding.policy import LanguagePolicy
from offline_lmrl.errors import InputError
from offline_lmrl.export.server.app import build_app
from offline_lmrl.export.server.request_log import RequestLog
from offline_lmrl.export.server.service import Service
from offline_lmrl.export.server.settings import EXTRA, ServerSettings
from offline_lmrl.logs.protocols import Scorer
from offline_lmrl.logs.terminal import visible

DRAIN_TICK = 0.05  # seconds between two looks at the running requests
CLOSE_SECONDS = 5  # in which the last bytes have to reach clients after that


class Prepared(NamedTuple):
    """What a server needs beside the run.

    run: the run's folder or hub name.
    key: the token that requests must send; None = none.
    scorer: chooses among `best_of` replies; None = none.
    log: the log of requests.
    socket: bound to the address, not yet listening.
    """

    run: str
    key: str | None
    scorer: Scorer | None
    log: RequestLog
    socket: socket.socket

    @property
    def address(self) -> str:
        host, port, *_ = self.socket.getsockname()
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def prepared(settings: ServerSettings, run: str) -> Iterator[Prepared]:
    """Context manager: check and open everything that a server needs beside the run, before the run is loaded.

    Args:
      settings: the settings.
      run: the run's folder or hub name.
    Raises: InputError if a package, the token or the scorer is missing, the port is taken, or the log cannot be
      written.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"serve: found no package {error.name}; install it with `{EXTRA}`") from error
    key = settings.key()
    with RequestLog(settings.log) as log, _bound(settings.host, settings.port) as bound:
        yield Prepared(run, key, _scorer(settings.scorer), log, bound)


def _scorer(spec: str | None) -> Scorer | None:
    if spec is None:
        return None
    from offline_lmrl.decoding.scorers import load_scorer

    return load_scorer(spec)


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"host: found {host!r}, which has no address ({error.strerror})") from error
    bound = socket.socket(family, kind)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(f"port: found {port} on {host}, expected one that is free ({error.strerror})") from error
    return bound


def serve_policy(policy: LanguagePolicy, settings: ServerSettings, ready: Prepared) -> tuple[int, int]:
    """Serve a run until SIGTERM or SIGINT; then refuse new requests and let the running ones finish.

    Args:
      policy: the run.
      settings: the settings.
      ready: the rest.
    Returns: the number of requests that were cut off at the end, and the signal.
    """
    return asyncio.run(_serve(policy, settings, ready))


async def _serve(policy: LanguagePolicy, settings: ServerSettings, ready: Prepared) -> tuple[int, int]:
    import uvicorn

    name = settings.name or Path(ready.run).resolve().name
    service = Service(policy, ready.scorer, settings, name, ready.log)
    ending = asyncio.Event()
    signals: list[int] = []
    events = asyncio.get_running_loop()

    def on_signal(number: int, frame: object) -> None:
        signals.append(number)
        service.engine.draining = True
        events.call_soon_threadsafe(ending.set)

    app = build_app(service, ready.key)
    quiet = {"log_level": "warning", "access_log": False, "lifespan": "off"}
    server = uvicorn.Server(uvicorn.Config(app, **quiet, timeout_graceful_shutdown=CLOSE_SECONDS))
    server.handle_exit = on_signal  # its own would close the port at once, and refuse new requests without a word
    _announce(policy, ready, name)

    async def drain() -> int:
        await ending.wait()
        limit = events.time() + settings.drain_seconds
        while service.engine.jobs and events.time() < limit and len(signals) == 1:
            await asyncio.sleep(DRAIN_TICK)
        cut = service.engine.cut_off()
        server.should_exit = True
        return cut

    draining = asyncio.create_task(drain())
    try:
        await server.serve([ready.socket])
        return await draining, signals[0]
    finally:
        draining.cancel()
        service.stop()


def _announce(policy: LanguagePolicy, ready: Prepared, name: str) -> None:
    """Print where the run is served, and how it decodes."""
    form = ", ".join(f"{key} {value}" for key, value in policy.decoding.to_dict().items() if value not in (None, []))
    for line in (
        f"serving {ready.run} as model {name!r} on {ready.address}/v1",
        f"decoding, where a request says nothing else: {form}",
        f"for many users at once: offline-lmrl export {ready.run} --to vllm --output FOLDER",
    ):
        print(visible(line), file=sys.stderr, flush=True)
