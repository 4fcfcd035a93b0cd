"""What is asked of a request before it is looked at: the key, the host it means, how much it sends and how long that takes."""

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from jlora.serve.errors import Refused

MAX_BODY = 4 << 20
"""Bytes of a request. The longest prompts of the largest models here have half a million characters."""
_BODY_SECONDS = 30.0
"""In which a request has to be there."""
_OPEN = ("/", "/health")
"""Paths that tell nothing."""

Result = TypeVar("Result")


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Lets through who has the key, or without one who means a loopback host: what a web page from elsewhere, whose name has been
    made to mean this machine, does not (DNS rebinding).

    Args:
        app: behind it.
        api_key: None: there is none.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None):
        self._app, self._key = app, None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await response_to(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refused | None:
        headers = Headers(scope=scope)
        if self._key is None:
            host = _name_of(headers.get("host", ""))
            return None if is_loopback(host) else _strange_host(host)
        if scope["path"] in _OPEN:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # The very bytes that came, compared in a time that does not tell how many are right.
        right = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        return None if right and scheme.lower() == "bearer" else _wrong_key(bool(given))


def response_to(refusal: Refused) -> Response:
    return JSONResponse(refusal.to_json(), status_code=refusal.status, headers=dict(refusal.headers))


def _name_of(host: str) -> str:
    """The host of a `Host` header without its port: "[::1]:8000", "127.0.0.1:8000", "localhost"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _strange_host(host: str) -> Refused:
    return Refused(
        f"This server answers requests to this machine's own address; got one to the host {host!r}. Give it an --api-key.",
        status=403, kind="permission_error", code="host_not_allowed",
    )  # fmt: skip


def _wrong_key(given: bool) -> Refused:
    said = "is not this server's" if given else "is missing: send `Authorization: Bearer KEY`"
    return Refused(f"The API key {said}.", status=401, kind="authentication_error", code="invalid_api_key")


async def body_of(request: Request) -> bytes:
    """The body of a request.

    Raises:
        Refused: when it is no JSON by its own account, too large, or does not come.
        ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a web page from elsewhere cannot send without being asked
        raise Refused(
            f"A request must have the `Content-Type` application/json; got {kind!r}.",
            status=415,
            code="unsupported_media_type",
        )
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await _within(request, MAX_BODY)
    except TimeoutError:
        raise Refused(
            f"The request was not there after {_BODY_SECONDS:g} seconds.", status=408, code="request_timeout"
        ) from None


async def _within(request: Request, most: int) -> bytes:
    declared = request.headers.get("content-length", "")
    body = bytearray()
    if not (declared.isdecimal() and int(declared) > most):
        async for part in request.stream():
            body += part
            if len(body) > most:
                break
        else:
            return bytes(body)
    raise Refused(f"A request must not be larger than {most} bytes.", status=413, code="request_too_large")


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """What `work` gives, which is cancelled when the client goes.

    Raises:
        ClientDisconnect: it has gone.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.wait({task, gone})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
