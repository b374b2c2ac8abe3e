"""The database: two engines, the unit of work, and the binding of the workspace to every transaction.

`parley_app` serves requests and is subject to row-level security; `parley_system` is for sign-in look-ups and for the
log's own machinery. `after_begin` binds workspace and user with transaction scope, so a commit in between, a
savepoint or a pooled connection can never carry them over (decision 0003).
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit
from uuid import UUID, uuid4

import asyncpg
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlmodel import Session
from sqlmodel.ext.asyncio.session import AsyncSession

from parley.core.errors import OutcomeUnknown, Unavailable
from parley.core.scope import Scope
from parley.core.settings import DatabaseSettings

logger = logging.getLogger(__name__)

APP_ROLE = "parley_app"
SYSTEM_ROLE = "parley_system"
OWNER_ROLE = "parley_owner"

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


class _ScopedAsyncSession(AsyncSession):
    sync_session_class: type[Session] = ScopedSession


class _SystemAsyncSession(AsyncSession):
    sync_session_class: type[Session] = SystemSession


@event.listens_for(ScopedSession, "after_begin")
def _bind_scope(session: ScopedSession, _transaction: object, connection: Any) -> None:
    scope = session.info.get("scope")
    if not isinstance(scope, Scope):
        raise MissingScope
    # Two UUIDs, so the text holds nothing that a caller could have written.
    prologue = _BIND.format(workspace=UUID(int=scope.workspace_id.int), user=UUID(int=scope.user_id.int))
    if session.info["become"]:
        prologue += "; " + _BECOME.format(role=APP_ROLE)
    connection.connection.driver_connection.prologue = prologue


@event.listens_for(SystemSession, "after_begin")
def _become_system(session: SystemSession, _transaction: object, connection: Any) -> None:
    if session.info["become"]:
        connection.connection.driver_connection.prologue = _BECOME.format(role=SYSTEM_ROLE)


@event.listens_for(ScopedSession, "after_rollback")
@event.listens_for(SystemSession, "after_rollback")
def _forget_actions(session: Session) -> None:
    session.info["after_commit"].clear()


class UnitOfWork:
    """One transaction: it commits when the block ends well, then runs what was to happen after the commit."""

    def __init__(self, session: AsyncSession) -> None:
        self.session = session
        # In the session, so that a rollback forgets what was to be announced.
        self._after_commit: list[Callable[[], None]] = session.sync_session.info.setdefault("after_commit", [])

    @property
    def scope(self) -> Scope:
        """The scope that the transaction is bound to. A unit of the system role has none: `MissingScope`."""
        scope = self.session.info.get("scope")
        if not isinstance(scope, Scope):
            raise MissingScope
        return scope

    async def connection(self) -> AsyncConnection:
        """Return the connection, its transaction begun and bound. Reads are Core statements on it."""
        return await self.session.connection()

    async def driver(self) -> asyncpg.Connection:
        """Return asyncpg's own connection inside the same transaction, for the paths that are written in SQL."""
        raw = await (await self.session.connection()).get_raw_connection()
        adapter: Any = raw.dbapi_connection
        # SQLAlchemy sends BEGIN with the first statement that it executes itself; here it may not execute any.
        if adapter._transaction is None:
            try:
                await adapter._start_transaction()
            except adapter.dbapi.Error as error:
                raise (error.__cause__ or error) from None
        return cast("asyncpg.Connection", raw.driver_connection)

    def after_commit(self, action: Callable[[], None]) -> None:
        """Run `action` right after the commit, before anything else can be awaited. It must not fail or block."""
        self._after_commit.append(action)

    async def _finish(self) -> None:
        try:
            await self.session.commit()
        except (SQLAlchemyError, OSError) as error:
            if is_connection_lost(error):
                raise OutcomeUnknown(retry_after_s=1) from error
            raise
        for action in self._after_commit:
            action()


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


@dataclass(frozen=True, slots=True)
class DatabaseUrls:
    """Where each role connects. `become` says that one login serves all and each transaction sets its role."""

    app: str
    system: str
    owner: str
    direct: str
    become: bool = False
    pooled: bool = False

    @property
    def name(self) -> str:
        """The database's name."""
        return unquote(urlsplit(self.app).path.removeprefix("/")) or "postgres"

    @classmethod
    def from_settings(cls, database: DatabaseSettings) -> "DatabaseUrls":
        """Fill in what was left out from the one address that is there."""
        if not database.url:
            raise ValueError("no database address")
        become = database.system_url is None or database.owner_url is None
        system = database.system_url or database.url
        return cls(
            app=database.url,
            system=system,
            owner=database.owner_url or database.direct_url or database.url,
            direct=database.direct_url or system,
            become=become,
            pooled=database.direct_url is not None,
        )


def asyncpg_dsn(url: str) -> str:
    """Return the address as asyncpg takes it: `postgresql://`, `sslmode` kept, other drivers' names removed."""
    parts = urlsplit(url)
    query = [(k, v) for k, v in parse_qsl(parts.query) if k != "channel_binding"]
    return urlunsplit(("postgresql", parts.netloc, parts.path, urlencode(query, safe="/"), ""))


async def _connect(dsn: str, **options: Any) -> asyncpg.Connection:
    try:
        return await asyncpg.connect(dsn, **options)
    except (OSError, TimeoutError) as error:
        # A missing socket is a FileNotFoundError, an unknown host a gaierror: here they mean one thing.
        raise ConnectionError("the database cannot be reached") from error


def _engine(url: str, *, size: int, settings: DatabaseSettings, pooled: bool) -> AsyncEngine:
    dsn = asyncpg_dsn(url)
    # Behind a pooler in transaction mode a prepared statement may meet another server connection.
    cache: dict[str, Any] = {"statement_cache_size": 0} if pooled else {}
    name = {"prepared_statement_name_func": lambda: f"__p_{uuid4()}__"} if pooled else {}

    async def connect(*_: object, **__: object) -> asyncpg.Connection:
        return await _connect(
            dsn,
            timeout=settings.connect_timeout_s,
            command_timeout=settings.statement_timeout_s,
            connection_class=BoundConnection,
            **cache,
        )

    engine = create_async_engine(
        "postgresql+asyncpg://",
        poolclass=AsyncAdaptedQueuePool,
        pool_size=size,
        max_overflow=0,
        pool_timeout=2,
        pool_use_lifo=True,
        # They would be in the text of every error, and so in the log.
        hide_parameters=True,
        connect_args={"async_creator_fn": connect, **({"prepared_statement_cache_size": 0} if pooled else {}), **name},
    )
    event.listen(engine.sync_engine, "checkin", _drop_prologue)
    return engine


def _drop_prologue(connection: Any, _record: object) -> None:
    # A transaction that was never begun leaves its binding behind; connections that are gone come as None.
    if connection is not None:
        connection.driver_connection.prologue = ""


class Database:
    """The engines of one process. Built in `create_app`, closed by its lifespan."""

    def __init__(self, urls: DatabaseUrls, settings: DatabaseSettings) -> None:
        self.urls = urls
        self.settings = settings
        self.app: AsyncEngine = _engine(urls.app, size=settings.pool_size, settings=settings, pooled=urls.pooled)
        self.system: AsyncEngine = _engine(
            urls.system, size=settings.system_pool_size, settings=settings, pooled=urls.pooled
        )
        # First come, first served: SQLAlchemy's pool lets a newcomer pass those who wait, for seconds under load.
        self._app_turns = asyncio.Semaphore(settings.pool_size)
        self._system_turns = asyncio.Semaphore(settings.system_pool_size)

    async def close(self) -> None:
        """Close every pooled connection."""
        await self.app.dispose()
        await self.system.dispose()

    def unit_of_work(self, scope: Scope, *, snapshot: bool = False) -> AbstractAsyncContextManager[UnitOfWork]:
        """Open a transaction bound to a scope.

        `snapshot`: REPEATABLE READ and read-only, for a state that several statements read together.
        Raises `Unavailable` when the database is away, `OutcomeUnknown` when it went away in COMMIT.
        """
        engine = self.app.execution_options(isolation_level="REPEATABLE READ") if snapshot else self.app
        session = _ScopedAsyncSession(engine, expire_on_commit=False, autoflush=False)
        session.sync_session.info.update(scope=scope, become=self.urls.become)
        return _Transaction(session, self._app_turns)

    def system_unit_of_work(self) -> AbstractAsyncContextManager[UnitOfWork]:
        """Open a transaction of the system role. Only classes named `Unscoped…` and the log's machinery may."""
        session = _SystemAsyncSession(self.system, expire_on_commit=False, autoflush=False)
        session.sync_session.info.update(become=self.urls.become)
        return _Transaction(session, self._system_turns)

    async def connect_system(self) -> asyncpg.Connection:
        """Return an own, unpooled connection of the system role; the caller closes it."""
        connection = await _connect(asyncpg_dsn(self.urls.direct), timeout=self.settings.connect_timeout_s)
        if self.urls.become:
            await connection.execute(f"SET ROLE {SYSTEM_ROLE}")
        return connection


# All that asyncpg and SQLAlchemy raise: `InternalClientError` is in none of asyncpg's families.
_DATABASE_ERRORS = (
    SQLAlchemyError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)


class _Transaction:
    """The block of a unit of work: a turn at the pool, a session, and the commit or what comes instead.

    A class and not a chain of generators: it is entered for every request.
    """

    __slots__ = ("_session", "_turns", "_unit")

    def __init__(self, session: AsyncSession, turns: asyncio.Semaphore) -> None:
        self._session = session
        self._turns = turns
        self._unit = UnitOfWork(session)

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
                await self._session.close()
            finally:
                self._turns.release()

    async def _settle(self, error: BaseException) -> None:
        """Keep a connection that cannot be used any more out of the pool, and say so if the database is away."""
        if isinstance(error, asyncio.CancelledError):
            # Cut off in BEGIN, a connection is in a transaction that nobody knows of: what comes next on it would be
            # a savepoint, and never be committed.
            await asyncio.shield(self._session.invalidate())
        elif isinstance(error, _DATABASE_ERRORS) and is_connection_lost(error):
            # What went past SQLAlchemy has told it nothing.
            await self._session.invalidate()
            raise Unavailable("The database is not available.", retry_after_s=2) from error


async def check_runtime_roles(database: Database) -> Sequence[str]:
    """Return what is wrong with the roles that serve requests: production refuses to start on any of it."""
    problems: list[str] = []
    for label, engine in (("PARLEY_DATABASE_URL", database.app), ("PARLEY_DATABASE_SYSTEM_URL", database.system)):
        async with engine.connect() as connection:
            row = (
                await connection.execute(
                    text(
                        "SELECT rolsuper OR rolbypassrls AS privileged, "
                        "EXISTS (SELECT 1 FROM pg_class WHERE relowner = r.oid AND relname = 'workspaces') AS owner "
                        "FROM pg_roles r WHERE rolname = current_user"
                    )
                )
            ).one()
        if row.privileged:
            problems.append(f"{label} logs in as a superuser or with BYPASSRLS: use a plain role (`parley db init`)")
        if row.owner:
            problems.append(f"{label} logs in as the owner of the tables: use parley_app or parley_system")
    return problems
