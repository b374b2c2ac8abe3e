"""What operators do with accounts, keys and sessions. Each method is whole; every change is in the audit log."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from parley.core import clock
from parley.core.db import Database
from parley.core.ids import new_id
from parley.core.revocations import Revocation, Revocations
from parley.core.scope import Role, Scope
from parley.identity import email_address
from parley.identity.api_key_schemas import ApiKeyCreate, ApiKeyCreated
from parley.identity.api_keys import ApiKeyService, KeyFormat
from parley.identity.erasures import AccountNotFound
from parley.identity.errors import ApiKeyNotFound, EmailInvalid, EmailTaken
from parley.identity.passwords import Passwords
from parley.identity.repository import UnscopedIdentityRepository
from parley.tenancy.audit import Action, record
from parley.tenancy.operators import NotAMember
from parley.tenancy.permissions import permissions_of
from parley.tenancy.service import UnscopedWorkspaces

_USERS = """
    SELECT u.id, u.email, u.name, u.email_verified, u.disabled_at, u.created_at, e.erase_after
    FROM users u LEFT JOIN erasures e ON e.user_id = u.id AND e.erased_at IS NULL
    WHERE ($1::uuid IS NULL OR u.id = $1) AND ($2::text IS NULL OR u.email_norm = $2) ORDER BY u.id LIMIT $3
"""
_PLACES = """
    SELECT m.workspace_id, w.name, m.role FROM memberships m JOIN workspaces w ON w.id = m.workspace_id
    WHERE m.user_id = $1 ORDER BY m.created_at, m.workspace_id
"""
_DISABLE = "UPDATE users SET disabled_at = coalesce(disabled_at, $2), tokens_valid_after = $2 WHERE id = $1"
_ENABLE = "UPDATE users SET disabled_at = NULL WHERE id = $1"
_STORE_HASH = """
    INSERT INTO credentials (user_id, password_hash, updated_at) VALUES ($1, $2, $3)
    ON CONFLICT (user_id) DO UPDATE SET password_hash = $2, updated_at = $3, failures = 0, failed_at = NULL
"""
_SESSIONS = """
    SELECT s.id, s.user_id, s.workspace_id, s.user_agent, s.address, s.created_at, s.last_used_at
    FROM sessions s
    WHERE ($1::uuid IS NULL OR s.user_id = $1) AND s.revoked_at IS NULL
      AND least(s.idle_expires_at, s.absolute_expires_at) > $2
    ORDER BY s.last_used_at DESC, s.id LIMIT $3
"""
_END = """
    UPDATE sessions SET revoked_at = $3, revoke_reason = 'operator'
    WHERE ($1::uuid IS NULL OR id = $1) AND ($2::uuid IS NULL OR user_id = $2) AND revoked_at IS NULL
    RETURNING id, user_id
"""
_KEYS = """
    SELECT id, workspace_id, user_id, name, prefix, last_four, scopes, expires_at, last_used_at, revoked_at, created_at
    FROM api_keys WHERE ($1::uuid IS NULL OR user_id = $1) ORDER BY workspace_id, id LIMIT $2
"""
_REVOKE_KEY = "UPDATE api_keys SET revoked_at = $2 WHERE id = $1 AND revoked_at IS NULL RETURNING workspace_id, user_id"
_ROLE = "SELECT role FROM memberships WHERE workspace_id = $1 AND user_id = $2"

Row = dict[str, Any]


class UnscopedOperators:
    """Accounts, keys and sessions, for operators."""

    def __init__(
        self, database: Database, *, passwords: Passwords, revocations: Revocations, key_format: KeyFormat
    ) -> None:
        self._database = database
        self._passwords = passwords
        self._revocations = revocations
        self._key_format = key_format

    # -- accounts --------------------------------------------------------------------------------------------------

    async def find_user(self, who: str) -> Row:
        """Return an account by its e-mail address or its id. Raises `AccountNotFound`."""
        id_, norm = None, None
        try:
            id_ = UUID(who)
        except ValueError:
            try:
                _, norm = email_address.parse(who)
            except EmailInvalid:
                raise AccountNotFound from None
        async with self._database.system_unit_of_work() as unit:
            row = await (await unit.driver()).fetchrow(_USERS, id_, norm, 1)
        if row is None:
            raise AccountNotFound
        return dict(row)

    async def list_users(self, *, limit: int) -> Sequence[Row]:
        """Return accounts, the oldest first."""
        async with self._database.system_unit_of_work() as unit:
            return [dict(row) for row in await (await unit.driver()).fetch(_USERS, None, None, limit)]

    async def places(self, user_id: UUID) -> Sequence[Row]:
        """Return the workspaces of a user."""
        async with self._database.system_unit_of_work() as unit:
            return [dict(row) for row in await (await unit.driver()).fetch(_PLACES, user_id)]

    async def create_user(self, *, email: str, password: str, name: str | None, verified: bool) -> Row:
        """Make an account with a workspace of its own. Raises `EmailInvalid`, `PasswordRefused`, `EmailTaken`."""
        given, norm = email_address.parse(email)
        self._passwords.check(password, email=given)
        password_hash = await self._passwords.hash(password)
        user_id = new_id()
        async with self._database.system_unit_of_work() as unit:
            repository = UnscopedIdentityRepository(unit)
            if not await repository.add_user(id=user_id, email=given, email_norm=norm, name=name):
                raise EmailTaken
            await repository.add_password(user_id, password_hash)
            if verified:
                await (await unit.driver()).execute("UPDATE users SET email_verified = true WHERE id = $1", user_id)
            workspace = await UnscopedWorkspaces(unit).create_personal(
                user_id, owner_name=name or given.partition("@")[0]
            )
            await record(unit, Action.ACCOUNT_CREATED, workspace_id=workspace.id, actor="operator", target=str(user_id))
        return {"id": user_id, "email": given, "name": name, "workspace_id": workspace.id}

    async def disable(self, user_id: UUID) -> None:
        """Keep a user out, at once: sessions end, keys and other issuers' tokens are refused."""
        now = clock.now()
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            await connection.execute(_DISABLE, user_id, now)
            await connection.execute(_END, None, user_id, now)
            await self._revocations.announce(unit, Revocation("user", user_id))
            await record(unit, Action.ACCOUNT_DISABLED, actor="operator", target=str(user_id))

    async def enable(self, user_id: UUID) -> None:
        """Let a user in again, who signs in anew."""
        async with self._database.system_unit_of_work() as unit:
            await (await unit.driver()).execute(_ENABLE, user_id)
            await self._revocations.announce(unit, Revocation("user", user_id))
            await record(unit, Action.ACCOUNT_ENABLED, actor="operator", target=str(user_id))

    async def set_password(self, user_id: UUID, password: str, *, email: str | None) -> int:
        """Give a user another password and end the sessions; return how many. Raises `PasswordRefused`."""
        self._passwords.check(password, email=email or "")
        password_hash = await self._passwords.hash(password)
        now = clock.now()
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            await connection.execute(_STORE_HASH, user_id, password_hash, now)
            ended = await connection.fetch(_END, None, user_id, now)
            await self._revocations.announce(unit, Revocation("user", user_id))
            await record(unit, Action.PASSWORD_CHANGED, actor="operator", target=str(user_id))
        return len(ended)

    # -- sessions --------------------------------------------------------------------------------------------------

    async def sessions(self, *, user_id: UUID | None, limit: int) -> Sequence[Row]:
        """Return the sessions that hold, the last used first."""
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            return [dict(row) for row in await connection.fetch(_SESSIONS, user_id, clock.now(), limit)]

    async def end_sessions(self, *, id: UUID | None = None, user_id: UUID | None = None) -> int:
        """End one session, a user's, or without either all of them; return how many."""
        async with self._database.system_unit_of_work() as unit:
            ended = await (await unit.driver()).fetch(_END, id, user_id, clock.now())
            # One message for each user is enough, however many sessions there were.
            told = [Revocation("session", id)] if id else [Revocation("user", u) for u in {r["user_id"] for r in ended}]
            for revocation in told:
                await self._revocations.announce(unit, revocation)
            await record(
                unit,
                Action.SESSION_REVOKED,
                actor="operator",
                target=str(id or user_id or "all"),
                details={"ended": len(ended)},
            )
        return len(ended)

    # -- keys ------------------------------------------------------------------------------------------------------

    async def keys(self, *, user_id: UUID | None, limit: int) -> Sequence[Row]:
        """Return API keys without what they are."""
        async with self._database.system_unit_of_work() as unit:
            return [dict(row) for row in await (await unit.driver()).fetch(_KEYS, user_id, limit)]

    async def create_key(self, user_id: UUID, workspace_id: UUID, wanted: ApiKeyCreate) -> ApiKeyCreated:
        """Make a key of a member; only this answer holds it. Raises `NotAMember`."""
        async with self._database.system_unit_of_work() as unit:
            role = await (await unit.driver()).fetchval(_ROLE, workspace_id, user_id)
        if role is None:
            raise NotAMember
        scope = Scope(workspace_id, user_id, Role(role), permissions=permissions_of(Role(role)))
        async with self._database.unit_of_work(scope) as bound:
            return await ApiKeyService(bound, scope, self._key_format, self._revocations).create(wanted)

    async def revoke_key(self, id: UUID) -> None:
        """End a key, at once. Raises `ApiKeyNotFound`."""
        async with self._database.system_unit_of_work() as unit:
            row = await (await unit.driver()).fetchrow(_REVOKE_KEY, id, clock.now())
            if row is None:
                raise ApiKeyNotFound
            await self._revocations.announce(unit, Revocation("key", id))
            await record(
                unit, Action.API_KEY_REVOKED, workspace_id=row["workspace_id"], actor="operator", target=str(id)
            )
