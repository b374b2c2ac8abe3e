"""What the server says in `parley.v1` (docs/protocol.md), typed: the counterpart of `frames.py`.

The server writes its frames by hand, where they are made. These types say what such a frame may be: the AsyncAPI
document is generated from them, and every frame that a test receives is held against that. They are closed, so a field
or a word that the protocol does not have is a fault here. Clients are not to be that strict: they ignore what they do
not know, since a later version may say more.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from parley.realtime.frames import RequestId

Uuid = Annotated[
    str,
    Field(
        pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
        json_schema_extra={"format": "uuid"},
    ),
]
Count = Annotated[int, Field(ge=0)]
Position = Annotated[int, Field(ge=0, description="A `seq` of the channel")]
Seconds = Annotated[int, Field(ge=0, description="Seconds since 1970")]
Milliseconds = Annotated[int, Field(ge=0, description="Milliseconds since 1970")]
ChannelName = Annotated[str, Field(min_length=1, max_length=200)]

ErrorCode = Literal[
    "bad_frame", "invalid", "unauthenticated", "forbidden", "not_found", "conflict", "busy", "rate_limited",
    "too_large", "active_reply", "limit_subs", "over_budget", "unavailable", "expired", "internal",
]  # fmt: skip
Retry = Literal["never", "now", "backoff"]
Why = Literal["ok", "initial", "epoch", "trimmed", "too_far"]


def _drop_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


def absent(**constraints: Any) -> Any:
    """Declare a field that may be left out but is never null."""
    return Field(default=None, json_schema_extra=_drop_default, **constraints)


def example(**fields: JsonValue) -> ConfigDict:
    """Return the configuration of a closed model with an example of it."""
    return ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [fields]})


def example_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the example that a model declares. Raises `LookupError` where there is none."""
    extra = model.model_config.get("json_schema_extra")
    if not isinstance(extra, dict) or not extra.get("examples"):
        raise LookupError(f"{model.__name__} has no example")
    examples: Any = extra["examples"]
    return dict(examples[0])


class Closed(BaseModel):
    """A part of a frame, or the data of an event."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ServerFrame(Closed):
    """A frame from the server."""


class Limits(Closed):
    """What a connection may do."""

    frame: Count = Field(description="Bytes of a frame from the client")
    subs: Count = Field(description="Subscriptions of the connection")
    rate: Annotated[float, Field(gt=0, description="Frames a second from the client, beside a burst")]


_ID = "0193c0de-9f3a-7bd2-8a51-3f0c9f0e1a2b"
_REPLY = "0193c0de-9f3a-7bd2-8a51-3f0c9f0e1a2c"
_CH = f"conversation:{_ID}"


class Welcome(ServerFrame):
    """The credential is taken. Subscriptions of the `hello` are answered next."""

    model_config = example(
        t="welcome", v=1, conn="c_9f3a7bd28a513f0c", user=_ID, workspace=_ID, hb=30, expires_at=1795123456,
        limits={"frame": 65536, "subs": 200, "rate": 20}, durable=True, now=1795123400,
    )  # fmt: skip

    t: Literal["welcome"]
    v: Literal[1]
    conn: str = Field(description="The connection's name in the server's log")
    user: Uuid
    workspace: Uuid
    hb: Annotated[int, Field(ge=1, description="Seconds between heartbeats")]
    expires_at: Seconds
    limits: Limits
    durable: Literal[True] = Field(description="A `log` event is committed before it is sent")
    now: Seconds


class Ok(ServerFrame):
    """A request was done."""

    model_config = example(t="ok", id=7)

    t: Literal["ok"]
    id: RequestId


class OkRenewed(Ok):
    """The credential was renewed in place."""

    model_config = example(t="ok", id=7, expires_at=1795123456)

    expires_at: Seconds


class OkSent(Ok):
    """A reply to `message` is begun, or waits. Its events come before this or after."""

    model_config = example(t="ok", id=7, message=_ID, reply=_REPLY)

    message: Uuid
    reply: Uuid


class OkReply(Ok):
    """Something was done about a reply."""

    model_config = example(t="ok", id=7, reply=_REPLY)

    reply: Uuid


class OkDecided(Ok):
    """A tool call was decided, now or before, as was asked."""

    model_config = example(t="ok", id=7, call=_ID, reply=_REPLY, approved=True)

    call: Uuid
    reply: Uuid
    approved: bool


class Err(ServerFrame):
    """A request was not done, or a frame could not be read. The connection goes on unless a close follows."""

    model_config = example(
        t="err", id=7, code="rate_limited", msg="Too many frames.", retry="backoff", retry_after_ms=51
    )

    t: Literal["err"]
    id: RequestId = absent()
    code: ErrorCode
    msg: str
    retry: Retry
    retry_after_ms: Count = absent()
    ch: ChannelName = absent()


class Subbed(ServerFrame):
    """The answer to `sub`. A snapshot or a replay follows, and always a `live`."""

    model_config = example(
        t="subbed", id=3, ch=_CH, ep="k3f9", head=845, floor=401, mode="log", recovered=True, why="ok"
    )

    t: Literal["subbed"]
    id: RequestId = absent(description="Missing for a subscription that came with `hello`, or that the server renews")
    ch: ChannelName
    ep: str = Field(min_length=1, description="The epoch of the positions: another one makes all positions void")
    head: Position
    floor: Position
    mode: Literal["log", "keyed", "latest"]
    recovered: bool
    why: Why


class Snap(ServerFrame):
    """The state after event `seq`, in parts: lists are joined. It replaces what the client holds of the channel."""

    t: Literal["snap"]
    ch: ChannelName
    ep: str = Field(min_length=1)
    seq: Position
    part: Count
    more: bool
    state: Any


class Ev(ServerFrame):
    """An event of a channel; with `from`, the merged range `from..seq`."""

    t: Literal["ev"]
    ch: ChannelName
    from_: Annotated[int, Field(ge=1)] = absent(alias="from")
    seq: Annotated[int, Field(ge=1)]
    e: str
    d: Any
    ts: Milliseconds


class Live(ServerFrame):
    """The replay or the snapshot is done; what comes now is new."""

    model_config = example(t="live", ch=_CH, seq=845)

    t: Literal["live"]
    ch: ChannelName
    seq: Position


class Eph(ServerFrame):
    """Something that is true now and is not kept: no `seq`, at most once. No channel of this version sends it."""

    model_config = example(t="eph", ch=_CH, e="typing", d={"user": _ID})

    t: Literal["eph"]
    ch: ChannelName
    e: str
    d: dict[str, Any]


class ServerHeartbeat(ServerFrame):
    """Every 30 s, busy or not. A head above the client's position for 2 s means that something was lost."""

    model_config = example(t="hb", ts=1795123401789, heads={_CH: 845})

    t: Literal["hb"]
    ts: Milliseconds
    heads: dict[ChannelName, Position]


class AuthExpiring(ServerFrame):
    """The credential ends at `at`: 60 s before. An `auth` frame renews it in place."""

    model_config = example(t="auth.expiring", at=1795123456)

    t: Literal["auth.expiring"]
    at: Seconds


class Unsubbed(ServerFrame):
    """The server ended a subscription: access was withdrawn, or the channel is gone."""

    model_config = example(t="unsubbed", ch=_CH, code="not_found", retry="never")

    t: Literal["unsubbed"]
    ch: ChannelName
    code: ErrorCode
    retry: Retry


class GoAway(ServerFrame):
    """The process is about to stop: connect elsewhere after the delay, then leave this socket before the deadline."""

    model_config = example(t="goaway", reason="restart", reconnect_after_ms=7300, deadline_ms=20000)

    t: Literal["goaway"]
    reason: str
    reconnect_after_ms: Count
    deadline_ms: Count


class Batch(ServerFrame):
    """Several frames at once, in order; only to a client whose `hello` had `caps: ["batch"]`."""

    t: Literal["batch"]
    f: Annotated[list[dict[str, Any]], Field(min_length=2)]


class Deleted(Closed):
    """What is left to say of a thing that was removed."""

    model_config = example(id=_ID)

    id: Uuid


# Frames that are the same on every channel, by the name of their message. `snap`, `ev` and `batch` depend on which
# channels there are.
PLAIN: dict[str, type[ServerFrame]] = {
    "welcome": Welcome,
    "ok": Ok,
    "ok.renewed": OkRenewed,
    "ok.sent": OkSent,
    "ok.reply": OkReply,
    "ok.decided": OkDecided,
    "err": Err,
    "subbed": Subbed,
    "live": Live,
    "eph": Eph,
    "hb": ServerHeartbeat,
    "auth.expiring": AuthExpiring,
    "unsubbed": Unsubbed,
    "goaway": GoAway,
}

# What answers a client's frame when all is well; what is not done is answered by an `err`.
ANSWERS: dict[str, str] = {
    "hello": "welcome",
    "sub": "subbed",
    "unsub": "ok",
    "auth": "ok.renewed",
    "chat.send": "ok.sent",
    "reply.cancel": "ok.reply",
    "reply.continue": "ok.sent",
    "reply.regenerate": "ok.sent",
    "tool.approve": "ok.decided",
}
