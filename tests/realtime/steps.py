"""Steps that several tests of the socket take."""

import asyncio
import json
from typing import Any
from uuid import uuid4

import httpx

from parley.core.scope import Credential, Role, Scope
from parley.realtime.events import Channel, NewEvent
from parley.realtime.log import append
from parley.tenancy.permissions import permissions_of
from tests.conftest import Account
from tests.realtime.conftest import (
    Frame,
    LiveServer,
    Peer,
    assert_valid_server_frame,
)


def slow_words(count: int) -> str:
    """Return a question whose answer takes a while: the demo model writes a word each 20 ms."""
    return f"repeat {count} word"


async def ticket_of(account: Account) -> str:
    answer = await account.http.post("/api/v1/realtime/tickets")
    assert answer.status_code == 201
    data = answer.json()["data"]
    assert data["expires_in"] == 30
    found: str = data["ticket"]
    return found


async def hello_code(server: LiveServer, auth: dict[str, Any]) -> int:
    """Return the close code of a hello that is refused, 0 for one that is welcome."""
    async with server.open() as peer:
        await peer.send("hello", v=1, auth=auth)
        answer = await peer.read()
        if answer["t"] == "welcome":
            return 0
        assert (answer["t"], answer["code"], answer["retry"]) == ("err", "unauthenticated", "never")
        for value in auth.values():
            assert str(value) not in answer["msg"] or not value
        return await peer.code()


async def poll_until_ended(account: Account, reply: str, channel: str) -> dict[str, Any]:
    """Return a reply's message once it has ended."""
    path = f"/api/v1/conversations/{channel.partition(':')[2]}/messages"
    async with asyncio.timeout(20):
        while True:
            rows = (await account.http.get(path)).json()["data"]
            found: dict[str, Any] = next(row for row in rows if row["id"] == reply)
            if found["status"] in {"completed", "failed", "cancelled"}:
                return found
            await asyncio.sleep(0.02)


async def poll_live(peer: Peer, *channels: str) -> None:
    """Read until every channel is live."""
    async with asyncio.timeout(10):
        while any(peer.logs.get(name) is None or peer.logs[name].state != "live" for name in channels):
            await peer.read()


def flattened(frames: list[Frame]) -> list[tuple[str, str]]:
    """Return events with the deltas of a part joined: what merging may not change."""
    found: list[tuple[str, str]] = []
    for frame in frames:
        if frame["e"] == "reply.delta" and found and found[-1][0] == "reply.delta":
            found[-1] = ("reply.delta", found[-1][1] + frame["d"]["x"])
        elif frame["e"] == "reply.delta":
            found.append(("reply.delta", frame["d"]["x"]))
        else:
            found.append((f"{frame['seq']} {frame['e']}", json.dumps(frame["d"], sort_keys=True)))
    return found


def tail_of(flat: list[tuple[str, str]], at: int) -> list[tuple[str, str]]:
    """Return what comes after a position that is not inside the deltas."""
    kept: list[tuple[str, str]] = []
    for name, data in reversed(flat):
        if name[0].isdigit() and int(name.split()[0]) <= at:
            break
        kept.insert(0, (name, data))
    return kept


async def once(server: LiveServer, account: Account, channel: str, text: str, cid: str) -> Frame:
    """Send from a connection of its own."""
    async with server.join(account) as peer:
        return await peer.say(channel, text, cid=cid)


async def peer_event(peer: Peer, name: str, reply: str) -> Frame:
    """Return an event that may have been read already."""
    for frame in peer.seen:
        if frame["t"] == "ev" and frame["e"] == name and frame["d"].get("reply") == reply:
            return frame
    return await peer.event(name, reply=reply)


class Events:
    """Reads server-sent events."""

    def __init__(self, response: httpx.Response) -> None:
        self._lines = response.aiter_lines()
        self.comments = 0

    async def next(self) -> tuple[str, str | None, Frame] | None:
        """Return name, id and frame of the next event, None at the end."""
        name, id_, data = "", None, ""
        async for line in self._lines:
            if line.startswith(":"):
                self.comments += 1
            elif line.startswith("event: "):
                name = line[7:]
            elif line.startswith("id: "):
                id_ = line[4:]
            elif line.startswith("data: "):
                data = line[6:]
            elif not line and data:
                return name, id_, assert_valid_server_frame(data)
        return None

    async def rest(self) -> list[tuple[str, str | None, Frame]]:
        """Return all that comes until the end."""
        found = []
        while (event := await self.next()) is not None:
            found.append(event)
        return found


async def stream_turn(
    account: Account, channel: str, text: str, key: str | None
) -> list[tuple[str, str | None, Frame]]:
    """Send over HTTP and read the turn."""
    headers = {"Accept": "text/event-stream", **({"Idempotency-Key": key} if key else {})}
    path = f"/api/v1/conversations/{channel.partition(':')[2]}/messages"
    async with account.http.stream("POST", path, json={"text": text}, headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        return await Events(response).rest()


async def within[T](awaitable: Any) -> Any:
    """Wait no longer than a test may."""
    async with asyncio.timeout(10):
        found = await awaitable
    assert found is not None
    return found


async def touch(server: LiveServer, account: Account) -> None:
    """Make the user's inbox move, past the credential."""
    from parley.chat.schemas import ConversationCreate
    from parley.chat.service import ConversationService

    scope = Scope(account.workspace_id, account.user_id, Role.OWNER)
    async with server.app.state.database.unit_of_work(scope) as unit:
        await ConversationService(unit, scope, server.realtime.bus).start(ConversationCreate())


async def fill(server: LiveServer, account: Account, channel: str, rows: int, parts: str) -> None:
    """Put messages into a conversation, past the API."""
    scope = Scope(account.workspace_id, account.user_id, Role.OWNER)
    async with server.app.state.database.unit_of_work(scope) as unit:
        connection = await unit.driver()
        for _ in range(rows):
            await connection.execute(
                "INSERT INTO messages (workspace_id, id, conversation_id, role, parts, status, author_id, created_at,"
                " completed_at) VALUES ($1, $2, $3, 'user', $4::json, 'completed', $5, now(), now())",
                account.workspace_id, uuid4(), channel.partition(":")[2], parts, account.user_id,
            )  # fmt: skip


def scope_of(account: Account) -> Scope:
    """Return a scope that may do what the account may."""
    return Scope(account.workspace_id, account.user_id, Role.OWNER, permissions=permissions_of(Role.OWNER))


async def channel_of(server: LiveServer, account: Account, name: str) -> Channel:
    """Return a channel as the log keeps it."""
    channel, _, _ = await server.realtime.channels.authorise(scope_of(account), name)
    return channel


async def task_of(account: Account) -> dict[str, Any]:
    """Make a task; return it as its events show it."""
    answer = await account.http.post("/api/v1/tasks", json={"title": "milk"})
    assert answer.status_code == 201, answer.text
    task: dict[str, Any] = answer.json()["data"]
    return task


async def publish(server: LiveServer, account: Account, task: dict[str, Any], *, count: int, size: int) -> int:
    """Tell of changes to a task that did not happen, each of so many bytes; return the last one's position."""
    channel = await channel_of(server, account, "tasks")
    events = [NewEvent(channel, "task.updated", {**task, "description": "x" * size}) for _ in range(count)]
    async with server.app.state.database.unit_of_work(scope_of(account)) as unit:
        return (await append(unit, server.realtime.bus, events))[-1]


class SlowAuthenticator:
    """Answers when it is let."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.open = asyncio.Event()
        self.asked = 0
        self.at_once = 0
        self.most = 0

    async def authenticate(self, token: str) -> Credential:
        self.asked += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await self.open.wait()
            found: Credential = await self.inner.authenticate(token)
            return found
        finally:
            self.at_once -= 1

    async def reauthenticate(self, scope: Scope) -> Credential:
        found: Credential = await self.inner.reauthenticate(scope)
        return found


def slow(server: LiveServer) -> SlowAuthenticator:
    """Make the verifying of credentials on sockets wait."""
    made = SlowAuthenticator(server.realtime.authenticator)
    server.realtime.authenticator = made
    return made
