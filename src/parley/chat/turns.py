"""A turn: the question is durable before anyone hears of it, and every reply comes to exactly one end.

Locks are taken in one order everywhere: the conversation, its head in the log, run records and messages, and last the
head of the user's inbox.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson

from parley.chat.errors import (
    CidReused,
    ConversationNotFound,
    MessageNotFound,
    ReplyActive,
    ReplyNotFound,
    TooManyReplies,
)
from parley.chat.messages import conversation_channel, conversation_json, materialise, message_json
from parley.chat.repository import ConversationRepository, MessageRepository
from parley.core import clock
from parley.core.api_limits import ApiLimits
from parley.core.db import Database, UnitOfWork
from parley.core.ids import new_id
from parley.core.scope import Scope
from parley.core.settings import RealtimeSettings
from parley.llm.registry import ModelRegistry
from parley.realtime import runs
from parley.realtime.bus import Bus
from parley.realtime.events import Channel, NewEvent, user_channel
from parley.realtime.fold import apply_reply_event, digest, visible_text
from parley.realtime.log import append
from parley.realtime.runs import Orphan, Run
from parley.realtime.tick import TickWriter

logger = logging.getLogger(__name__)

_TITLE_LENGTH = 60
_BUSY_S = 5
_RETRYABLE = frozenset({"provider_rate_limited", "provider_unavailable", "provider_timeout", "worker_lost", "internal"})


@dataclass(frozen=True, slots=True)
class Send:
    """A message that someone wants answered. `cid` makes it idempotent."""

    conversation_id: UUID
    cid: UUID
    texts: tuple[str, ...]
    model: str | None = None
    tools: tuple[str, ...] | None = None
    parent: UUID | None = None
    on_active: str = "queue"

    @property
    def body_hash(self) -> bytes:
        """What must be the same when the key comes again. Where it was sent to is part of it."""
        body = [str(self.conversation_id), self.texts, self.model, self.tools, str(self.parent)]
        return hashlib.sha256(orjson.dumps(body)).digest()


@dataclass(frozen=True, slots=True)
class Sent:
    """A question and its reply, as JSON."""

    message: dict[str, Any]
    reply: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a reply ended."""

    status: str
    parts: list[dict[str, Any]]
    model: str | None = None
    usage: dict[str, int] | None = None
    cost: Decimal | None = None
    error: dict[str, Any] | None = None
    prompt_path: str | None = None
    prompt_hash: str | None = None


class Turns:
    """Begins and ends replies. `on_started` is told of each run that this process is to generate, after the commit."""

    def __init__(
        self,
        database: Database,
        bus: Bus,
        writer: TickWriter,
        registry: ModelRegistry,
        settings: RealtimeSettings,
        limits: ApiLimits,
    ) -> None:
        self._database = database
        self._bus = bus
        self._writer = writer
        self._registry = registry
        self._settings = settings
        self._limits = limits
        self.on_started: Callable[[Run], None] = _nobody

    # -- beginning -----------------------------------------------------------------------------------------------

    async def send(self, scope: Scope, wanted: Send) -> Sent:
        """Store a question and begin its reply. The same `cid` gives the same answer, for ever.

        Raises `ConversationNotFound`, `MessageNotFound` (parent), `CidReused`, `ReplyActive`, `TooMany`,
        `TooManyReplies`, and `UnknownModel` or `ModelNotUsable` before anything is stored.
        """
        await self._limits.send(scope)
        sent, interrupted = await self._send(scope, wanted)
        if interrupted is not None:
            await self.cancel(scope, interrupted)
        return sent

    async def _send(self, scope: Scope, wanted: Send) -> tuple[Sent, UUID | None]:
        async with self._database.unit_of_work(scope) as unit:
            messages = MessageRepository(unit, scope)
            channel = conversation_channel(scope.workspace_id, wanted.conversation_id)
            conversation = await ConversationRepository(unit, scope).lock(wanted.conversation_id)
            before = await messages.before_send(
                wanted.conversation_id,
                channel=channel.key,
                cid=wanted.cid,
                parent=wanted.parent,
                current=conversation["current_id"],
            )
            if before["known_id"] is not None:
                return await self._again(messages, wanted), None
            if not before["parent_ok"]:
                raise MessageNotFound
            if self._limits.enabled and before["open_of_user"] >= self._limits.running_replies:
                raise TooManyReplies(retry_after_s=_BUSY_S)
            if before["open"] and wanted.on_active == "reject":
                raise ReplyActive
            entry = self._registry.resolve(wanted.model or conversation["model"])
            waiting: int = before["open"]
            run, sent = await self._store(unit, scope, wanted, dict(conversation), model=entry.id, waiting=waiting)
            if not waiting:
                run.history = [*orjson.loads(before["history"] or "[]"), ("user", sent.message["parts"])]
                unit.after_commit(lambda: self._begin(run))
            return sent, before["streaming_id"] if wanted.on_active == "interrupt" else None

    async def _again(self, messages: MessageRepository, wanted: Send) -> Sent:
        found = await messages.find_sent(wanted.cid)
        if found is None or found[0]["body_hash"] != wanted.body_hash:
            raise CidReused
        question, reply = await materialise(messages, found)
        return Sent(question, reply)

    async def _store(
        self, unit: UnitOfWork, scope: Scope, wanted: Send, conversation: dict[str, Any], *, model: str, waiting: int
    ) -> tuple[Run, Sent]:
        question_id, reply_id, moment = new_id(), new_id(), clock.now()
        parent = wanted.parent or conversation["current_id"]
        parts = [{"type": "text", "text": text} for text in wanted.texts]
        shared = {
            "conversation_id": wanted.conversation_id,
            "usage": None,
            "cost": None,
            "error": None,
            "created_at": moment,
        }
        question = message_json(
            {**shared, "id": question_id, "role": "user", "parts": parts, "status": "completed", "model": None,
             "parent_id": parent, "completed_at": moment}
        )  # fmt: skip
        reply = message_json(
            {**shared, "id": reply_id, "role": "assistant", "parts": [], "status": "queued", "model": model,
             "parent_id": question_id, "completed_at": None}
        )  # fmt: skip
        conversation.update(
            current_id=reply_id,
            updated_at=moment,
            title=conversation["title"] or " ".join(" ".join(wanted.texts).split())[:_TITLE_LENGTH].strip() or None,
        )
        channel = conversation_channel(scope.workspace_id, wanted.conversation_id)
        follow_up = (
            NewEvent(channel, "reply.queued", {"reply": reply["id"], "to": question["id"], "pos": waiting})
            if waiting
            else _started(channel, reply_id, question_id, model=model, attempt=1)
        )
        seqs = await append(
            unit,
            self._bus,
            [
                NewEvent(channel, "message.created", {**question, "cid": str(wanted.cid)}),
                NewEvent(channel, "message.created", {**reply, "cid": None}),
                follow_up,
            ],
        )
        options = {"model": model, "tools": wanted.tools, "assistant": conversation["assistant"], **runs.grants(scope)}
        run = Run(
            scope=scope, reply_id=reply_id, question_id=question_id, channel=channel, fence=1, start_seq=seqs[1],
            options=options,
        )  # fmt: skip
        await MessageRepository(unit, scope).add_turn(
            wanted.conversation_id, question_id, reply_id, parent, orjson.dumps(parts).decode(), scope.user_id,
            wanted.cid, wanted.body_hash, moment, model, channel.key, "queued" if waiting else "streaming",
            orjson.dumps(options).decode(), self._writer.owner, 0 if waiting else 1, seqs[1], self._settings.lease_s,
            conversation["title"],
        )  # fmt: skip
        # Last, right before the commit: all sends of a user meet at the head of the inbox.
        inbox = user_channel(scope.workspace_id, scope.user_id)
        await append(unit, self._bus, [NewEvent(inbox, "conversation.updated", conversation_json(conversation))])
        return run, Sent(question, reply)

    def _begin(self, run: Run) -> None:
        self._writer.track(run)
        self.on_started(run)

    async def start_next(self, scope: Scope, channel: Channel) -> None:
        """Begin the next reply that waits in a conversation, if none is running."""
        async with self._database.unit_of_work(scope) as unit:
            conversation_id = UUID(channel.key.partition(":")[2])
            messages = MessageRepository(unit, scope)
            try:
                await ConversationRepository(unit, scope).lock(conversation_id)
            except ConversationNotFound:
                return
            row = await messages.next_queued(channel.key)
            if row is None:
                return
            run = await runs.claim(
                unit, scope, row["id"], owner=self._writer.owner, fence=row["fence"], lease_s=self._settings.lease_s
            )
            if run is None:
                return
            model = run.options["model"]
            started = _started(channel, run.reply_id, run.question_id, model=model, attempt=run.attempt)
            await append(unit, self._bus, [started])
            unit.after_commit(lambda: self._begin(run))

    # -- ending --------------------------------------------------------------------------------------------------

    async def finish(self, run: Run, ending_: Ending) -> bool:
        """Store a reply's end with its last events. Returns whether the run was still ours.

        Raises `Unavailable` when the database is away: nothing has happened then, or all of it (`is_ended` tells).
        """
        async with self._database.unit_of_work(run.scope) as unit:
            if not await self._finish(unit, run, ending_):
                await unit.session.rollback()
                return False
        return True

    async def _finish(self, unit: UnitOfWork, run: Run, end: Ending) -> bool:
        messages = MessageRepository(unit, run.scope)
        by = None
        if end.status == "cancelled":
            by = await messages.cancelled_by(run.reply_id) or run.scope.user_id
        row = await messages.finish(
            run.reply_id, orjson.dumps(end.parts).decode(), end.status, end.model,
            None if end.usage is None else orjson.dumps(end.usage).decode(), end.cost,
            None if end.error is None else orjson.dumps(end.error).decode(), clock.now(), end.prompt_path,
            end.prompt_hash,
        )  # fmt: skip
        if row is None:
            return False
        pending = list(run.buffer)
        run.emit(f"reply.{end.status}", _terminal(run.reply_id, message_json(row), end, by))
        try:
            return await self._writer.finish(unit, run, status=end.status)
        finally:
            run.buffer = pending

    async def start_of(self, scope: Scope, reply_id: UUID) -> int:
        """Return the `seq` of a reply's first event. Raises `ReplyNotFound`."""
        async with self._database.unit_of_work(scope) as unit:
            found = await MessageRepository(unit, scope).find_run(reply_id)
            if found is None:
                raise ReplyNotFound
            return int(found["start_seq"])

    async def release(self, run: Run) -> None:
        """Give a run up, so that the sweep of open replies ends it. What fails here leaves it to the next process."""
        run.signal(lost=True)
        try:
            async with self._database.unit_of_work(run.scope) as unit:
                await runs.release(unit, run)
        except Exception as error:
            logger.exception("a run could not be released", extra={"cause": type(error).__name__})

    async def is_ended(self, run: Run) -> bool:
        """Whether a reply has its end: asked when the outcome of a commit is not known."""
        async with self._database.unit_of_work(run.scope) as unit:
            found = await MessageRepository(unit, run.scope).find_run(run.reply_id)
            return found is None or found["status"] in runs.TERMINAL

    async def cancel(self, scope: Scope, reply_id: UUID) -> None:
        """Stop a reply, durably; one that has ended stays as it is. Raises `ReplyNotFound`."""
        async with self._database.unit_of_work(scope) as unit:
            messages = MessageRepository(unit, scope)
            found = await messages.find_run(reply_id)
            if found is None:
                raise ReplyNotFound
            if found["status"] == "queued":
                await ConversationRepository(unit, scope).lock(found["conversation_id"])
                if await self._cancel_queued(unit, scope, found):
                    return
            await messages.request_cancel(reply_id)
            unit.after_commit(lambda: self._signal(reply_id))

    def _signal(self, reply_id: UUID) -> None:
        if (run := self._writer.find(reply_id)) is not None:
            run.signal(cancelled=True)

    async def _cancel_queued(self, unit: UnitOfWork, scope: Scope, found: Any) -> bool:
        """End a reply that has not begun. False when it began meanwhile: the conversation's lock decides."""
        messages = MessageRepository(unit, scope)
        fresh = await messages.find_run(found["id"])
        if fresh is None or fresh["status"] != "queued":
            return False
        end = Ending(status="cancelled", parts=[])
        row = await messages.finish(
            found["id"], "[]", "cancelled", fresh["model"], None, None, None, clock.now(), None, None
        )
        if row is None:
            return False
        channel = conversation_channel(scope.workspace_id, found["conversation_id"])
        d = _terminal(found["id"], message_json(row), end, scope.user_id)
        await append(unit, self._bus, [NewEvent(channel, "reply.cancelled", d)])
        return await messages.end_queued(found["id"])

    async def fail_orphan(self, orphan: Orphan) -> None:
        """End a reply whose process is gone: what was delivered is kept, and the user may go on from there."""
        scope = orphan.scope
        async with self._database.unit_of_work(scope) as unit:
            run = await runs.claim(
                unit, scope, orphan.reply_id, owner=self._writer.owner, fence=orphan.fence,
                lease_s=self._settings.lease_s,
            )  # fmt: skip
            if run is None:
                return
            messages = MessageRepository(unit, scope)
            folded: dict[str, Any] = {"status": "queued", "parts": [], "model": run.options.get("model")}
            for _, e, d in await messages.open_events([run.reply_id]):
                apply_reply_event(folded, e, d)
            parts = [
                {**part, "state": "unknown"} if part.get("state") in {"input", "running"} else part
                for part in folded["parts"]
            ]
            end = (
                Ending(status="cancelled", parts=parts, model=folded["model"])
                if run.cancelled
                else Ending(status="failed", parts=parts, model=folded["model"], error=failure("worker_lost"))
            )
            if not await self._finish(unit, run, end):
                await unit.session.rollback()


def _nobody(run: Run) -> None:
    raise RuntimeError(f"nobody writes {run.reply_id}: the chat was not put together")


def failure(code: str, message: str | None = None, *, retryable: bool | None = None) -> dict[str, Any]:
    """Return the `error` of a failed reply."""
    texts = {
        "worker_lost": "The server stopped while it was writing this reply. What it had written is kept.",
        "internal": "Something went wrong on our side. What was written is kept.",
        "bad_output": "The model's answer could not be used.",
    }
    return {
        "code": code,
        "msg": message or texts[code],
        "retryable": code in _RETRYABLE if retryable is None else retryable,
    }


def _started(channel: Channel, reply: UUID, question: UUID, *, model: str, attempt: int) -> NewEvent:
    return NewEvent(
        channel, "reply.started", {"reply": str(reply), "to": str(question), "model": model, "attempt": attempt}
    )


def _terminal(reply_id: UUID, message: dict[str, Any], end: Ending, by: UUID | None) -> dict[str, Any]:
    d = {
        "reply": str(reply_id),
        "message": message,
        "usage": message["usage"],
        "cost": message["cost"],
        **_check(end.parts),
    }
    if end.status == "completed":
        return d
    d["partial"] = True
    if end.status == "cancelled":
        return {**d, "by": str(by)}
    return {**d, "error": end.error, "can": ["continue", "regenerate"]}


def _check(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the check of a terminal event: `len` in code points and `sha256` of the visible text."""
    length, sha256 = digest(visible_text({"parts": parts}))
    return {"len": length, "sha256": sha256}
