"""Exports a conversation piece by piece: each page in a short transaction, no more than one in memory."""

import base64
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final
from uuid import UUID

import orjson

from parley.chat.attachments.errors import AttachmentNotFound
from parley.chat.attachments.schemas import plain_name
from parley.chat.attachments.service import AttachmentService
from parley.chat.messages import conversation_json, materialise
from parley.chat.repository import ConversationRepository, MessageRepository
from parley.chat.transfer.markdown import heading, message_text
from parley.chat.transfer.repository import ExportRepository
from parley.chat.transfer.schemas import FORMAT, VERSION, ExportedAttachment
from parley.core.db import Database
from parley.core.scope import Scope

_PAGE: Final = 100
INLINE_BYTES: Final = 20 * 1024 * 1024
"""How many bytes of files an export holds at most; those beyond are named only."""


class Exporter:
    """Exports conversations that a user may read."""

    def __init__(self, database: Database, attachments: AttachmentService) -> None:
        self._database = database
        self._attachments = attachments

    async def conversation(self, scope: Scope, id: UUID) -> dict[str, Any]:
        """Return what the conversation itself is. Raises `ConversationNotFound`."""
        async with self._database.unit_of_work(scope) as unit:
            return conversation_json(await ConversationRepository(unit, scope).get(id))

    async def as_json(self, scope: Scope, conversation: dict[str, Any], *, inline: bool) -> AsyncIterator[bytes]:
        """Yield the whole tree as JSON (`ConversationExport`)."""
        id_ = UUID(conversation["id"])
        head = orjson.dumps({"format": FORMAT, "version": VERSION, "conversation": conversation})
        yield head[:-1] + b',"messages":['
        first, after = True, UUID(int=0)
        while True:
            async with self._database.unit_of_work(scope) as unit:
                ids = await ExportRepository(unit, scope, id_).next_ids(after, _PAGE)
                found = await MessageRepository(unit, scope).find_all(ids)
                page = await materialise(MessageRepository(unit, scope), [found[one] for one in ids if one in found])
            if page:
                yield (b"" if first else b",") + b",".join(map(orjson.dumps, page))
                first = False
            if len(ids) < _PAGE:
                break
            after = ids[-1]
        yield b'],"attachments":['
        room, first = INLINE_BYTES if inline else 0, True
        for about in await self._files(scope, id_):
            data = await self._data(scope, about) if about["size"] <= room else None
            room -= len(data or b"")
            whole = {**about, "data": base64.b64encode(data).decode() if data is not None else None}
            yield (b"" if first else b",") + ExportedAttachment.model_validate(whole).model_dump_json().encode()
            first = False
        yield b"]}\n"

    async def as_markdown(self, scope: Scope, conversation: dict[str, Any], *, inline: bool) -> AsyncIterator[bytes]:
        """Yield the branch that is shown as Markdown. `inline`: images stand in it as `data:` addresses."""
        id_ = UUID(conversation["id"])
        yield heading(conversation).encode()
        async with self._database.unit_of_work(scope) as unit:
            ids = await ExportRepository(unit, scope, id_).branch_ids()
        room = INLINE_BYTES if inline else 0
        for start in range(0, len(ids), _PAGE):
            page = await self._messages(scope, ids[start : start + _PAGE])
            for message in page:
                images = {}
                for part in message["parts"]:
                    if part["type"] == "image" and part["size"] <= room:
                        data = await self._data(scope, {"id": UUID(part["attachment"])})
                        room -= len(data or b"")
                        images[part["attachment"]] = data
                yield message_text(message, images).encode()

    async def _messages(self, scope: Scope, ids: Sequence[UUID]) -> list[dict[str, Any]]:
        async with self._database.unit_of_work(scope) as unit:
            repository = MessageRepository(unit, scope)
            found = await repository.find_all(ids)
            return await materialise(repository, [found[one] for one in ids if one in found])

    async def _files(self, scope: Scope, id: UUID) -> list[dict[str, Any]]:
        async with self._database.unit_of_work(scope) as unit:
            return [dict(row) for row in await ExportRepository(unit, scope, id).attachments()]

    async def _data(self, scope: Scope, about: dict[str, Any]) -> bytes | None:
        try:
            _, pieces = await self._attachments.open(scope, about["id"])
        except AttachmentNotFound:
            return None
        return b"".join([piece async for piece in pieces])


def file_name(conversation: dict[str, Any], ending: str) -> str:
    """Return what the file is called: the title, as far as a file may be called so."""
    title = plain_name((conversation["title"] or "").replace("/", "-").replace("\\", "-"))
    kept = "".join("-" if c in '<>:"|?*' else c for c in title)[:80].strip(" .-")
    return f"{kept or 'conversation'}.{ending}"
