"""Every frame that a test receives is held against the AsyncAPI document, and every one it sends that a server takes."""

from functools import cache
from typing import Any

import jsonschema_rs
import orjson
from httpx_ws import AsyncWebSocketSession
from pydantic import TypeAdapter, ValidationError

from parley.main import CHANNEL_KINDS
from parley.realtime import asyncapi, frames

Frame = dict[str, Any]

_well_formed: TypeAdapter[frames.ClientFrame] = TypeAdapter(frames.ClientFrame)


class NotDocumented(AssertionError):
    """A frame that the document does not have."""


class Documented:
    """The frames of a document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self._validators: dict[str, jsonschema_rs.Draft7Validator] = {}

    def validator(self, message: str) -> jsonschema_rs.Draft7Validator:
        """Return what checks a message's payload. Raises `NotDocumented`."""
        if message not in self._validators:
            components = self.document["components"]
            if message not in components["messages"]:
                raise NotDocumented(f"there is no message {message}")
            root = {"allOf": [components["messages"][message]["payload"]], "components": components}
            self._validators[message] = jsonschema_rs.Draft7Validator(root, validate_formats=True)
        return self._validators[message]

    def check(self, message: str, frame: Frame) -> None:
        """Raise `NotDocumented` unless a frame is this message."""
        validator = self.validator(message)
        if not validator.is_valid(frame):
            faults = [
                f"{'/'.join(map(str, fault.instance_path))}: {fault.message}" for fault in validator.iter_errors(frame)
            ]
            raise NotDocumented(f"{message}: {'; '.join(faults)[:1000]} in {orjson.dumps(frame).decode()[:1000]}")

    def message_of(self, frame: Frame) -> str:
        """Return which message a server's frame is by its names; `check` says whether it is."""
        match frame:
            case {"t": "ev", "e": str(e)}:
                return f"server.ev.{e}"
            case {"t": "snap", "ch": str(ch)}:
                return f"server.snap.{ch.partition(':')[0]}"
            case {"t": "ok"}:
                extra = frozenset(frame) - {"t", "id"}
                return {
                    frozenset({"expires_at"}): "server.ok.renewed",
                    frozenset({"message", "reply"}): "server.ok.sent",
                    frozenset({"reply"}): "server.ok.reply",
                    frozenset({"call", "reply", "approved"}): "server.ok.decided",
                }.get(extra, "server.ok")
            case {"t": str(t)}:
                return f"server.{t}"
        raise NotDocumented(f"a frame without t: {str(frame)[:300]}")

    def received(self, frame: Frame) -> Frame:
        """Return a server's frame. Raises `NotDocumented`; each frame of a batch is looked at by itself, and then all."""
        if frame.get("t") == "batch" and isinstance(frame.get("f"), list):
            for inner in frame["f"]:
                self.received(inner)
        self.check(self.message_of(frame), frame)
        return frame

    def streamed(self, text: str) -> str:
        """Return what came as server-sent events. Raises `NotDocumented`."""
        for line in text.splitlines():
            if line.startswith("data: "):
                self.received(orjson.loads(line.removeprefix("data: ")))
        return text

    def sent(self, text: str) -> None:
        """Raise `NotDocumented` for a well-formed frame of a client that the document does not have.

        Tests send malformed ones on purpose. A server takes some of those, `true` for a number say: they are not ours to send.
        """
        try:
            value = orjson.loads(text)
            frame = _well_formed.validate_json(text, strict=True)
        except (orjson.JSONDecodeError, ValidationError):
            return
        self.check(f"client.{frame.t}", value)


@cache
def documented() -> Documented:
    """Return the frames of this version."""
    return Documented(asyncapi.document(CHANNEL_KINDS, title="Parley", version="0"))


class DocumentedSession(AsyncWebSocketSession):
    """A socket to an application in this process, whose frames the document has."""

    async def send_text(self, data: str) -> None:
        documented().sent(data)
        await super().send_text(data)

    async def receive_text(self, timeout: float | None = None) -> str:
        text = await super().receive_text(timeout)
        documented().received(orjson.loads(text))
        return text
