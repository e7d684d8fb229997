"""One request for replies: its refusals, its answer as a whole or as a stream, and its line in the log."""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

from offline_lmrl.errors import InputError, shown
from offline_lmrl.export.server.answers import Answers
from offline_lmrl.export.server.bodies import Asked
from offline_lmrl.export.server.engine import Draining, Full
from offline_lmrl.export.server.service import Service, Unknown

HTTPRequest = Any  # FastAPI's Request; it is an extra, imported where it is used

log = logging.getLogger(__name__)
RETRY_AFTER = {"Retry-After": "1"}
BODY_SECONDS = 30  # in which a client has to send its request
CLIENT_GONE = 499  # nginx's number for a client that closed the connection; only the log shows it
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """Raised to answer a request with an error.

    Args:
      status: the HTTP status.
      message: one line with what was found and what was expected.
      headers: further HTTP headers.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers

    @classmethod
    def of(cls, error: Exception) -> "Refusal":
        """Return the refusal that answers an error."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, InputError):
            return cls(404 if isinstance(error, Unknown) else 400, str(error))
        if isinstance(error, Full):
            return cls(429, "too many replies wait already (max_waiting); try again later", RETRY_AFTER)
        if isinstance(error, Draining):
            return cls(503, "the server is about to end", RETRY_AFTER)
        log.error("a request failed", exc_info=error)
        return cls(500, "the server failed at this reply; its standard error says why")

    @property
    def body(self) -> dict[str, Any]:
        """The error in the form of OpenAI's API."""
        field, found, _ = self.message.partition(": ")
        field = field.partition("[")[0].partition(".")[0] if found and self.status in (400, 404) else None
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": field, "code": str(self.status)}}


class Exchange:
    """One request for replies, from its arrival to its line in the log.

    Args:
      service: the run.
      request: the request.
      key: the token that it must send; None = none.
    """

    def __init__(self, service: Service, request: HTTPRequest, key: str | None):
        self.service, self.request, self.key = service, request, key
        self.id = f"{'chatcmpl' if 'chat' in request.url.path else 'cmpl'}-{secrets.token_hex(12)}"
        self.answers: Answers | None = None
        self.refusal: Refusal | None = None
        self.is_done = False

    async def begin(self, read: Callable[[bytes], Asked]) -> None:
        """Read the request and start its replies.

        Args:
          read: reads the body.
        Raises: Refusal, InputError, Full or Draining if there will be no reply.
        """
        authorise(self.request, self.key)
        asked = read(await self._body())
        self.answers = self.service.begin(asked)
        self.shapes = self.service.shapes(asked, self.id)
        await self._unless_gone(self.answers.job.started())

    async def whole(self) -> dict[str, Any]:
        """Return the answer to a request without `stream`, once every reply is finished."""

        async def written() -> None:
            async for _ in self.answers.pieces():
                pass

        await self._unless_gone(written())
        self.is_done = True
        return self.shapes.whole(self.answers)

    async def stream(self) -> AsyncIterator[str]:
        """Yield the events of a stream; an error ends it."""
        asked, answers, opened = self.answers.asked, self.answers, set()
        try:
            async for piece in answers.pieces():
                if asked.chat and piece.choice not in opened:
                    opened.add(piece.choice)
                    yield event(self.shapes.opening(piece.choice))
                if not self.shapes.is_empty(piece):
                    yield event(self.shapes.part(piece))
            if asked.include_usage:
                yield event(self.shapes.last(answers))
            self.is_done = True
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield event(self.fail(error).body)

    def fail(self, error: Exception) -> Refusal:
        """Note an error as the end of this exchange; return the refusal that answers it."""
        self.refusal = Refusal.of(error)
        return self.refusal

    def end(self) -> None:
        """Give up what is not finished, and write the log."""
        if self.answers is not None:
            self.service.engine.close(self.answers.job)
        if self.refusal is None and not self.is_done:
            self.refusal = _gone()
        status = 200 if self.refusal is None else self.refusal.status
        served = {"route": self.request.url.path, "status": status}
        error = {"error": self.refusal.message} if self.refusal else {}
        self.service.note(self.id, served | error, self.answers)

    async def _body(self) -> bytes:
        kind = self.request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            # Also keeps web pages of other sites out, which can send other types without asking first.
            raise Refusal(415, f"content-type: found {shown(kind)}, expected application/json")
        from starlette.requests import ClientDisconnect

        most = self.service.settings.max_body_bytes
        body = b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in self.request.stream():
                    body += chunk
                    if len(body) > most:
                        raise Refusal(
                            413, f"body: found more than {most} bytes, expected at most that (max_body_bytes)"
                        )
        except TimeoutError as error:
            raise Refusal(408, f"body: found no end after {BODY_SECONDS} s, expected a whole request") from error
        except ClientDisconnect as error:
            raise _gone() from error
        return body

    async def _unless_gone(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for work, unless the client closes the connection first.

        Raises: Refusal if it does; and what the work raises.
        """
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(self.request))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise _gone()
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()


def _gone() -> Refusal:
    return Refusal(CLIENT_GONE, "the client closed the connection")


async def _disconnected(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(content: Mapping[str, Any]) -> str:
    """Return a server-sent event with this content."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def authorise(request: HTTPRequest, key: str | None) -> None:
    """Check the token of a request.

    Raises: Refusal if it is not the right one.
    """
    sent = request.headers.get("authorization", "")
    if key is not None and not secrets.compare_digest(sent.encode("latin-1"), f"Bearer {key}".encode()):
        raise Refusal(
            401, "no right token, expected the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
        )
