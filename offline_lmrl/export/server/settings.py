"""The settings of the server, apart from what they set, so that a help is printed soon."""

import ipaddress
import os
from dataclasses import dataclass

from offline_lmrl.errors import InputError, require
from offline_lmrl.settings import setting

KEY_VARIABLE = "OFFLINE_LMRL_API_KEY"
EXTRA = "pip install 'offline_lmrl[serve]'"


@dataclass(kw_only=True)
class ServerSettings:
    """How a run is served; see configs/guides/serving.md."""

    host: str = setting("127.0.0.1", "Address to listen on; any but this machine's own needs an api_key.")
    port: int = setting(8000, "Port to listen on; 0 = a free one, which is printed.")
    api_key: str | None = setting(
        None,
        f"Token that requests must send as `Authorization: Bearer TOKEN`; null = the environment variable "
        f"{KEY_VARIABLE}, which other users of the machine cannot see, or no token.",
    )
    name: str | None = setting(None, "Name of the model in requests and replies; null = the last part of RUN.")
    scorer: str | None = setting(
        None, "Scorer that chooses among `best_of` replies, as in `relabel`; null = best_of is refused."
    )
    log: str = setting("-", "File to which one JSON line per reply is appended, or - for stdout.")
    log_texts: bool = setting(
        False,
        "Log the messages and the reply with its token ids and log-probabilities too. `check` and `train` read such a "
        "file as a log.",
    )
    max_body_bytes: int = setting(2**20, "Largest request, in bytes.")
    max_prompt_tokens: int | None = setting(
        None, "Longest prompt in tokens, after the run's window rule; null = what the window holds."
    )
    max_replies: int = setting(32, "Replies that are written at once; also the most that one request may ask for.")
    max_waiting: int = setting(256, "Replies that may wait for their start; further requests are answered 429.")
    cache_bytes: int = setting(
        2**30, "Memory for the prompts of earlier requests, in bytes, so that a chat is not read anew every turn."
    )
    drain_seconds: float = setting(
        30.0, "Seconds in which running requests may finish after SIGTERM or SIGINT; a second signal cuts them off."
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("max_body_bytes", 1),
            ("max_prompt_tokens", 1),
            ("max_replies", 1),
            ("max_waiting", 0),
            ("cache_bytes", 0),
            ("drain_seconds", 0),
        ):
            value = vars(self)[name]
            require(value is None or value >= least, f"{name}: found {value}, expected at least {least}")
        require(0 <= self.port < 2**16, f"port: found {self.port}, expected 0 to 65535")
        require(self.log != "", "log: found an empty text, expected a file or -")

    def key(self) -> str | None:
        """Return the token that requests must send; None = no token.

        Raises: InputError if the token is empty, or missing for an address that other machines can reach.
        """
        key = os.environ.get(KEY_VARIABLE) if self.api_key is None else self.api_key
        require(key is None or key.strip() != "", "api_key: found an empty text, expected a token")
        if key is None and not _is_own_machine(self.host):
            raise InputError(
                f"api_key: missing, expected a token in {KEY_VARIABLE} or --api_key, as other machines can reach "
                f"host {self.host}"
            )
        return key


def _is_own_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
