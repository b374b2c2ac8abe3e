"""Where the bytes of attachments are: a port with two implementations, PostgreSQL and an S3-compatible store."""

from collections.abc import AsyncIterator
from typing import Final, Protocol
from uuid import UUID

from parley.chat.attachments.receiving import Spool
from parley.core.buckets import Bucket, ObjectMissing
from parley.core.db import Database
from parley.core.scope import Scope

_ADD = "INSERT INTO attachment_chunks (workspace_id, attachment_id, number, data) VALUES ($1, $2, $3, $4)"
# Four pieces at a time: a reader that is slow holds neither a connection nor more memory than that.
_READ = """
    SELECT number, data FROM attachment_chunks
    WHERE workspace_id = $1 AND attachment_id = $2 AND number > $3 ORDER BY number LIMIT 4
"""
_AT_ONCE: Final = 4


class AttachmentStore(Protocol):
    """Keeps bytes under a workspace and an id. The row in `attachments` is there before the bytes come."""

    @property
    def outside(self) -> bool:
        """Whether it is outside the database: what is there has to be removed by itself."""
        ...

    async def write(self, scope: Scope, id: UUID, spool: Spool, *, media_type: str) -> None:
        """Store all of a file, or raise."""
        ...

    def read(self, scope: Scope, id: UUID) -> AsyncIterator[bytes]:
        """Yield a file's bytes; nothing where there is none."""
        ...


class PostgresStore:
    """Pieces in a table of the tenant: row-level security holds for them, and they go with the row they belong to."""

    outside: Final = False

    def __init__(self, database: Database) -> None:
        self._database = database

    async def write(self, scope: Scope, id: UUID, spool: Spool, *, media_type: str) -> None:  # noqa: ARG002 - of the port
        """Store a file in one transaction."""
        async with self._database.unit_of_work(scope) as unit:
            connection = await unit.driver()
            for number, piece in enumerate(spool.pieces()):
                await connection.execute(_ADD, scope.workspace_id, id, number, piece)

    async def read(self, scope: Scope, id: UUID) -> AsyncIterator[bytes]:
        """Yield the pieces."""
        last = -1
        while True:
            async with self._database.unit_of_work(scope) as unit:
                connection = await unit.driver()
                rows = await connection.fetch(_READ, scope.workspace_id, id, last)
            for row in rows:
                yield row["data"]
            if len(rows) < _AT_ONCE:
                return
            last = rows[-1]["number"]


class BucketStore:
    """Objects in a bucket, each below its workspace."""

    outside: Final = True

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    async def write(self, scope: Scope, id: UUID, spool: Spool, *, media_type: str) -> None:
        """Store a file as one object."""
        key = object_key(scope.workspace_id, id)
        await self._bucket.put(key, spool.pieces, size=spool.size, sha256=spool.sha256.hex(), media_type=media_type)

    async def read(self, scope: Scope, id: UUID) -> AsyncIterator[bytes]:
        """Yield the object as it comes."""
        try:
            async for piece in self._bucket.get(object_key(scope.workspace_id, id)):
                yield piece
        except ObjectMissing:
            return

    async def remove(self, workspace_id: UUID, id: UUID) -> None:
        """Remove an object."""
        await self._bucket.delete(object_key(workspace_id, id))


def object_key(workspace_id: UUID, id: UUID) -> str:
    """Return the key of an attachment's object."""
    return f"workspaces/{workspace_id}/attachments/{id}"
