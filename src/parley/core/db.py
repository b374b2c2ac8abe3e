"""The database of one process: its two engines, and where they connect.

`parley_app` serves requests and is subject to row-level security; `parley_system` is for sign-in look-ups and for the
log's own machinery. Transactions are units of work (`unit_of_work.py`).
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from parley.core.catalogue import ROLE_FAULTS, version_fault
from parley.core.scope import Scope
from parley.core.settings import DatabaseSettings
from parley.core.unit_of_work import (
    APP_ROLE,
    SYSTEM_ROLE,
    BoundConnection,
    MissingScope,
    ScopedAsyncSession,
    SystemAsyncSession,
    Transaction,
    UnitOfWork,
    is_connection_lost,
)

__all__ = [
    "APP_ROLE",
    "OWNER_ROLE",
    "SYSTEM_ROLE",
    "Database",
    "DatabaseUrls",
    "MissingScope",
    "UnitOfWork",
    "asyncpg_dsn",
    "check_runtime_roles",
    "check_version",
    "is_connection_lost",
]

OWNER_ROLE = "parley_owner"


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


# A process that is frozen in a transaction holds its locks no longer than this: others take its replies over.
_SERVER_SETTINGS = {"idle_in_transaction_session_timeout": "10s"}


def _engine(url: str, *, size: int, settings: DatabaseSettings, pooled: bool) -> AsyncEngine:
    dsn = asyncpg_dsn(url)
    # Behind a pooler in transaction mode a prepared statement may meet another server connection,
    # and a pooler refuses settings that it does not know.
    cache: dict[str, Any] = {"statement_cache_size": 0} if pooled else {"server_settings": _SERVER_SETTINGS}
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
        self._listeners: dict[str, list[Callable[[Any], None]]] = {}

    async def close(self) -> None:
        """Close every pooled connection."""
        await self.app.dispose()
        await self.system.dispose()

    def listen(self, name: str, listener: Callable[[Any], None]) -> Callable[[], None]:
        """Call `listener` with each value signalled by a unit that has committed; it must not fail or block.

        Returns how to stop.
        """
        self._listeners.setdefault(name, []).append(listener)
        return partial(self._listeners[name].remove, listener)

    def tell(self, name: str, value: object) -> None:
        """Hand a value to those who listen to `name`. Units do it after their commit."""
        for listener in list(self._listeners.get(name, ())):
            listener(value)

    def unit_of_work(self, scope: Scope, *, snapshot: bool = False) -> AbstractAsyncContextManager[UnitOfWork]:
        """Open a transaction bound to a scope.

        `snapshot`: REPEATABLE READ and read-only, for a state that several statements read together.
        Raises `Unavailable` when the database is away, `OutcomeUnknown` when it went away in COMMIT.
        """
        info = {"scope": scope, "become": self.urls.become}
        unit = UnitOfWork(self.app, ScopedAsyncSession, info, tell=self.tell, snapshot=snapshot)
        return Transaction(unit, self._app_turns)

    def system_unit_of_work(self) -> AbstractAsyncContextManager[UnitOfWork]:
        """Open a transaction of the system role. Only classes named `Unscoped…` and the log's machinery may."""
        unit = UnitOfWork(self.system, SystemAsyncSession, {"become": self.urls.become}, tell=self.tell)
        return Transaction(unit, self._system_turns)

    async def connect_system(self) -> asyncpg.Connection:
        """Return an own, unpooled connection of the system role; the caller closes it."""
        connection = await _connect(
            asyncpg_dsn(self.urls.direct), timeout=self.settings.connect_timeout_s, server_settings=_SERVER_SETTINGS
        )
        if self.urls.become:
            await connection.execute(f"SET ROLE {SYSTEM_ROLE}")
        return connection


async def check_runtime_roles(database: Database) -> Sequence[str]:
    """Return what is wrong with the roles that serve requests: production refuses to start on any of it."""
    problems: list[str] = []
    for label, engine in (("PARLEY_DATABASE_URL", database.app), ("PARLEY_DATABASE_SYSTEM_URL", database.system)):
        async with engine.connect() as connection:
            faults = (await connection.execute(text(ROLE_FAULTS))).all()
        for row in faults:
            problems.append(f"{label} {row.fault}: use a plain role (`parley db init`)")
            # The worst two bring all the others with them.
            if row.rank <= 2:
                break
    return problems


async def check_version(database: Database) -> str | None:
    """Return what is wrong with the release of PostgreSQL, or None."""
    async with database.system.connect() as connection:
        return version_fault(int((await connection.execute(text("SHOW server_version_num"))).scalar_one()))
