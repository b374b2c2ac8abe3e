"""Requests that wait for `ok` or `err`, and that outlive the connection they were first sent over."""

import asyncio
from collections.abc import Callable
from typing import Any

from parley.client.errors import ApiError
from parley.client.link import Frame, Link, encode
from parley.client.policy import backoff_s

_MAX_REFUSALS = 6


class _Request:
    """A frame and who waits for its answer. What is `durable` is sent again over the next connection."""

    def __init__(self, frame: Frame, future: asyncio.Future[Frame], *, durable: bool) -> None:
        self.frame = frame
        self.future = future
        self.durable = durable
        self.refusals = 0
        self.timer: asyncio.TimerHandle | None = None


class Requests:
    """The requests that have no answer yet, oldest first."""

    def __init__(self, *, next_id: Callable[[], int], random: Callable[[], float]) -> None:
        self._next_id = next_id
        self._random = random
        self._waiting: dict[int, _Request] = {}
        self._link: Link | None = None
        self._loop = asyncio.get_running_loop()

    def adopt(self, link: Link) -> None:
        """Go on over a new connection: what has no answer is sent again, with the same key."""
        self.release()  # where the connection before still stands, its answers are not heard any more
        self._link = link
        for request in list(self._waiting.values()):
            if request.timer is None:  # else it was refused for now: it goes out at its time
                self._send(request)

    def release(self) -> None:
        """The connection is gone, and with it the answers to what is not durable."""
        self._link = None
        for request in self._waiting.values():
            if not request.durable and not request.future.done():
                request.future.set_exception(ApiError(503, "unavailable", "The connection was lost."))

    def close(self, error: Exception) -> None:
        """Give up: everyone who waits is told why."""
        self._link = None
        for request in self._waiting.values():
            if not request.future.done():
                request.future.set_exception(error)

    async def ask(self, frame: Frame, *, durable: bool) -> dict[str, Any]:
        """Send a request and return the fields of its `ok`. Raises `ApiError` when it is refused for good."""
        id_ = self._next_id()
        request = _Request({**frame, "id": id_}, self._loop.create_future(), durable=durable)
        self._waiting[id_] = request
        try:
            self._send(request)
            answer = await request.future
        finally:
            del self._waiting[id_]
            if request.timer is not None:
                request.timer.cancel()
        return {key: value for key, value in answer.items() if key not in {"t", "id"}}

    def answered(self, frame: Frame) -> bool:
        """Take an `ok` or `err`. Returns whether it was the answer to one of these."""
        request = self._waiting.get(frame.get("id"))  # type: ignore[arg-type]  # a missing id finds nothing
        if request is None or request.future.done():
            return False
        if frame["t"] == "ok":
            request.future.set_result(frame)
        elif frame["code"] == "unauthenticated" and request.durable:
            pass  # the server closes next; it goes out again with the new credential
        elif frame.get("retry", "never") == "never" or request.refusals >= _MAX_REFUSALS:
            request.future.set_exception(ApiError.from_frame(frame))
        else:
            after = frame.get("retry_after_ms")
            delay = 0.0 if frame["retry"] == "now" else backoff_s(request.refusals, self._random)
            request.refusals += 1
            if request.timer is not None:
                request.timer.cancel()
            request.timer = self._loop.call_later(delay if after is None else after / 1000, self._again, request)
        return True

    def _again(self, request: _Request) -> None:
        request.timer = None
        self._send(request)

    def _send(self, request: _Request) -> None:
        link = self._link
        if link is None or request.future.done():
            return
        limit = link.welcome.get("limits", {}).get("frame", 65536)
        if len(encode(request.frame).encode()) > limit:
            message = f"This is larger than the {limit} bytes that the live connection takes at once."
            request.future.set_exception(ApiError(413, "too_large", message))
            return
        link.send(request.frame)
