"""The routes of the server."""

from collections.abc import Callable
from typing import Any

from offline_lmrl.export.server.bodies import Asked, read_chat, read_text
from offline_lmrl.export.server.exchange import Exchange, Refusal, authorise, event
from offline_lmrl.export.server.service import Service

FastAPI = Response = Any  # FastAPI's classes; it is an extra, imported where it is used


def build_app(service: Service, key: str | None) -> FastAPI:
    """Return the application.

    Args:
      service: the run.
      key: the token that requests must send; None = none.
    """
    from fastapi import FastAPI, Request, Response

    app = FastAPI(title="offline_lmrl", docs_url=None, redoc_url=None, openapi_url=None)
    _refuse_by(app)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _replies(Exchange(service, request, key), read_chat)

    @app.post("/v1/completions")
    async def text(request: Request) -> Response:
        return await _replies(Exchange(service, request, key), read_text)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        authorise(request, key)
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        authorise(request, key)
        service.check_name(name)
        return service.card()

    @app.post("/load_model")
    async def load_model(request: Request) -> Response:
        """Answer `transformers chat`, which asks for the model before its first message."""
        authorise(request, key)
        return Response(event({"status": "ready", "cached": True}), media_type="text/event-stream")

    @app.get("/health")
    async def health(response: Response) -> dict[str, Any]:
        draining = service.engine.draining
        response.status_code = 503 if draining else 200
        return {"status": "draining" if draining else "ok", "replies": service.engine.open_rows}

    return app


async def _replies(exchange: Exchange, read: Callable[[bytes], Asked]) -> Response:
    """Answer a request for replies, whose body `read` reads."""
    from fastapi.responses import JSONResponse

    stream = None
    try:
        await exchange.begin(read)
        if exchange.answers.asked.stream:
            stream = _stream(exchange)
            return stream
        return JSONResponse(await exchange.whole())
    except Exception as error:
        return _refused(exchange.fail(error))
    finally:
        if stream is None:
            exchange.end()


def _stream(exchange: Exchange) -> Response:
    """Return the answer as a stream, which ends the exchange however it ends, also when the client leaves."""
    from fastapi.responses import StreamingResponse

    class EventStream(StreamingResponse):
        async def __call__(self, *connection: Any) -> None:
            try:
                await super().__call__(*connection)
            finally:
                exchange.end()

    return EventStream(exchange.stream(), media_type="text/event-stream")


def _refused(refusal: Refusal) -> Response:
    from fastapi.responses import JSONResponse

    return JSONResponse(refusal.body, refusal.status, refusal.headers)


def _refuse_by(app: FastAPI) -> None:
    """Let every error of the application be answered in OpenAI's form."""
    from starlette.exceptions import HTTPException

    async def refuse(_: Any, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # an unknown route or method
            error = Refusal(error.status_code, str(error.detail), error.headers)
        return _refused(Refusal.of(error))

    for kind in (HTTPException, Exception):
        app.add_exception_handler(kind, refuse)
