"""Invitations to a workspace, bound to the address that they were sent to.

The token is made when the mail is sent, and kept as a keyed hash. Whoever accepts must have that very address. Holding
the token proves it: nobody else was sent it. So an account whose address is not confirmed yet, and is the invited one,
is confirmed by accepting; one with another address learns nothing.
"""

import secrets
from datetime import timedelta
from uuid import UUID

from parley.core import base64url, clock
from parley.core.db import Database, UnitOfWork
from parley.core.errors import Conflict, Forbidden, NotFound
from parley.core.idempotency import Once
from parley.core.ids import new_id
from parley.core.pagination import PageRequest
from parley.core.scope import Role, Scope
from parley.identity import email_address
from parley.identity.errors import EmailInvalid, LinkInvalid
from parley.identity.invitation_schemas import InvitationCreate, InvitationRead
from parley.identity.mails import InvitationLetter, queue_invitation
from parley.identity.one_time_tokens import SecretHash
from parley.tenancy.audit import Action, record
from parley.tenancy.errors import RoleNotAllowed, WorkspaceNotFound
from parley.tenancy.roles import may_change
from parley.tenancy.schemas import WorkspaceRead
from parley.tenancy.service import UnscopedWorkspaces

PREFIX = "parley_in_"

_SECRET_BYTES = 28
_LENGTH = len(PREFIX) + (16 + 16 + _SECRET_BYTES) // 3 * 4

_SHOWN = "id, email, role, invited_by, created_at, expires_at"
_OPEN = "accepted_at IS NULL AND revoked_at IS NULL"
_COUNT = f"SELECT count(*) FROM invitations WHERE workspace_id = $1 AND {_OPEN} AND expires_at > $2"  # noqa: S608 - constants
_LIST = f"""
    SELECT {_SHOWN} FROM invitations WHERE workspace_id = $1 AND {_OPEN} AND expires_at > $2
    ORDER BY id DESC LIMIT $3 OFFSET $4
"""  # noqa: S608 - constants
_IS_MEMBER = """
    SELECT EXISTS (SELECT FROM memberships m JOIN users u ON u.id = m.user_id
                   WHERE m.workspace_id = $1 AND u.email_norm = $2)
"""
_REPLACE = f"""
    UPDATE invitations SET revoked_at = $3 WHERE workspace_id = $1 AND email_norm = $2 AND {_OPEN}
"""  # noqa: S608 - constants
_ADD = f"""
    INSERT INTO invitations (workspace_id, id, email, email_norm, role, invited_by, expires_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING {_SHOWN}
"""  # noqa: S608 - constants
_REVOKE = f"""
    UPDATE invitations SET revoked_at = $3 WHERE workspace_id = $1 AND id = $2 AND {_OPEN} RETURNING id
"""  # noqa: S608 - constants
_LETTER = f"""
    SELECT i.email, w.name AS workspace, coalesce(u.name, u.email, 'Somebody') AS inviter
    FROM invitations i JOIN workspaces w ON w.id = i.workspace_id LEFT JOIN users u ON u.id = i.invited_by
    WHERE i.workspace_id = $1 AND i.id = $2 AND i.{_OPEN.replace(" AND ", " AND i.")} AND i.expires_at > $3
"""  # noqa: S608 - constants
_SET_HASH = "UPDATE invitations SET hash = $3 WHERE workspace_id = $1 AND id = $2"
_FIND = """
    SELECT email_norm, role, hash, accepted_at, revoked_at, expires_at FROM invitations
    WHERE workspace_id = $1 AND id = $2 FOR UPDATE
"""
_ACCEPT = "UPDATE invitations SET accepted_at = $3 WHERE workspace_id = $1 AND id = $2"
_USER = "SELECT email, email_norm, email_verified FROM users WHERE id = $1"
_VERIFY = "UPDATE users SET email_verified = true WHERE id = $1 AND NOT email_verified RETURNING id"


class AlreadyMember(Conflict):
    """Whoever has this address is in the workspace."""

    code = "already_member"
    message = "This person is a member already."


class InvitationNotFound(NotFound):
    """No such invitation, or not open any more."""

    code = "invitation_not_found"
    message = "No such invitation."


class InvitationForAnother(Forbidden):
    """The invitation was sent to another address than the account's."""

    code = "invitation_for_another"
    message = "This invitation was sent to another address."


class Invitations:
    """Invites, takes back and accepts. Each method is whole: it has its own transactions."""

    def __init__(self, database: Database, hash: SecretHash, *, life: timedelta) -> None:
        self._database = database
        self._hash = hash
        self._life = life

    async def list(self, scope: Scope, workspace_id: UUID, page: PageRequest) -> tuple[list[InvitationRead], int]:
        """Return a page of the open invitations, newest first, and how many there are. Raises `WorkspaceNotFound`."""
        self._own(scope, workspace_id)
        now = clock.now()
        async with self._database.unit_of_work(scope) as unit:
            connection = await unit.driver()
            total: int = await connection.fetchval(_COUNT, workspace_id, now)
            rows = await connection.fetch(_LIST, workspace_id, now, page.per_page, page.offset)
        return [InvitationRead.model_validate(dict(row)) for row in rows], total

    async def create(self, scope: Scope, workspace_id: UUID, wanted: InvitationCreate, once: Once) -> InvitationRead:
        """Invite an address by mail; an open invitation of the same address is replaced.

        Raises `WorkspaceNotFound`, `EmailInvalid`, `RoleNotAllowed`, `AlreadyMember`.
        """
        self._own(scope, workspace_id)
        given, norm = email_address.parse(wanted.email)
        if not may_change(scope.role, None, wanted.role):
            raise RoleNotAllowed
        now = clock.now()
        async with self._database.unit_of_work(scope) as unit:
            await once.begin(unit)
            connection = await unit.driver()
            # Users of other issuers have no folded address: they are found out when they accept.
            if await connection.fetchval(_IS_MEMBER, workspace_id, norm):
                raise AlreadyMember
            await connection.execute(_REPLACE, workspace_id, norm, now)
            row = await connection.fetchrow(
                _ADD, workspace_id, new_id(), given, norm, wanted.role.value, scope.user_id, now + self._life
            )
            await queue_invitation(unit, workspace_id=workspace_id, invitation_id=row["id"])
            await record(
                unit,
                Action.INVITATION_CREATED,
                scope=scope,
                target=str(row["id"]),
                details={"role": wanted.role.value},
            )
            made = InvitationRead.model_validate(dict(row))
            await once.settle(made)
        return made

    async def revoke(self, scope: Scope, workspace_id: UUID, invitation_id: UUID) -> None:
        """Take an open invitation back. Raises `WorkspaceNotFound`, `InvitationNotFound`."""
        self._own(scope, workspace_id)
        async with self._database.unit_of_work(scope) as unit:
            connection = await unit.driver()
            if await connection.fetchval(_REVOKE, workspace_id, invitation_id, clock.now()) is None:
                raise InvitationNotFound
            await record(unit, Action.INVITATION_REVOKED, scope=scope, target=str(invitation_id))

    async def mint(self, workspace_id: UUID, invitation_id: UUID) -> InvitationLetter | None:
        """Make the secret of an open invitation, for the job that mails it; the one before is good no more."""
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            row = await connection.fetchrow(_LETTER, workspace_id, invitation_id, clock.now())
            if row is None:
                return None
            raw = workspace_id.bytes + invitation_id.bytes + secrets.token_bytes(_SECRET_BYTES)
            token = PREFIX + base64url.encode(raw)
            await connection.execute(_SET_HASH, workspace_id, invitation_id, self._hash.make(token))
        return InvitationLetter(to=row["email"], workspace=row["workspace"], inviter=row["inviter"], token=token)

    async def accept(self, scope: Scope, token: str) -> WorkspaceRead:
        """Join a workspace. Who has joined by this token before gets the same answer.

        Raises `LinkInvalid`, `InvitationForAnother`.
        """
        workspace_id, invitation_id = _ids_of(token)
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            row = await connection.fetchrow(_FIND, workspace_id, invitation_id)
            if row is None or row["hash"] is None or not self._hash.matches(token, row["hash"]):
                raise LinkInvalid
            await self._check_address(unit, scope.user_id, row["email_norm"])
            workspaces = UnscopedWorkspaces(unit)
            if row["accepted_at"] is None:
                if row["revoked_at"] is not None or row["expires_at"] <= clock.now():
                    raise LinkInvalid
                await connection.execute(_ACCEPT, workspace_id, invitation_id, clock.now())
                if await workspaces.add_member(workspace_id, scope.user_id, Role(row["role"])):
                    await record(
                        unit,
                        Action.INVITATION_ACCEPTED,
                        scope=scope,
                        workspace_id=workspace_id,
                        target=str(invitation_id),
                    )
            place = await workspaces.find_place(scope.user_id, workspace_id)
            # Accepted before, and no member any more.
            if place is None:
                raise LinkInvalid
        return place

    @staticmethod
    async def _check_address(unit: UnitOfWork, user_id: UUID, invited: str) -> None:
        connection = await unit.driver()
        user = await connection.fetchrow(_USER, user_id)
        if user is None:
            raise InvitationForAnother
        norm = user["email_norm"]
        if norm is None and user["email"] is not None and user["email_verified"]:
            # Another issuer's user: its word on the address counts once it has confirmed it.
            try:
                _, norm = email_address.parse(user["email"])
            except EmailInvalid:
                norm = None
        if norm != invited:
            raise InvitationForAnother
        if user["email_norm"] is not None and await connection.fetchval(_VERIFY, user_id) is not None:
            await record(unit, Action.EMAIL_VERIFIED, user_id=user_id, target=str(user_id))

    @staticmethod
    def _own(scope: Scope, workspace_id: UUID) -> None:
        if workspace_id != scope.workspace_id:
            raise WorkspaceNotFound


def _ids_of(token: str) -> tuple[UUID, UUID]:
    if len(token) != _LENGTH or not token.startswith(PREFIX):
        raise LinkInvalid
    try:
        raw = base64url.decode(token.removeprefix(PREFIX))
    except ValueError:
        raise LinkInvalid from None
    return UUID(bytes=raw[:16]), UUID(bytes=raw[16:32])
