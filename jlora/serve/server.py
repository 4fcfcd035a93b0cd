"""The web server, from its socket to its end by a signal."""

import asyncio
import contextlib
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from jlora.serve.engine import Engine

_BACKLOG = 2048
_AFTER_THE_END = 5
"""Seconds in which what the engine said last is delivered."""


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Port 0: a free one.

    Raises:
        ValueError: when it cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as undo:
            bound = undo.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(_BACKLOG)
            undo.pop_all()
    except OSError as error:
        said = f"Nothing can listen at {host} port {port}: {error.strerror}. Give another --host or --port."
        raise ValueError(said) from error
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(app: ASGIApp, engine: Engine, bound: socket.socket, *, grace: float, ready: Callable[[], None]) -> None:
    """Runs until SIGINT or SIGTERM; then requests that wait are refused, and answers that are being given have `grace` seconds. A
    second signal ends them.

    Raises:
        BaseException: what the engine failed with.
    """
    engine.start()
    try:
        Server(app, engine, grace=grace, ready=ready).run(sockets=[bound])
    finally:
        engine.stop()
    if engine.failure is not None:
        raise engine.failure


class Server(uvicorn.Server):
    """uvicorn's, which ends with the engine, and the engine with it."""

    def __init__(self, app: ASGIApp, engine: Engine, *, grace: float, ready: Callable[[], None]):
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, lifespan="off", ws="none", server_header=False,
                timeout_graceful_shutdown=int(grace) + _AFTER_THE_END,
            )
        )  # fmt: skip
        self._engine, self._grace, self._ready = engine, grace, ready

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._engine.failure is not None

    def handle_exit(self, sig, frame) -> None:
        # Not kept to be raised again at the end, as uvicorn does: what was asked for is done then.
        self.force_exit, self.should_exit = self.should_exit, True

    async def shutdown(self, sockets=None) -> None:
        self._engine.drain()
        ending = asyncio.create_task(self._end())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end(self) -> None:
        await asyncio.sleep(self._grace)
        await asyncio.to_thread(self._engine.stop)
