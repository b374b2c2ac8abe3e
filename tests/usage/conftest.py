from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from benchmarks.fake_provider import FakeProvider
from parley.core.http import create_http_client
from parley.core.scope import Role, Scope
from parley.jobs.registry import JobRun, Periodic
from parley.usage.service import UsageService
from tests.chat.books import Books
from tests.conftest import Account


@pytest.fixture
async def provider() -> AsyncIterator[FakeProvider]:
    async with FakeProvider() as provider:
        yield provider


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    client = create_http_client()
    yield client
    await client.aclose()


@pytest.fixture
def usage(app: FastAPI) -> UsageService:
    found: UsageService = app.state.usage
    return found


@pytest.fixture
def books(admin: asyncpg.Connection) -> Books:
    return Books(admin)


@pytest.fixture
def scope(alice: Account) -> Scope:
    return Scope(alice.workspace_id, alice.user_id, Role.OWNER)


@pytest.fixture
def swept_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The application leaves expired reservations to the test: its own sweep is due whenever the clock is shifted."""

    async def nothing(_: JobRun) -> dict[str, Any]:
        return {}

    monkeypatch.setattr("parley.main.sweep_of", lambda *_: Periodic("usage.sweep", timedelta(minutes=1), nothing))
