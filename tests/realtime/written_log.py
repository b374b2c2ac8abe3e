"""A conversation that a test writes event by event, and what a client must see of it wherever it comes from."""

import copy
import hashlib
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast
from uuid import UUID

import asyncpg
import orjson

from parley.chat.channels import ConversationChannel
from parley.chat.messages import conversation_channel, message_json
from parley.core import clock
from parley.core.db import Database
from parley.core.ids import new_id
from parley.core.scope import Role, Scope
from parley.core.settings import RealtimeSettings
from parley.realtime.bus import Bus
from parley.realtime.channels import Channels
from parley.realtime.cursor import Cursor
from parley.realtime.events import Channel, NewEvent
from parley.realtime.fold import apply_reply_event, visible_text
from parley.realtime.frames import Since
from parley.realtime.log import LogReader, append
from parley.realtime.service import Realtime
from parley.tenancy.permissions import permissions_of

Messages = dict[str, dict[str, Any]]

_MESSAGE = """
    INSERT INTO messages (workspace_id, id, conversation_id, parent_id, role, parts, status, model, author_id, created_at,
                          completed_at)
    VALUES ($1, $2, $3, $4, $5, $6::json, $7, $8, $9, $10, $11)
"""
_REPLY = """
    INSERT INTO replies (workspace_id, id, channel, user_id, question_id, status, options, fence, attempt, appended,
                         start_seq, cancel_requested)
    VALUES ($1, $2, $3, $4, $5, $6, '{}', 1, $7, 0, $8, false)
"""


def limits(**changed: Any) -> RealtimeSettings:
    """Return settings whose numbers may be smaller than those that the service takes."""
    return RealtimeSettings.model_construct(**changed)


def apply(messages: Messages, e: str, d: dict[str, Any]) -> None:
    """Do what a client does with an event."""
    d = copy.deepcopy(d)
    if e in {"message.created", "message.updated"}:
        messages[d["id"]] = {key: value for key, value in d.items() if key != "cid"}
    elif e.startswith("reply."):
        assert apply_reply_event(messages[d["reply"]], e, d), (e, d)


@dataclass
class WrittenLog:
    """A conversation, everything that was ever appended to it, and readers of it."""

    database: Database
    admin: asyncpg.Connection
    realtime: Realtime
    bus: Bus
    scope: Scope
    id: UUID
    channel: Channel
    first: int
    events: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    running: UUID | None = None
    waiting: list[UUID] = field(default_factory=list)
    questions: dict[UUID, UUID] = field(default_factory=dict)
    words: int = 0

    @classmethod
    async def make(
        cls, database: Database, admin: asyncpg.Connection, *, settings: RealtimeSettings | None = None, first: int = 0
    ) -> "WrittenLog":
        """Make a workspace with an empty conversation whose log begins after `first`."""
        settings = settings or limits()
        bus = Bus(database, settings)
        nobody = cast("Any", None)
        realtime = Realtime(
            settings=settings, authenticator=nobody, tickets=nobody,
            channels=Channels(database, [ConversationChannel(bus)]), bus=bus, log=LogReader(database),
            origins=frozenset(), allow_loopback_origins=True,
        )  # fmt: skip
        scope = Scope(new_id(), new_id(), Role.OWNER, permissions=permissions_of(Role.OWNER))
        await admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'A', true)", scope.workspace_id)
        return await cls(database, admin, realtime, bus, scope, new_id(), cast("Channel", None), first)._begin()

    async def _begin(self) -> "WrittenLog":
        self.channel = conversation_channel(self.scope.workspace_id, self.id)
        await self.admin.execute(
            "INSERT INTO conversations (workspace_id, id, owner_id, assistant, shared, archived) "
            "VALUES ($1, $2, $3, 'general', false, false)",
            self.scope.workspace_id, self.id, self.scope.user_id,
        )  # fmt: skip
        await self.admin.execute(
            "INSERT INTO channel_heads (workspace_id, channel, seq, floor) VALUES ($1, $2, $3, $3)",
            *self.channel.address, self.first,
        )  # fmt: skip
        return self

    async def another(self) -> "WrittenLog":
        """Return another conversation of the same user."""
        made = WrittenLog(
            self.database, self.admin, self.realtime, self.bus, self.scope, new_id(), self.channel, self.first
        )
        return await made._begin()

    # -- writing -------------------------------------------------------------------------------------------------

    async def append(self, *events: tuple[str, dict[str, Any]]) -> list[int]:
        """Append events in a transaction of their own."""
        async with self.database.unit_of_work(self.scope) as unit:
            seqs = await append(unit, self.bus, [NewEvent(self.channel, e, d) for e, d in events])
        for seq, (e, d) in zip(seqs, events, strict=True):
            self.events.append((seq, e, orjson.loads(orjson.dumps(d, default=str))))
        return seqs

    async def _add(self, id: UUID, *, role: str, parent: UUID | None, parts: list[Any], status: str) -> dict[str, Any]:
        now = clock.now()
        ended = now if status == "completed" else None
        await self.admin.execute(
            _MESSAGE, self.scope.workspace_id, id, self.id, parent, role, orjson.dumps(parts).decode(), status,
            "demo" if role == "assistant" else None, self.scope.user_id, now, ended,
        )  # fmt: skip
        return message_json(
            {"id": id, "conversation_id": self.id, "role": role, "parts": parts, "status": status, "usage": None,
             "model": "demo" if role == "assistant" else None, "parent_id": parent, "cost": None, "error": None,
             "created_at": now, "completed_at": ended}
        )  # fmt: skip

    async def ask(self) -> UUID:
        """Ask a question; its reply begins, or waits for the one that runs. Returns the reply."""
        question, reply = new_id(), new_id()
        parts = [{"type": "text", "text": f"question {len(self.questions)}"}]
        asked = await self._add(question, role="user", parent=None, parts=parts, status="completed")
        answer = await self._add(reply, role="assistant", parent=question, parts=[], status="queued")
        waits = self.running is not None
        then = {"reply": str(reply), "to": str(question)}
        seqs = await self.append(
            ("message.created", {**asked, "cid": None}),
            ("message.created", {**answer, "cid": None}),
            ("reply.queued", {**then, "pos": 1})
            if waits
            else ("reply.started", {**then, "model": "demo", "attempt": 1}),
        )
        await self.admin.execute(
            _REPLY, self.scope.workspace_id, reply, self.channel.key, self.scope.user_id, question,
            "queued" if waits else "streaming", 0 if waits else 1, seqs[1],
        )  # fmt: skip
        self.questions[reply] = question
        if waits:
            self.waiting.append(reply)
        else:
            self.running = reply
        return reply

    async def start_next(self) -> None:
        """Begin the reply that has waited longest, if there is one and none runs."""
        if self.running is not None or not self.waiting:
            return
        reply = self.running = self.waiting.pop(0)
        await self.admin.execute("UPDATE replies SET status = 'streaming', attempt = 1 WHERE id = $1", reply)
        started = {"reply": str(reply), "to": str(self.questions[reply]), "model": "demo", "attempt": 1}
        await self.append(("reply.started", started))

    async def write(self, deltas: int) -> None:
        """Let the running reply say so many words, an event each."""
        reply = str(self.running)
        message = self.state()[reply]
        events: list[tuple[str, dict[str, Any]]] = []
        if not message["parts"]:
            events.append(("reply.part", {"reply": reply, "part": 0, "kind": "text", "state": "start"}))
        off = len(visible_text(message))
        for _ in range(deltas):
            self.words += 1
            word = f"wörd{self.words} "
            events.append(("reply.delta", {"reply": reply, "part": 0, "off": off, "x": word}))
            off += len(word)
        if events:
            await self.append(*events)

    async def end(self, status: str = "completed") -> UUID:
        """End the running reply; returns it."""
        reply = self.running
        assert reply is not None
        self.running = None
        await self._end(reply, status)
        return reply

    async def cancel_waiting(self) -> None:
        """Cancel the reply that was queued last."""
        await self._end(self.waiting.pop(), "cancelled")

    async def _end(self, reply: UUID, status: str) -> None:
        now = clock.now()
        message = copy.deepcopy(self.state()[str(reply)])
        message |= {"status": status, "completed_at": now.isoformat().replace("+00:00", "Z")}
        text = visible_text(message)
        await self.admin.execute(
            "UPDATE messages SET parts = $2::json, status = $3, completed_at = $4 WHERE id = $1",
            reply, orjson.dumps(message["parts"]).decode(), status, now,
        )  # fmt: skip
        d = {"reply": str(reply), "message": message, "usage": None, "cost": None, "len": len(text),
             "sha256": hashlib.sha256(text.encode()).hexdigest()}  # fmt: skip
        await self.append((f"reply.{status}", d))
        await self.admin.execute("UPDATE replies SET status = $2, ended_at = now() WHERE id = $1", reply, status)

    async def edit(self) -> None:
        """Change the first question."""
        question = next(iter(self.questions.values()))
        self.words += 1
        parts = [{"type": "text", "text": f"edited {self.words}"}]
        await self.admin.execute(
            "UPDATE messages SET parts = $2::json WHERE id = $1", question, orjson.dumps(parts).decode()
        )
        await self.append(("message.updated", {**self.state()[str(question)], "parts": parts, "cid": None}))

    async def age(self, by: timedelta) -> None:
        """Let time go by, for this conversation."""
        await self.admin.execute(
            "UPDATE channel_events SET at = at - $3::interval WHERE workspace_id = $1 AND channel = $2",
            *self.channel.address, by,
        )  # fmt: skip
        await self.admin.execute(
            "UPDATE replies SET ended_at = ended_at - $3::interval WHERE workspace_id = $1 AND channel = $2",
            *self.channel.address, by,
        )  # fmt: skip

    # -- looking -------------------------------------------------------------------------------------------------

    @property
    def head(self) -> int:
        """The last position."""
        return self.events[-1][0] if self.events else self.first

    def state(self, until: int | None = None) -> Messages:
        """Return the messages after the events up to a position, whatever the log still has of them."""
        messages: Messages = {}
        for seq, e, d in self.events:
            if until is None or seq <= until:
                apply(messages, e, d)
        return messages

    async def standing(self) -> tuple[int, int, list[int]]:
        """Return seq, floor and the positions of the events that the log holds."""
        row = await self.admin.fetchrow(
            "SELECT seq, floor FROM channel_heads WHERE workspace_id = $1 AND channel = $2", *self.channel.address
        )
        kept = await self.admin.fetch(
            "SELECT seq FROM channel_events WHERE workspace_id = $1 AND channel = $2 ORDER BY seq",
            *self.channel.address,
        )
        return row["seq"], row["floor"], [event["seq"] for event in kept]

    async def assert_whole(self) -> int:
        """Fail unless the log holds exactly the events above its floor; return the floor."""
        seq, floor, kept = await self.standing()
        assert (seq, kept) == (self.head, list(range(floor + 1, seq + 1)))
        return floor

    def cursor(self) -> Cursor:
        """Return a reader."""
        return self.realtime.cursor(self.scope, lambda: None)

    async def assert_reads(self, since: int, *, floor: int) -> None:
        """Fail unless a client that holds the state after `since` comes to the state of now, by events or a snapshot."""
        cursor = self.cursor()
        head, why, snapshot = await cursor.open(self.channel.name, Since(ep=None, seq=since))
        try:
            assert head.floor == floor
            if since == -1:
                assert (why, snapshot, cursor.seq, cursor.is_behind) == ("initial", None, self.head, False)
                return
            assert why == ("epoch" if since > self.head else "trimmed" if since < floor else "ok")
            if snapshot is not None:
                assert why != "ok"
                assert snapshot.head.seq == self.head
                assert {message["id"]: message for message in snapshot.state["messages"]} == self.state()
                assert not cursor.is_behind
                return
            messages = self.state(since)
            place = since
            while cursor.is_behind:
                events = await cursor.read(limit=7)
                assert not cursor.lost
                for event in events:
                    assert event.first == place + 1
                    apply(messages, event.e, event.d)
                    place = event.seq
            assert place == self.head
            assert messages == self.state()
        finally:
            cursor.close()
