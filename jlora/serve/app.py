"""The web application: OpenAI's interface, metrics, and a page to chat on."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jlora._typing import JsonObject
from jlora.report.page import page
from jlora.serve import requests
from jlora.serve.desk import Desk, Settings
from jlora.serve.engine import Engine
from jlora.serve.errors import Refused, failed, stopping
from jlora.serve.guard import Guard, body_of, response_to, unless_gone
from jlora.serve.metrics import CONTENT_TYPE, Metrics
from jlora.serve.voices import Catalogue, Voice

PAGE = Path(__file__).parent / "page"
_CLOSED_BY_CLIENT = 499
"""In the metrics alone, where nobody hears of a status; nginx' number for it."""


def make_app(engine: Engine, catalogue: Catalogue, settings: Settings) -> Starlette:
    """The application of a running engine."""
    served = _Served(Desk(engine, catalogue, settings, Metrics(engine)))
    routes = [
        Route("/", served.page),
        Route("/health", served.health),
        Route("/metrics", served.metrics),
        Route("/v1/models", served.models),
        Route("/v1/models/{name:path}", served.model),
        Route("/v1/chat/completions", served.chat, methods=["POST"]),
        Route("/v1/completions", served.completions, methods=["POST"]),
    ]
    handlers = {Refused: _refused, HTTPException: _http_error, Exception: _internal_error}
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, api_key=settings.api_key)],
        exception_handlers=handlers,  # pyright: ignore[reportArgumentType]: each takes its own error
    )


class _Served:
    """The endpoints."""

    def __init__(self, desk: Desk):
        self._desk, self._began = desk, int(time.time())
        self._page = page(
            PAGE / "chat.html", scripts=[PAGE / "chat.js"], styles=[PAGE / "chat.css"], connects=True, setup=self._setup()
        )  # fmt: skip

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers={"X-Frame-Options": "DENY", "Cache-Control": "no-cache"})

    async def health(self, request: Request) -> Response:
        if not self._desk.engine.accepts:
            raise stopping() if self._desk.engine.failure is None else failed()
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._desk.metrics.text(), media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        found = self._desk.catalogue.by_name.values()
        return JSONResponse({"object": "list", "data": [self._model(voice) for voice in found]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._model(self._desk.catalogue.named(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        began, path = time.monotonic(), request.url.path

        def count(status: int) -> None:
            self._desk.metrics.requests.labels(path, str(status)).inc()

        try:
            asked = requests.parse(await body_of(request), chat=chat)
            ticket = await self._desk.take(asked, began)
            if asked.stream:
                chunks = ticket.chunks()
                try:
                    first = await unless_gone(request.receive, anext(chunks))
                except BaseException:
                    await chunks.aclose()
                    raise
                count(200)
                return _Events(first, chunks, began + self._desk.settings.timeout)
            reply = await unless_gone(request.receive, ticket.whole())
        except Refused as error:
            count(error.status)
            raise
        except ClientDisconnect:
            count(_CLOSED_BY_CLIENT)
            return Response(status_code=_CLOSED_BY_CLIENT)
        count(200)
        return JSONResponse(reply)

    def _model(self, voice: Voice) -> JsonObject:
        base = next(iter(self._desk.catalogue.by_name))
        return {
            "id": voice.name, "object": "model", "created": self._began, "owned_by": "jlora", "root": base,
            "parent": None if voice.adapter < 0 else base, "max_model_len": self._desk.catalogue.max_length,
        }  # fmt: skip

    def _setup(self) -> JsonObject:
        """What the page is told."""
        settings, catalogue = self._desk.settings, self._desk.catalogue
        return {
            "voices": [
                {"name": voice.name, "base": voice.adapter < 0, "chats": voice.template is not None}
                for voice in catalogue.by_name.values()
            ],
            "needs_key": settings.api_key is not None, "temperature": settings.sampling.temperature,
            "top_p": settings.sampling.top_p, "max_length": catalogue.max_length,
        }  # fmt: skip


class _Events(Response):
    """Chunks as server-sent events, as they come.

    A client that does not read them holds up nothing but itself, and that until the deadline; the rows of one that has gone are
    cancelled.
    """

    media_type = "text/event-stream"

    def __init__(self, first: JsonObject, chunks: AsyncGenerator[JsonObject, None], deadline: float):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._chunks, self._deadline = first, chunks, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic()) + _LAST_WORDS):
                await unless_gone(receive, self._send(send))
        except (ClientDisconnect, TimeoutError):
            pass
        finally:
            await self._chunks.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await _send_event(send, json.dumps(self._first))
            async for chunk in self._chunks:
                await _send_event(send, json.dumps(chunk))
        except Refused as error:
            await _send_event(send, json.dumps(error.to_json()))
        await _send_event(send, "[DONE]", more=False)


_LAST_WORDS = 1.0
"""Seconds behind the deadline, in which a client can still be told that it is over."""


async def _send_event(send: Send, data: str, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})


async def _refused(request: Request, error: Refused) -> Response:
    return response_to(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Of the routes: no such path, or no such method there."""
    said = f"{request.method} {request.url.path}: {error.detail}."
    refused = Refused(said, status=error.status_code, code="unknown_url" if error.status_code == 404 else None)
    return JSONResponse(refused.to_json(), status_code=error.status_code, headers=error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    """What went wrong is in the log."""
    return response_to(Refused("The server has made a mistake; its log says which.", status=500, kind="server_error"))
