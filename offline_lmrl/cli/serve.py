"""The command serve: a run behind the routes of OpenAI's API."""

import sys
from dataclasses import dataclass

from offline_lmrl.cli.play import OpenedRun
from offline_lmrl.errors import Stopped
from offline_lmrl.export.server.settings import ServerSettings


@dataclass(kw_only=True)
class ServeConfig(ServerSettings, OpenedRun):
    """Serve a run over HTTP with the routes of OpenAI's API, for a laptop and first users.

    Requests may set the decoding of their own reply: temperature, beta, support and the like.
    """

    def __post_init__(self) -> None:
        ServerSettings.__post_init__(self)
        OpenedRun.__post_init__(self)


def serve(config: ServeConfig) -> None:
    """Serve a run until a signal ends the server.

    Raises: Stopped if requests were cut off because they did not finish within drain_seconds.
    """
    from offline_lmrl.export.server.serving import prepared, serve_policy

    with prepared(config, config.run) as ready:
        cut, number = serve_policy(config.open(), config, ready)
    if cut:
        raise Stopped(f"{cut} requests were cut off after drain_seconds ({config.drain_seconds:g})", number)
    print("all requests are finished", file=sys.stderr)
