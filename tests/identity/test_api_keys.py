"""API keys: what they look like, what they may, and how they end."""

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from parley.chat.tools import ToolBox
from parley.core import clock
from parley.core.db import Database, DatabaseUrls
from parley.core.ids import new_id
from parley.core.revocations import Kind, Revocation, Revocations
from parley.core.scope import PERMISSION_KEY, Role, Scope
from parley.core.secrets import key_ring
from parley.core.settings import Settings
from parley.identity.api_key_schemas import ApiKeyCreate, KeyScope
from parley.identity.api_keys import ApiKeys, ApiKeyService, KeyFormat, PresentedKey
from parley.identity.errors import ApiKeyExpired, ApiKeyInvalid
from parley.llm.ports import ToolCallChunk
from parley.realtime import runs
from parley.realtime.tickets import TicketInvalid
from parley.tasks.tools import TOOLS
from parley.tenancy.permissions import KEY_SCOPES, Permission, permissions_of
from tests.conftest import Account, SignUp, http_client, make_settings
from tests.held import held
from tests.identity.conftest import SECRET
from tests.live import LiveServer, Socket, dial, live

API = "/api/v1"
KEYS = f"{API}/api-keys"
LOOK = re.compile(r"parley_sk_[A-Za-z0-9_-]{84}")

Client = Callable[[str], httpx.AsyncClient]


@pytest.fixture
async def with_key(app: FastAPI) -> AsyncIterator[Client]:
    """Return a client whose credential is a key."""
    made: list[httpx.AsyncClient] = []

    def client(key: str) -> httpx.AsyncClient:
        made.append(http_client(app, headers={"Authorization": f"Bearer {key}"}))
        return made[-1]

    yield client
    for http in made:
        await http.aclose()


async def make(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    """Make a key and return the answer's data."""
    answer = await http.post(KEYS, json={"name": "Import", **body})
    assert answer.status_code == 201, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]


# -- what a key looks like ---------------------------------------------------------------------------------------------


def a_key() -> PresentedKey:
    return KeyFormat.make(new_id(), new_id())


def test_a_key_names_its_id_and_workspace_and_looks_like_one() -> None:
    id_, workspace_id = new_id(), new_id()
    key = KeyFormat.make(id_, workspace_id)

    assert LOOK.fullmatch(key.text)
    assert KeyFormat.parse(key.text) == PresentedKey(id_, workspace_id, key.text)
    # 26 random bytes: no two keys of one id are alike.
    assert len({KeyFormat.make(id_, workspace_id).text for _ in range(100)}) == 100
    assert len(base64.urlsafe_b64decode(key.text.removeprefix("parley_sk_"))) - 1 - 16 - 16 - 4 == 26


def test_every_typo_is_refused_without_asking_anyone() -> None:
    text = a_key().text
    wrong = {text[:i] + ("A" if text[i] != "A" else "B") + text[i + 1 :] for i in range(len(text))}
    swapped = {text[:i] + text[i + 1] + text[i] + text[i + 2 :] for i in range(len(text) - 1)} - {text}
    for other in {*wrong, *swapped, text[:-1], text + "A", text.upper(), f"{text} ", text.replace(text[20], "é"), ""}:
        with pytest.raises(ApiKeyInvalid):
            KeyFormat.parse(other)


def test_the_hash_is_keyed_and_outlives_a_rotation_of_the_secret() -> None:
    old, both, new = (KeyFormat(key_ring(ring, "api-key")) for ring in (("old",), ("new", "old"), ("new",)))
    key = a_key()
    stored = old.hash(key)

    assert old.matches(key, stored)
    assert both.matches(key, stored)
    assert not new.matches(key, stored)
    assert new.matches(key, both.hash(key))
    assert not old.matches(a_key(), stored)
    assert key.text.encode() not in stored


def test_the_documents_scopes_are_those_that_keys_can_have() -> None:
    assert set(KeyScope.__args__) == KEY_SCOPES  # type: ignore[attr-defined]  # a Literal has it


# -- making, listing, revoking -----------------------------------------------------------------------------------------


async def test_make_use_list_revoke(alice: Account, with_key: Client, admin: asyncpg.Connection) -> None:
    made = await make(alice.http, name="  Nightly import ", scopes=["tasks:write", "tasks:read", "tasks:read"])
    http = with_key(made["key"])
    created = await http.post(f"{API}/tasks", json={"title": "Buy milk"})
    listed = await alice.http.get(KEYS)
    revoked = await alice.http.delete(f"{KEYS}/{made['id']}")
    refused = await http.get(f"{API}/tasks")
    again = await alice.http.delete(f"{KEYS}/{made['id']}")

    assert made == {
        "id": made["id"],
        "name": "Nightly import",
        "prefix": made["key"][:22],
        "last_four": made["key"][-4:],
        "scopes": ["tasks:read", "tasks:write"],
        "created_at": made["created_at"],
        "expires_at": None,
        "last_used_at": None,
        "key": made["key"],
    }
    assert created.status_code == 201
    (row,) = listed.json()["data"]
    assert row["last_used_at"] is not None
    assert {**row, "last_used_at": None} == {name: value for name, value in made.items() if name != "key"}
    assert made["key"] not in listed.text
    assert revoked.status_code == 204
    assert code(refused) == (401, "api_key_invalid")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert code(again) == (404, "api_key_not_found")
    assert (await alice.http.get(KEYS)).json()["data"] == []
    events = await admin.fetch(
        "SELECT action, user_id, actor, target, details FROM audit_events WHERE action LIKE 'api_key.%' ORDER BY id"
    )
    assert [(event["action"], event["actor"], event["target"]) for event in events] == [
        ("api_key.created", "user", made["id"]),
        ("api_key.revoked", "user", made["id"]),
    ]
    assert {event["user_id"] for event in events} == {alice.user_id}
    assert not any(made["key"] in str(dict(event)) for event in events)


async def test_without_scopes_a_key_has_all_that_keys_can_have(alice: Account) -> None:
    assert (await make(alice.http))["scopes"] == sorted(KEY_SCOPES)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"scopes": ["keys:manage"]}, "scopes.0"),
        ({"scopes": ["account:manage"]}, "scopes.0"),
        ({"scopes": ["members:manage"]}, "scopes.0"),
        ({"scopes": ["everything"]}, "scopes.0"),
        ({"scopes": []}, "scopes"),
        ({"scopes": "tasks:read"}, "scopes"),
        ({"name": " "}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2099-01-01T00:00:00"}, "expires_at"),
        ({"expires_at": "9999-12-31T23:59:59-14:00"}, "expires_at"),
        ({"expires_at": "9999-12-31T23:59:59.999999Z"}, "expires_at"),
        ({"expires_at": 4102444800}, "expires_at"),
        ({"key": "parley_sk_mine"}, "key"),
    ],
)
async def test_what_does_not_hold_is_refused(
    alice: Account, admin: asyncpg.Connection, body: dict[str, Any], field: str
) -> None:
    answer = await alice.http.post(KEYS, json={"name": "Import", **body})

    assert code(answer) == (422, "validation_error")
    assert answer.json()["details"]["field"].startswith(field)
    assert await admin.fetchval("SELECT count(*) FROM api_keys") == 0


async def test_a_repeated_request_is_answered_without_the_key(alice: Account, admin: asyncpg.Connection) -> None:
    headers = {"Idempotency-Key": "one-key"}
    first = await alice.http.post(KEYS, json={"name": "Import"}, headers=headers)
    again = await alice.http.post(KEYS, json={"name": "Import"}, headers=headers)

    data = first.json()["data"]
    key = data.pop("key")
    assert again.status_code == 201
    assert again.json()["data"] == data
    assert key not in again.text
    assert again.headers["location"] == first.headers["location"] == f"{KEYS}/{data['id']}"
    assert again.headers["cache-control"] == first.headers["cache-control"] == "no-store"
    assert await admin.fetchval("SELECT count(*) FROM api_keys") == 1


async def member_of(admin: asyncpg.Connection, account: Account, workspace_id: UUID, role: str) -> None:
    """Give someone a place in a workspace and sign them in there."""
    await admin.execute(
        "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, $3)", workspace_id, account.user_id, role
    )
    await admin.execute("UPDATE sessions SET workspace_id = $1 WHERE user_id = $2", workspace_id, account.user_id)
    answer = await account.http.post(f"{API}/auth/refresh", json={"refresh_token": account.refresh_token})
    account.http.headers["Authorization"] = f"Bearer {answer.json()['data']['access_token']}"


@pytest.mark.parametrize(("role", "status"), [("viewer", 403), ("member", 403), ("admin", 404)])
async def test_keys_are_for_admins_and_for_their_makers(
    alice: Account, bob: Account, admin: asyncpg.Connection, role: str, status: int
) -> None:
    made = await make(alice.http)
    await member_of(admin, bob, alice.workspace_id, role)

    assert (await bob.http.delete(f"{KEYS}/{made['id']}")).status_code == status
    listed = await bob.http.get(KEYS)
    assert listed.status_code == (403 if status == 403 else 200)
    assert made["id"] not in listed.text


# -- what a key may ----------------------------------------------------------------------------------------------------


async def calls_of(app: FastAPI, account: Account) -> list[tuple[str, str, str]]:
    """Return method, path and permission of every operation that asks for one."""
    found = []
    for path, methods in app.openapi()["paths"].items():
        for method, about in methods.items():
            if about[PERMISSION_KEY] != "public":
                filled = re.sub(r"\{\w+\}", str(uuid4()), path.replace("/api/{user_id}/", f"/api/{account.user_id}/"))
                found.append((method.upper(), filled, about[PERMISSION_KEY]))
    return found


@pytest.mark.parametrize("scope", sorted(KEY_SCOPES))
async def test_a_scope_opens_its_own_routes_and_no_others(
    app: FastAPI, alice: Account, with_key: Client, scope: str
) -> None:
    http = with_key((await make(alice.http, scopes=[scope]))["key"])
    calls = await calls_of(app, alice)
    for method, path, permission in calls:
        answer = await http.request(method, path, json={} if method in {"POST", "PUT", "PATCH"} else None)

        if permission == scope:
            assert answer.status_code not in {401, 403}, (method, path, answer.text)
        else:
            assert code(answer) == (403, "forbidden"), (method, path, answer.text)
            assert answer.json()["details"] == {"permission": permission}
    assert any(permission not in KEY_SCOPES for _, _, permission in calls)


async def set_role(app: FastAPI, admin: asyncpg.Connection, account: Account, role: str) -> None:
    await admin.execute("UPDATE memberships SET role = $2 WHERE user_id = $1", account.user_id, role)
    await announce(app, account, "membership", account.workspace_id)


async def announce(app: FastAPI, account: Account, kind: Kind, id: UUID) -> None:
    """Say what changed, as whoever changed it does."""
    scope = Scope(account.workspace_id, account.user_id, Role.VIEWER)
    async with app.state.database.unit_of_work(scope) as unit:
        await app.state.revocations.announce(unit, Revocation(kind, id, account.user_id))


async def test_a_key_follows_its_maker(
    app: FastAPI, alice: Account, with_key: Client, admin: asyncpg.Connection
) -> None:
    http = with_key((await make(alice.http))["key"])
    conversations = f"{API}/conversations"
    assert (await http.post(conversations, json={})).status_code == 201

    await set_role(app, admin, alice, "viewer")
    assert code(await http.post(conversations, json={})) == (403, "forbidden")
    assert (await http.get(conversations)).status_code == 200

    await set_role(app, admin, alice, "owner")
    assert (await http.post(conversations, json={})).status_code == 201

    await admin.execute("DELETE FROM memberships WHERE user_id = $1", alice.user_id)
    await announce(app, alice, "membership", alice.workspace_id)
    assert code(await http.get(conversations)) == (401, "api_key_invalid")
    assert await admin.fetchval("SELECT count(*) FROM api_keys") == 0


async def test_a_key_of_a_disabled_user_is_refused(
    app: FastAPI, alice: Account, with_key: Client, admin: asyncpg.Connection
) -> None:
    http = with_key((await make(alice.http))["key"])
    assert (await http.get(f"{API}/me")).status_code == 200

    await admin.execute("UPDATE users SET disabled_at = now() WHERE id = $1", alice.user_id)
    await announce(app, alice, "user", alice.user_id)

    assert code(await http.get(f"{API}/me")) == (401, "api_key_invalid")


async def test_a_change_that_nobody_announced_counts_within_the_cache(
    alice: Account, with_key: Client, admin: asyncpg.Connection
) -> None:
    http = with_key((await make(alice.http))["key"])
    assert (await http.get(f"{API}/me")).status_code == 200
    await admin.execute("UPDATE api_keys SET revoked_at = now()")

    assert (await http.get(f"{API}/me")).status_code == 200
    with clock.shifted(31):
        assert code(await http.get(f"{API}/me")) == (401, "api_key_invalid")


async def test_a_key_expires(alice: Account, with_key: Client) -> None:
    made = await make(alice.http, expires_at=(clock.now() + timedelta(hours=1)).isoformat())
    http = with_key(made["key"])
    with clock.shifted(3590):
        assert (await http.get(f"{API}/me")).status_code == 200
    with clock.shifted(3601):
        assert code(await http.get(f"{API}/me")) == (401, "api_key_expired")


async def test_last_use_is_written_once_a_minute(
    alice: Account, with_key: Client, admin: asyncpg.Connection, app: FastAPI
) -> None:
    http = with_key((await make(alice.http))["key"])
    written = []
    # The cache of half a minute is passed each time.
    for seconds in (0, 0, 31, 45, 62, 80, 124):
        with clock.shifted(seconds):
            await asyncio.gather(*(http.get(f"{API}/me") for _ in range(3)))
        written.append(await admin.fetchval("SELECT last_used_at FROM api_keys"))

    assert written[0] == written[1] == written[2] == written[3]
    assert written[3] < written[4] == written[5] < written[6]


async def test_a_key_in_use_outlives_the_secret_of_its_hash(
    alice: Account, database: Database, admin: asyncpg.Connection, app: FastAPI, settings: Settings
) -> None:
    secret = (settings.data_dir / "secret_key").read_text().strip()
    key = (await make(alice.http))["key"]
    for ring, holds in ((("next",), False), (("next", secret), True), (("next",), True)):
        keys = ApiKeys(database, key_ring(ring, "api-key"), cache_s=0)
        if holds:
            assert (await keys.authenticate(key)).scope.user_id == alice.user_id
        else:
            with pytest.raises(ApiKeyInvalid):
                await keys.authenticate(key)
        await keys.close()


async def test_keys_that_are_none_are_refused_alike(alice: Account, with_key: Client) -> None:
    made = await make(alice.http)
    forged = KeyFormat.make(UUID(made["id"]), alice.workspace_id).text
    moved = KeyFormat.make(UUID(made["id"]), new_id()).text
    unknown = KeyFormat.make(new_id(), alice.workspace_id).text
    answers = [await with_key(key).get(f"{API}/me") for key in (forged, moved, unknown, made["key"][:-1], "parley_sk_")]

    assert {code(answer) for answer in answers} == {(401, "api_key_invalid")}
    assert len({answer.json()["message"] for answer in answers}) == 1


async def test_a_look_up_that_began_before_a_revocation_is_not_remembered(
    database: Database, alice: Account, monkeypatch: pytest.MonkeyPatch, app: FastAPI
) -> None:
    made = await make(alice.http)
    keys: ApiKeys = app.state.api_keys
    read, goes_on, query = asyncio.Event(), asyncio.Event(), keys._query

    async def slow(id: UUID, workspace_id: UUID) -> Any:
        standing = await query(id, workspace_id)
        read.set()
        await goes_on.wait()
        return standing

    with monkeypatch.context() as patch:
        patch.setattr(keys, "_query", slow)
        asking = asyncio.create_task(keys.authenticate(made["key"]))
        await read.wait()
        await alice.http.delete(f"{KEYS}/{made['id']}")
    goes_on.set()
    await asking

    with pytest.raises(ApiKeyInvalid):
        await keys.authenticate(made["key"])


# -- nothing of it is kept ---------------------------------------------------------------------------------------------


async def dump(admin: asyncpg.Connection) -> str:
    """Return every column of every table as text; bytes as text, as hex and as base64."""
    found = []
    tables = await admin.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    for (table,) in tables:
        for row in await admin.fetch(f"SELECT * FROM {table}"):
            for value in row.values():
                found.append(str(value))
                if isinstance(value, bytes):
                    found += [value.decode("latin-1"), value.hex(), base64.urlsafe_b64encode(value).decode()]
    return "\n".join(found)


async def test_no_issued_secret_is_in_the_database(alice: Account, with_key: Client, admin: asyncpg.Connection) -> None:
    made = await alice.http.post(KEYS, json={"name": "Import"}, headers={"Idempotency-Key": "a-secret-of-mine"})
    key = made.json()["data"]["key"]
    ticket = (await with_key(key).post(f"{API}/realtime/tickets")).json()["data"]["ticket"]
    await alice.http.post(f"{API}/tasks", json={"title": "needle-in-hay"})
    whole = await dump(admin)

    assert "needle-in-hay" in whole
    for secret in (key, ticket, alice.access_token, alice.refresh_token, "a-secret-of-mine", "correct horse 1"):
        assert secret not in whole
    # Nor the part of the key that is secret, in any spelling.
    raw = base64.urlsafe_b64decode(key.removeprefix("parley_sk_"))
    for part in (raw, raw[33:], raw[33:59]):
        assert part.hex() not in whole
        assert part.decode("latin-1") not in whole
    assert key[len("parley_sk_") + 44 : -4] not in whole


# -- tickets and sockets -----------------------------------------------------------------------------------------------


@pytest.fixture
async def server(tmp_path: Path, urls: DatabaseUrls) -> AsyncIterator[LiveServer]:
    async with held(live(make_settings(tmp_path, urls))) as made:
        yield made


@pytest.fixture
async def ada(server: LiveServer, sign_up: SignUp) -> Account:
    """A user of the live server."""
    return await sign_up("ada@example.com", app=server.app)


Hello = Callable[..., Awaitable[Socket]]


@pytest.fixture
async def hello(server: LiveServer) -> AsyncIterator[Hello]:
    """Open a socket with some credential."""
    opened: list[Socket] = []

    async def say(**auth: str) -> Socket:
        socket = await dial(server)
        opened.append(socket)
        await socket.send(t="hello", v=1, auth=auth, subs=[])
        return socket

    yield say
    for socket in opened:
        await socket.connection.close()


async def test_hello_takes_a_key_in_its_own_field_only(server: LiveServer, ada: Account, hello: Hello) -> None:
    made = await make(ada.http)

    welcome = await (await hello(api_key=made["key"])).receive()
    assert (welcome["t"], welcome["user"]) == ("welcome", str(ada.user_id))
    for auth in ({"token": made["key"]}, {"api_key": ada.access_token}, {"ticket": made["key"]}):
        assert await (await hello(**auth)).closed() == 4401


async def test_a_keys_socket_needs_its_scopes(server: LiveServer, ada: Account, hello: Hello) -> None:
    without = await make(ada.http, scopes=["chat:read"])
    reading = await make(ada.http, scopes=["realtime:connect", "chat:read"])
    conversation = (await ada.http.post(f"{API}/conversations", json={})).json()["data"]["id"]
    channel = f"conversation:{conversation}"

    assert await (await hello(api_key=without["key"])).closed() == 4403
    socket = await hello(api_key=reading["key"])
    await socket.of_type("welcome")
    await socket.send(t="sub", id=1, ch=channel)
    await socket.of_type("live")
    await socket.send(t="sub", id=2, ch="tasks")
    assert (await socket.of_type("err"))["code"] == "forbidden"
    parts = [{"type": "text", "text": "Hello"}]
    await socket.send(t="chat.send", id=3, ch=channel, cid=str(uuid4()), parts=parts)
    assert (await socket.of_type("err"))["code"] == "forbidden"


@pytest.mark.parametrize("by_ticket", [False, True])
async def test_revoking_a_key_ends_its_sockets_and_no_others(
    server: LiveServer, ada: Account, hello: Hello, by_ticket: bool
) -> None:
    made, other = await make(ada.http), await make(ada.http)
    auth = {"api_key": made["key"]}
    if by_ticket:
        async with http_client(server.app, headers={"Authorization": f"Bearer {made['key']}"}) as http:
            auth = {"ticket": (await http.post(f"{API}/realtime/tickets")).json()["data"]["ticket"]}
    socket, kept = await hello(**auth), await hello(api_key=other["key"])
    await socket.of_type("welcome")
    await kept.of_type("welcome")
    await ada.http.delete(f"{KEYS}/{made['id']}")

    assert await socket.closed() == 4403
    await kept.send(t="sub", id=1, ch="tasks")
    await kept.of_type("live")


async def test_a_socket_ends_when_its_key_expires(server: LiveServer, ada: Account, hello: Hello) -> None:
    made = await make(ada.http, expires_at=(clock.now() + timedelta(seconds=3600)).isoformat())
    with clock.shifted(3599.2):
        socket = await hello(api_key=made["key"])
        assert (await socket.of_type("welcome"))["expires_at"] <= clock.timestamp() + 1
        assert await socket.closed() == 4004
    with clock.shifted(3601):
        assert await (await hello(api_key=made["key"])).closed() == 4401


async def test_a_ticket_stands_for_the_key_that_asked_for_it(app: FastAPI, alice: Account, with_key: Client) -> None:
    made = await make(alice.http, scopes=["realtime:connect", "tasks:read"])
    issue = f"{API}/realtime/tickets"
    tickets = [(await with_key(made["key"]).post(issue)).json()["data"]["ticket"] for _ in range(2)]

    scope = (await app.state.realtime.tickets.redeem(tickets[0])).scope
    assert (scope.key_id, scope.permissions) == (UUID(made["id"]), {"realtime:connect", "tasks:read"})
    await alice.http.delete(f"{KEYS}/{made['id']}")
    with pytest.raises(ApiKeyInvalid):
        await app.state.realtime.tickets.redeem(tickets[1])
    with pytest.raises(TicketInvalid):
        await app.state.realtime.tickets.redeem(tickets[1])


# -- tools -------------------------------------------------------------------------------------------------------------


async def say(http: httpx.AsyncClient, conversation: str, text: str) -> str:
    """Say something and return the whole turn's events."""
    answer = await http.post(
        f"{API}/conversations/{conversation}/messages", json={"text": text}, headers={"Accept": "text/event-stream"}
    )
    assert "event: reply.completed" in answer.text, answer.text
    return answer.text


async def test_a_reply_writes_no_tasks_for_a_key_that_may_not(
    alice: Account, with_key: Client, admin: asyncpg.Connection
) -> None:
    conversation = (await alice.http.post(f"{API}/conversations", json={})).json()["data"]["id"]
    chats = with_key((await make(alice.http, scopes=["chat:read", "chat:write"]))["key"])
    writes = with_key((await make(alice.http, scopes=["chat:read", "chat:write", "tasks:write"]))["key"])

    await say(chats, conversation, "add task buy milk")
    assert await admin.fetchval("SELECT count(*) FROM tasks") == 0
    await say(writes, conversation, "add task buy milk")
    assert await admin.fetchval("SELECT count(*) FROM tasks") == 1
    await say(alice.http, conversation, "add task buy tea")
    assert await admin.fetchval("SELECT count(*) FROM tasks") == 2
    options = [row["options"] for row in await admin.fetch("SELECT options::text FROM replies ORDER BY id")]
    assert ["permissions" in text for text in options] == [True, True, False]


async def test_tools_beyond_the_scope_are_not_offered_and_not_run(app: FastAPI, alice: Account) -> None:
    box: ToolBox = app.state.chat.tools
    reads = Scope(alice.workspace_id, alice.user_id, Role.OWNER, permissions=frozenset({"tasks:read"}))

    assert {spec.name for spec in box.specs(reads, None)} == {"list_tasks"}
    assert {spec.name for spec in box.specs(reads, ["add_task", "list_tasks"])} == {"list_tasks"}
    state, output = await box.run(reads, ToolCallChunk("1", "add_task", {"title": "Buy milk"}, ""))
    assert (state, output["permission"]) == ("failed", "tasks:write")
    assert (await box.run(reads, ToolCallChunk("2", "list_tasks", {}, "{}")))[0] == "done"
    assert all(tool.permission in set(Permission) for tool in TOOLS)


async def open_reply(admin: asyncpg.Connection, account: Account, options: str) -> UUID:
    """Store a queued reply that no process has."""
    id_ = new_id()
    await admin.execute(
        """
        INSERT INTO replies (workspace_id, id, channel, user_id, question_id, status, options, fence, attempt, appended,
                             start_seq, cancel_requested)
        VALUES ($1, $2, $3, $4, $5, 'queued', $6, 0, 0, 0, 0, false)
        """,
        account.workspace_id, id_, f"conversation:{new_id()}", account.user_id, new_id(), options,
    )  # fmt: skip
    return id_


@pytest.mark.parametrize(
    ("options", "role", "granted"),
    [
        ("{}", "owner", permissions_of(Role.OWNER)),
        ('{"permissions": ["chat:write", "tasks:read"]}', "owner", {"chat:write", "tasks:read"}),
        # No more than the role has by now.
        ('{"permissions": ["chat:write", "tasks:read"]}', "viewer", {"tasks:read"}),
        ("{}", None, set()),
    ],
)
async def test_a_reply_that_another_process_begins_has_the_rights_that_it_was_asked_with(
    database: Database,
    alice: Account,
    admin: asyncpg.Connection,
    app: FastAPI,
    options: str,
    role: str | None,
    granted: set[str],
) -> None:
    await app.state.chat.take_over.close()
    reply_id = await open_reply(admin, alice, options)
    if role is None:
        await admin.execute("DELETE FROM memberships")
    else:
        await admin.execute("UPDATE memberships SET role = $1", role)

    async with database.system_unit_of_work() as unit:
        (orphan,) = [found for found in await runs.orphans(unit, owner=1) if found.reply_id == reply_id]
    # The reply before it may have been asked for with other rights.
    full = Scope(alice.workspace_id, alice.user_id, Role.OWNER, permissions=permissions_of(Role.OWNER))
    async with database.unit_of_work(full) as unit:
        run = await runs.claim(unit, full, reply_id, owner=1, fence=0, lease_s=10)

    assert run is not None
    assert set(orphan.scope.permissions) == set(run.scope.permissions) == granted


# -- the service by itself ---------------------------------------------------------------------------------------------


async def test_of_many_requests_at_once_one_looks_the_key_up(
    database: Database, sign_up: SignUp, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice = await sign_up()
    scope = Scope(alice.workspace_id, alice.user_id, Role.OWNER, permissions=permissions_of(Role.OWNER))
    keys = ApiKeys(database, key_ring((SECRET,), "api-key"), cache_s=30)
    asked, query = [], keys._query

    async def counted(id: UUID, workspace_id: UUID) -> Any:
        asked.append(id)
        return await query(id, workspace_id)

    monkeypatch.setattr(keys, "_query", counted)
    async with database.unit_of_work(scope) as unit:
        service = ApiKeyService(unit, scope, keys.format, Revocations())
        made = await service.create(ApiKeyCreate(name="Import", expires_at=clock.now() + timedelta(minutes=5)))
    credentials = await asyncio.gather(*(keys.authenticate(made.key) for _ in range(20)))

    assert len(asked) == 1
    assert len({credential.scope for credential in credentials}) == 1
    with clock.shifted(301), pytest.raises(ApiKeyExpired):
        await keys.reauthenticate(credentials[0].scope)
    await keys.close()
