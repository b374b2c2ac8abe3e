"""One-time tickets: how a browser gets on the socket without a token in a URL."""

import hashlib
import secrets
from datetime import timedelta
from uuid import UUID

from parley.core import base64url, clock
from parley.core.db import Database
from parley.core.errors import Unauthenticated
from parley.core.scope import Authenticator, Credential, Role, Scope

_PREFIX = "tk_"

_STORE = """
    INSERT INTO realtime_tickets (workspace_id, hash, user_id, session_id, key_id, issuer, subject, expires_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
"""
_TAKE = """
    DELETE FROM realtime_tickets WHERE workspace_id = $1 AND hash = $2
    RETURNING user_id, session_id, key_id, issuer, subject, expires_at
"""
_SWEEP = """
    WITH gone AS (
        DELETE FROM realtime_tickets WHERE (workspace_id, hash) IN (
            SELECT workspace_id, hash FROM realtime_tickets WHERE expires_at < $1 LIMIT $2)
        RETURNING 1
    )
    SELECT count(*) FROM gone
"""


class TicketInvalid(Unauthenticated):
    """The ticket does not exist, was used or has expired: one answer for all."""

    code = "unauthenticated"
    message = "The ticket is not valid."


class Tickets:
    """Makes and takes tickets. A ticket names its workspace, where the look-up starts; only a hash of it is kept."""

    def __init__(self, database: Database, authenticator: Authenticator, *, life_s: int) -> None:
        self._database = database
        self._authenticator = authenticator
        self.life_s = life_s

    async def issue(self, scope: Scope) -> str:
        """Return a new ticket for the caller."""
        secret = scope.workspace_id.bytes + secrets.token_bytes(32)
        expires = clock.now() + timedelta(seconds=self.life_s)
        async with self._database.unit_of_work(scope) as unit:
            connection = await unit.driver()
            digest = hashlib.sha256(secret).digest()
            await connection.execute(
                _STORE,
                scope.workspace_id,
                digest,
                scope.user_id,
                scope.session_id,
                scope.key_id,
                scope.issuer,
                scope.subject,
                expires,
            )
        return _PREFIX + base64url.encode(secret)

    async def redeem(self, ticket: str) -> Credential:
        """Take a ticket, once. Raises `TicketInvalid`, also when what it was asked for with has ended."""
        try:
            secret = base64url.decode(ticket.removeprefix(_PREFIX))
        except ValueError:
            raise TicketInvalid from None
        if not ticket.startswith(_PREFIX) or len(secret) != 48:
            raise TicketInvalid
        workspace_id = UUID(bytes=secret[:16])
        async with self._database.system_unit_of_work() as unit:
            connection = await unit.driver()
            row = await connection.fetchrow(_TAKE, workspace_id, hashlib.sha256(secret).digest())
        if row is None or row["expires_at"] < clock.now():
            raise TicketInvalid
        return await self._authenticator.reauthenticate(
            Scope(
                workspace_id,
                row["user_id"],
                Role.VIEWER,
                row["session_id"],
                subject=row["subject"] or "",
                key_id=row["key_id"],
                issuer=row["issuer"],
            )
        )


async def clean_tickets(database: Database, limit: int) -> int:
    """Remove at most `limit` tickets that nobody used; return how many."""
    async with database.system_unit_of_work() as unit:
        connection = await unit.driver()
        removed: int = await connection.fetchval(_SWEEP, clock.now() - timedelta(minutes=1), limit)
    return removed
