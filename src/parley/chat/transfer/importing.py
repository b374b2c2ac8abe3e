"""The job of an import: reads an uploaded file conversation by conversation and stores what is not there yet.

It gives way every few milliseconds, since replies are written by the same process. A broken conversation is reported
and breaks no other. An attempt that was lost is repeated from the beginning and finds what the first one stored.
"""

import asyncio
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final
from uuid import UUID

from parley.chat.attachments.errors import AttachmentNotFound
from parley.chat.attachments.service import AttachmentService
from parley.chat.transfer.chatgpt import is_chatgpt, read_chatgpt
from parley.chat.transfer.claude import is_claude, read_claude
from parley.chat.transfer.drafts import DraftConversation, conversation_id, file_id, place, text_part, within
from parley.chat.transfer.errors import ItemRefused, NotAnExport
from parley.chat.transfer.items import Beside, Item, read_items
from parley.chat.transfer.own import is_own, read_own
from parley.chat.transfer.schemas import result_of
from parley.chat.transfer.storing import ImportRepository, Ready, Stored
from parley.core.db import Database, UnitOfWork
from parley.core.error_handlers import translate
from parley.core.errors import Unavailable
from parley.core.scope import Role, Scope
from parley.jobs.outbox import enqueue
from parley.jobs.registry import JobFailed, JobRun, JobType
from parley.realtime.log import Publisher

logger = logging.getLogger(__name__)

KIND: Final = "import"
ATTEMPTS: Final = 3
_TIMEOUT_S: Final = 3600.0
_IN_MEMORY_BYTES: Final = 1024 * 1024
_AT_ONCE: Final = 25
_MESSAGES_AT_ONCE: Final = 500
_PROBLEMS: Final = 100

_MEMBER = "SELECT true FROM memberships WHERE workspace_id = $1 AND user_id = $2"


@dataclass(slots=True)
class _Tally:
    """What has become of the file so far."""

    items: int = 0
    empty: int = 0
    failed: int = 0
    stored: Stored = field(default_factory=Stored)
    problems: list[dict[str, Any]] = field(default_factory=list)

    def refuse(self, item: Item | Ready, why: str, *, title: str | None = None) -> None:
        self.failed += 1
        if len(self.problems) < _PROBLEMS:
            self.problems.append({"item": item.number, "title": title, "problem": why})

    def add(self, done: Stored) -> None:
        self.stored.new += done.new
        self.stored.changed += done.changed
        self.stored.unchanged += done.unchanged
        self.stored.messages += done.messages

    @property
    def result(self) -> dict[str, Any]:
        done = self.stored
        counts = {"conversations": done.new, "extended": done.changed, "unchanged": done.unchanged, "empty": self.empty,
                  "failed": self.failed, "messages": done.messages}  # fmt: skip
        return result_of(counts, self.problems, more=self.failed - len(self.problems))


class Importer:
    """Imports conversations of one user at a time."""

    def __init__(self, database: Database, attachments: AttachmentService, publisher: Publisher) -> None:
        self._database = database
        self._attachments = attachments
        self._publisher = publisher

    @property
    def job_type(self) -> JobType:
        """The job, for the dispatcher."""
        return JobType(KIND, self.run, timeout_s=_TIMEOUT_S, max_attempts=ATTEMPTS)

    async def begin(self, unit: UnitOfWork, upload_id: UUID) -> UUID:
        """Have an upload imported, in the transaction that completes it; return the job's id."""
        scope = unit.scope
        return await enqueue(
            unit, KIND, {"upload": str(upload_id)}, workspace_id=scope.workspace_id, user_id=scope.user_id,
            max_attempts=ATTEMPTS,
        )  # fmt: skip

    async def run(self, run: JobRun) -> dict[str, Any]:
        """Import an upload; the result counts what was stored and names what was not."""
        if run.user_id is None:
            raise JobFailed("The import is nobody's.")
        scope = Scope(run.workspace_id, run.user_id, Role.MEMBER)
        upload_id = UUID(run.payload["upload"])
        await self._check_member(scope)
        try:
            with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES) as file:
                async with self._attachments.open_upload(scope, upload_id) as pieces:
                    async for piece in pieces:
                        file.write(piece)
                file.seek(0)
                result = await self._import(run, scope, file)
        except AttachmentNotFound:
            raise JobFailed("The upload is no longer there.") from None
        except NotAnExport as error:
            await self._attachments.drop_upload(scope, upload_id)
            raise JobFailed(error.detail) from None
        await self._attachments.drop_upload(scope, upload_id)
        return result

    async def _check_member(self, scope: Scope) -> None:
        async with self._database.unit_of_work(scope) as unit:
            connection = await unit.driver()
            if not await connection.fetchval(_MEMBER, scope.workspace_id, scope.user_id):
                raise JobFailed("You are not in this workspace any more.")

    async def _import(self, run: JobRun, scope: Scope, file: IO[bytes]) -> dict[str, Any]:
        tally, batch, waiting = _Tally(), list[Ready](), 0
        for item in read_items(file):
            # The event loop is others' too: their replies are being written.
            await asyncio.sleep(0)
            if item is None:
                continue
            tally.items += 1
            ready = self._ready(scope, item, tally)
            if ready is None:
                continue
            if any(message.draft.files for message in ready.placed):
                await self._store_files(scope, ready)
            batch.append(ready)
            waiting += len(ready.placed)
            if len(batch) >= _AT_ONCE or waiting >= _MESSAGES_AT_ONCE:
                await self._store(scope, batch, tally)
                batch, waiting = [], 0
                await run.progress(tally.items, None, "conversations")
        await self._store(scope, batch, tally)
        if not tally.items:
            raise NotAnExport
        return tally.result

    def _ready(self, scope: Scope, item: Item, tally: _Tally) -> Ready | None:
        if item.problem is not None:
            tally.refuse(item, item.problem)
            return None
        draft: DraftConversation | None = None
        try:
            draft = read_conversation(item.value, item.beside)
            placed, end = place(scope.user_id, draft)
        except ItemRefused as error:
            tally.refuse(item, str(error), title=draft.title if draft else None)
            return None
        except Exception:
            # A shape that nobody foresaw is this conversation's fault and no other's.
            logger.exception("a conversation could not be read")
            tally.refuse(item, "It could not be read.")
            return None
        if not placed:
            tally.empty += 1
            return None
        draft.at = within(draft.at, placed[0].at)
        draft.changed_at = within(draft.changed_at, placed[-1].at)
        return Ready(item.number, conversation_id(scope.user_id, draft), draft, placed, end)

    async def _store_files(self, scope: Scope, ready: Ready) -> None:
        """Store a conversation's files, for which it has to be there itself."""
        async with self._database.unit_of_work(scope) as unit:
            await ImportRepository(unit, scope, self._publisher).add_conversation(ready)
        for message in ready.placed:
            files = message.draft.files
            if not files:
                continue
            parts = []
            for part in message.draft.parts:
                if part["type"] not in {"image", "file"}:
                    parts.append(part)
                    continue
                file = files[part["attachment"]]
                data, kept = file.read(), None
                if data:
                    number = file_id(message, part["attachment"])
                    kept = await self._attachments.add_imported(scope, ready.id, number, name=file.name, data=data)
                parts.append(kept or text_part(f"[{file.name}: not taken]"))
            ready.parts[message.id] = parts

    async def _store(self, scope: Scope, batch: Sequence[Ready], tally: _Tally) -> None:
        """Store a batch; where it cannot be stored, each of it alone."""
        if not batch:
            return
        try:
            async with self._database.unit_of_work(scope) as unit:
                done = await ImportRepository(unit, scope, self._publisher).store(batch)
        except Exception as error:
            if isinstance(translate(error), Unavailable):
                # The database is away: the next attempt finds what is there.
                raise
            if len(batch) > 1:
                for one in batch:
                    await self._store(scope, [one], tally)
                return
            logger.exception("a conversation could not be stored")
            tally.refuse(batch[0], "It could not be stored.", title=batch[0].draft.title)
        else:
            tally.add(done)
        await asyncio.sleep(0)


def read_conversation(value: object, beside: Beside | None = None) -> DraftConversation:
    """Read a conversation, whichever product it is from, with the files beside it. Raises `ItemRefused`."""
    if isinstance(value, Mapping):
        if is_own(value):
            return read_own(value)
        if is_chatgpt(value):
            return read_chatgpt(value, beside)
        if is_claude(value):
            return read_claude(value)
    raise ItemRefused("It is no conversation of a kind that is known.")
