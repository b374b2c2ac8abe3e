"""What has ended is refused in every process, whichever way it ended and whether or not anyone hears of it."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta

import asyncpg
import pytest

from parley.core import clock
from parley.core.db import Database
from parley.core.errors import Unauthenticated
from parley.core.revocations import Revocation, Revocations
from parley.core.scope import Role, Scope
from parley.core.settings import Settings
from parley.identity.errors import SessionRevoked, TokenInvalid
from parley.identity.one_time_tokens import Purpose
from parley.identity.schemas import TokenAnswer
from parley.identity.setup import Identity, build_identity
from parley.tenancy.service import UnscopedWorkspaces
from tests.identity.conftest import PASSWORD, SECRET, sign_up
from tests.jobs.conftest import until


@dataclass
class Process:
    """What one process has of identity."""

    identity: Identity
    revocations: Revocations
    database: Database

    async def takes(self, token: str) -> bool:
        try:
            await self.identity.authenticator.authenticate(token)
        except Unauthenticated:
            return False
        return True


@pytest.fixture
async def processes(database: Database, settings: Settings) -> AsyncIterator[tuple[Process, Process]]:
    made = []
    for _ in range(2):
        revocations = Revocations(database)
        identity = build_identity(database, settings, (SECRET,), revocations=revocations)
        await revocations.start()
        made.append(Process(identity, revocations, database))
    yield made[0], made[1]
    async with AsyncExitStack() as stack:
        for process in made:
            stack.push_async_callback(process.identity.close)
            stack.push_async_callback(process.revocations.close)


async def scope_of(process: Process, token: str) -> Scope:
    return (await process.identity.authenticator.authenticate(token)).scope


async def sign_out(process: Process, ada: TokenAnswer) -> None:
    await process.identity.service.sessions.sign_out(ada.access_token)


async def revoke_one(process: Process, ada: TokenAnswer) -> None:
    scope = await scope_of(process, ada.access_token)
    assert scope.session_id is not None
    await process.identity.service.sessions.revoke(scope, scope.session_id)


async def revoke_all(process: Process, ada: TokenAnswer) -> None:
    await process.identity.service.sessions.revoke_all(await scope_of(process, ada.access_token), keep_current=False)


async def change_elsewhere(process: Process, ada: TokenAnswer) -> None:
    other = await process.identity.service.sign_in(email=str(ada.user.email), password=PASSWORD)
    scope = await scope_of(process, other.access_token)
    await process.identity.password_service.change(scope, current_password=PASSWORD, password="another horse 2")


async def reset(process: Process, ada: TokenAnswer) -> None:
    async with process.database.system_unit_of_work() as unit:
        token = await process.identity.one_time_tokens.mint(
            unit, ada.user.id, Purpose.RESET_PASSWORD, life=timedelta(minutes=30), email=ada.user.email
        )
    await process.identity.password_service.reset(token, "another horse 2")


async def reuse(process: Process, ada: TokenAnswer) -> None:
    await process.identity.service.sessions.refresh(ada.refresh_token)
    with clock.shifted(31):
        with pytest.raises(SessionRevoked):
            await process.identity.service.sessions.refresh(ada.refresh_token)


async def switch(process: Process, ada: TokenAnswer) -> None:
    scope = await scope_of(process, ada.access_token)
    async with process.database.system_unit_of_work() as unit:
        another = await UnscopedWorkspaces(unit).create_personal(ada.user.id, owner_name="Another")
    await process.identity.service.sessions.switch(scope, another.id)


Ends = Callable[[Process, TokenAnswer], Awaitable[None]]


@pytest.mark.parametrize("ends", [sign_out, revoke_one, revoke_all, change_elsewhere, reset, reuse, switch])
async def test_each_end_is_heard_everywhere(processes: tuple[Process, Process], ends: Ends) -> None:
    here, there = processes
    ada, bob = await sign_up(here.identity.service), await sign_up(here.identity.service, email="bob@example.com")
    for process in processes:
        assert await process.takes(ada.access_token)
        assert await process.takes(bob.access_token)
    await ends(here, ada)
    # Here at once.
    assert not await here.takes(ada.access_token)
    began = time.monotonic()

    async def refused() -> bool:
        return not await there.takes(ada.access_token)

    await until(refused)
    assert time.monotonic() - began < 2
    for process in processes:
        assert await process.takes(bob.access_token)


async def test_without_the_announcement_the_memory_would_be_seen(
    processes: tuple[Process, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = processes
    ada = await sign_up(here.identity.service)
    assert await there.takes(ada.access_token)

    async def silent(*_: object) -> None:
        pass

    monkeypatch.setattr(Revocations, "announce", silent)
    await sign_out(here, ada)
    with clock.shifted(25):
        assert await there.takes(ada.access_token)
    with clock.shifted(31):
        assert not await there.takes(ada.access_token)


async def test_while_nothing_is_heard_a_session_is_remembered_for_less_than_a_second(
    processes: tuple[Process, Process], admin: asyncpg.Connection
) -> None:
    here, there = processes
    ada = await sign_up(here.identity.service)
    await there.revocations.close()
    for process in processes:
        assert await process.takes(ada.access_token)
    # By hand: nobody announces it.
    await admin.execute("UPDATE sessions SET revoked_at = now()")
    with clock.shifted(0.9):
        assert await here.takes(ada.access_token)
        assert not await there.takes(ada.access_token)


async def test_when_it_is_heard_again_everything_is_looked_up_anew(
    processes: tuple[Process, Process], admin: asyncpg.Connection
) -> None:
    here, there = processes
    ada = await sign_up(here.identity.service)
    for process in processes:
        assert await process.takes(ada.access_token)
    await admin.execute("UPDATE sessions SET revoked_at = now()")
    there.identity.authenticator._standings.forget_all()
    assert await here.takes(ada.access_token)
    assert not await there.takes(ada.access_token)


@pytest.mark.parametrize("kind", ["user", "membership", "workspace"])
async def test_a_role_that_changed_counts_once_it_is_announced(
    processes: tuple[Process, Process], admin: asyncpg.Connection, kind: str
) -> None:
    here, there = processes
    ada = await sign_up(here.identity.service)
    for process in processes:
        assert (await scope_of(process, ada.access_token)).role is Role.OWNER
    await admin.execute("UPDATE memberships SET role = 'viewer'")
    revocation = {
        "user": Revocation("user", ada.user.id),
        "membership": Revocation("membership", ada.workspace.id, ada.user.id),
        "workspace": Revocation("workspace", ada.workspace.id),
    }[kind]
    async with here.database.system_unit_of_work() as unit:
        await here.revocations.announce(unit, revocation)
    assert (await scope_of(here, ada.access_token)).role is Role.VIEWER

    async def changed() -> bool:
        return (await scope_of(there, ada.access_token)).role is Role.VIEWER

    await until(changed)


async def test_a_session_whose_workspace_is_another_now_is_not_the_tokens(
    processes: tuple[Process, Process], admin: asyncpg.Connection
) -> None:
    here, _ = processes
    ada, bob = await sign_up(here.identity.service), await sign_up(here.identity.service, email="bob@example.com")
    assert await here.takes(ada.access_token)
    await admin.execute(
        "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, 'member')", bob.workspace.id, ada.user.id
    )
    await admin.execute("UPDATE sessions SET workspace_id = $1 WHERE user_id = $2", bob.workspace.id, ada.user.id)
    here.identity.authenticator.forget(Revocation("membership", ada.workspace.id, ada.user.id))
    with pytest.raises(TokenInvalid):
        await here.identity.authenticator.authenticate(ada.access_token)
