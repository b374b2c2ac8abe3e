"""The unit of work: one transaction, and the binding of the workspace to it.

What binds a transaction goes out together with its BEGIN and ends with it, so a commit in between, a savepoint or a
pooled connection can never carry it over (decision 0003).
"""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, cast
from uuid import UUID

import asyncpg
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.util.concurrency import greenlet_spawn
from sqlmodel import Session
from sqlmodel.ext.asyncio.session import AsyncSession

from parley.core.errors import OutcomeUnknown, Unavailable
from parley.core.scope import Scope

APP_ROLE = "parley_app"
SYSTEM_ROLE = "parley_system"

_TURN_S = 2.0

_BIND = "SELECT set_config('app.workspace_id', '{workspace}', true), set_config('app.user_id', '{user}', true)"
_BECOME = "SELECT set_config('role', '{role}', true)"


class MissingScope(Exception):
    """A scoped session was opened without a scope: a fault in our code, found before the first query."""


class BoundConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """A connection that sends what binds a transaction together with its BEGIN: one round trip for both.

    `prologue` is for the next transaction only.
    """

    prologue = ""

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """Execute, as asyncpg does; a BEGIN takes the prologue with it."""
        if self.prologue and query.startswith("BEGIN"):
            query, self.prologue = query + self.prologue, ""
        status: str = await super().execute(query, *args, timeout=timeout)
        return status


class ScopedSession(Session):
    """A session whose every transaction is bound to one workspace and user."""


class SystemSession(Session):
    """A session of the system role, which no workspace bounds."""


class ScopedAsyncSession(AsyncSession):
    sync_session_class: type[Session] = ScopedSession


class SystemAsyncSession(AsyncSession):
    sync_session_class: type[Session] = SystemSession


def _scoped_prologue(info: Mapping[Any, Any]) -> str:
    scope = info.get("scope")
    if not isinstance(scope, Scope):
        raise MissingScope
    # Two UUIDs, so the text holds nothing that a caller could have written.
    prologue = _BIND.format(workspace=UUID(int=scope.workspace_id.int), user=UUID(int=scope.user_id.int))
    return prologue + "; " + _BECOME.format(role=APP_ROLE) if info["become"] else prologue


def _system_prologue(info: Mapping[Any, Any]) -> str:
    return _BECOME.format(role=SYSTEM_ROLE) if info["become"] else ""


@event.listens_for(ScopedSession, "after_begin")
def _bind_scope(session: ScopedSession, _transaction: object, connection: Any) -> None:
    connection.connection.driver_connection.prologue = _scoped_prologue(session.info)


@event.listens_for(SystemSession, "after_begin")
def _become_system(session: SystemSession, _transaction: object, connection: Any) -> None:
    connection.connection.driver_connection.prologue = _system_prologue(session.info)


@event.listens_for(ScopedSession, "after_rollback")
@event.listens_for(SystemSession, "after_rollback")
def _forget_actions(session: Session) -> None:
    session.info["after_commit"].clear()


class _DriverTransaction:
    """A transaction on a pooled connection without a session: what most requests need, at a third of the cost.

    Begun through SQLAlchemy's own adapter, so that a session can go on in it.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._pooled: Any = None
        self._connection: AsyncConnection | None = None

    async def begin(self, prologue: str) -> None:
        """Take a connection from the pool and begin, bound by the prologue."""
        self._pooled = await greenlet_spawn(self._engine.sync_engine.raw_connection)
        self._pooled.driver_connection.prologue = prologue
        await _start(self._pooled.dbapi_connection)

    @property
    def driver(self) -> asyncpg.Connection:
        """Asyncpg's connection."""
        return cast("asyncpg.Connection", self._pooled.driver_connection)

    @property
    def connection(self) -> AsyncConnection:
        """SQLAlchemy's connection, for a session to be bound to."""
        if self._connection is None:
            self._connection = AsyncConnection(
                self._engine, Connection(self._engine.sync_engine, connection=self._pooled)
            )
        return self._connection

    async def commit(self) -> None:
        """Commit. Raises what asyncpg raises."""
        adapter = self._pooled.dbapi_connection
        transaction, adapter._transaction = adapter._transaction, None
        await transaction.commit()

    async def close(self) -> None:
        """Give the connection back; a transaction that was not committed is rolled back."""
        if self._pooled is None:
            return
        if self._connection is not None:
            await self._connection.close()
        elif self._pooled.dbapi_connection is None or self._pooled.dbapi_connection._transaction is None:
            # Nothing to wait for.
            self._pooled.close()
        else:
            await greenlet_spawn(self._pooled.close)

    async def invalidate(self) -> None:
        """Close the connection instead of giving it back."""
        if self._connection is not None:
            await self._connection.invalidate()
        elif self._pooled is not None:
            await greenlet_spawn(self._pooled.invalidate)


async def _start(adapter: Any) -> None:
    try:
        await adapter._start_transaction()
    except adapter.dbapi.Error as error:
        raise (error.__cause__ or error) from None


class UnitOfWork:
    """One transaction: it commits when the block ends well, then runs what was to happen after the commit."""

    def __init__(
        self,
        engine: AsyncEngine,
        kind: type[AsyncSession],
        info: dict[Any, Any],
        *,
        tell: Callable[[str, object], None],
        snapshot: bool = False,
    ) -> None:
        self._engine = engine
        self._kind = kind
        self._info = info
        self._tell = tell
        self._snapshot = snapshot
        self._session: AsyncSession | None = None
        self._plain: _DriverTransaction | None = None
        # In what the session knows, so that a rollback forgets what was to be announced.
        self._after_commit: list[Callable[[], None]] = info.setdefault("after_commit", [])

    @property
    def scope(self) -> Scope:
        """The scope that the transaction is bound to. A unit of the system role has none: `MissingScope`."""
        scope = self._info.get("scope")
        if not isinstance(scope, Scope):
            raise MissingScope
        return scope

    @property
    def session(self) -> AsyncSession:
        """The session, made when it is first asked for."""
        if self._session is None:
            engine = self._engine
            if self._snapshot:
                engine = engine.execution_options(isolation_level="REPEATABLE READ")
            bind = self._plain.connection if self._plain is not None else engine
            self._session = self._kind(bind, expire_on_commit=False, autoflush=False)
            self._session.sync_session.info.update(self._info)
        return self._session

    async def connection(self) -> AsyncConnection:
        """Return the connection, its transaction begun and bound. Reads are Core statements on it."""
        return await self.session.connection()

    async def driver(self) -> asyncpg.Connection:
        """Return asyncpg's own connection inside the same transaction, for the paths that are written in SQL."""
        if self._session is None and not self._snapshot:
            if self._plain is None:
                plain = self._plain = _DriverTransaction(self._engine)
                system = issubclass(self._kind, SystemAsyncSession)
                await plain.begin(_system_prologue(self._info) if system else _scoped_prologue(self._info))
            return self._plain.driver
        raw = await (await self.session.connection()).get_raw_connection()
        adapter: Any = raw.dbapi_connection
        # SQLAlchemy sends BEGIN with the first statement that it executes itself; here it may not execute any.
        if adapter._transaction is None:
            await _start(adapter)
        return cast("asyncpg.Connection", raw.driver_connection)

    def after_commit(self, action: Callable[[], None]) -> None:
        """Run `action` right after the commit, before anything else can be awaited. It must not fail or block."""
        self._after_commit.append(action)

    def signal(self, name: str, value: object = None) -> None:
        """Tell those of this process who listen to `name` (`Database.listen`), right after the commit."""
        self.after_commit(partial(self._tell, name, value))

    async def _finish(self) -> None:
        try:
            if self._session is not None:
                await self._session.commit()
            elif self._plain is not None:
                await self._plain.commit()
        except _DATABASE_ERRORS as error:
            if is_connection_lost(error):
                raise OutcomeUnknown(retry_after_s=1) from error
            raise
        for action in self._after_commit:
            action()

    async def _close(self) -> None:
        try:
            if self._session is not None:
                await self._session.close()
        finally:
            if self._plain is not None:
                await self._plain.close()

    async def _invalidate(self) -> None:
        if self._plain is not None:
            await self._plain.invalidate()
        elif self._session is not None:
            await self._session.invalidate()


# All that asyncpg and SQLAlchemy raise: `InternalClientError` is in none of asyncpg's families.
_DATABASE_ERRORS = (
    SQLAlchemyError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)


def is_connection_lost(error: BaseException) -> bool:
    """Whether the database is away, as opposed to having refused a statement."""
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return True
        error = error.orig.__cause__ or error.orig if error.orig is not None else error
    if isinstance(error, asyncpg.InterfaceError):
        # asyncpg says the same of a connection that is gone and of an argument that does not fit.
        return "closed" in str(error) or "released" in str(error)
    return isinstance(
        error,
        ConnectionError
        | TimeoutError
        | PoolTimeout
        | asyncpg.CannotConnectNowError
        | asyncpg.PostgresConnectionError
        | asyncpg.InternalClientError
        | asyncpg.AdminShutdownError
        | asyncpg.CrashShutdownError
        | asyncpg.TooManyConnectionsError,
    )


class Transaction:
    """The block of a unit of work: a turn at the pool, and the commit or what comes instead.

    A class and not a chain of generators: it is entered for every request.
    """

    __slots__ = ("_turns", "_unit")

    def __init__(self, unit: UnitOfWork, turns: asyncio.Semaphore) -> None:
        self._turns = turns
        self._unit = unit

    async def __aenter__(self) -> UnitOfWork:
        if self._turns.locked():
            # Not for long: a caller is better told than kept.
            try:
                async with asyncio.timeout(_TURN_S):
                    await self._turns.acquire()
            except TimeoutError:
                raise Unavailable("The database is busy.", retry_after_s=1) from None
        else:
            await self._turns.acquire()
        return self._unit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                try:
                    await self._unit._finish()
                except BaseException as failed:
                    await self._settle(failed)
                    raise
            else:
                await self._settle(error)
        finally:
            try:
                await self._unit._close()
            finally:
                self._turns.release()

    async def _settle(self, error: BaseException) -> None:
        """Keep a connection that cannot be used any more out of the pool, and say so if the database is away."""
        if isinstance(error, asyncio.CancelledError):
            # Cut off in BEGIN, a connection is in a transaction that nobody knows of: what comes next on it would be
            # a savepoint, and never be committed.
            await asyncio.shield(self._unit._invalidate())
        elif isinstance(error, _DATABASE_ERRORS) and is_connection_lost(error):
            # What went past SQLAlchemy has told it nothing.
            await self._unit._invalidate()
            raise Unavailable("The database is not available.", retry_after_s=2) from error
