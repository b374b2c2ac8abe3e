"""A turn: the question is durable before anyone hears of it, and every reply comes to exactly one end.

Locks are taken in one order everywhere: the conversation, its head in the log, run records and messages, and last the
heads of inboxes, and after them the counters of budgets.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

import orjson

from parley.chat.assistants.types import own_assistant
from parley.chat.attachments.service import choose_model, message_parts
from parley.chat.endings import Ending, failure
from parley.chat.ends import Ends
from parley.chat.errors import (
    CidReused,
    ConversationNotFound,
    MessageNotFound,
    ReplyActive,
    ReplyNotFound,
    TooManyReplies,
)
from parley.chat.inbox import tell_owner
from parley.chat.messages import conversation_channel, first_words, materialise, message_json
from parley.chat.payments import Payments
from parley.chat.repository import ConversationRepository, MessageRepository
from parley.chat.written import Written
from parley.core import clock
from parley.core.api_limits import ApiLimits
from parley.core.db import Database, UnitOfWork
from parley.core.ids import new_id
from parley.core.scope import Scope
from parley.core.settings import RealtimeSettings
from parley.llm.registry import ModelRegistry
from parley.realtime import runs
from parley.realtime.bus import Bus
from parley.realtime.events import Channel, NewEvent
from parley.realtime.log import append
from parley.realtime.runs import Orphan, Run
from parley.realtime.tick import TickWriter
from parley.tenancy.permissions import Permission

logger = logging.getLogger(__name__)

_BUSY_S = 5
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Send:
    """A message that someone wants answered: texts and ids of attachments. `cid` makes it idempotent."""

    conversation_id: UUID
    cid: UUID
    contents: tuple[str | UUID, ...]
    model: str | None = None
    tools: tuple[str, ...] | None = None
    parent: UUID | None = None
    on_active: str = "queue"
    edits: UUID | None = None
    """The message that it is another version of; `parent` is that one's then, none for a first message."""

    @property
    def body_hash(self) -> bytes:
        """What must be the same when the key comes again. Where it was sent to is part of it."""
        body = [str(self.conversation_id), self.contents, self.model, self.tools, str(self.parent)]
        if self.edits is not None:
            body.append(str(self.edits))
        return hashlib.sha256(orjson.dumps(body)).digest()

    @property
    def texts(self) -> list[str]:
        """What it says."""
        return [content for content in self.contents if isinstance(content, str)]


@dataclass(frozen=True, slots=True)
class Sent:
    """A question and its reply, as JSON."""

    message: dict[str, Any]
    reply: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Again:
    """A wish for another reply where there is one: `continue` goes on from it, `regenerate` answers once more."""

    reply_id: UUID
    cid: UUID
    mode: Literal["continue", "regenerate"]

    @property
    def body_hash(self) -> bytes:
        """What must be the same when the key comes again."""
        return hashlib.sha256(f"{self.mode} {self.reply_id}".encode()).digest()


class Turns:
    """Begins and ends replies. `on_started` is told of each run that this process is to generate, after the commit.

    Where this process does not generate, a reply is queued for whichever process that does is first.
    """

    def __init__(
        self,
        database: Database,
        bus: Bus,
        writer: TickWriter,
        models: Callable[[Scope], ModelRegistry],
        settings: RealtimeSettings,
        limits: ApiLimits,
        ends: Ends,
        payments: Payments,
        *,
        generates: bool = True,
    ) -> None:
        self._ends = ends
        self._payments = payments
        self._generates = generates
        self._database = database
        self._bus = bus
        self._writer = writer
        self._models = models
        self._settings = settings
        self._limits = limits
        self.on_started: Callable[[Run, Written | None], None] = _nobody

    def leave_to_others(self) -> None:
        """Begin no reply here any more: what is sent from now on is queued for another process."""
        self._generates = False

    # -- beginning -----------------------------------------------------------------------------------------------

    async def send(self, scope: Scope, wanted: Send) -> Sent:
        """Store a question and begin its reply. The same `cid` gives the same answer, for ever.

        Raises `ConversationNotFound`, `MessageNotFound` (parent), `CidReused`, `ReplyActive`, `TooMany`,
        `TooManyReplies`, `OverBudget`, and `UnknownModel` or `ModelNotUsable` before anything is stored.
        """
        await self._limits.send(scope)
        sent, interrupted = await self._send(scope, wanted)
        if interrupted is not None:
            await self._ends.cancel(scope, interrupted)
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
                current=None if wanted.edits else conversation["current_id"],
            )
            if before["known_id"] is not None:
                return await self._again(messages, wanted), None
            if not before["parent_ok"]:
                raise MessageNotFound
            if self._limits.enabled and before["open_of_user"] >= self._limits.running_replies:
                raise TooManyReplies(retry_after_s=_BUSY_S)
            if before["open"] and wanted.on_active == "reject":
                raise ReplyActive
            parts = await message_parts(unit, scope, wanted.conversation_id, wanted.contents)
            own = own_assistant(conversation)
            named = wanted.model or conversation["model"] or (own["model"] if own else None)
            entry = choose_model(self._models(scope), named, parts)
            waiting: int = before["open"]
            run, sent = await self._store(
                unit, scope, wanted, dict(conversation), parts=parts, model=entry.id, waiting=waiting
            )
            run.history = [*orjson.loads(before["history"] or "[]"), ("user", sent.message["parts"])]
            run.assistant = own
            self._begin_after_commit(unit, run, waiting=waiting)
            if before["budgeted"] or self._payments.bounded:
                await self._payments.reserve(unit, run, before["history"] or "", question=sent.message)
            return sent, before["streaming_id"] if wanted.on_active == "interrupt" else None

    async def _again(self, messages: MessageRepository, wanted: Send | Again) -> Sent:
        found = await messages.find_sent(wanted.cid, wanted.body_hash)
        if found is None:
            raise CidReused
        question, reply = await materialise(messages, found)
        return Sent(question, reply)

    async def _store(
        self, unit: UnitOfWork, scope: Scope, wanted: Send, conversation: dict[str, Any], *,
        parts: list[dict[str, Any]], model: str, waiting: int,
    ) -> tuple[Run, Sent]:  # fmt: skip
        question_id, reply_id, moment = new_id(), new_id(), clock.now()
        parent = wanted.parent if wanted.edits else wanted.parent or conversation["current_id"]
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
            title=conversation["title"] or first_words(" ".join(wanted.texts)),
        )
        channel = conversation_channel(scope.workspace_id, wanted.conversation_id)
        seqs = await append(
            unit,
            self._bus,
            [
                NewEvent(channel, "message.created", {**question, "cid": str(wanted.cid)}),
                NewEvent(channel, "message.created", {**reply, "cid": None}),
                *self._follow_up(channel, reply_id, question_id, model=model, waiting=waiting),
            ],
        )
        options = {"model": model, "tools": wanted.tools, "assistant": conversation["assistant"], **runs.grants(scope)}
        run = Run(
            scope=scope, reply_id=reply_id, question_id=question_id, channel=channel, fence=1, start_seq=seqs[1],
            options=options,
        )  # fmt: skip
        await MessageRepository(unit, scope).add_turn(
            wanted.conversation_id, question_id, reply_id, parent, orjson.dumps(parts).decode(), scope.user_id,
            wanted.cid, wanted.body_hash, moment, model, channel.key, *self._beginning(options, waiting, seqs[1]),
            conversation["title"],
        )  # fmt: skip
        await tell_owner(unit, self._bus, conversation)
        return run, Sent(question, reply)

    async def again(self, scope: Scope, wanted: Again) -> Sent:
        """Have a finished reply continued, or its question answered once more; `cid` as in `send`.

        Returns the message that is answered and the new reply. Raises `ReplyNotFound`, `ReplyActive` for one that is
        still being written, and what `send` raises.
        """
        await self._limits.send(scope)
        async with self._database.unit_of_work(scope) as unit:
            messages = MessageRepository(unit, scope)
            found = await messages.find_run(wanted.reply_id)
            if found is None:
                raise ReplyNotFound
            conversation_id: UUID = found["conversation_id"]
            channel = conversation_channel(scope.workspace_id, conversation_id)
            conversation = dict(await ConversationRepository(unit, scope).lock(conversation_id))
            # What is continued is an end of its own; what is answered once more has the same question before it.
            parent: UUID = wanted.reply_id if wanted.mode == "continue" else found["parent_id"]
            before = await messages.before_send(
                conversation_id, channel=channel.key, cid=wanted.cid, parent=parent, current=None
            )
            if before["known_id"] is not None:
                return await self._again(messages, wanted)
            fresh = await messages.find_run(wanted.reply_id)
            if fresh is None or fresh["status"] not in runs.TERMINAL:
                raise ReplyActive
            if self._limits.enabled and before["open_of_user"] >= self._limits.running_replies:
                raise TooManyReplies(retry_after_s=_BUSY_S)
            former = orjson.loads(found["options"])
            options = {
                "model": self._models(scope).resolve(former["model"]).id,
                "tools": former.get("tools"),
                "assistant": conversation["assistant"],
                "continues": wanted.mode == "continue",
                **runs.grants(scope),
            }
            run, reply = await self._store_again(
                unit, scope, wanted, conversation, parent=parent, options=options, waiting=before["open"]
            )
            run.history = orjson.loads(before["history"] or "[]")
            run.assistant = own_assistant(conversation)
            self._begin_after_commit(unit, run, waiting=before["open"])
            (answered,) = await materialise(messages, list((await messages.find_all([parent])).values()))
            if before["budgeted"] or self._payments.bounded:
                await self._payments.reserve(unit, run, before["history"] or "")
            return Sent(answered, reply)

    async def _store_again(
        self, unit: UnitOfWork, scope: Scope, wanted: Again, conversation: dict[str, Any], *, parent: UUID,
        options: dict[str, Any], waiting: int,
    ) -> tuple[Run, dict[str, Any]]:  # fmt: skip
        reply_id, moment, model = new_id(), clock.now(), options["model"]
        reply = message_json(
            {"id": reply_id, "conversation_id": conversation["id"], "role": "assistant", "parts": [],
             "status": "queued", "model": model, "parent_id": parent, "usage": None, "cost": None, "error": None,
             "created_at": moment, "completed_at": None}
        )  # fmt: skip
        conversation.update(current_id=reply_id, updated_at=moment)
        channel = conversation_channel(scope.workspace_id, conversation["id"])
        seqs = await append(
            unit,
            self._bus,
            [
                NewEvent(channel, "message.created", {**reply, "cid": str(wanted.cid)}),
                *self._follow_up(channel, reply_id, parent, model=model, waiting=waiting),
            ],
        )
        await MessageRepository(unit, scope).add_reply(
            conversation["id"], reply_id, parent, scope.user_id, wanted.cid, wanted.body_hash, moment, model,
            channel.key, *self._beginning(options, waiting, seqs[0]),
        )  # fmt: skip
        await tell_owner(unit, self._bus, conversation)
        run = Run(
            scope=scope, reply_id=reply_id, question_id=parent, channel=channel, fence=1, start_seq=seqs[0],
            options=options,
        )  # fmt: skip
        return run, reply

    def _follow_up(
        self, channel: Channel, reply_id: UUID, question_id: UUID, *, model: str, waiting: int
    ) -> list[NewEvent]:
        if waiting:
            return [NewEvent(channel, "reply.queued", {"reply": str(reply_id), "to": str(question_id), "pos": waiting})]
        if not self._generates:
            # It does not wait for anything but the process that will begin it within the same moment.
            return []
        return [_started(channel, reply_id, question_id, model=model, attempt=1)]

    def _beginning(self, options: dict[str, Any], waiting: int, start_seq: int) -> tuple[object, ...]:
        """Return a run record's first status, options, owner, appended, start and lease."""
        begins = self._generates and not waiting
        return (
            "streaming" if begins else "queued", orjson.dumps(options).decode(),
            self._writer.owner if begins else None, 1 if begins else 0, start_seq, self._settings.lease_s,
        )  # fmt: skip

    def _begin_after_commit(self, unit: UnitOfWork, run: Run, *, waiting: int) -> None:
        if waiting:
            return
        if self._generates:
            unit.after_commit(lambda: self._begin(run))
        else:
            unit.after_commit(lambda: self._bus.call("work", run.reply_id))

    def _begin(self, run: Run, written: Written | None = None) -> None:
        self._writer.track(run)
        self.on_started(run, written)

    async def start_next(self, scope: Scope, channel: Channel) -> None:
        """Begin the next reply that waits in a conversation, if none is running."""
        if not self._generates:
            return
        async with self._database.unit_of_work(scope) as unit:
            conversation_id = UUID(channel.key.partition(":")[2])
            messages = MessageRepository(unit, scope)
            try:
                await ConversationRepository(unit, scope).hold(conversation_id)
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

    async def start_of(self, scope: Scope, reply_id: UUID) -> int:
        """Return the `seq` of a reply's first event. Raises `ReplyNotFound`."""
        async with self._database.unit_of_work(scope) as unit:
            found = await MessageRepository(unit, scope).find_run(reply_id)
            if found is None:
                raise ReplyNotFound
            return int(found["start_seq"])

    async def take_over(self, orphan: Orphan) -> bool:
        """Go on with a reply whose process is gone, or end it; False when another process was first.

        What was delivered is kept. One that has been taken over twice already is ended: it may be what kills them.
        """
        scope = orphan.scope
        async with self._database.unit_of_work(scope) as unit:
            await runs.lock_head(unit, orphan.channel)
            run = await runs.claim(
                unit, scope, orphan.reply_id, owner=self._writer.owner, fence=orphan.fence,
                lease_s=self._settings.lease_s,
            )  # fmt: skip
            if run is None:
                return False
            events = await MessageRepository(unit, scope).open_events([run.reply_id])
            written = Written.from_events((e, d) for _, e, d in events)
            model = written.model or run.options.get("model")
            end: Ending | None = None
            if run.cancelled:
                end = Ending(status="cancelled", parts=written.ending, model=model)
            elif run.attempt > _ATTEMPTS or Permission.CHAT_WRITE not in run.scope.permissions:
                end = Ending(status="failed", parts=written.ending, model=model, error=failure("worker_lost"))
            if end is None:
                unit.after_commit(lambda: self._begin(run, written))
            elif not await self._ends.finish_in(unit, run, await self._payments.with_lost(unit, run, end, written)):
                await unit.session.rollback()
                return False
        if end is not None:
            await self.start_next(scope, orphan.channel)
        return True


def _nobody(run: Run, written: Written | None) -> None:  # noqa: ARG001 - the signature of those who do
    raise RuntimeError(f"nobody writes {run.reply_id}: the chat was not put together")


def _started(channel: Channel, reply: UUID, question: UUID, *, model: str, attempt: int) -> NewEvent:
    return NewEvent(
        channel, "reply.started", {"reply": str(reply), "to": str(question), "model": model, "attempt": attempt}
    )
