"""The frames of `parley.v1` (docs/protocol.md), typed. The protocol is this file and nothing else.

Unknown fields are ignored. A frame that does not fit its type is `bad_frame`; a frame that fits and whose content
cannot be taken is `invalid`, which the handler decides.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from uuid import UUID

import orjson
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, TypeAdapter, ValidationError

from parley.core.error_handlers import plain_message
from parley.core.schemas import Text

SUBPROTOCOL = "parley.v1"
VERSION = 1
MERGED_BYTES = 32 * 1024
SNAPSHOT_BYTES = 64 * 1024
HELLO_BYTES = 8 * 1024


class Close:
    """Close codes."""

    NORMAL = 1000
    BINARY = 1003
    TOO_BIG = 1009
    SERVER_ERROR = 1011
    RESTART = 1012
    OVERLOADED = 1013
    RETRY = 4000
    HEARTBEAT_TIMEOUT = 4001
    SLOW_CONSUMER = 4002
    STATE_LOST = 4003
    EXPIRED = 4004
    BAD_FRAMES = 4400
    UNAUTHENTICATED = 4401
    FORBIDDEN = 4403
    WRONG_SUBPROTOCOL = 4406
    NO_HELLO = 4408
    SECOND_HELLO = 4409
    TOO_MANY = 4429


class _Frame(BaseModel):
    model_config = ConfigDict(extra="ignore")


# What can be sent back: orjson writes 64-bit numbers and whole code points.
RequestId = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**64)] | Annotated[Text, Field(max_length=64)]
ChannelName = Annotated[str, Field(min_length=1, max_length=200)]


class Auth(_Frame):
    """A credential: exactly one of the three."""

    ticket: str | None = Field(default=None, max_length=512)
    token: str | None = Field(default=None, max_length=8192)
    api_key: str | None = Field(default=None, max_length=512)


class Since(_Frame):
    """A position. `seq` of -1: live only."""

    ep: str | None = Field(default=None, max_length=64)
    seq: int = Field(ge=-1, strict=True)


class HelloSubscription(_Frame):
    """A subscription that comes with `hello`, so that a resume is one round trip."""

    ch: ChannelName
    since: Since | None = None


class Hello(_Frame):
    """The first frame."""

    t: Literal["hello"]
    v: int = Field(strict=True)
    auth: Auth
    client: Any = None
    caps: list[str] = Field(default_factory=list, max_length=16)
    subs: list[HelloSubscription] = Field(default_factory=list, max_length=200)


class Sub(_Frame):
    """Subscribe: no `since`, a snapshot and then live; with it, a replay or a snapshot."""

    t: Literal["sub"]
    id: RequestId
    ch: ChannelName
    since: Since | None = None
    max_hz: float | None = Field(default=None, gt=0)


class Unsub(_Frame):
    """Stop."""

    t: Literal["unsub"]
    id: RequestId
    ch: ChannelName


class Ack(_Frame):
    """Processed up to these positions."""

    t: Literal["ack"]
    a: dict[str, StrictInt] = Field(max_length=200)


class Heartbeat(_Frame):
    """The answer to the server's heartbeat."""

    t: Literal["hb"]
    ts: int | float | None = None
    a: dict[str, StrictInt] | None = Field(default=None, max_length=200)


class Renew(_Frame):
    """Renew the credential in place."""

    t: Literal["auth"]
    id: RequestId
    auth: Auth


class SentPart(_Frame):
    """A part of a message that is sent. Content is judged by the chat, not here."""

    type: str = Field(max_length=32)
    text: str | None = None
    attachment: UUID | None = None


class SendOptions(_Frame):
    """How a message is to be answered."""

    model: str | None = Field(default=None, max_length=100)
    tools: list[str] | None = Field(default=None, max_length=64)


class ChatSend(_Frame):
    """Send a message and have it answered; `cid` makes it idempotent."""

    t: Literal["chat.send"]
    id: RequestId
    ch: ChannelName
    cid: UUID
    parent: UUID | None = None
    parts: list[SentPart] = Field(max_length=64)
    opts: SendOptions | None = None
    on_active: Literal["queue", "reject", "interrupt"] = "queue"


class ReplyCancel(_Frame):
    """Stop a reply: durable and idempotent."""

    t: Literal["reply.cancel"]
    id: RequestId
    reply: UUID


class ReplyContinue(_Frame):
    """Go on from where a reply stopped, in a reply of its own; `cid` makes it idempotent."""

    t: Literal["reply.continue"]
    id: RequestId
    reply: UUID
    cid: UUID


class ReplyRegenerate(_Frame):
    """Answer the same question once more, beside the first answer; `cid` makes it idempotent."""

    t: Literal["reply.regenerate"]
    id: RequestId
    reply: UUID
    cid: UUID


class ToolApprove(_Frame):
    """Say yes or no to a tool call that waits: the first answer holds."""

    t: Literal["tool.approve"]
    id: RequestId
    reply: UUID
    call: UUID
    approved: StrictBool


ClientFrame = Annotated[
    Hello | Sub | Unsub | Ack | Heartbeat | Renew | ChatSend | ReplyCancel | ReplyContinue | ReplyRegenerate
    | ToolApprove,
    Field(discriminator="t"),
]  # fmt: skip
_client_frame: TypeAdapter[ClientFrame] = TypeAdapter(ClientFrame)
_request_id: TypeAdapter[RequestId] = TypeAdapter(RequestId)


class BadFrame(Exception):
    """A client's frame that does not fit; `id` is the request's, where one could be read."""

    def __init__(self, reason: str, id: int | str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.id = id


def parse(text: str) -> ClientFrame:
    """Return the typed frame, or raise `BadFrame`."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        # orjson refuses unpaired surrogates, which JSON allows: that frame is well-formed, its content is not taken.
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise BadFrame("not valid JSON") from None
    if not isinstance(value, dict):
        raise BadFrame("a frame is a JSON object")
    try:
        return _client_frame.validate_python(value)
    except ValidationError as error:
        id_ = _readable_id(value.get("id"))
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        kind = "unknown or missing `t`" if first["type"].startswith("union_tag") else f"{where}: {plain_message(first)}"
        raise BadFrame(kind[:200], id_) from None


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _readable_id(value: object) -> int | str | None:
    try:
        return _request_id.validate_python(value)
    except ValidationError:
        return None


def encode(**fields: Any) -> str:
    """Return a server's frame."""
    return orjson.dumps(fields, default=str).decode()


def batch(texts: Sequence[str]) -> str:
    """Return several frames as one; only for a client whose `hello` says that it takes them."""
    return f'{{"t":"batch","f":[{",".join(texts)}]}}' if len(texts) > 1 else texts[0]


def error(code: str, message: str, *, retry: str = "never", id: int | str | None = None, **fields: Any) -> str:
    """Return an `err` frame."""
    frame: dict[str, Any] = {"t": "err"}
    if id is not None:
        frame["id"] = id
    return encode(**frame, code=code, msg=message, retry=retry, **{k: v for k, v in fields.items() if v is not None})
