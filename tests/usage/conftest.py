from collections.abc import AsyncIterator

import httpx
import pytest

from benchmarks.fake_provider import FakeProvider
from parley.core.http import create_http_client


@pytest.fixture
async def provider() -> AsyncIterator[FakeProvider]:
    async with FakeProvider() as provider:
        yield provider


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    client = create_http_client()
    yield client
    await client.aclose()
