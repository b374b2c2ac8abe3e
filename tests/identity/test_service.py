import asyncio
from uuid import UUID, uuid4

import asyncpg
import bcrypt
import pytest

from parley.core import clock
from parley.core.db import Database, DatabaseUrls
from parley.core.embedded_postgres import EmbeddedPostgres
from parley.core.errors import Unauthenticated
from parley.core.origin import origin
from parley.core.scope import Role
from parley.core.settings import DatabaseSettings, Settings
from parley.identity.errors import (
    CredentialsInvalid,
    EmailInvalid,
    EmailTaken,
    NoWorkspace,
    PasswordRefused,
    RefreshInvalid,
    SessionRevoked,
    TokenExpired,
    TokenInvalid,
)
from parley.identity.repository import UnscopedIdentityRepository
from parley.identity.schemas import TokenAnswer
from parley.identity.service import IdentityService
from parley.identity.setup import Identity, build_identity
from tests.identity.conftest import PASSWORD, SECRET, sign_up, statements


async def sign_in(service: IdentityService, email: str = "ada@example.com", password: str = PASSWORD) -> TokenAnswer:
    return await service.sign_in(email=email, password=password)


@pytest.mark.parametrize(
    ("name", "workspace", "kept"),
    [
        (None, "Ada's workspace", None),
        ("Ada Lovelace", "Ada Lovelace's workspace", "Ada Lovelace"),
        ("  Ada ", "Ada's workspace", "Ada"),
        ("   ", "Ada's workspace", None),
        ("🙂" * 200, "🙂" * 88 + "'s workspace", "🙂" * 200),
    ],
)
async def test_signing_up_makes_a_user_with_a_workspace_of_their_own(
    service: IdentityService, admin: asyncpg.Connection, name: str | None, workspace: str, kept: str | None
) -> None:
    with origin("203.0.113.7", "x\x00" * 500):
        answer = await sign_up(service, email=" Ada@Example.com ", name=name)
    assert answer.user.email == "Ada@Example.com"
    assert answer.user.name == kept
    assert answer.user.email_verified is False
    assert (answer.workspace.name, answer.workspace.role) == (workspace, Role.OWNER)
    row = await admin.fetchrow(
        "SELECT u.email_norm, w.personal, m.role, length(s.user_agent) AS agent FROM users u JOIN memberships m"
        " ON m.user_id = u.id JOIN workspaces w ON w.id = m.workspace_id JOIN sessions s ON s.user_id = u.id"
    )
    assert tuple(row) == ("ada@example.com", True, "owner", 400)


@pytest.mark.parametrize("other", ["ada@example.com", "ADA@EXAMPLE.COM", " Ada@example.com", "\uff41da@example.com"])
async def test_an_address_is_taken_once_in_any_spelling(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection, other: str
) -> None:
    with pytest.raises(EmailTaken) as caught:
        await sign_up(service, email=other, password=PASSWORD)
    assert caught.value.code == "email_taken"
    counts = await admin.fetchrow(
        "SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM workspaces), (SELECT count(*) FROM sessions)"
    )
    assert tuple(counts) == (1, 1, 1)


async def test_of_sign_ups_at_once_one_wins(service: IdentityService, admin: asyncpg.Connection) -> None:
    spellings = ["Ada@example.com", "ada@example.com", "ADA@example.com", "ada@EXAMPLE.com"] * 3
    outcomes = await asyncio.gather(
        *(sign_up(service, email=email, password=PASSWORD) for email in spellings), return_exceptions=True
    )
    assert sum(isinstance(outcome, TokenAnswer) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, EmailTaken) for outcome in outcomes) == len(spellings) - 1
    assert await admin.fetchval("SELECT count(*) FROM memberships") == 1


async def test_a_sign_up_that_breaks_a_rule_leaves_nothing(service: IdentityService, admin: asyncpg.Connection) -> None:
    with pytest.raises(EmailInvalid):
        await sign_up(service, email="ada", password=PASSWORD)
    with pytest.raises(PasswordRefused):
        await sign_up(service, email="ada@example.com", password="password1")
    assert await admin.fetchval("SELECT count(*) FROM users") == 0


@pytest.mark.parametrize("email", ["ada@example.com", "ADA@Example.COM", "  ada@example.com\t"])
async def test_signing_in_with_any_spelling(
    service: IdentityService, identity: Identity, ada: TokenAnswer, email: str
) -> None:
    answer = await sign_in(service, email)
    assert answer.user == ada.user
    assert answer.workspace == ada.workspace
    first = (await identity.authenticator.authenticate(ada.access_token)).scope
    second = (await identity.authenticator.authenticate(answer.access_token)).scope
    assert first.session_id != second.session_id


@pytest.mark.parametrize(
    ("email", "password"),
    [
        ("ada@example.com", "wrong horse 1"),
        ("ada@example.com", PASSWORD + " "),
        ("ada@example.com", ""),
        ("ada@example.com", "x" * 10_000),
        ("ada@example.com", "\x00\ud800"),
        ("bob@example.com", PASSWORD),
        ("", PASSWORD),
        ("no address", PASSWORD),
        ("ada@example.com\x00", PASSWORD),
        ("\ud800@example.com", PASSWORD),
        ("ada@example.com' OR '1'='1", PASSWORD),
        ("x" * 100_000, PASSWORD),
    ],
)
async def test_wrong_credentials_are_one_error(
    service: IdentityService, ada: TokenAnswer, email: str, password: str
) -> None:
    with pytest.raises(CredentialsInvalid) as caught:
        await sign_in(service, email, password)
    assert (caught.value.code, caught.value.details) == ("invalid_credentials", {})


async def test_an_unknown_account_is_compared_with_a_hash_too(
    monkeypatch: pytest.MonkeyPatch, identity: Identity, ada: TokenAnswer
) -> None:
    """The same work for both, so the same time: the number of hashes and of statements is what could tell."""
    hashed: list[str] = []
    original = identity.passwords._context.verify_and_update

    def record(password: str, hash: str) -> tuple[bool, str | None]:
        hashed.append(hash)
        return original(password, hash)

    monkeypatch.setattr(identity.passwords._context, "verify_and_update", record)
    work = []
    for email in ("ada@example.com", "nobody@example.com"):
        with statements(identity.service._database) as sent, pytest.raises(CredentialsInvalid):
            await sign_in(identity.service, email, "wrong horse 1")
        work.append(list(sent))
    assert work[0] == work[1]
    parameters = [one.rsplit("$", 2)[0] for one in hashed]
    assert parameters == ["$argon2id$v=19$m=19456,t=2,p=1"] * 2


async def test_a_bcrypt_hash_is_upgraded_at_sign_in(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    old = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    await admin.execute("UPDATE credentials SET password_hash = $1, updated_at = '2020-01-01'", old)
    with pytest.raises(CredentialsInvalid):
        await sign_in(service, password="wrong horse 1")
    assert await admin.fetchval("SELECT password_hash FROM credentials") == old
    await asyncio.gather(sign_in(service), sign_in(service))
    row = await admin.fetchrow("SELECT password_hash, updated_at FROM credentials")
    assert row["password_hash"].startswith("$argon2id$")
    assert row["updated_at"].year > 2020
    await sign_in(service)
    assert await admin.fetchval("SELECT password_hash FROM credentials") == row["password_hash"]


async def test_an_upgrade_of_a_hash_never_takes_back_a_changed_password(
    database: Database, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    await admin.execute("UPDATE credentials SET password_hash = 'the new one'")
    async with database.system_unit_of_work() as unit:
        repository = UnscopedIdentityRepository(unit)
        await repository.replace_hash(ada.user.id, old="the old one", new="the old one, upgraded", now=clock.now())
    assert await admin.fetchval("SELECT password_hash FROM credentials") == "the new one"


async def join(admin: asyncpg.Connection, user_id: UUID, role: str) -> UUID:
    workspace: UUID = await admin.fetchval(
        "INSERT INTO workspaces (id, name, personal) VALUES ($1, 'Team', false) RETURNING id", uuid4()
    )
    await admin.execute("INSERT INTO memberships VALUES ($1, $2, $3)", workspace, user_id, role)
    return workspace


async def test_sign_in_goes_where_the_user_was_last(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    team = await join(admin, ada.user.id, "member")
    assert (await sign_in(service)).workspace == ada.workspace
    last = await sign_in(service)
    assert last.workspace == ada.workspace
    # As switching does it.
    await admin.execute(
        "UPDATE sessions SET workspace_id = $1, rotated_at = now() + '1 minute' WHERE id = "
        "(SELECT id FROM sessions ORDER BY id DESC LIMIT 1)",
        team,
    )
    there = (await sign_in(service)).workspace
    assert (there.id, there.name, there.role) == (team, "Team", Role.MEMBER)
    await admin.execute("DELETE FROM memberships WHERE workspace_id = $1", team)
    assert (await sign_in(service)).workspace == ada.workspace


async def test_sign_in_without_a_personal_workspace_goes_to_the_oldest_and_without_any_is_refused(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    team = await join(admin, ada.user.id, "viewer")
    await join(admin, ada.user.id, "admin")
    await admin.execute("DELETE FROM workspaces WHERE personal")
    answer = await sign_in(service)
    assert (answer.workspace.id, answer.workspace.role) == (team, Role.VIEWER)
    await admin.execute("DELETE FROM memberships")
    with pytest.raises(NoWorkspace):
        await sign_in(service)


async def test_a_user_without_a_password_cannot_sign_in(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    await admin.execute("DELETE FROM credentials")
    with pytest.raises(CredentialsInvalid):
        await sign_in(service)


async def test_signing_out_counts_at_once(
    service: IdentityService, identity: Identity, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    other = await sign_in(service)
    await identity.authenticator.authenticate(ada.access_token)
    await service.sessions.sign_out(ada.access_token)
    with pytest.raises(SessionRevoked):
        await identity.authenticator.authenticate(ada.access_token)
    with pytest.raises(SessionRevoked):
        await service.sessions.refresh(ada.refresh_token)
    await identity.authenticator.authenticate(other.access_token)
    await service.sessions.sign_out(ada.access_token)
    assert await admin.fetchval("SELECT count(*) FROM sessions WHERE revoke_reason = 'sign_out'") == 1


async def test_signing_out_with_a_refresh_token_of_any_age(
    service: IdentityService, identity: Identity, ada: TokenAnswer
) -> None:
    newest = await service.sessions.refresh(ada.refresh_token)
    await identity.authenticator.authenticate(newest.access_token)
    for _ in range(2):
        await service.sessions.sign_out(None, refresh_token=ada.refresh_token)
    with pytest.raises(SessionRevoked):
        await identity.authenticator.authenticate(newest.access_token)
    with pytest.raises(SessionRevoked):
        await service.sessions.refresh(newest.refresh_token)


async def test_signing_out_with_an_expired_access_token_and_a_refresh_token(
    service: IdentityService, ada: TokenAnswer
) -> None:
    with clock.shifted(1000):
        with pytest.raises(TokenExpired):
            await service.sessions.sign_out(ada.access_token)
        await service.sessions.sign_out(ada.access_token, refresh_token=ada.refresh_token)
        with pytest.raises(SessionRevoked):
            await service.sessions.refresh(ada.refresh_token)


async def test_signing_out_with_a_bad_refresh_token_ends_the_bearers_session(
    service: IdentityService, identity: Identity, ada: TokenAnswer
) -> None:
    await service.sessions.sign_out(ada.access_token, refresh_token="parley_rt_" + "A" * 76)
    with pytest.raises(SessionRevoked):
        await identity.authenticator.authenticate(ada.access_token)


async def test_signing_out_needs_one_of_our_tokens(service: IdentityService, ada: TokenAnswer) -> None:
    with pytest.raises(Unauthenticated):
        await service.sessions.sign_out(None)
    with pytest.raises(TokenInvalid):
        await service.sessions.sign_out("x")
    with pytest.raises(RefreshInvalid):
        await service.sessions.sign_out(None, refresh_token=ada.refresh_token[:-1] + "!")
    await service.sessions.refresh(ada.refresh_token)


async def test_signing_out_of_a_session_that_is_not_there(
    service: IdentityService, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    await admin.execute("DELETE FROM sessions")
    await service.sessions.sign_out(ada.access_token)
    with pytest.raises(RefreshInvalid):
        await service.sessions.sign_out(None, refresh_token=ada.refresh_token)


async def test_of_two_users_each_signs_in_to_their_own(service: IdentityService, ada: TokenAnswer) -> None:
    bob = await sign_up(service, email="bob@example.com", password=PASSWORD)
    for signed_up in (ada, bob, ada):
        answer = await sign_in(service, str(signed_up.user.email))
        assert (answer.user, answer.workspace) == (signed_up.user, signed_up.workspace)
        again = await service.sessions.refresh(answer.refresh_token)
        assert (again.user, again.workspace) == (signed_up.user, signed_up.workspace)


async def test_a_membership_that_goes_within_the_cache_shows_nothing(
    service: IdentityService, identity: Identity, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    scope = (await identity.authenticator.authenticate(ada.access_token)).scope
    await admin.execute("DELETE FROM memberships")
    assert (await identity.authenticator.authenticate(ada.access_token)).scope == scope
    with pytest.raises(SessionRevoked):
        await service.me(scope)


async def test_me_and_rename(service: IdentityService, identity: Identity, ada: TokenAnswer) -> None:
    scope = (await identity.authenticator.authenticate(ada.access_token)).scope
    me = await service.me(scope)
    assert (me.id, me.email, me.name, me.workspace) == (ada.user.id, ada.user.email, None, ada.workspace)
    assert (await service.rename(scope, "Ada")).name == "Ada"
    assert (await service.me(scope)).name == "Ada"


async def test_renaming_touches_nobody_else(
    service: IdentityService, identity: Identity, ada: TokenAnswer, admin: asyncpg.Connection
) -> None:
    bob = await sign_up(service, email="bob@example.com", password=PASSWORD, name="Bob")
    await admin.execute("INSERT INTO memberships VALUES ($1, $2, 'member')", ada.workspace.id, bob.user.id)
    await service.rename((await identity.authenticator.authenticate(ada.access_token)).scope, "Ada")
    names = await admin.fetch("SELECT name FROM users ORDER BY name")
    assert [row["name"] for row in names] == ["Ada", "Bob"]


async def test_few_statements(database: Database, service: IdentityService, identity: Identity) -> None:
    with statements(database) as sent:
        ada = await sign_up(service, email="ada@example.com", password=PASSWORD)
    assert len(sent) == 5, sent
    with statements(database) as sent:
        await sign_in(service)
    assert len(sent) == 5, sent
    scope = (await identity.authenticator.authenticate(ada.access_token)).scope
    with statements(database) as sent:
        await service.me(scope)
    assert len(sent) == 1, sent
    with statements(database) as sent:
        await service.rename(scope, "Ada")
    assert len(sent) == 2, sent


async def test_with_one_login_for_all_roles(urls: DatabaseUrls, postgres: EmbeddedPostgres, settings: Settings) -> None:
    """Outside production one address suffices: each transaction then sets its role."""
    admin_url = postgres.admin_url(urls.app.split("?")[0].rsplit("/", 1)[1])
    one = DatabaseUrls(app=admin_url, system=admin_url, owner=admin_url, direct=admin_url, become=True)
    database = Database(one, DatabaseSettings())
    identity = build_identity(database, settings, (SECRET,))
    ada = await sign_up(identity.service)
    answer = await identity.service.sessions.refresh((await sign_in(identity.service)).refresh_token)
    scope = (await identity.authenticator.authenticate(answer.access_token)).scope
    assert (await identity.service.rename(scope, "Ada")).id == ada.user.id
    await identity.service.sessions.sign_out(answer.access_token)
    await identity.close()
    await database.close()
