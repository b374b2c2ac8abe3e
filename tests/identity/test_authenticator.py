import asyncio
from uuid import UUID, uuid4

import asyncpg
import pytest

from parley.core import clock
from parley.core.db import Database, DatabaseUrls
from parley.core.errors import Unauthenticated, Unavailable
from parley.core.revocations import Revocation
from parley.core.scope import Authenticator, Role, Scope
from parley.core.settings import DatabaseSettings, Settings
from parley.identity import standings
from parley.identity.authenticator import SessionAuthenticator
from parley.identity.errors import SessionExpired, SessionRevoked, TokenExpired, TokenInvalid
from parley.identity.schemas import TokenAnswer
from parley.identity.service import IdentityService
from parley.identity.setup import Identity, build_identity
from tests.identity.conftest import PASSWORD, SECRET, statements


@pytest.fixture
def authenticator(identity: Identity) -> SessionAuthenticator:
    return identity.authenticator


async def test_it_is_what_core_asks_for(authenticator: SessionAuthenticator) -> None:
    port: Authenticator = authenticator
    for nothing in ("", "x"):
        with pytest.raises(Unauthenticated):
            await port.authenticate(nothing)


async def test_a_token_becomes_a_scope(authenticator: SessionAuthenticator, ada: TokenAnswer) -> None:
    credential = await authenticator.authenticate(ada.access_token)
    scope = credential.scope
    assert (scope.user_id, scope.workspace_id, scope.role) == (ada.user.id, ada.workspace.id, Role.OWNER)
    assert scope.subject == str(ada.user.id)
    assert scope.session_id is not None
    assert credential.expires_at == pytest.approx(clock.timestamp() + 900, abs=2)


async def test_a_session_is_looked_up_once_in_thirty_seconds(
    database: Database, authenticator: SessionAuthenticator, ada: TokenAnswer
) -> None:
    with statements(database) as sent:
        for _ in range(5):
            await authenticator.authenticate(ada.access_token)
        with clock.shifted(29):
            await authenticator.authenticate(ada.access_token)
        assert len(sent) == 1
        with clock.shifted(31):
            await authenticator.authenticate(ada.access_token)
    # Its use is written down, no more often than it is looked up.
    assert [statement.split()[0] for statement in sent] == ["SELECT", "SELECT", "UPDATE"]


async def test_requests_at_once_share_one_look_up(
    database: Database, authenticator: SessionAuthenticator, ada: TokenAnswer
) -> None:
    with statements(database) as sent:
        await asyncio.gather(*(authenticator.authenticate(ada.access_token) for _ in range(40)))
    assert len(sent) == 1


async def test_a_role_change_counts_after_the_cache(
    authenticator: SessionAuthenticator, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    await authenticator.authenticate(ada.access_token)
    await admin.execute("UPDATE memberships SET role = 'viewer'")
    with clock.shifted(31):
        assert (await authenticator.authenticate(ada.access_token)).scope.role is Role.VIEWER


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE sessions SET revoked_at = now(), revoke_reason = 'test'",
        "DELETE FROM memberships",
        "DELETE FROM sessions",
        "DELETE FROM users",
        "DELETE FROM workspaces",
    ],
)
async def test_what_has_ended_is_refused_after_the_cache_and_at_once_when_forgotten(
    authenticator: SessionAuthenticator, ada: TokenAnswer, admin: asyncpg.Connection, change: str
) -> None:
    scope = (await authenticator.authenticate(ada.access_token)).scope
    await admin.execute(change)
    with clock.shifted(31), pytest.raises(SessionRevoked):
        await authenticator.authenticate(ada.access_token)
    assert scope.session_id is not None
    authenticator.forget(Revocation("session", scope.session_id))
    with pytest.raises(SessionRevoked):
        await authenticator.authenticate(ada.access_token)
    with pytest.raises(SessionRevoked):
        await authenticator.reauthenticate(scope)


async def test_a_remembered_token_still_expires(authenticator: SessionAuthenticator, ada: TokenAnswer) -> None:
    await authenticator.authenticate(ada.access_token)
    with clock.shifted(901):
        for _ in range(2):
            with pytest.raises(TokenExpired):
                await authenticator.authenticate(ada.access_token)


async def test_a_token_of_another_workspace_than_the_session_is_refused(
    identity: Identity, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    session_id = await admin.fetchval("SELECT id FROM sessions")
    for user, workspace in ((ada.user.id, uuid4()), (uuid4(), ada.workspace.id)):
        token = identity.tokens.issue(user, workspace, session_id).token
        with pytest.raises(TokenInvalid):
            await identity.authenticator.authenticate(token)
    with pytest.raises(TokenInvalid):
        await identity.authenticator.reauthenticate(Scope(uuid4(), ada.user.id, Role.OWNER, session_id))


async def test_a_session_that_moved_is_looked_up_again(
    identity: Identity, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    await identity.authenticator.authenticate(ada.access_token)
    other = uuid4()
    await admin.execute("INSERT INTO workspaces (id, name, personal) VALUES ($1, 'Other', false)", other)
    await admin.execute("INSERT INTO memberships VALUES ($1, $2, 'member')", other, ada.user.id)
    session_id = await admin.fetchval("UPDATE sessions SET workspace_id = $1 RETURNING id", other)
    token = identity.tokens.issue(ada.user.id, other, session_id).token
    found = (await identity.authenticator.authenticate(token)).scope
    assert (found.workspace_id, found.role) == (other, Role.MEMBER)
    with pytest.raises(TokenInvalid):
        await identity.authenticator.authenticate(ada.access_token)


async def test_reauthentication_holds_for_an_access_tokens_life_within_the_session(
    authenticator: SessionAuthenticator, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    scope = (await authenticator.authenticate(ada.access_token)).scope
    weaker = Scope(scope.workspace_id, scope.user_id, Role.VIEWER, scope.session_id)
    with clock.shifted(3600):
        credential = await authenticator.reauthenticate(weaker)
        assert credential.scope == scope
        assert credential.expires_at == pytest.approx(clock.timestamp() + 900, abs=2)
    ends = await admin.fetchval(
        "UPDATE sessions SET absolute_expires_at = now() + '1 hour' RETURNING absolute_expires_at"
    )
    with clock.shifted(3600 - 60):
        credential = await authenticator.reauthenticate(weaker)
        assert credential.expires_at == pytest.approx(ends.timestamp())
    with clock.shifted(3601), pytest.raises(SessionExpired):
        await authenticator.reauthenticate(weaker)
    with pytest.raises(Unauthenticated):
        await authenticator.reauthenticate(Scope(scope.workspace_id, scope.user_id, Role.OWNER))


async def test_a_session_that_ends_while_it_is_remembered_is_refused(
    authenticator: SessionAuthenticator, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    await admin.execute("UPDATE sessions SET absolute_expires_at = now() + '10 seconds'")
    await authenticator.authenticate(ada.access_token)
    with clock.shifted(11), pytest.raises(SessionExpired):
        await authenticator.authenticate(ada.access_token)


async def wait_for_a_blocked_query(admin: asyncpg.Connection) -> None:
    while not await admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):  # noqa: ASYNC110 - PostgreSQL tells nobody
        await asyncio.sleep(0.005)


async def test_a_look_up_that_a_revocation_overtook_is_not_remembered(
    database: Database, authenticator: SessionAuthenticator, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    session_id: UUID = await admin.fetchval("SELECT id FROM sessions")
    async with admin.transaction():
        await admin.execute("LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE")
        asked = asyncio.create_task(authenticator.authenticate(ada.access_token))
        await wait_for_a_blocked_query(admin)
        authenticator.forget(Revocation("session", session_id))
    await asked
    await admin.execute("UPDATE sessions SET revoked_at = now()")
    with pytest.raises(SessionRevoked):
        await authenticator.authenticate(ada.access_token)


async def test_a_caller_that_goes_away_does_not_fail_the_others(
    authenticator: SessionAuthenticator, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    async with admin.transaction():
        await admin.execute("LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE")
        first, second = (asyncio.create_task(authenticator.authenticate(ada.access_token)) for _ in range(2))
        await wait_for_a_blocked_query(admin)
        first.cancel()
        await asyncio.wait([first])
    assert (await second).scope.user_id == ada.user.id


async def test_a_database_that_is_away_is_unavailable_and_never_401(settings: Settings, identity: Identity) -> None:
    away = "postgresql://parley_app@127.0.0.1:1/nothing"
    database = Database(DatabaseUrls(app=away, system=away, owner=away, direct=away), DatabaseSettings())
    other = build_identity(database, settings, (SECRET,))
    token = other.tokens.issue(uuid4(), uuid4(), uuid4()).token
    for _ in range(2):
        with pytest.raises(Unavailable) as caught:
            await other.authenticator.authenticate(token)
        assert caught.value.retry_after_s
    await other.close()
    await database.close()


async def test_a_pool_that_is_used_up_is_unavailable(urls: DatabaseUrls, settings: Settings, ada: TokenAnswer) -> None:
    database = Database(urls, DatabaseSettings(system_pool_size=1))
    identity = build_identity(database, settings, (SECRET,))
    async with database.system_unit_of_work() as unit:
        await unit.connection()
        with pytest.raises(Unavailable):
            await identity.authenticator.authenticate(ada.access_token)
    await identity.authenticator.authenticate(ada.access_token)
    await identity.close()
    await database.close()


async def test_what_is_remembered_is_bounded(
    monkeypatch: pytest.MonkeyPatch, identity: Identity, service: IdentityService, ada: TokenAnswer
) -> None:
    monkeypatch.setattr(standings, "BOUND", 3)
    answers = [ada] + [await service.sign_in(email=str(ada.user.email), password=PASSWORD) for _ in range(4)]
    for _ in range(2):
        for answer in answers:
            await identity.authenticator.authenticate(answer.access_token)
    assert len(identity.authenticator._standings) == 3
    assert len(identity.authenticator._verified) == 3
    assert not identity.authenticator._standings._loading


async def test_no_usable_token_stays_in_memory(authenticator: SessionAuthenticator, ada: TokenAnswer) -> None:
    await authenticator.authenticate(ada.access_token)
    assert ada.access_token.encode() not in authenticator._verified
    assert all(len(key) == 32 for key in authenticator._verified)
