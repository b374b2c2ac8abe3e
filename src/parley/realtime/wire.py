"""Between processes: what was committed here, told to the others. It may be lost; that costs latency and no event.

By PostgreSQL's NOTIFY each process hears how far a channel has moved and reads the events itself. With Redis the
events themselves travel, and nothing is read; while Redis is away it is NOTIFY again. What is to be told while a
message is on its way goes together into the next, so there are few of them however many channels move.
"""

import asyncio
import base64
import hashlib
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol
from uuid import UUID

import asyncpg
import orjson
import redis.asyncio as redis
from redis.exceptions import RedisError

from parley.core.db import Database
from parley.core.listening import Listening
from parley.realtime.events import LoggedEvent

logger = logging.getLogger(__name__)

Address = tuple[UUID, str]
Mark = str

CHANNEL = "parley_realtime"
_REDIS_CHANNEL = "parley:realtime"

# PostgreSQL refuses payloads of 8,000 bytes and more.
_PAYLOAD_BYTES = 7900
_MESSAGE_BYTES = 1024 * 1024
_AWAY_S = 1.0
_FAILED = (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresError)


def mark_of(address: Address) -> Mark:
    """Return a channel's short name on the wire. Two channels with one mark cost a look in vain, and nothing else."""
    workspace_id, key = address
    digest = hashlib.blake2b(workspace_id.bytes + key.encode(), digest_size=8).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


class Receiver(Protocol):
    """What hears the other processes. Nothing here may fail or block."""

    def moved(self, mark: Mark, seq: int) -> None:
        """Hear that a channel has come to `seq`; -1: its positions no longer hold."""
        ...

    def arrived(self, mark: Mark, events: Sequence[LoggedEvent]) -> None:
        """Take committed events of a channel."""
        ...

    def missed(self) -> None:
        """Note that something may not have been heard."""
        ...

    def called(self, word: str, id: UUID) -> None:
        """Hear a word about a reply: `work`, `cancel`, `sweep`; or about a call in one: `approval`."""
        ...


class Wire:
    """Tells and hears. `alone`: no other process is there to be told."""

    def __init__(self, database: Database, *, redis_url: str | None = None) -> None:
        self._database = database
        self._node = secrets.token_urlsafe(6)
        self._receiver: Receiver | None = None
        self._listening = Listening(database, CHANNEL, self._notified, listening=self._heard_again)
        self._redis = _RedisWire(redis_url, self._node) if redis_url else None
        self._marks: dict[Address, Mark] = {}
        self._moved: dict[Address, int] = {}
        self._events: dict[Address, list[LoggedEvent]] = {}
        self._words: list[tuple[str, UUID]] = []
        self._wake = asyncio.Event()
        self._connection: asyncpg.Connection | None = None
        self._sender: asyncio.Task[None] | None = None
        self.alone = False

    async def start(self, receiver: Receiver) -> None:
        """Begin to hear and to tell."""
        self._receiver = receiver
        await self._listening.start()
        if self._redis is not None:
            self._redis.start(receiver)
        self._sender = asyncio.create_task(self._send(), name="wire")

    async def close(self) -> None:
        """Tell what is left, and stop."""
        if self._sender is not None:
            self._sender.cancel()
            with suppress(asyncio.CancelledError):
                await self._sender
            if self._wake.is_set():
                await self._send_pending()
        if self._redis is not None:
            await self._redis.close()
        await self._listening.close()
        if self._connection is not None:
            self._connection.terminate()

    def announce(self, address: Address, events: Sequence[LoggedEvent]) -> None:
        """Tell that events of a channel have been committed."""
        if self.alone or not events:
            return
        self._moved[address] = events[-1].seq
        if self._redis is not None:
            self._events.setdefault(address, []).extend(events)
        self._wake.set()

    def void(self, address: Address) -> None:
        """Tell that a channel's positions no longer hold."""
        if not self.alone:
            self._moved[address] = -1
            self._wake.set()

    def call(self, word: str, id: UUID) -> None:
        """Say a word about a reply to every other process."""
        self._words.append((word, id))
        self._wake.set()

    # -- telling -------------------------------------------------------------------------------------------------

    async def _send(self) -> None:
        while True:
            await self._wake.wait()
            await self._send_pending()

    async def _send_pending(self) -> None:
        self._wake.clear()
        moved, self._moved = self._moved, {}
        events, self._events = self._events, {}
        words, self._words = self._words, []
        if self._redis is not None and await self._redis.publish(
            (self._mark(address), listed) for address, listed in events.items()
        ):
            moved = {address: seq for address, seq in moved.items() if seq < 0}
        texts = list(self._texts(moved, words))
        if texts:
            await self._notify(texts)

    async def _notify(self, texts: list[str]) -> None:
        try:
            if self._connection is None or self._connection.is_closed():
                self._connection = await self._database.connect_system()
            await self._connection.execute(
                "SELECT pg_notify($1, text) FROM unnest($2::text[]) AS text", CHANNEL, texts, timeout=5
            )
        except _FAILED as error:
            # The others look at their channels by themselves once a second.
            logger.warning("other processes were not told", extra={"cause": type(error).__name__})
            if self._connection is not None:
                self._connection.terminate()
            await asyncio.sleep(0.1)

    def _texts(self, moved: dict[Address, int], words: list[tuple[str, UUID]]) -> Iterator[str]:
        pieces = [f"{self._mark(address)}:{seq}" for address, seq in moved.items()]
        pieces += [f"{word}:{reply_id}" for word, reply_id in words]
        text = self._node
        for piece in pieces:
            if len(text) + len(piece) + 1 > _PAYLOAD_BYTES:
                yield text
                text = self._node
            text += f" {piece}"
        if pieces:
            yield text

    def _mark(self, address: Address) -> Mark:
        mark = self._marks.get(address)
        if mark is None:
            if len(self._marks) > 50_000:
                self._marks.clear()
            mark = self._marks[address] = mark_of(address)
        return mark

    # -- hearing -------------------------------------------------------------------------------------------------

    def _notified(self, text: str) -> None:
        node, *pieces = text.split(" ")
        if node == self._node or self._receiver is None:
            return
        for piece in pieces:
            name, _, value = piece.partition(":")
            try:
                if name in {"work", "cancel", "sweep", "approval"}:
                    self._receiver.called(name, UUID(value))
                else:
                    self._receiver.moved(name, int(value))
            except ValueError:
                # Of a newer version.
                self._receiver.missed()

    def _heard_again(self) -> None:
        if self._receiver is not None:
            self._receiver.missed()


class _RedisWire:
    """The same by Redis, with the events in it."""

    def __init__(self, url: str, node: str) -> None:
        self._node = node
        self._client = redis.Redis.from_url(url, socket_connect_timeout=1, socket_timeout=1)
        # Its own connections: whoever waits for messages must not be told after a second that there were none.
        self._listener = redis.Redis.from_url(url, socket_connect_timeout=1)
        self._away_until = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self, receiver: Receiver) -> None:
        self._task = asyncio.create_task(self._listen(receiver), name="wire-redis")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for client in (self._client, self._listener):
            with suppress(RedisError, OSError):
                await client.aclose()

    async def publish(self, channels: Iterator[tuple[Mark, list[LoggedEvent]]]) -> bool:
        """Publish; False when Redis does not take it."""
        if time.monotonic() < self._away_until:
            return False
        try:
            for message in self._messages(channels):
                await self._client.publish(_REDIS_CHANNEL, message)
        except (RedisError, OSError, TimeoutError) as error:
            logger.warning("Redis is away, telling by NOTIFY", extra={"cause": type(error).__name__})
            self._away_until = time.monotonic() + _AWAY_S
            return False
        return True

    def _messages(self, channels: Iterator[tuple[Mark, list[LoggedEvent]]]) -> Iterator[bytes]:
        listed: list[object] = []
        size = 0
        for mark, events in channels:
            listed.append([mark, [[event.seq, event.e, event.data, event.ts] for event in events]])
            size += sum(event.size for event in events)
            if size > _MESSAGE_BYTES:
                yield orjson.dumps([self._node, listed])
                listed, size = [], 0
        if listed:
            yield orjson.dumps([self._node, listed])

    async def _listen(self, receiver: Receiver) -> None:
        while True:
            try:
                async with self._listener.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe(_REDIS_CHANNEL)
                    receiver.missed()
                    async for message in pubsub.listen():
                        self._take(receiver, message["data"])
            except (RedisError, OSError, TimeoutError) as error:
                logger.warning("not listening to Redis", extra={"cause": type(error).__name__})
            receiver.missed()
            await asyncio.sleep(0.3)

    def _take(self, receiver: Receiver, data: bytes) -> None:
        try:
            node, listed = orjson.loads(data)
            if node == self._node:
                return
            for mark, events in listed:
                receiver.arrived(mark, [LoggedEvent(seq, e, text, ts) for seq, e, text, ts in events])
        except (ValueError, TypeError):
            # Of a newer version, or of somebody else: PostgreSQL has what it was about.
            receiver.missed()
