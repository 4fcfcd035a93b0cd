"""What a client is told when it gets no answer: OpenAI's error object, and the status that goes with it."""

from collections.abc import Mapping

from jlora._typing import JsonObject
from jlora.serve.schedule import End


class Refused(Exception):
    """A request that is not answered.

    Args:
        message: the rule, the value got and the edit to make.
        status: of HTTP.
        kind: `type` of OpenAI's error object.
        param: the parameter that is to blame.
        code: for programs.
        retry_after: seconds, after which the same request may be answered.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.retry_after = status, kind, param, code, retry_after

    @property
    def headers(self) -> Mapping[str, str]:
        said = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return said | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def to_json(self) -> JsonObject:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


_RETRY_AFTER = 2
"""Seconds: a slot is free again about that soon."""


def queue_full() -> Refused:
    return Refused(
        "The queue is full: more requests wait than this server takes. Try again in a moment.",
        status=429, kind="rate_limit_error", code="queue_full", retry_after=_RETRY_AFTER,
    )  # fmt: skip


def stopping() -> Refused:
    return Refused(
        "The server is stopping. Try again when it is there again.",
        status=503, kind="server_error", code="stopping", retry_after=_RETRY_AFTER,
    )  # fmt: skip


def failed() -> Refused:
    return Refused("The server has failed; its log says how.", status=500, kind="server_error", code="engine_failed")


_TIMED_OUT = "The answer took longer than this server's --timeout. Ask for fewer tokens, or try again when fewer wait."
_UNSOUND = (
    "The logits are not finite: a weight of the model or of the adapter is not, or the activations overflow. Serve it with "
    "--dtype float32, and look at it with `jlora inspect`."
)


def cut_short(end: End) -> Refused:
    """What is said for an answer that ended before its end."""
    if end == "timeout":
        return Refused(_TIMED_OUT, status=504, kind="server_error", code="timeout", retry_after=_RETRY_AFTER)
    if end == "unsound":
        return Refused(_UNSOUND, status=500, kind="server_error", code="not_finite")
    return stopping()
