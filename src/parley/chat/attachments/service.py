"""What a user does with attachments: uploading, reading, removing; and what messages and models need of them.

A row comes first, then the bytes, then the row is complete. What breaks off in between is removed at once, or by the
hourly cleaning after a day.
"""

import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, Final
from uuid import UUID

from parley.chat.attachments.errors import (
    AttachmentInUse,
    AttachmentNotFound,
    ModelSeesNoImages,
    QuotaExceeded,
    TooManyAttachments,
)
from parley.chat.attachments.receiving import Spool, receive, receive_any
from parley.chat.attachments.repository import AttachmentRepository, part_of
from parley.chat.attachments.schemas import AttachmentRead, plain_name
from parley.chat.attachments.sniffing import Sniffed
from parley.chat.attachments.stores import AttachmentStore
from parley.core.db import Database, UnitOfWork
from parley.core.errors import Invalid, TooLarge
from parley.core.idempotency import Once
from parley.core.ids import new_id
from parley.core.scope import Scope
from parley.core.settings import AttachmentSettings
from parley.llm.errors import ModelNotUsable
from parley.llm.registry import DEFAULT_ALIAS, Capability, ModelEntry, ModelRegistry

logger = logging.getLogger(__name__)

PER_MESSAGE: Final = 10
MESSAGE_BYTES: Final = 20 * 1024 * 1024

OnceOf = Callable[[bytes], Once]
"""Makes the request's `Once` of the hash of its body."""


class AttachmentService:
    """Attachments of one process. It opens its own units of work: no transaction waits for a client or a store."""

    def __init__(self, database: Database, settings: AttachmentSettings, stores: Mapping[str, AttachmentStore]) -> None:
        self._database = database
        self.settings = settings
        self._stores = stores

    async def upload(self, scope: Scope, body: AsyncIterable[bytes], *, name: str, declared: str, once: OnceOf) -> Once:
        """Take an image or a text file in. Raises what `receive` raises, and `QuotaExceeded`."""
        kept = plain_name(name)
        with Spool() as spool:
            found = await receive(body, spool, name=kept, declared=declared, settings=self.settings)
            return await self._keep(scope, spool, found, name=kept or _default_name(found), once=once)

    async def upload_import(
        self, scope: Scope, body: AsyncIterable[bytes], *, once: OnceOf, then: Callable[[UnitOfWork, UUID], Any]
    ) -> Once:
        """Take a file in that is to be imported; `then` is awaited in the unit that completes it, with its id.

        Raises `AttachmentTooLarge`, `QuotaExceeded`.
        """
        with Spool() as spool:
            await receive_any(body, spool, limit=self.settings.import_bytes)
            found = Sniffed("import", "application/octet-stream")
            return await self._keep(scope, spool, found, name="import", once=once, then=then)

    async def add_imported(
        self, scope: Scope, conversation_id: UUID, id: UUID, *, name: str, data: bytes
    ) -> dict[str, Any] | None:
        """Keep a file of an imported message under an id; return its part. None: it is not taken, or there is no room.

        The conversation is the user's own. A second call with the id finds what the first one kept.
        """
        async with self._database.unit_of_work(scope) as unit:
            repository = AttachmentRepository(unit, scope)
            if (row := (await repository.take(conversation_id, [id])).get(id)) is not None:
                return part_of(row)
            # What an attempt before this one left half done.
            await repository.delete_unused(id)
        try:
            with Spool() as spool:
                kept = plain_name(name)
                found = await receive(_one(data), spool, name=kept, declared="", settings=self.settings)
                await self._store(scope, spool, found, name=kept or _default_name(found), id=id)
        except (Invalid, TooLarge, QuotaExceeded):
            return None
        async with self._database.unit_of_work(scope) as unit:
            repository = AttachmentRepository(unit, scope)
            await repository.complete(id)
            return part_of((await repository.take(conversation_id, [id]))[id])

    async def _keep(
        self, scope: Scope, spool: Spool, found: Sniffed, *, name: str, once: OnceOf,
        then: Callable[[UnitOfWork, UUID], Any] | None = None,
    ) -> Once:  # fmt: skip
        id_ = await self._store(scope, spool, found, name=name)
        try:
            async with self._database.unit_of_work(scope) as unit:
                settled = once(spool.sha256)
                await settled.begin(unit)
                row = await AttachmentRepository(unit, scope).complete(id_)
                if row is None:
                    raise AttachmentNotFound
                await settled.settle(
                    AttachmentRead.model_validate(dict(row)) if then is None else await then(unit, id_)
                )
                return settled
        except BaseException:
            # The request was answered before, or it cannot be answered now.
            await asyncio.shield(self._drop(scope, id_))
            raise

    async def _store(self, scope: Scope, spool: Spool, found: Sniffed, *, name: str, id: UUID | None = None) -> UUID:
        id_, store = id or new_id(), self._stores[self.settings.store]
        async with self._database.unit_of_work(scope) as unit:
            repository = AttachmentRepository(unit, scope)
            if await repository.used() + spool.size > self.settings.workspace_bytes:
                raise QuotaExceeded(details={"limit": self.settings.workspace_bytes})
            await repository.add(
                id_, found.kind, found.media_type, name, spool.size, spool.sha256, found.width, found.height,
                self.settings.store, outside=store.outside,
            )  # fmt: skip
        try:
            await store.write(scope, id_, spool, media_type=found.media_type)
        except BaseException:
            await asyncio.shield(self._drop(scope, id_))
            raise
        return id_

    async def _drop(self, scope: Scope, id: UUID) -> None:
        try:
            async with self._database.unit_of_work(scope) as unit:
                await AttachmentRepository(unit, scope).delete_unused(id)
        except Exception:
            # The cleaning finds it.
            logger.warning("an upload that broke off is still there", exc_info=True)

    async def open(self, scope: Scope, id: UUID) -> tuple[AttachmentRead, AsyncIterator[bytes]]:
        """Return an attachment and its bytes, which can be read once. Raises `AttachmentNotFound`."""
        async with self._database.unit_of_work(scope) as unit:
            row = await AttachmentRepository(unit, scope).find(id)
        if row is None:
            raise AttachmentNotFound
        return AttachmentRead.model_validate(dict(row)), await _begun(self._stores[row["store"]].read(scope, id))

    async def delete(self, scope: Scope, id: UUID) -> None:
        """Remove an attachment that no message has. Raises `AttachmentNotFound`, `AttachmentInUse`."""
        async with self._database.unit_of_work(scope) as unit:
            repository = AttachmentRepository(unit, scope)
            if not await repository.delete_unused(id):
                raise AttachmentInUse if await repository.find(id) is not None else AttachmentNotFound

    async def contents(self, scope: Scope, message_id: UUID, ids: Sequence[UUID]) -> dict[UUID, bytes]:
        """Return the bytes of attachments, for a model that answers a message of the same conversation.

        Those that are gone are left out.
        """
        async with self._database.unit_of_work(scope) as unit:
            where = await AttachmentRepository(unit, scope).stores(message_id, ids)
        found = {}
        for id_, store in where.items():
            data = bytearray()
            async for piece in self._stores[store].read(scope, id_):
                data += piece
            if data:
                found[id_] = bytes(data)
        return found

    def open_upload(self, scope: Scope, id: UUID) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Read an upload of the user's that is to be imported. Raises `AttachmentNotFound`."""
        return self._open_upload(scope, id)

    @asynccontextmanager
    async def _open_upload(self, scope: Scope, id: UUID) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._database.unit_of_work(scope) as unit:
            row = await AttachmentRepository(unit, scope).find_upload(id)
        if row is None:
            raise AttachmentNotFound
        async with aclosing(self._stores[row["store"]].read(scope, id)) as pieces:  # type: ignore[type-var]  # generators
            yield pieces

    async def drop_upload(self, scope: Scope, id: UUID) -> None:
        """Remove an upload that has been imported."""
        async with self._database.unit_of_work(scope) as unit:
            await AttachmentRepository(unit, scope).delete_unused(id)


async def message_parts(
    unit: UnitOfWork, scope: Scope, conversation_id: UUID, contents: Sequence[str | UUID]
) -> list[dict[str, Any]]:
    """Return the parts of a message that is being sent, and make its attachments the conversation's.

    No query for a message without any. The caller has seen that the user may write in the conversation. Raises
    `AttachmentNotFound`, `TooManyAttachments`.
    """
    wanted = {content for content in contents if isinstance(content, UUID)}
    if not wanted:
        return [{"type": "text", "text": content} for content in contents]
    if len(wanted) > PER_MESSAGE:
        raise TooManyAttachments(details={"limit": PER_MESSAGE})
    found = await AttachmentRepository(unit, scope).take(conversation_id, list(wanted))
    if len(found) < len(wanted):
        raise AttachmentNotFound
    if sum(row["size"] for row in found.values()) > MESSAGE_BYTES:
        raise TooManyAttachments(details={"limit_bytes": MESSAGE_BYTES})
    return [
        part_of(found[content]) if isinstance(content, UUID) else {"type": "text", "text": content}
        for content in contents
    ]


def choose_model(registry: ModelRegistry, name: str | None, parts: Sequence[Mapping[str, Any]]) -> ModelEntry:
    """Return the model that is to answer: of an alias the first usable one that takes what the message has.

    Raises what `resolve` raises, and `ModelSeesNoImages`.
    """
    entry = registry.resolve(name)
    if all(part["type"] != "image" for part in parts) or Capability.IMAGES in entry.capabilities:
        return entry
    if name is None or entry.id != name:
        for target in registry.aliases.get(name or DEFAULT_ALIAS, ()):
            try:
                candidate = registry.resolve(target)
            except ModelNotUsable:
                continue
            if Capability.IMAGES in candidate.capabilities:
                return candidate
    raise ModelSeesNoImages


async def _one(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _begun(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Read the first piece, so that a store that is away is told of before the answer begins."""
    first = await anext(pieces, None)
    if first is None:
        raise AttachmentNotFound

    async def all_of_them() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return all_of_them()


def _default_name(found: Sniffed) -> str:
    return f"image.{found.media_type.rpartition('/')[2]}" if found.kind == "image" else "file.txt"
