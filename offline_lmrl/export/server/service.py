"""From a request's body to its replies: what a request may ask of this run, and the prompts that the model reads."""

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from offline_lmrl.decoding.batch import Request
from offline_lmrl.decoding.cache import CacheMemory
from offline_lmrl.decoding.loop import SamplingLoop
from offline_lmrl.decoding.policy import SAMPLE_STRIDE, LanguagePolicy
from offline_lmrl.decoding.reranking import CANDIDATE_STRIDE
from offline_lmrl.errors import InputError, require, shown
from offline_lmrl.export.server.answers import Answer, Answers, Shapes
from offline_lmrl.export.server.bodies import MOST_SEED, Asked
from offline_lmrl.export.server.engine import Engine
from offline_lmrl.export.server.request_log import RequestLog, reply_row
from offline_lmrl.export.server.settings import ServerSettings
from offline_lmrl.logs.preferences import score_rows
from offline_lmrl.logs.protocols import Scorer
from offline_lmrl.logs.trajectory import Turn, as_context, leading_system_turns


class Unknown(InputError):
    """The error for a request to another model."""


class Service:
    """A run as a server plays it.

    Made inside the event loop, whose thread calls all methods but `_requests` and `_score`.

    Args:
      policy: the run.
      scorer: chooses among `best_of` replies; None = best_of is refused.
      settings: limits.
      name: name of the model.
      log: the log of requests.
    """

    def __init__(
        self, policy: LanguagePolicy, scorer: Scorer | None, settings: ServerSettings, name: str, log: RequestLog
    ):
        self.policy, self.scorer, self.settings, self.name, self.log = policy, scorer, settings, name, log
        self.created = int(time.time())
        self.close_ids = policy.renderer.close_ids
        self.engine = Engine(
            lambda: SamplingLoop(policy.sampler, CacheMemory(settings.cache_bytes)),
            lambda token: policy.renderer.tokenizer.decode([token]),
            settings.max_replies,
            settings.max_waiting,
        )
        self._scoring = ThreadPoolExecutor(1, "scorer")  # a scorer is a model of its own, beside the token loop

    def stop(self) -> None:
        """End the threads."""
        self.engine.stop()
        self._scoring.shutdown(cancel_futures=True)

    def check_name(self, name: str) -> None:
        """Check that a request is for this model.

        Raises: Unknown if it is not.
        """
        if name != self.name:
            raise Unknown(f"model: found {shown(name)}, expected {self.name!r}, the one that is served")

    def card(self) -> dict[str, Any]:
        """Return what /v1/models says of the model."""
        window = self.policy.window.max_length
        owner = {"owned_by": "offline_lmrl", "max_model_len": window}
        return {"id": self.name, "object": "model", "created": self.created, **owner}

    def begin(self, asked: Asked) -> Answers:
        """Start the replies to a request; `Answers.job` has to be closed.

        Raises: InputError for a request that this run cannot serve; Full and Draining as `Engine.open`.
        """
        self.check_name(self.name if asked.model is None else asked.model)
        require(
            asked.best_of == 1 or self.scorer is not None,
            f"best_of: found {asked.best_of}, expected 1, as this server was started without --scorer",
        )
        require(
            asked.best_of == 1 or asked.chat or all(isinstance(prompt, str) for prompt in asked.prompts),
            "prompt: found token ids together with best_of, expected text, as the scorer reads text",
        )
        most = self.settings.max_replies
        require(
            asked.replies <= most,
            f"n: found {asked.replies} replies in all (prompts · n · best_of), expected at most {most} (max_replies)",
        )
        self._check_ask(asked.decoding.get("ask"))
        seed = secrets.randbelow(MOST_SEED) if asked.seed is None else asked.seed
        job = self.engine.open(lambda: self._requests(asked, seed), asked.replies, asked.top is not None)
        return Answers(asked, job, lambda prompt, group: self._choose(asked.prompts[prompt], group))

    def _check_ask(self, ask: Any) -> None:
        """Refuse a request for the values of another run: a sender must not make the server load models."""
        if isinstance(ask, str) and ask.startswith("auto:") and ask != self.policy.decoding.ask:
            raise InputError(f"ask: found {shown(ask)}, expected no other run than the one of the server's own ask")

    def _requests(self, asked: Asked, seed: int) -> list[Request]:
        """Read the prompts; called in the engine's thread, which owns tokenizer and model.

        Seeds are those of `generate --n --best_of`, so that replies are the same.
        """
        found = []
        for i, prompt in enumerate(asked.prompts):
            request = self._chat_request(prompt, asked) if asked.chat else self._text_request(prompt, asked)
            length, most = len(request.prompt), self.settings.max_prompt_tokens
            name = "messages" if asked.chat else "prompt"
            require(
                most is None or length <= most,
                f"{name}: found {length} tokens, expected at most {most} (max_prompt_tokens)",
            )
            found += [
                replace(request, seed=seed + i + j * SAMPLE_STRIDE + k * CANDIDATE_STRIDE, top=asked.top or 0)
                for j in range(asked.n)
                for k in range(asked.best_of)
            ]
        return found

    def _chat_request(self, turns: Sequence[Turn], asked: Asked) -> Request:
        window, longest = self.policy.window.max_length, asked.decoding.get("max_new_tokens", 0)
        require(longest < window, f"max_tokens: found {longest}, expected fewer than {window}, the run's window")
        request = self.policy.request(turns, 0, **asked.decoding)
        head = leading_system_turns(turns)
        if head < len(turns):
            # The window drops whole turns, oldest first; if it drops all, the reply would be to nothing.
            empty = self.policy.null_window(turns[:head], request.config.max_new_tokens)
            require(
                len(request.prompt) > len(empty),
                f"messages: found a last message that does not fit into the window ({window} tokens, of which "
                f"max_tokens takes {request.config.max_new_tokens}), expected a shorter one",
            )
        return request

    def _text_request(self, prompt: str | Sequence[int], asked: Asked) -> Request:
        policy = self.policy
        require(
            policy.return_tokens is None,
            "prompt: found a text, expected messages (/v1/chat/completions), as this run was trained with returns, "
            "which come before the agent's turns",
        )
        ids = policy.renderer.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        size = policy.model.get_input_embeddings().weight.shape[0]
        require(ids, "prompt: found a text without tokens, expected at least one")
        require(
            0 <= min(ids) and max(ids) < size,
            f"prompt: found a token outside the vocabulary, expected 0 to {size - 1}",
        )
        config = policy.with_decoding(**asked.decoding).decoding
        most = policy.window.max_length - config.max_new_tokens
        require(
            len(ids) <= most,
            f"prompt: found {len(ids)} tokens, expected at most {most}, as the window of {policy.window.max_length} "
            f"tokens also has to hold a reply of max_tokens ({config.max_new_tokens})",
        )
        return Request(ids, 0, config)

    async def _choose(self, prompt: Any, group: Sequence[Answer]) -> tuple[int, Mapping[str, Any]]:
        """Return the index of the best of several replies by the scorer, the first of equal ones, and its score."""
        scores = await asyncio.get_running_loop().run_in_executor(self._scoring, self._score, prompt, group)
        best = int(scores.argmax())
        return best, {"score": float(scores[best]), "n": len(group)}

    def _score(self, prompt: Any, group: Sequence[Answer]) -> Any:
        context = [Turn("user", prompt)] if isinstance(prompt, str) else as_context(prompt)
        (scores,) = score_rows([(context, [(Turn("assistant", one.text),) for one in group])], self.scorer)
        return scores

    def shapes(self, asked: Asked, identity: str) -> Shapes:
        """Return the forms of the answer to a request with this id."""
        return Shapes(asked, {"id": identity, "created": int(time.time()), "model": self.name}, self.close_ids)

    def note(self, identity: str, served: Mapping[str, Any], answers: Answers | None = None) -> None:
        """Write the lines of a request to the log: one per reply, or one without a reply.

        Numbers are in groups, so that none of them looks like the score of a row.

        Args:
          identity: the id of the request.
          served: route, status and, for a refused request, the error.
          answers: the replies; None = the request was refused before there were any.
        """
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "id": identity, "model": self.name}
        if answers is None or not answers.job.requests:
            self.log.write(line | {"served": served})
            return
        asked, first = answers.asked, answers.first_token
        seconds = {
            "seconds": round(time.monotonic() - answers.start, 4),
            "first_token_seconds": None if first is None else round(first, 4),
        }
        for choice in range(asked.replies // asked.best_of):
            # Of candidates among which nothing was chosen, because the request was given up, the first is logged.
            answer = answers.chosen.get(choice, answers.drawn[choice * asked.best_of])
            request = answers.job.requests[choice * asked.best_of]
            counts = {"prompt_tokens": len(request.prompt), "completion_tokens": len(answer.written)}
            ended = {"choice": choice, "finish_reason": answer.finished}
            own = {
                "served": {**served, **ended, **counts, **seconds},
                "decoding": {**request.config.to_dict(), "seed": request.seed},
                "tokenizer": self.policy.renderer.fingerprint,
                **({"best_of": answer.labels} if answer.labels else {}),
            }
            row = line | asked.labels | own
            if self.settings.log_texts and asked.chat and answer.written:
                row = reply_row(asked.prompts[0], answer, self.close_ids, row, asked.best_of == 1)
            self.log.write(row)
