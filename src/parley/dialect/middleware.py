"""Gives what is answered below `/v1` OpenAI's shape, wherever in the service a refusal came from."""

import re
from typing import Any, Final

import orjson
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from parley.core.rate_limits import Room
from parley.dialect.errors import Failure, ModelAbsent, shaped

PREFIX: Final = "/v1/"
# Our own sign-up, in our own envelope.
_NOT_OURS: Final = "/v1/auth/"

_LEFT = re.compile(rb'"[^"]*";r=(\d+);t=(\d+)')
_QUOTA = re.compile(rb'"[^"]*";q=(\d+);w=\d+')
_DROPPED: Final = frozenset({b"content-length", b"content-type"})


class DialectMiddleware:
    """Translates errors of the service into OpenAI's, and tells the rate limit under OpenAI's names.

    Errors keep their status, but for 422, which OpenAI does not have.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path: str = scope.get("path", "")
        if scope["type"] != "http" or not path.startswith(PREFIX) or path.startswith(_NOT_OURS):
            await self.app(scope, receive, send)
            return
        refusal: Message | None = None
        parts: list[bytes] = []

        async def shaping(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start":
                _tell_limits(message, scope)
                if message["status"] >= 400:
                    refusal = message
                    return
            elif refusal is not None:
                parts.append(message.get("body", b""))
                if message.get("more_body"):
                    return
                start, body = _translated(refusal, b"".join(parts))
                await send(start)
                message = {"type": "http.response.body", "body": body}
            await send(message)

        await self.app(scope, receive, shaping)


def _translated(start: Message, body: bytes) -> tuple[Message, bytes]:
    failure = _failure(start["status"], body)
    if failure is None:
        return start, body
    headers = [(name, value) for name, value in start["headers"] if name.lower() not in _DROPPED]
    added = {**failure.headers, "content-type": "application/json", "content-length": str(len(failure.body))}
    headers += [(name.lower().encode(), value.encode()) for name, value in added.items()]
    return {**start, "status": failure.status, "headers": headers}, failure.body


def _failure(status: int, body: bytes) -> Failure | None:
    """Return what an envelope says; None for what has OpenAI's shape already."""
    try:
        envelope: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        envelope = None
    if not isinstance(envelope, dict) or "meta" not in envelope:
        return None
    code, message = envelope["error"], envelope["message"]
    if code == ModelAbsent.code:
        return Failure(status, message, param="model", code=code)
    if code == "not_found":
        return Failure(404, "Invalid URL: of OpenAI's API there are chat/completions and models.", code="unknown_url")
    return shaped(status, code=code, message=message, details=envelope["details"])


def _tell_limits(message: Message, scope: AsgiScope) -> None:
    """Repeat what is left of the limit of requests under the names that OpenAI's clients look at."""
    room: Room | None = scope.get("state", {}).get("room")
    if room is not None:
        quota, left, reset_s = room.limit.count, room.remaining, room.reset_s
    else:
        told = dict(message["headers"])
        remaining = _LEFT.fullmatch(told.get(b"ratelimit", b""))
        policy = _QUOTA.fullmatch(told.get(b"ratelimit-policy", b""))
        if remaining is None or policy is None:
            return
        quota, left, reset_s = int(policy[1]), int(remaining[1]), int(remaining[2])
    message["headers"] = [
        *message["headers"],
        (b"x-ratelimit-limit-requests", str(quota).encode()),
        (b"x-ratelimit-remaining-requests", str(left).encode()),
        (b"x-ratelimit-reset-requests", f"{reset_s}s".encode()),
    ]
