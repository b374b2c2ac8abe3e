"""A real server in this event loop, a raw peer for its socket, and the strict reading of the protocol's field tables."""

import asyncio
import hashlib
import itertools
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4
from weakref import WeakSet

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Close as CloseFrame

from parley.cli import serve
from parley.core.db import DatabaseUrls
from parley.core.settings import RealtimeSettings, Settings
from parley.main import create_app
from parley.realtime.protocol import SocketProtocol
from parley.realtime.service import Realtime
from tests.conftest import Account, TestDatabases, make_settings
from tests.documented import documented
from tests.held import held

Frame = dict[str, Any]

WAIT_S = 10.0
"""How long a test waits for what must come. Only failures take this long."""

# -- the protocol's tables -----------------------------------------------------------------------------------------

ERR_CODES = frozenset(
    [
        "bad_frame",
        "invalid",
        "unauthenticated",
        "forbidden",
        "not_found",
        "conflict",
        "busy",
        "rate_limited",
        "too_large",
        "active_reply",
        "limit_subs",
        "over_budget",
        "unavailable",
        "expired",
        "internal",
    ]
)
FAILURE_CODES = frozenset(
    [
        "provider_auth",
        "provider_rate_limited",
        "provider_unavailable",
        "provider_timeout",
        "bad_output",
        "content_filtered",
        "context_too_long",
        "over_budget",
        "worker_lost",
        "internal",
    ]
)
TERMINAL = frozenset({"reply.completed", "reply.failed", "reply.cancelled"})
_RETRY = frozenset({"never", "now", "backoff"})
_WHY = frozenset({"ok", "initial", "epoch", "trimmed", "too_far"})
_MODES = frozenset({"log", "keyed", "latest"})
_TOOL_STATES = frozenset({"input", "approval", "running", "done", "failed", "unknown"})
_STATUSES = frozenset({"queued", "streaming", "completed", "failed", "cancelled"})

Check = Callable[[Any], bool]


def _int(value: Any) -> bool:
    return type(value) is int


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _str(value: Any) -> bool:
    return type(value) is str


def _bool(value: Any) -> bool:
    return type(value) is bool


def _object(value: Any) -> bool:
    return type(value) is dict


def _id(value: Any) -> bool:
    return type(value) in {int, str}


def _uuid(value: Any) -> bool:
    try:
        return type(value) is str and str(UUID(value)) == value
    except ValueError:
        return False


def _seconds(value: Any) -> bool:
    return type(value) in {int, float} and 1.5e9 < value < 1e10


def _millis(value: Any) -> bool:
    return type(value) is int and 1.5e12 < value < 1e13


def _one_of(values: frozenset[str]) -> Check:
    return lambda value: value in values


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _heads(value: Any) -> bool:
    return type(value) is dict and all(_count(seq) for seq in value.values())


def _limits(value: Any) -> bool:
    return type(value) is dict and set(value) == {"frame", "subs", "rate"} and all(map(_count, value.values()))


# Field → check; a name with "?" may be missing. No other field may be there.
_FRAMES: dict[str, dict[str, Check]] = {
    "welcome": {
        "v": lambda value: value == 1, "conn": _str, "user": _uuid, "workspace": _uuid, "hb": _count,
        "expires_at": _seconds, "limits": _limits, "durable": _bool, "now": _seconds,
    },
    "err": {
        "id?": _id, "code": _one_of(ERR_CODES), "msg": _str, "retry": _one_of(_RETRY), "retry_after_ms?": _count,
        "ch?": _str,
    },
    "subbed": {
        "id?": _id, "ch": _str, "ep": _str, "head": _count, "floor": _count, "mode": _one_of(_MODES),
        "recovered": _bool, "why": _one_of(_WHY),
    },
    "snap": {"ch": _str, "ep": _str, "seq": _count, "part": _count, "more": _bool, "state": _object},
    "ev": {"ch": _str, "seq": _count, "from?": _count, "e": _str, "d": _object, "ts": _millis},
    "live": {"ch": _str, "seq": _count},
    "eph": {"ch": _str, "e": _str, "d": _object},
    "hb": {"ts": _millis, "heads": _heads},
    "auth.expiring": {"at": _seconds},
    "unsubbed": {"ch": _str, "code": _one_of(ERR_CODES), "retry": _one_of(_RETRY)},
    "goaway": {"reason": _str, "reconnect_after_ms": _count, "deadline_ms": _count},
}  # fmt: skip

_MESSAGE: dict[str, Check] = {
    "id": _uuid, "conversation_id": _uuid, "role": _one_of(frozenset({"user", "assistant", "system"})),
    "parts": lambda value: type(value) is list and all(_part(part) for part in value), "status": _one_of(_STATUSES),
    "model": _or_none(_str), "parent_id": _or_none(_uuid), "usage": _or_none(_object), "cost": _or_none(_str),
    "error": _or_none(_object), "created_at": _str, "completed_at": _or_none(_str),
}  # fmt: skip
_CONVERSATION: dict[str, Check] = {
    "id": _uuid, "title": _or_none(_str), "model": _or_none(_str), "owner_id": _uuid, "current_id": _or_none(_uuid),
    "shared": _bool, "shared_access": _or_none(_one_of(frozenset({"read", "write"}))), "archived": _bool,
    "pinned": _bool, "assistant": _str, "created_at": _str, "updated_at": _str,
}  # fmt: skip
_TASK: dict[str, Check] = {
    "id": _uuid, "user_id": _uuid, "title": _str, "description": _or_none(_str), "completed": _bool,
    "due_at": _or_none(_str), "created_at": _str, "updated_at": _str,
}  # fmt: skip


def _fits(value: Any, table: dict[str, Check]) -> bool:
    return type(value) is dict and not _problems(value, table)


def _problems(value: dict[str, Any], table: dict[str, Check]) -> list[str]:
    found = [f"{name} is missing" for name in table if not name.endswith("?") and name not in value]
    for name, item in value.items():
        check = table.get(name) or table.get(f"{name}?")
        if check is None:
            found.append(f"{name} is not in the table")
        elif not check(item):
            found.append(f"{name} is {item!r}")
    return found


def _part(value: Any) -> bool:
    if type(value) is not dict:
        return False
    if value.get("type") in {"text", "reasoning"}:
        return set(value) == {"type", "text"} and _str(value["text"])
    return set(value) == {"type", "call", "name", "state", "input", "output"} and value["type"] == "tool"


def _message(value: Any) -> bool:
    return _fits(value, _MESSAGE)


_CHECKED: dict[str, Check] = {
    "reply": _uuid, "message": _message, "usage": _or_none(_object), "cost": _or_none(_str), "len": _count,
    "sha256": lambda value: _str(value) and len(value) == 64,
}  # fmt: skip
_FAILURE: dict[str, Check] = {"code": _one_of(FAILURE_CODES), "msg": _str, "retryable": _bool}
_EVENTS: dict[str, dict[str, Check]] = {
    "message.created": {**_MESSAGE, "cid": _or_none(_uuid)},
    "message.updated": {**_MESSAGE, "cid": _or_none(_uuid)},
    "message.deleted": {"id": _uuid},
    "reply.queued": {"reply": _uuid, "to": _uuid, "pos": _count},
    "reply.started": {"reply": _uuid, "to": _uuid, "model": _str, "attempt": _count},
    "reply.part": {
        "reply": _uuid, "part": _count, "kind": _one_of(frozenset({"text", "reasoning", "tool"})),
        "state": _one_of(frozenset({"start", "end"})),
    },
    "reply.delta": {"reply": _uuid, "part": _count, "off": _count, "x": _str},
    "reply.tool": {
        "reply": _uuid, "part": _count, "call": _uuid, "name": _str, "state": _one_of(_TOOL_STATES),
        "input?": _or_none(_object), "output?": lambda value: True,
    },
    "reply.resumed": {"reply": _uuid, "attempt": _count, "model": _str, "strategy": _str},
    "reply.reset": {"reply": _uuid, "attempt": _count, "part": _count, "to_off": _count},
    "reply.completed": _CHECKED,
    "reply.failed": {
        **_CHECKED, "error": lambda value: _fits(value, _FAILURE), "partial": _bool,
        "can": lambda value: type(value) is list and set(value) <= {"continue", "regenerate"},
    },
    "reply.cancelled": {**_CHECKED, "by": _uuid, "partial": _bool},
    "conversation.created": _CONVERSATION,
    "conversation.updated": _CONVERSATION,
    "conversation.deleted": {"id": _uuid},
    "conversation.changed": {key: check for key, check in _CONVERSATION.items() if key != "pinned"},
    "task.created": _TASK,
    "task.updated": _TASK,
    "task.deleted": {"id": _uuid},
}  # fmt: skip
_STATES: dict[str, dict[str, Check]] = {
    "conversation": {
        "conversation": lambda value: _fits(value, _CONVERSATION),
        "messages": lambda value: type(value) is list and all(map(_message, value)),
    },
    "user": {
        "conversations": lambda value: type(value) is list and all(_fits(item, _CONVERSATION) for item in value),
        "jobs": lambda value: type(value) is list,
    },
    "tasks": {"items": lambda value: type(value) is list and all(_fits(item, _TASK) for item in value)},
}


def assert_valid_server_frame(text: str | bytes) -> Frame:
    """Return a server's frame, or fail where it is not exactly what the protocol's tables and the document say."""
    assert isinstance(text, str), "a server sends text frames only"
    frame = json.loads(text)
    assert type(frame) is dict, text
    documented().received(frame)
    t = frame.get("t")
    rest = {name: value for name, value in frame.items() if name != "t"}
    if t == "ok":
        assert _id(rest.get("id")), text
        return frame
    assert t in _FRAMES, f"unknown t: {text[:300]}"
    assert not (found := _problems(rest, _FRAMES[t])), f"{found}: {text[:1000]}"
    if t == "ev":
        assert frame["e"] in _EVENTS, text[:300]
        assert not (found := _problems(frame["d"], _EVENTS[frame["e"]])), f"{found}: {text[:1000]}"
        assert frame.get("from", 0) < frame["seq"], text[:300]
        assert len(text) <= 32 * 1024 + 512 or "from" not in frame, "a merged event is at most 32 KiB"
    if t == "snap":
        kind = frame["ch"].partition(":")[0]
        assert not (found := _problems(frame["state"], _STATES[kind])), f"{found}: {text[:1000]}"
    return frame


@dataclass
class Log:
    """What a client that obeys the client rule knows of one channel; fails on whatever the rule says cannot come."""

    ep: str = ""
    last: int = -1
    state: str = "new"
    parts: int = 0
    texts: dict[str, dict[int, str]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    since: int | None = None

    def take(self, frame: Frame) -> None:
        match frame["t"]:
            case "subbed":
                assert frame["floor"] <= frame["head"], frame
                assert frame["recovered"] == (frame["why"] == "ok"), frame
                self.state, self.ep, self.parts = frame["why"], frame["ep"], 0
                self.texts.clear()
                self.ended.clear()
                self.last = self.since if frame["why"] == "ok" and self.since is not None else -1
            case "snap":
                if self.state == "live":
                    # Too far behind: the state instead of the events.
                    self.state, self.parts = "behind", 0
                assert self.state in {"initial", "epoch", "trimmed", "too_far", "behind"}, (self.state, frame["t"])
                assert (frame["part"], frame["ep"]) == (self.parts, self.ep), frame
                self.parts += 1
                if not frame["more"]:
                    self.last, self.state = frame["seq"], "replay"
                    self.texts.clear()
            case "ev":
                self._event(frame)
            case "live":
                assert self.state != "live", "live comes once"
                assert self.last in {-1, frame["seq"]}, (frame, self.last)
                self.last, self.state = frame["seq"], "live"

    def _event(self, frame: Frame) -> None:
        low = frame.get("from", frame["seq"])
        if self.last >= 0:
            assert low == self.last + 1, f"{low} after {self.last}"
        self.last = frame["seq"]
        d = frame["d"]
        reply = d.get("reply")
        if reply is not None:
            assert reply not in self.ended, "nothing of a reply follows its end"
        match frame["e"]:
            case "reply.part" if d["state"] == "start" and d["kind"] == "text":
                self.texts.setdefault(d["reply"], {})[d["part"]] = ""
            case "reply.delta":
                text = self.texts.get(d["reply"], {}).get(d["part"])
                if text is not None:
                    assert d["off"] == len(text), (d["off"], len(text))
                    self.texts[d["reply"]][d["part"]] = text + d["x"]
            case "reply.reset":
                held = self.texts.get(d["reply"], {})
                for part in [part for part in held if part > d["part"]]:
                    del held[part]
                if d["part"] in held:
                    held[d["part"]] = held[d["part"]][: d["to_off"]]
            case e if e in TERMINAL:
                self.ended.add(d["reply"])
                assert_terminal(d)

    def text(self, reply: str) -> str:
        """Return what the deltas of a reply add up to."""
        return "".join(self.texts.get(reply, {}).values())


def visible_text(message: dict[str, Any]) -> str:
    """Return a message's text parts, joined."""
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


def assert_terminal(d: dict[str, Any]) -> None:
    """Check a terminal event against its own promise."""
    text = visible_text(d["message"])
    assert (d["len"], d["sha256"]) == (len(text), hashlib.sha256(text.encode()).hexdigest())
    assert (d["message"]["id"], d["message"]["cost"], d["message"]["usage"]) == (d["reply"], d["cost"], d["usage"])


# -- a peer --------------------------------------------------------------------------------------------------------


@dataclass
class Peer:
    """One socket, read frame by frame. Every frame is checked against the tables, every channel against the rule."""

    socket: ClientConnection
    seen: list[Frame] = field(default_factory=list)
    logs: dict[str, Log] = field(default_factory=dict)
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1000))
    acks: bool = False
    """Whether every event is acknowledged as soon as it is read."""

    async def send(self, t: str, **fields: Any) -> None:
        """Send a frame."""
        await self.raw(json.dumps({"t": t, **fields}))

    async def raw(self, data: str | bytes) -> None:
        """Send a text or a binary message."""
        if isinstance(data, str):
            documented().sent(data)
        await self.socket.send(data)

    async def read(self, *, within_s: float = WAIT_S) -> Frame:
        """Return the next frame. Raises `ConnectionClosed`."""
        async with asyncio.timeout(within_s):
            frame = assert_valid_server_frame(await self.socket.recv())
        self.seen.append(frame)
        if frame["t"] in {"subbed", "snap", "ev", "live"}:
            self.logs.setdefault(frame["ch"], Log()).take(frame)
        if self.acks and frame["t"] in {"snap", "ev"}:
            await self.send("ack", a={frame["ch"]: frame["seq"]})
        return frame

    async def until(self, t: str | None = None, *, within_s: float = WAIT_S, **fields: Any) -> Frame:
        """Read up to the first frame of that `t` with those fields. What comes before it is only in `seen`."""
        async with asyncio.timeout(within_s):
            while True:
                frame = await self.read(within_s=within_s)
                if t in {None, frame["t"]} and all(frame.get(name) == value for name, value in fields.items()):
                    return frame

    async def event(self, *names: str, within_s: float = WAIT_S, **d: Any) -> Frame:
        """Read up to the first event of one of those names whose data holds those fields."""
        async with asyncio.timeout(within_s):
            while True:
                frame = await self.read(within_s=within_s)
                if frame["t"] == "ev" and frame["e"] in names and all(frame["d"].get(k) == v for k, v in d.items()):
                    return frame

    async def ask(self, t: str, **fields: Any) -> Frame:
        """Send a frame with an id of our own and return its `ok`, `err` or `subbed`."""
        id_ = next(self.ids)
        await self.send(t, id=id_, **fields)
        return await self.until(id=id_)

    async def sub(self, ch: str, **fields: Any) -> Frame:
        """Subscribe; return the `subbed` or `err` frame. The rest up to `live` has been read."""
        self.logs[ch] = Log(since=(fields.get("since") or {}).get("seq"))
        answer = await self.ask("sub", ch=ch, **fields)
        if answer["t"] == "subbed":
            await self.until("live", ch=answer["ch"])
        return answer

    async def say(self, conversation: str, text: str, **fields: Any) -> Frame:
        """Send a message; return the `ok` or `err` frame."""
        parts = [{"type": "text", "text": text}]
        return await self.ask("chat.send", **{"ch": conversation, "cid": str(uuid4()), "parts": parts, **fields})

    async def closed(self, *, within_s: float = WAIT_S) -> CloseFrame:
        """Read whatever still comes and return how the server closed."""
        try:
            async with asyncio.timeout(within_s):
                while True:
                    await self.read(within_s=within_s)
        except ConnectionClosed as error:
            assert error.rcvd is not None, "the server dropped the connection without a close frame"
            return error.rcvd

    async def code(self, *, within_s: float = WAIT_S) -> int:
        """Return the code that the server closes with."""
        return (await self.closed(within_s=within_s)).code

    async def alive(self) -> None:
        """Fail unless the connection still answers."""
        answer = await self.ask("unsub", ch="conversation:nothing")
        assert (answer["t"], answer["code"]) == ("err", "not_found"), answer


# -- a server ------------------------------------------------------------------------------------------------------


@dataclass
class LiveServer:
    """A running server."""

    app: FastAPI
    settings: Settings
    urls: DatabaseUrls
    base: str
    ws: str

    @property
    def realtime(self) -> Realtime:
        """The live part of the application."""
        found: Realtime = self.app.state.realtime
        return found

    @asynccontextmanager
    async def open(self, *, query: str = "", **options: Any) -> AsyncIterator[Peer]:
        """Connect, and say nothing yet."""
        options = {"subprotocols": ["parley.v1"], "max_size": None, "compression": None, "ping_interval": None,
                   # A test may leave with frames unread, and then the library waits for nothing.
                   "close_timeout": 0.5, **options}  # fmt: skip
        async with connect(self.ws + query, **options) as socket:
            yield Peer(socket)

    @asynccontextmanager
    async def bytes(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Connect without any protocol. Leaving it drops the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.settings.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()

    @asynccontextmanager
    async def join(self, account: Account, **hello: Any) -> AsyncIterator[Peer]:
        """Connect and be welcome."""
        async with self.open() as peer:
            await peer.send("hello", **{"v": 1, "auth": {"token": account.access_token}, **hello})
            assert (await peer.read())["t"] == "welcome"
            yield peer

    @asynccontextmanager
    async def sign_up(self, email: str | None = None) -> AsyncIterator[Account]:
        """Sign someone up over HTTP."""
        email = email or f"user-{uuid4().hex[:12]}@example.com"
        async with httpx.AsyncClient(base_url=self.base, timeout=30) as client:
            body = {"email": email, "password": "correct horse 1", "confirmPassword": "correct horse 1"}
            answer = await client.post("/api/v1/auth/signup", json=body)
            assert answer.status_code == 201, answer.text
            data = answer.json()["data"]
            client.headers["Authorization"] = f"Bearer {data['access_token']}"
            yield Account(
                http=client,
                email=email,
                user_id=UUID(data["user"]["id"]),
                workspace_id=UUID(data["workspace"]["id"]),
                access_token=data["access_token"],
                refresh_token=data["refresh_token"],
            )


class _InLoop(uvicorn.Server):
    """A server that leaves the signals to the test runner and says when it answers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answers = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answers.set()


@asynccontextmanager
async def serving(settings: Settings, urls: DatabaseUrls) -> AsyncIterator[LiveServer]:
    """Run the server as `parley serve` runs it: its socket, its uvicorn options, its lifespan."""
    settings.host, settings.port = "127.0.0.1", 0
    app = create_app(settings)
    with serve._listen(settings) as listening:
        # uvloop, which the command runs on, does this for every connection; asyncio only where the socket names TCP.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port = settings.port = listening.getsockname()[1]
        server = _InLoop(serve.uvicorn_config(app, settings))
        task = asyncio.create_task(server.serve(sockets=[listening]))
        await server.answers.wait()
        try:
            assert server.started, "the lifespan failed; the log says why"
            yield LiveServer(app, settings, urls, f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}/api/v1/realtime")
        finally:
            server.should_exit = True
            await task


Serve = Callable[..., AbstractAsyncContextManager[LiveServer]]


@pytest.fixture(scope="module")
def serve_with(databases: TestDatabases, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """Run a server of one's own: `async with serve_with(realtime={"heartbeat_s": 0.2}) as server`."""

    @asynccontextmanager
    async def run(*, realtime: dict[str, Any] | None = None, **overrides: Any) -> AsyncIterator[LiveServer]:
        urls = await databases.create()
        directory: Path = tmp_path_factory.mktemp("server")
        overrides["realtime"] = RealtimeSettings(**{"drain_s": 1, **(realtime or {})})
        try:
            async with serving(make_settings(directory, urls, **overrides), urls) as server:
                yield server
        finally:
            await databases.drop(urls)

    return run


QUICK: dict[str, Any] = {"frames_per_s": 1000, "frames_burst": 2000}
"""Limits for tests that send faster than people."""


@pytest.fixture(scope="module")
async def live_server(serve_with: Serve) -> AsyncIterator[LiveServer]:
    """A server with the usual settings, shared by a module."""
    async with held(serve_with(realtime=QUICK)) as server:
        yield server


@pytest.fixture(scope="module")
async def ada(live_server: LiveServer) -> AsyncIterator[Account]:
    """A user of the live server, shared by a module."""
    async with live_server.sign_up() as account:
        yield account


@pytest.fixture
async def eve(live_server: LiveServer) -> AsyncIterator[Account]:
    """A user who has nothing yet, and whom a test may sign out."""
    async with live_server.sign_up() as account:
        yield account


@pytest.fixture(scope="module")
async def bob(live_server: LiveServer) -> AsyncIterator[Account]:
    """Another user, in another workspace."""
    async with live_server.sign_up() as account:
        yield account


async def conversation_of(account: Account, **body: Any) -> str:
    """Make a conversation; return its channel."""
    answer = await account.http.post("/api/v1/conversations", json=body)
    assert answer.status_code == 201, answer.text
    return f"conversation:{answer.json()['data']['id']}"


async def poll(holds: Callable[[], object], *, within_s: float = WAIT_S) -> None:
    """Wait until something holds that nothing announces."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold in time"
        await asyncio.sleep(0.01)


@pytest.fixture
def protocols(monkeypatch: pytest.MonkeyPatch) -> WeakSet[SocketProtocol]:
    """The server's side of every socket, below the application."""
    made: WeakSet[SocketProtocol] = WeakSet()
    original = SocketProtocol.connection_made

    def connection_made(self: SocketProtocol, transport: Any) -> None:
        made.add(self)
        original(self, transport)

    monkeypatch.setattr(SocketProtocol, "connection_made", connection_made)
    return made
