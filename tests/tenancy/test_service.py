from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import select
from sqlmodel import col

from parley.core.db import Database
from parley.core.scope import Role, Scope
from parley.tenancy.models import Workspace
from parley.tenancy.service import UnscopedWorkspaces, membership_places
from tests.conftest import Account, SignUp


@pytest.fixture
async def ada(admin: asyncpg.Connection) -> UUID:
    user = UUID(int=1)
    await admin.execute("INSERT INTO users VALUES ($1, 'ada@example.com', 'ada@example.com', NULL, false)", user)
    return user


async def test_a_personal_workspace_has_its_owner(database: Database, ada: UUID, admin: asyncpg.Connection) -> None:
    async with database.system_unit_of_work() as unit:
        made = await UnscopedWorkspaces(unit).create_personal(ada, owner_name="Ada")
    assert (made.name, made.role) == ("Ada's workspace", Role.OWNER)
    row = await admin.fetchrow("SELECT w.id, w.name, w.personal, m.user_id, m.role FROM workspaces w, memberships m")
    assert tuple(row) == (made.id, "Ada's workspace", True, ada, "owner")


async def test_a_long_name_fits(database: Database, ada: UUID) -> None:
    async with database.system_unit_of_work() as unit:
        made = await UnscopedWorkspaces(unit).create_personal(ada, owner_name="x" * 87 + " " + "y" * 100)
    assert made.name == "x" * 87 + "'s workspace"


async def test_places_show_a_scope_nothing_of_another_workspace(
    database: Database, sign_up: SignUp, alice: Account, bob: Account
) -> None:
    """The helper is joined by other modules: row-level security bounds it as it bounds them."""
    place = membership_places()
    scope = Scope(alice.workspace_id, alice.user_id, Role.OWNER)
    async with database.unit_of_work(scope) as unit:
        rows = (await (await unit.connection()).execute(select(place.c.user_id, place.c.workspace_id))).all()
    assert [tuple(row) for row in rows] == [(alice.user_id, alice.workspace_id)]
    async with database.system_unit_of_work() as unit:
        rows = (await (await unit.connection()).execute(select(place.c.user_id))).all()
    assert len(rows) == 2


async def test_a_home_is_the_preferred_place_only_while_a_member(
    database: Database, ada: UUID, admin: asyncpg.Connection
) -> None:
    async with database.system_unit_of_work() as unit:
        workspaces = UnscopedWorkspaces(unit)
        nowhere = select(col(Workspace.id)).where(col(Workspace.name) == "nowhere").scalar_subquery()
        assert await workspaces.find_home(ada, preferred=nowhere) is None
        own = await workspaces.create_personal(ada, owner_name="Ada")
        team = UUID(int=5)
        await admin.execute("INSERT INTO workspaces VALUES ($1, 'Team', false)", team)
        preferred = select(col(Workspace.id)).where(col(Workspace.id) == team).scalar_subquery()
        assert await workspaces.find_home(ada, preferred=preferred) == own
        assert await workspaces.find_home(ada, preferred=nowhere) == own
    await admin.execute("INSERT INTO memberships VALUES ($1, $2, 'admin')", team, ada)
    async with database.system_unit_of_work() as unit:
        found = await UnscopedWorkspaces(unit).find_home(ada, preferred=preferred)
    assert found is not None
    assert (found.id, found.name, found.role) == (team, "Team", Role.ADMIN)


async def test_a_home_is_never_a_strangers(database: Database, ada: UUID, admin: asyncpg.Connection) -> None:
    """The system role sees everyone's workspaces: the condition on the user is all that keeps them apart."""
    bob = UUID(int=2)
    await admin.execute("INSERT INTO users VALUES ($1, 'bob@example.com', 'bob@example.com', NULL, false)", bob)
    async with database.system_unit_of_work() as unit:
        workspaces = UnscopedWorkspaces(unit)
        first = await workspaces.create_personal(ada, owner_name="Ada")
        second = await workspaces.create_personal(bob, owner_name="Bob")
    for user, own, other in ((ada, first, second), (bob, second, first)):
        preferred = select(col(Workspace.id)).where(col(Workspace.id) == other.id).scalar_subquery()
        async with database.system_unit_of_work() as unit:
            assert await UnscopedWorkspaces(unit).find_home(user, preferred=preferred) == own
