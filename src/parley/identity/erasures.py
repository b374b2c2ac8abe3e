"""The end of an account, in two phases: closed at once, erased when the days to come back are over.

The ledger `erasures` outlives the person. After a restore from a backup it is applied again, so that nobody who was
erased comes back; it can be kept as a file beside the backups.
"""

import json
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from parley.core import clock
from parley.core.db import Database, UnitOfWork
from parley.core.errors import Conflict, Forbidden, Invalid, NotFound
from parley.core.mail import Mail, Mailer
from parley.core.personal_data import Person, PersonalData
from parley.core.revocations import Revocation, Revocations
from parley.core.scope import Scope
from parley.jobs.outbox import enqueue
from parley.jobs.registry import JobFailed, JobRun, JobType
from parley.realtime.personal_data import stop_everything
from parley.tenancy.audit import Action, Actor, record
from parley.tenancy.personal_data import last_owned, workspaces_of

KIND: Final = "erasure"
MAIL_KIND: Final = "erasure.mail"

_FIND = """
    SELECT u.email, u.disabled_at, c.password_hash FROM users u LEFT JOIN credentials c ON c.user_id = u.id
    WHERE u.id = $1 FOR UPDATE OF u
"""
_CLOSE = "UPDATE users SET disabled_at = coalesce(disabled_at, $2), tokens_valid_after = $2 WHERE id = $1"
_END_ALL = (
    "UPDATE sessions SET revoked_at = $2, revoke_reason = 'account_deleted' WHERE user_id = $1 AND revoked_at IS NULL",
    "UPDATE api_keys SET revoked_at = $2 WHERE user_id = $1 AND revoked_at IS NULL",
    "UPDATE one_time_tokens SET used_at = $2 WHERE user_id = $1 AND used_at IS NULL",
    "DELETE FROM export_chunks c USING exports e WHERE e.id = c.export_id AND e.user_id = $1 AND e.created_at <= $2",
)
_WRITE_DOWN = """
    INSERT INTO erasures (user_id, requested_at, erase_after) VALUES ($1, $2, $3)
    ON CONFLICT (user_id) DO UPDATE SET requested_at = $2, erase_after = $3, erased_at = NULL
"""
_PENDING = "SELECT erase_after FROM erasures WHERE user_id = $1 AND erased_at IS NULL"
_DUE = "SELECT erase_after FROM erasures WHERE user_id = $1"
_WITHDRAW = "DELETE FROM erasures WHERE user_id = $1 AND erased_at IS NULL RETURNING user_id"
_REOPEN = "UPDATE users SET disabled_at = NULL WHERE id = $1"
_ERASED = "UPDATE erasures SET erased_at = coalesce(erased_at, $2) WHERE user_id = $1"
_LEDGER = "SELECT user_id, requested_at, erase_after, erased_at FROM erasures ORDER BY requested_at, user_id"
_TAKE_IN = """
    INSERT INTO erasures (user_id, requested_at, erase_after, erased_at) VALUES ($1, $2, $3, $4)
    ON CONFLICT (user_id) DO UPDATE SET requested_at = least(erasures.requested_at, EXCLUDED.requested_at),
        erase_after = least(erasures.erase_after, EXCLUDED.erase_after),
        erased_at = coalesce(erasures.erased_at, EXCLUDED.erased_at)
"""


ConfirmPassword = Callable[[Scope, str], Awaitable[None]]
"""Raises unless the password is the caller's; guesses are counted."""


class AccountDeleted(Forbidden):
    """The password is right, and the account is waiting to be erased. `restore` brings it back."""

    code = "account_deleted"
    message = 'This account is being deleted. Sign in with "restore": true to keep it.'


class LastOwner(Conflict):
    """Workspaces with other members would have no owner any more; `details.workspace_ids` names them."""

    code = "last_owner"
    message = "Give these workspaces another owner or delete them first."


class NotConfirmed(Invalid):
    """The account's end was not confirmed as it has to be."""


class AccountNotFound(NotFound):
    """There is no such account."""

    message = "There is no such account."


class LedgerInvalid(Exception):
    """A file that is no ledger."""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """Someone to erase, or erased."""

    user_id: UUID
    requested_at: datetime
    erase_after: datetime
    erased_at: datetime | None

    def to_line(self) -> str:
        """Return the entry as a line of the ledger's file."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps({name: str(value) if value is not None else None for name, value in fields.items()})

    @classmethod
    def from_line(cls, line: str) -> "LedgerEntry":
        """Read a line of the ledger's file. Raises `LedgerInvalid`."""
        try:
            fields = json.loads(line)
            moments = {name: datetime.fromisoformat(fields[name]) for name in ("requested_at", "erase_after")}
            erased = datetime.fromisoformat(fields["erased_at"]) if fields["erased_at"] else None
            if any(moment.tzinfo is None for moment in (*moments.values(), *([erased] if erased else []))):
                raise LedgerInvalid("a time without a time zone")
            return cls(UUID(fields["user_id"]), **moments, erased_at=erased)
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerInvalid("this line is no entry of a ledger") from error


class ErasureService:
    """Closes accounts, brings them back, erases them. `parts` are what the modules have of people, in that order."""

    def __init__(
        self,
        database: Database,
        parts: Sequence[PersonalData],
        *,
        confirm: ConfirmPassword,
        revocations: Revocations,
        mailer: Mailer,
        days: int,
    ) -> None:
        self._database = database
        self._parts = parts
        self._confirm = confirm
        self._revocations = revocations
        self._mailer = mailer
        self._wait = timedelta(days=days)

    def job_types(self) -> tuple[JobType, ...]:
        """Return the jobs of erasure, for the dispatcher."""
        return (
            JobType(KIND, self.run, timeout_s=900, shown=False),
            JobType(MAIL_KIND, self.send_notice, shown=False),
        )

    async def request(self, scope: Scope, *, current_password: str | None, confirm: str | None) -> datetime:
        """Close the caller's account; return when it will be erased.

        An account with a password is confirmed by it, one without by its e-mail address or its id. Raises
        `PasswordWrong`, `TooMany`, `NotConfirmed`, `LastOwner`, `PasswordsBusy`.
        """
        async with self._database.system_unit_of_work() as unit:
            row = await (await unit.driver()).fetchrow(_FIND, scope.user_id)
        if row is None:
            raise AccountNotFound
        if row["password_hash"] is not None:
            if current_password is None:
                raise NotConfirmed(
                    "current_password is required", details={"field": "current_password", "constraint": "required"}
                )
            # Between the transactions: a connection must not wait for a hash.
            await self._confirm(scope, current_password)
        elif not _confirms(confirm, scope.user_id, row["email"]):
            raise NotConfirmed(
                "confirm must be the account's e-mail address or id",
                details={"field": "confirm", "constraint": "email or id"},
            )
        return await self.close_account(scope.user_id, scope=scope)

    async def close_account(
        self, user_id: UUID, *, scope: Scope | None = None, actor: Actor | None = None, wait: timedelta | None = None
    ) -> datetime:
        """Close an account at once, for the user or an operator; return when it will be erased.

        Sessions, keys and one-time tokens end, replies that are being written are cancelled, sockets close. Raises
        `AccountNotFound`, `LastOwner`.
        """
        now = clock.now()
        erase_after = now + (self._wait if wait is None else wait)
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            row = await connection.fetchrow(_FIND, user_id)
            if row is None:
                raise AccountNotFound
            if left_alone := await last_owned(unit, user_id):
                raise LastOwner(details={"workspace_ids": [str(id_) for id_ in left_alone]})
            await connection.execute(_WRITE_DOWN, user_id, now, erase_after)
            await self._end_everything(unit, user_id, now)
            # By its time too: one that was withdrawn and asked for again is another one.
            await enqueue(
                unit,
                KIND,
                {"user_id": str(user_id)},
                dedupe_key=f"{user_id}:{erase_after.timestamp():.6f}",
                delay=erase_after - now,
            )
            if row["email"] is not None:
                await enqueue(unit, MAIL_KIND, {"user_id": str(user_id)}, user_id=user_id)
            await record(
                unit, Action.ACCOUNT_ERASURE_REQUESTED, scope=scope, user_id=user_id, actor=actor, target=str(user_id)
            )
        return erase_after

    async def _end_everything(self, unit: UnitOfWork, user_id: UUID, now: datetime) -> None:
        connection = await unit.driver()
        for statement in (_CLOSE, *_END_ALL):
            await connection.execute(statement, user_id, now)
        await stop_everything(unit, user_id)
        await self._revocations.announce(unit, Revocation("user", user_id))

    async def pending(self, unit: UnitOfWork, user_id: UUID) -> datetime | None:
        """Return when a closed account will be erased; None for one that was not deleted. System role."""
        found: datetime | None = await (await unit.driver()).fetchval(_PENDING, user_id)
        return found

    async def restore(self, unit: UnitOfWork, user_id: UUID, *, actor: Actor = "user") -> bool:
        """Open a closed account again, in the unit's transaction; False if it was not waiting to be erased.

        Sessions and keys stay ended.
        """
        connection = await unit.driver()
        if await connection.fetchval(_WITHDRAW, user_id) is None:
            return False
        await connection.execute(_REOPEN, user_id)
        await record(unit, Action.ACCOUNT_ENABLED, user_id=user_id, actor=actor, target=str(user_id))
        return True

    async def restore_account(self, user_id: UUID, *, actor: Actor) -> bool:
        """Open a closed account again; False if it was not waiting to be erased."""
        async with self._database.system_unit_of_work() as unit:
            return await self.restore(unit, user_id, actor=actor)

    async def send_notice(self, run: JobRun) -> None:
        """Tell the owner of the address that the account will be erased, and how to keep it."""
        user_id = UUID(run.payload["user_id"])
        async with self._database.system_unit_of_work() as unit:
            row = await (await unit.driver()).fetchrow(
                "SELECT u.email, e.erase_after FROM users u JOIN erasures e ON e.user_id = u.id "
                "WHERE u.id = $1 AND e.erased_at IS NULL",
                user_id,
            )
        if row is None or row["email"] is None:
            return
        await self._mailer.send(
            Mail(
                to=row["email"],
                subject="Your account will be deleted",
                text=f"Your account is closed and will be deleted with all its data after "
                f"{row['erase_after']:%Y-%m-%d %H:%M} UTC.\n\n"
                f"To keep it, sign in before then and choose to restore it.\n",
            )
        )

    async def run(self, run: JobRun) -> None:
        """Erase an account whose days are over; one that was restored stays."""
        user_id = UUID(run.payload["user_id"])
        async with self._database.system_unit_of_work() as unit:
            erase_after = await self.pending(unit, user_id)
        if erase_after is None or erase_after > clock.now():
            return
        await self.erase(user_id)

    async def erase(self, user_id: UUID) -> None:
        """Remove everything of a user, whose entry is in the ledger. Can be repeated; each part commits by itself."""
        async with self._database.system_unit_of_work() as unit:
            if await (await unit.driver()).fetchval(_DUE, user_id) is None:
                raise JobFailed("The account is not in the ledger.")
        person = Person(user_id, await workspaces_of(self._database, user_id))
        for part in self._parts:
            await part.erase(self._database, person)
        async with self._database.system_unit_of_work() as unit:
            await (await unit.driver()).execute(_ERASED, user_id, clock.now())
            await self._revocations.announce(unit, Revocation("user", user_id))
            await record(unit, Action.ACCOUNT_ERASED, actor="system", target=str(user_id))

    # -- the ledger ------------------------------------------------------------------------------------------------

    async def ledger(self) -> list[LedgerEntry]:
        """Return every entry, the oldest first."""
        async with self._database.system_unit_of_work() as unit:
            return [LedgerEntry(**row) for row in await (await unit.driver()).fetch(_LEDGER)]

    async def take_in(self, entries: Iterable[LedgerEntry]) -> int:
        """Add the entries of a file; return how many it had. What is erased in either is erased."""
        count = 0
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            for entry in entries:
                await connection.execute(
                    _TAKE_IN, entry.user_id, entry.requested_at, entry.erase_after, entry.erased_at
                )
                count += 1
        return count

    async def reapply(self) -> list[UUID]:
        """Erase again whom the ledger calls erased, and whose days are over; close the accounts of the others.

        After a restore: the backup may be from before. Returns who was erased.
        """
        now = clock.now()
        done = []
        for entry in await self.ledger():
            if entry.erased_at is not None or entry.erase_after <= now:
                await self.erase(entry.user_id)
                done.append(entry.user_id)
                continue
            async with self._database.system_unit_of_work() as unit:
                await self._end_everything(unit, entry.user_id, now)
                await enqueue(
                    unit,
                    KIND,
                    {"user_id": str(entry.user_id)},
                    dedupe_key=f"{entry.user_id}:{entry.erase_after.timestamp():.6f}",
                    delay=entry.erase_after - now,
                )
        return done


def _confirms(text: str | None, user_id: UUID, email: str | None) -> bool:
    given = (text or "").strip().casefold().encode("utf-8", "surrogatepass")
    wanted = [str(user_id), *([email.casefold()] if email else [])]
    return any(secrets.compare_digest(given, word.encode()) for word in wanted)


def parse_ledger(text: str) -> list[LedgerEntry]:
    """Read a ledger's file. Raises `LedgerInvalid`."""
    return [LedgerEntry.from_line(line) for line in text.splitlines() if line.strip()]


def render_ledger(entries: Iterable[LedgerEntry]) -> str:
    """Return the ledger as a file: one JSON object in a line."""
    return "".join(entry.to_line() + "\n" for entry in entries)
