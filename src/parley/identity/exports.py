"""A user's data as a file: asked for, packed by a job, fetched once.

The file is a ZIP of JSON. Its entries have fixed names and ids, never a user's text. It is packed as it is read and
kept in the database in pieces, so that neither the job nor the download holds more than one of them.
"""

import hashlib
import secrets
import zipfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import asyncpg

from parley.core import clock
from parley.core.db import Database
from parley.core.errors import Conflict, Forbidden, NotFound, RateLimited
from parley.core.idempotency import Once
from parley.core.ids import new_id
from parley.core.mail import Mail, Mailer
from parley.core.personal_data import Person, PersonalData
from parley.core.scope import Scope
from parley.jobs.outbox import enqueue
from parley.jobs.registry import JobFailed, JobRun, JobType, Periodic
from parley.tenancy.audit import Action, record
from parley.tenancy.personal_data import workspaces_of

KIND: Final = "export"
MAIL_KIND: Final = "export.mail"
SWEEP_KIND: Final = "exports.sweep"

_PIECE_BYTES = 256 * 1024
_A_DAY = timedelta(days=1)
_PER_DAY = 2
_LINK_LIFE = timedelta(hours=1)
# How long a job may take with all its attempts before another one may be asked for.
_PATIENCE = timedelta(hours=2)
_FRESH = timedelta(minutes=10)
_ATTEMPTS = 3
# An attempt numbers its pieces in a range of its own: one that was given up cannot mix with the next.
_PIECES_PER_ATTEMPT = 2**20
_REPORT_EVERY = 500

_TODAY = """
    SELECT created_at, size = 0 AND downloaded_at IS NULL AND expires_at > $2 AS running
    FROM exports WHERE user_id = $1 AND created_at > $3 ORDER BY created_at
"""
_ADD = "INSERT INTO exports (id, user_id, created_at, expires_at) VALUES ($1, $2, $3, $4)"
_PIECE = """
    INSERT INTO export_chunks (export_id, number, data) VALUES ($1, $2, $3)
    ON CONFLICT (export_id, number) DO UPDATE SET data = EXCLUDED.data
"""
_DONE = "UPDATE exports SET size = $2, expires_at = $3 WHERE id = $1 AND size = 0 RETURNING id"
_ONLY_THIS_ATTEMPT = "DELETE FROM export_chunks WHERE export_id = $1 AND (number < $2 OR number >= $3)"
_GIVE_UP = "UPDATE exports SET expires_at = $2 WHERE id = $1 AND size = 0"
_FIND = "SELECT size, expires_at FROM exports WHERE id = $1"
_LINK = """
    UPDATE exports e SET hash = $2, expires_at = $3 FROM users u
    WHERE e.id = $1 AND u.id = e.user_id AND u.email IS NOT NULL AND u.disabled_at IS NULL
      AND e.size > 0 AND e.downloaded_at IS NULL
    RETURNING u.email
"""
_MINE = """
    SELECT size, hash FROM exports
    WHERE id = $1 AND user_id = $2 AND size > 0 AND downloaded_at IS NULL AND expires_at > $3 FOR UPDATE
"""
_TAKE = "UPDATE exports SET downloaded_at = $2, hash = NULL WHERE id = $1"
_NEXT_PIECE = "SELECT number, data FROM export_chunks WHERE export_id = $1 AND number > $2 ORDER BY number LIMIT 1"
_DROP = "DELETE FROM export_chunks WHERE export_id = $1"
# The row stays for a day: it counts.
_SWEEP = "DELETE FROM export_chunks c USING exports e WHERE e.id = c.export_id AND e.expires_at < $1"
_SESSION_OPENED = "SELECT created_at FROM sessions WHERE id = $1 AND user_id = $2"


class ExportRunning(Conflict):
    """One at a time."""

    code = "export_running"
    message = "An export is being made already."


class ExportNotFound(NotFound):
    """Nobody's, somebody else's, fetched already, or expired: all alike."""

    message = "There is no such export, or it was fetched already."


class SignInAgain(Forbidden):
    """The link's token is not there, and the session is not fresh either."""

    code = "sign_in_again"
    message = "Use the link from the mail, or sign in again and come back within ten minutes."


@dataclass(frozen=True, slots=True)
class ExportFile:
    """A file to be sent. `pieces` can be read once."""

    size: int
    pieces: AsyncIterator[bytes]


class _Pieces:
    """What the ZIP is written to: keeps what was not stored yet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def write(self, data: bytes, /) -> int:
        self._buffer += data
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def full(self) -> list[bytes]:
        """Take whole pieces out."""
        found = []
        while len(self._buffer) >= _PIECE_BYTES:
            found.append(bytes(self._buffer[:_PIECE_BYTES]))
            del self._buffer[:_PIECE_BYTES]
        return found

    def rest(self) -> list[bytes]:
        """Take what is left."""
        found = [*self.full(), bytes(self._buffer)]
        self._buffer.clear()
        return [piece for piece in found if piece]


class ExportService:
    """Makes exports and hands them out. `parts` are what the modules have of people."""

    def __init__(self, database: Database, parts: Sequence[PersonalData], *, mailer: Mailer, base_url: str) -> None:
        self._database = database
        self._parts = parts
        self._mailer = mailer
        self._base_url = base_url

    def job_types(self) -> tuple[JobType, ...]:
        """Return the jobs of exports, for the dispatcher."""
        return (
            JobType(KIND, self.run, timeout_s=900, max_attempts=_ATTEMPTS),
            JobType(MAIL_KIND, self.send_link, shown=False),
        )

    def periodics(self) -> tuple[Periodic, ...]:
        """Return what is to be done from time to time."""
        return (Periodic(SWEEP_KIND, timedelta(minutes=10), self.sweep),)

    async def request(self, scope: Scope, *, once: Once | None = None) -> UUID:
        """Ask for an export of everything of the caller's; return the job's id.

        Raises `ExportRunning`, and `RateLimited` for the third within 24 hours.
        """
        now, once = clock.now(), once or Once()
        async with self._database.system_unit_of_work() as unit:
            await once.begin(unit)
            connection = await unit.driver()
            # Two requests at once: the second one waits here and then sees the first.
            await connection.execute("SELECT FROM users WHERE id = $1 FOR UPDATE", scope.user_id)
            today = await connection.fetch(_TODAY, scope.user_id, now, now - _A_DAY)
            if any(row["running"] for row in today):
                raise ExportRunning
            if len(today) >= _PER_DAY:
                again: datetime = today[-_PER_DAY]["created_at"] + _A_DAY
                raise RateLimited(
                    "An export can be asked for twice a day.", retry_after_s=int((again - now).total_seconds()) + 1
                )
            export_id = new_id()
            await connection.execute(_ADD, export_id, scope.user_id, now, now + _PATIENCE)
            job_id = await enqueue(
                unit,
                KIND,
                {"export_id": str(export_id)},
                workspace_id=scope.workspace_id,
                user_id=scope.user_id,
                max_attempts=_ATTEMPTS,
            )
            await record(unit, Action.ACCOUNT_EXPORT_REQUESTED, scope=scope, target=str(export_id))
            await once.settle(job_id)
        return job_id

    async def run(self, run: JobRun) -> dict[str, Any]:
        """Pack an export. The result says its id and until when it can be fetched."""
        if run.user_id is None:
            raise JobFailed("The export is nobody's.")
        export_id = UUID(run.payload["export_id"])
        try:
            return await self._pack(run, export_id, run.user_id)
        except Exception:
            if run.attempt >= _ATTEMPTS:
                async with self._database.system_unit_of_work() as unit:
                    await (await unit.driver()).execute(_GIVE_UP, export_id, clock.now())
            raise

    async def _pack(self, run: JobRun, export_id: UUID, user_id: UUID) -> dict[str, Any]:
        first = run.attempt * _PIECES_PER_ATTEMPT
        person = Person(user_id, await workspaces_of(self._database, user_id))
        target, size, rows, number = _Pieces(), 0, 0, first
        async for _ in self._write_zip(target, person):
            rows += 1
            if rows % _REPORT_EVERY == 0:
                await run.progress(rows, None, "rows")
            for piece in target.full():
                await self._store(export_id, number, piece)
                size, number = size + len(piece), number + 1
        for piece in target.rest():
            await self._store(export_id, number, piece)
            size, number = size + len(piece), number + 1
        return await self._finish(export_id, user_id, size=size, first=first)

    async def _write_zip(self, target: _Pieces, person: Person) -> AsyncIterator[None]:
        """Write the archive; give way after every row, so that what is full can be stored."""
        # Zip files know no time zones, and the dates of entries say nothing here.
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for part in self._parts:
                entry, name = None, ""
                try:
                    async for row in part.export(self._database, person):
                        if row.entry != name:
                            if entry is not None:
                                entry.write(b"\n]\n")
                                entry.close()
                            entry, name = archive.open(_entry(row.entry), "w"), row.entry
                            entry.write(b"[\n")
                        else:
                            entry.write(b",\n")  # type: ignore[union-attr]  # opened with the first row
                        entry.write(row.json.encode())  # type: ignore[union-attr]  # as above
                        yield
                    if entry is not None:
                        entry.write(b"\n]\n")
                finally:
                    if entry is not None:
                        entry.close()

    async def _store(self, export_id: UUID, number: int, piece: bytes) -> None:
        async with self._database.system_unit_of_work() as unit:
            try:
                await (await unit.driver()).execute(_PIECE, export_id, number, piece)
            except asyncpg.ForeignKeyViolationError:
                raise JobFailed("The export is not wanted any more.") from None

    async def _finish(self, export_id: UUID, user_id: UUID, *, size: int, first: int) -> dict[str, Any]:
        expires_at = clock.now() + _LINK_LIFE
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            if await connection.fetchval(_DONE, export_id, size, expires_at) is not None:
                await connection.execute(_ONLY_THIS_ATTEMPT, export_id, first, first + _PIECES_PER_ATTEMPT)
                await enqueue(
                    unit, MAIL_KIND, {"export_id": str(export_id)}, user_id=user_id, dedupe_key=str(export_id)
                )
            found = await connection.fetchrow(_FIND, export_id)
        if found is None:
            raise JobFailed("The export is not wanted any more.")
        # What another attempt finished counts, and not this one.
        return {"export_id": str(export_id), "expires_at": found["expires_at"].isoformat(), "size": found["size"]}

    async def send_link(self, run: JobRun) -> None:
        """Mail the link. Its secret is made here; a second attempt makes another one and only that one holds."""
        token = secrets.token_urlsafe(32)
        export_id = UUID(run.payload["export_id"])
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            email = await connection.fetchval(_LINK, export_id, _hash(token), clock.now() + _LINK_LIFE)
        if email is None:
            # Gone, fetched by a fresh session already, or of someone without an address.
            return
        # Behind a `#`: it reaches no server's log and no `Referer`.
        link = f"{self._base_url}/export#id={export_id}&token={token}"
        await self._mailer.send(
            Mail(
                to=email,
                subject="Your data is ready",
                text=f"The export of your data is ready. Sign in and fetch it within one hour; the link works once.\n\n"
                f"{link}\n\nIf you did not ask for it, change your password.\n",
            )
        )

    async def open(self, scope: Scope, export_id: UUID, *, token: str | None = None) -> ExportFile:
        """Take an export, once: of two at the same time one gets it.

        It needs the token of the mail's link, or a session that was opened within the last ten minutes; a credential
        of another issuer counts as fresh, since those live for minutes. Raises `ExportNotFound`, `SignInAgain`.
        """
        now = clock.now()
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            row = await connection.fetchrow(_MINE, export_id, scope.user_id, now)
            if row is None:
                raise ExportNotFound
            linked = token is not None and row["hash"] is not None and secrets.compare_digest(row["hash"], _hash(token))
            if not linked and (token is not None or not await self._is_fresh(connection, scope, now)):
                raise SignInAgain
            await connection.execute(_TAKE, export_id, now)
            await record(unit, Action.ACCOUNT_EXPORT_DOWNLOADED, scope=scope, target=str(export_id))
        return ExportFile(row["size"], self._read(export_id))

    async def _is_fresh(self, connection: Any, scope: Scope, now: datetime) -> bool:
        if scope.session_id is None:
            return scope.issuer is not None
        opened = await connection.fetchval(_SESSION_OPENED, scope.session_id, scope.user_id)
        return opened is not None and now - opened < _FRESH

    async def _read(self, export_id: UUID) -> AsyncIterator[bytes]:
        number = -1
        while True:
            async with self._database.system_unit_of_work() as unit:
                row = await (await unit.driver()).fetchrow(_NEXT_PIECE, export_id, number)
            if row is None:
                break
            number = row["number"]
            yield row["data"]
        # A download that breaks off leaves them to the sweep.
        async with self._database.system_unit_of_work() as unit:
            await (await unit.driver()).execute(_DROP, export_id)

    async def sweep(self, run: JobRun) -> None:  # noqa: ARG002 - a handler's argument
        """Remove the files whose links have expired."""
        async with self._database.system_unit_of_work() as unit:
            await (await unit.driver()).execute(_SWEEP, clock.now())


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o600 << 16
    return entry


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
