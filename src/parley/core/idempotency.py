"""Idempotency-Key: the first answer again for a repeated request, stored in the transaction of its effect.

A creating route asks for `RequestOnce` and ends with `return await once.keep(respond(…))`. For a service that opens a
unit of its own the route asks for `OwnUnitOnce` and says with `answering` how a result is answered; the service calls
`begin` first and `settle` last in that unit, and the route returns `once.response`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Final
from uuid import UUID

import orjson
from fastapi import Depends, Header, Request, Response
from sqlalchemy import JSON, Column, ForeignKeyConstraint
from sqlmodel import Field, SQLModel

from parley.core import clock
from parley.core.db import Database, UnitOfWork
from parley.core.dependencies import RequestUnit
from parley.core.envelope import ErrorEnvelope
from parley.core.errors import Conflict, Invalid
from parley.core.models import filled_in
from parley.core.scope import CurrentScope, Scope

KEPT_FOR: Final = timedelta(hours=24)
HEADER: Final = "Idempotency-Key"

ONCE_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    409: {"model": ErrorEnvelope, "description": "`request_in_flight`: one with this Idempotency-Key is being answered"}
}
"""For `responses` of a route that asks for an Idempotency-Key."""

_RETRY_AFTER_S = 1

# An answer that is seen counts whether the lock is free or not: others may be getting it at this moment.
_BEGIN = """
    SELECT pg_try_advisory_xact_lock($4) AS held, k.fingerprint, k.status, k.headers::text AS headers, k.body
    FROM (VALUES (1)) AS one LEFT JOIN idempotency_keys k
      ON k.workspace_id = $1 AND k.user_id = $2 AND k.hash = $3 AND k.expires_at > $5
"""
# The lock may have become free between the snapshot and the try: then the first answer was not seen above, is in the
# way here, and nothing comes back.
_KEEP = """
    INSERT INTO idempotency_keys AS k
        (workspace_id, user_id, hash, fingerprint, status, headers, body, created_at, expires_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
    ON CONFLICT (workspace_id, user_id, hash) DO UPDATE SET
        fingerprint = EXCLUDED.fingerprint, status = EXCLUDED.status, headers = EXCLUDED.headers,
        body = EXCLUDED.body, created_at = EXCLUDED.created_at, expires_at = EXCLUDED.expires_at
    WHERE k.expires_at <= $8
    RETURNING true
"""
_CLEAN = """
    WITH gone AS (
        DELETE FROM idempotency_keys WHERE (workspace_id, user_id, hash) IN (
            SELECT workspace_id, user_id, hash FROM idempotency_keys WHERE expires_at <= $1 LIMIT $2
            FOR UPDATE SKIP LOCKED)
        RETURNING 1
    )
    SELECT count(*) FROM gone
"""


class IdempotencyKey(SQLModel, table=True):
    """A creating request that was answered, by the hash of the key that its sender gave it."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (ForeignKeyConstraint(["workspace_id"], ["workspaces.id"], ondelete="CASCADE"),)

    workspace_id: UUID = Field(primary_key=True)
    user_id: UUID = Field(primary_key=True)
    hash: bytes = Field(primary_key=True)
    fingerprint: bytes
    status: int
    headers: Any = Field(sa_column=Column(JSON, nullable=False))
    body: bytes
    created_at: datetime = filled_in()
    expires_at: datetime


class IdempotencyKeyInvalid(Invalid):
    """More than one key came with a request."""

    message = f"{HEADER} must be given once"

    def __init__(self) -> None:
        super().__init__(details={"field": HEADER, "constraint": "single"})


class IdempotencyKeyReused(Invalid):
    """The key came before, with another body: one of the two requests is not what its sender thinks."""

    code = "idempotency_key_reused"
    message = f"This {HEADER} was used with another request."

    def __init__(self) -> None:
        super().__init__(details={"field": HEADER, "constraint": "same_request"})


class RequestInFlight(Conflict):
    """A request with this key is being answered at this moment."""

    code = "request_in_flight"
    message = f"A request with this {HEADER} is still being answered."

    def __init__(self) -> None:
        super().__init__(retry_after_s=_RETRY_AFTER_S)


class Replay(Exception):
    """The request was answered before: no error, it carries the first answer past the route."""

    def __init__(self, response: Response) -> None:
        self.response = response
        super().__init__(response.status_code)


@dataclass(frozen=True, slots=True)
class _Presented:
    """A key as it is looked up: what it stands for, and what came with it."""

    workspace_id: UUID
    user_id: UUID
    hash: bytes
    fingerprint: bytes

    @property
    def lock(self) -> int:
        return int.from_bytes(self.hash[:8], signed=True)


class Once:
    """One request that has one effect, however often it comes. Without a key it does nothing at all."""

    __slots__ = ("_make", "_presented", "_response", "_unit")

    def __init__(self, presented: _Presented | None = None) -> None:
        self._presented = presented
        self._unit: UnitOfWork | None = None
        self._make: Callable[[Any], Response] | None = None
        self._response: Response | None = None

    def answering(self, make: Callable[[Any], Response]) -> "Once":
        """Say how the result of a service is answered; return this very object."""
        self._make = make
        return self

    async def settle(self, result: object) -> None:
        """Keep the answer that `answering` makes of a result: for services, which know nothing of answers."""
        if self._make is not None:
            self._response = await self.keep(self._make(result))

    @property
    def response(self) -> Response:
        """The answer that was settled."""
        if self._response is None:
            raise RuntimeError("an answer is asked for before it was settled")
        return self._response

    async def begin(self, unit: UnitOfWork) -> None:
        """Look the key up and hold it until the unit ends; before anything else in the unit.

        Raises `Replay` with the first answer, `IdempotencyKeyReused`, `RequestInFlight`.
        """
        self._unit = unit
        if (presented := self._presented) is None:
            return
        connection = await unit.driver()
        row = await connection.fetchrow(
            _BEGIN, presented.workspace_id, presented.user_id, presented.hash, presented.lock, clock.now()
        )
        if row["fingerprint"] is not None:
            if row["fingerprint"] != presented.fingerprint:
                raise IdempotencyKeyReused
            headers = {**orjson.loads(row["headers"]), "idempotent-replayed": "true"}
            raise Replay(Response(row["body"], status_code=row["status"], headers=headers))
        if not row["held"]:
            raise RequestInFlight

    async def keep(self, response: Response, *, replayed: Response | None = None) -> Response:
        """Store a successful answer in the unit of its effect, and return it.

        `replayed` is what a repeated request gets instead, where the answer holds what is shown once. Raises
        `RequestInFlight`, which takes the effect back, when another request was first after all.
        """
        if self._unit is None:
            raise RuntimeError("an answer is kept before its request has begun")
        if (presented := self._presented) is None:
            return response
        stored = replayed or response
        headers = {name: value for name, value in stored.headers.items() if name != "content-length"}
        now = clock.now()
        connection = await self._unit.driver()
        kept = await connection.fetchval(
            _KEEP,
            presented.workspace_id,
            presented.user_id,
            presented.hash,
            presented.fingerprint,
            stored.status_code,
            orjson.dumps(headers).decode(),
            bytes(stored.body),
            now,
            now + KEPT_FOR,
        )
        if not kept:
            raise RequestInFlight
        return response


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        # The length first: no two lists of parts are the same bytes.
        digest.update(len(part).to_bytes(8) + part)
    return digest.digest()


def _credential(scope: Scope) -> str:
    """Return whose key it is. All sessions of a user are one: a retry may come after signing in again."""
    return f"key:{scope.key_id}" if scope.key_id else f"issuer:{scope.issuer}" if scope.issuer else "session"


_Key = Annotated[
    str | None,
    Header(
        alias=HEADER,
        max_length=255,
        pattern="^[!-~]+$",
        description="Makes the request safe to repeat: within 24 h the same key and body get the first answer",
    ),
]


async def _own_unit_once(request: Request, scope: CurrentScope, idempotency_key: _Key = None) -> Once:
    if idempotency_key is None:
        return Once(None)
    return _once_of(request, scope, idempotency_key, await request.body())


async def _streamed_once(
    request: Request, scope: CurrentScope, idempotency_key: _Key = None
) -> Callable[[bytes], Once]:
    def once(sha256: bytes) -> Once:
        return Once(None) if idempotency_key is None else _once_of(request, scope, idempotency_key, sha256)

    return once


def _once_of(request: Request, scope: Scope, idempotency_key: str, body: bytes) -> Once:
    if len(request.headers.getlist(HEADER)) > 1:
        raise IdempotencyKeyInvalid
    target = (request.method, request.scope["path"], idempotency_key)
    hashed = _digest(
        scope.workspace_id.bytes, scope.user_id.bytes, _credential(scope).encode(), *(part.encode() for part in target)
    )
    fingerprint = _digest(request.scope["query_string"], body)
    return Once(_Presented(scope.workspace_id, scope.user_id, hashed, fingerprint))


OwnUnitOnce = Annotated[Once, Depends(_own_unit_once)]
"""For a service with a unit of its own: it calls `begin` first, `keep` last."""

StreamedOnce = Annotated[Callable[[bytes], Once], Depends(_streamed_once)]
"""The same for a body that is not read at once: makes the `Once` when the hash of the body is known."""


async def _request_once(once: OwnUnitOnce, unit: RequestUnit) -> Once:
    await once.begin(unit)
    return once


RequestOnce = Annotated[Once, Depends(_request_once)]
"""For a route in the request's unit: it only ends with `keep`."""


async def clean_idempotency_keys(database: Database, limit: int) -> int:
    """Remove answers that are kept no longer, at most so many; return how many."""
    async with database.system_unit_of_work() as unit:
        connection = await unit.driver()
        removed: int = await connection.fetchval(_CLEAN, clock.now(), limit)
        return removed
