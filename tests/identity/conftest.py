"""Identity on a fresh database, without HTTP."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import event

from parley.core.db import Database
from parley.core.revocations import Revocations
from parley.core.settings import Settings
from parley.identity.schemas import TokenAnswer
from parley.identity.service import IdentityService
from parley.identity.setup import Identity, build_identity

SECRET = "the key of these tests, long enough"
PASSWORD = "correct horse 1"


@pytest.fixture
async def identity(database: Database, settings: Settings) -> AsyncIterator[Identity]:
    revocations = Revocations(database)
    await revocations.start()
    made = build_identity(database, settings, (SECRET,), revocations=revocations)
    yield made
    await made.close()
    await revocations.close()


@pytest.fixture
def service(identity: Identity) -> IdentityService:
    return identity.service


@pytest.fixture
async def ada(service: IdentityService) -> TokenAnswer:
    return await sign_up(service)


async def sign_up(
    service: IdentityService,
    *,
    email: str = "ada@example.com",
    password: str = PASSWORD,
    name: str | None = None,
) -> TokenAnswer:
    """Sign someone up where nothing has to be confirmed first."""
    answer = await service.sign_up(email=email, password=password, name=name)
    assert answer is not None
    return answer


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """Record what either role sends inside the block; BEGIN, COMMIT and the binding of the workspace left out."""
    sent: list[str] = []

    def record(_c: object, _cursor: object, statement: str, *_: object) -> None:
        if "set_config" not in statement:
            sent.append(statement)

    engines = [database.app.sync_engine, database.system.sync_engine]
    for engine in engines:
        event.listen(engine, "before_cursor_execute", record)
    yield sent
    for engine in engines:
        event.remove(engine, "before_cursor_execute", record)
