"""SQL of users and passwords."""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CursorResult, Executable, RowMapping, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlmodel import col

from parley.core.db import UnitOfWork
from parley.core.scope import Scope
from parley.identity.models import PasswordCredential, Session, User
from parley.identity.session_repository import USER
from parley.tenancy.service import membership_places

_WITH_PASSWORD: tuple[Any, ...] = (
    *USER,
    col(User.disabled_at),
    col(PasswordCredential.password_hash),
    col(PasswordCredential.failures),
    col(PasswordCredential.updated_at).label("password_since"),
)


class UnscopedIdentityRepository:
    """Users and sessions before there is a scope. Takes a unit of work of the system role."""

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit = unit

    async def add_user(self, *, id: UUID, email: str, email_norm: str, name: str | None) -> bool:
        """Add a user; False if the address is taken, also by a sign-up that commits at this moment."""
        statement = (
            insert(User)
            .values(id=id, email=email, email_norm=email_norm, name=name, email_verified=False)
            .on_conflict_do_nothing(index_elements=["email_norm"])
            .returning(col(User.id))
        )
        return (await self._execute(statement)).scalar_one_or_none() is not None

    async def add_password(self, user_id: UUID, password_hash: str) -> None:
        """Store a new user's password."""
        await self._execute(insert(PasswordCredential).values(user_id=user_id, password_hash=password_hash))

    async def replace_hash(self, user_id: UUID, *, old: str, new: str, now: datetime) -> None:
        """Replace a hash by one of the current kind, unless the password was changed meanwhile."""
        await self._execute(
            update(PasswordCredential)
            .where(col(PasswordCredential.user_id) == user_id, col(PasswordCredential.password_hash) == old)
            .values(password_hash=new, updated_at=now)
        )

    async def find_user(self, email_norm: str) -> RowMapping | None:
        """Return a user by address, with `password_hash`."""
        statement = (
            select(*_WITH_PASSWORD)
            .outerjoin(PasswordCredential, col(PasswordCredential.user_id) == col(User.id))
            .where(col(User.email_norm) == email_norm)
        )
        return (await self._execute(statement)).mappings().one_or_none()

    async def find_user_by_id(self, user_id: UUID) -> RowMapping | None:
        """Return a user, with `password_hash` and what else sign-in asks for."""
        statement = (
            select(*_WITH_PASSWORD)
            .outerjoin(PasswordCredential, col(PasswordCredential.user_id) == col(User.id))
            .where(col(User.id) == user_id)
        )
        return (await self._execute(statement)).mappings().one_or_none()

    async def lock_password(self, user_id: UUID) -> str | None:
        """Return a user's hash, which nobody else changes until the transaction ends."""
        statement = select(col(PasswordCredential.password_hash)).where(col(PasswordCredential.user_id) == user_id)
        # Not a shared lock: two that hold one and both go on to write would wait for each other.
        return (await self._execute(statement.with_for_update(key_share=True))).scalar_one_or_none()

    async def change_hash(self, user_id: UUID, *, old: str, new: str, now: datetime) -> bool:
        """Replace a password; False if it is not the old one any more."""
        statement = (
            update(PasswordCredential)
            .where(col(PasswordCredential.user_id) == user_id, col(PasswordCredential.password_hash) == old)
            .values(password_hash=new, updated_at=now, failures=0, failed_at=None)
            .returning(col(PasswordCredential.user_id))
        )
        return (await self._execute(statement)).scalar_one_or_none() is not None

    async def set_password(self, user_id: UUID, password_hash: str, *, now: datetime) -> None:
        """Set a password whatever was there, and forget what was guessed."""
        fresh = {"password_hash": password_hash, "updated_at": now, "failures": 0, "failed_at": None}
        statement = insert(PasswordCredential).values(user_id=user_id, **fresh)
        await self._execute(statement.on_conflict_do_update(index_elements=["user_id"], set_=fresh))

    async def note_failure(self, user_id: UUID, *, now: datetime) -> None:
        """Count a wrong password."""
        more = col(PasswordCredential.failures) + 1
        await self._execute(
            update(PasswordCredential)
            .where(col(PasswordCredential.user_id) == user_id)
            .values(failures=more, failed_at=now)
        )

    async def forget_failures(self, user_id: UUID) -> None:
        """Begin to count anew."""
        await self._execute(
            update(PasswordCredential)
            .where(col(PasswordCredential.user_id) == user_id, col(PasswordCredential.failures) > 0)
            .values(failures=0, failed_at=None)
        )

    async def verify_email(self, user_id: UUID, email: str) -> bool:
        """Mark a user's address as confirmed; False if it is another one by now."""
        statement = (
            update(User)
            .where(col(User.id) == user_id, col(User.email) == email)
            .values(email_verified=True)
            .returning(col(User.id))
        )
        return (await self._execute(statement)).scalar_one_or_none() is not None

    async def change_email(self, user_id: UUID, *, email: str, email_norm: str) -> bool:
        """Give a user another address, confirmed; False if it is taken."""
        taken = select(col(User.id)).where(col(User.email_norm) == email_norm, col(User.id) != user_id)
        if (await self._execute(taken)).first() is not None:
            return False
        statement = (
            update(User).where(col(User.id) == user_id).values(email=email, email_norm=email_norm, email_verified=True)
        )
        try:
            await self._execute(statement)
        except IntegrityError:
            # Taken at this very moment. The transaction can only be rolled back.
            return False
        return True

    async def has_been_at(self, user_id: UUID, address: str | None) -> bool:
        """Whether a session of a user was opened from an address."""
        if address is None:
            return False
        statement = select(col(Session.id)).where(col(Session.user_id) == user_id, col(Session.address) == address)
        return (await self._execute(statement.limit(1))).first() is not None

    async def refuse_tokens_before(self, user_id: UUID, moment: datetime) -> None:
        """Have other issuers' tokens refused that were made before a moment."""
        await self._execute(update(User).where(col(User.id) == user_id).values(tokens_valid_after=moment))

    async def _execute(self, statement: Executable) -> CursorResult[Any]:
        return await (await self._unit.connection()).execute(statement)


class AccountRepository:
    """The caller's own user and workspace, as the caller's scope sees them."""

    def __init__(self, unit: UnitOfWork, scope: Scope) -> None:
        self._unit = unit
        self._scope = scope

    async def get(self) -> RowMapping | None:
        """Return the caller with `workspace_name` and `role`."""
        place = membership_places()
        statement = (
            select(*USER, place.c.workspace_id, place.c.name.label("workspace_name"), place.c.role)
            .join(place, place.c.user_id == col(User.id))
            .where(col(User.id) == self._scope.user_id, place.c.workspace_id == self._scope.workspace_id)
        )
        connection = await self._unit.connection()
        return (await connection.execute(statement)).mappings().one_or_none()

    async def rename(self, name: str | None) -> None:
        """Change the caller's name."""
        connection = await self._unit.connection()
        await connection.execute(update(User).where(col(User.id) == self._scope.user_id).values(name=name))
