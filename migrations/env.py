"""Alembic's environment: migrations run as parley_owner, one process at a time, and never wait long for a lock."""

import asyncio

import asyncpg
from alembic import context
from sqlalchemy import Connection, pool, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import SQLModel

import parley.model_registry  # noqa: F401 - fills the metadata
from parley.core.db import OWNER_ROLE, DatabaseUrls, asyncpg_dsn
from parley.core.settings import load_settings

LOCK = 7_265_361  # any number that nothing else uses


def _urls() -> DatabaseUrls:
    given = context.config.attributes.get("urls")
    return given if isinstance(given, DatabaseUrls) else DatabaseUrls.from_settings(load_settings().database)


def _run(connection: Connection, *, become: bool) -> None:
    if become:
        connection.execute(text(f"SET ROLE {OWNER_ROLE}"))
    connection.execute(text("SET lock_timeout = '5s'"))
    connection.execute(text("SET statement_timeout = '10min'"))
    connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
    connection.commit()
    context.configure(connection=connection, target_metadata=SQLModel.metadata, compare_server_default=False)
    with context.begin_transaction():
        context.run_migrations()


async def _main() -> None:
    urls = _urls()

    async def connect(*_: object, **__: object) -> asyncpg.Connection:
        # The driver reads the address itself: it knows parameters that would be unknown arguments otherwise.
        return await asyncpg.connect(asyncpg_dsn(urls.owner))

    engine = create_async_engine(
        "postgresql+asyncpg://", poolclass=pool.NullPool, connect_args={"async_creator_fn": connect}
    )
    async with engine.connect() as connection:
        await connection.run_sync(lambda sync: _run(sync, become=urls.become))
        await connection.commit()
    await engine.dispose()


if context.is_offline_mode():
    raise SystemExit("migrations run against a database: there is no offline mode")
asyncio.run(_main())
