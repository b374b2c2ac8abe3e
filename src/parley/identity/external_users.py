"""Users of other issuers: known by issuer and subject, and never joined by an e-mail address."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from parley.core.db import Database, UnitOfWork
from parley.core.ids import new_id
from parley.core.scope import Role
from parley.identity.errors import NoWorkspace, UserUnknown
from parley.identity.issuers import Issuer
from parley.tenancy.audit import Action, record
from parley.tenancy.service import UnscopedWorkspaces

_FIND = """
    SELECT i.user_id, i.deleted_at, u.disabled_at, u.tokens_valid_after
    FROM identities i LEFT JOIN users u ON u.id = i.user_id WHERE i.issuer = $1 AND i.subject = $2
"""
_ERASED = "SELECT EXISTS (SELECT FROM identities WHERE issuer = $1 AND subject = $2)"
# Of requests that come at the same moment the first makes the user; the others wait for it here.
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))"
_ADD_USER = "INSERT INTO users (id, email, name, email_verified) VALUES ($1, $2, $3, $4)"
_ADD_IDENTITY = "INSERT INTO identities (issuer, subject, user_id, updated_at) VALUES ($1, $2, $3, $4)"
# What a claim names is never somebody's own workspace; what the operator wrote into the entry may be.
_OPEN = "SELECT EXISTS (SELECT FROM workspaces WHERE id = $1 AND ($2 OR NOT personal))"
_ROLE = "SELECT role FROM memberships WHERE workspace_id = $1 AND user_id = $2"
_REMOVED = """
    SELECT EXISTS (SELECT FROM audit_events WHERE workspace_id = $1 AND action = 'member.removed' AND target = $2)
"""
_NAME_LENGTH = 200
_EMAIL_LENGTH = 320


@dataclass(frozen=True, slots=True)
class Profile:
    """What an issuer says of a person."""

    email: str | None = None
    email_verified: bool = False
    name: str | None = None

    @classmethod
    def from_claims(cls, claims: dict[str, Any]) -> "Profile":
        """Read the usual claims; what is no text, or too long, or cannot be stored is left out."""
        return cls(
            email=_text(claims.get("email"), _EMAIL_LENGTH),
            email_verified=claims.get("email_verified") is True,
            name=_text(claims.get("name"), _NAME_LENGTH),
        )


def _text(value: object, length: int) -> str | None:
    if not isinstance(value, str) or not value.strip() or len(value) > length:
        return None
    return value.strip() if value.isprintable() else None


@dataclass(frozen=True, slots=True)
class ExternalStanding:
    """Who a subject is here, where, and as what."""

    user_id: UUID
    workspace_id: UUID
    role: Role
    tokens_valid_after: datetime | None


def erased_subject(issuer: str, subject: str) -> str:
    """Return what stands for the subject of somebody who was erased: nothing that names them."""
    return "erased:" + hashlib.sha256(f"{issuer}|{subject}".encode()).hexdigest()


class UnscopedExternalUsers:
    """Finds and makes users of other issuers, each method in a transaction of its own."""

    def __init__(self, database: Database, *, workspaces_per_month: int | None = None) -> None:
        self._database = database
        self._workspaces_per_month = workspaces_per_month

    async def stand(self, issuer: Issuer, subject: str, claims: dict[str, Any]) -> ExternalStanding:
        """Return who a subject is here; the user is made where the issuer's entry allows it.

        Raises `UserUnknown` for one that is not made, was deleted or closed, `NoWorkspace`, and
        `TooManyWorkspaces` for one whose own workspaces have gone too often.
        """
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            row = await connection.fetchrow(_FIND, issuer.name, subject)
            if row is None and issuer.create_users:
                await connection.execute(_LOCK, f"{issuer.name}|{subject}")
                row = await connection.fetchrow(_FIND, issuer.name, subject)
                if row is None:
                    user_id = await self.add(unit, issuer, subject, Profile.from_claims(claims))
                    workspace_id, role = await self._place(unit, issuer, user_id, claims)
                    return ExternalStanding(user_id, workspace_id, role, None)
            if row is None or row["user_id"] is None or row["deleted_at"] or row["disabled_at"]:
                raise UserUnknown
            user_id = row["user_id"]
            workspace_id, role = await self._place(unit, issuer, user_id, claims)
            return ExternalStanding(user_id, workspace_id, role, row["tokens_valid_after"])

    async def find(self, issuer: str, subject: str, workspace_id: UUID) -> ExternalStanding | None:
        """Return who a subject is in a workspace, for a scope that was verified before."""
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            row = await connection.fetchrow(_FIND, issuer, subject)
            if row is None or row["user_id"] is None or row["deleted_at"] or row["disabled_at"]:
                return None
            role = await connection.fetchval(_ROLE, workspace_id, row["user_id"])
        if role is None:
            return None
        return ExternalStanding(row["user_id"], workspace_id, Role(role), row["tokens_valid_after"])

    async def add(
        self, unit: UnitOfWork, issuer: Issuer, subject: str, profile: Profile, *, updated_at: datetime | None = None
    ) -> UUID:
        """Make a user for a subject. Raises `UserUnknown` for somebody who was erased: nothing revives them."""
        connection = await unit.driver()
        if await connection.fetchval(_ERASED, issuer.name, erased_subject(issuer.name, subject)):
            raise UserUnknown
        user_id = new_id()
        await connection.execute(_ADD_USER, user_id, profile.email, profile.name, profile.email_verified)
        await connection.execute(_ADD_IDENTITY, issuer.name, subject, user_id, updated_at)
        await record(unit, Action.IDENTITY_LINKED, user_id=user_id, actor="issuer", details={"issuer": issuer.name})
        return user_id

    async def _place(
        self, unit: UnitOfWork, issuer: Issuer, user_id: UUID, claims: dict[str, Any]
    ) -> tuple[UUID, Role]:
        workspaces = UnscopedWorkspaces(unit)
        kind, _, value = issuer.workspace.partition(":")
        if kind == "personal":
            home = await workspaces.find_home(user_id, preferred=None)
            if home is None:
                # The identity may be there before its first request, by a message.
                await (await unit.driver()).execute(_LOCK, f"place|{user_id}")
                home = await workspaces.find_home(user_id, preferred=None)
            if home is None:
                profile = Profile.from_claims(claims)
                owner_name = profile.name or (profile.email or "").partition("@")[0] or "My"
                home = await workspaces.replace_personal(
                    user_id, owner_name=owner_name, per_month=self._workspaces_per_month
                )
            return home.id, home.role
        wanted = _uuid(value if kind == "fixed" else _claim(claims, value))
        connection: asyncpg.Connection = await unit.driver()
        if wanted is None:
            raise NoWorkspace
        place = await workspaces.find_place(user_id, wanted)
        if place is None:
            await connection.execute(_LOCK, f"place|{user_id}")
            place = await workspaces.find_place(user_id, wanted)
        if place is None and not await connection.fetchval(_OPEN, wanted, kind == "fixed"):
            raise NoWorkspace
        # The issuer is trusted to place its users. What they are there is ours to change, and whom an admin has taken
        # out no token puts back.
        if place is None and not await connection.fetchval(_REMOVED, wanted, str(user_id)):
            await workspaces.add_member(wanted, user_id, Role.MEMBER)
            await record(
                unit,
                Action.MEMBER_ADDED,
                workspace_id=wanted,
                actor="issuer",
                target=str(user_id),
                details={"issuer": issuer.name, "role": Role.MEMBER.value},
            )
            place = await workspaces.find_place(user_id, wanted)
        if place is None:
            raise NoWorkspace
        return place.id, place.role


def _claim(claims: dict[str, Any], path: str) -> object:
    """Return a claim by its name; dots go into objects."""
    value: object = claims
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _uuid(value: object) -> UUID | None:
    try:
        return UUID(str(value)) if value is not None else None
    except ValueError:
        return None
