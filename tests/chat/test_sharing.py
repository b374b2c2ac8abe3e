"""Sharing within the workspace, pins and lists: who sees what, who may do what, and how it ends."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI

from benchmarks.fake_provider import FakeProvider
from parley.chat.repository import ConversationRepository
from parley.core.settings import Settings
from parley.realtime.channels import Channels
from parley.realtime.fold import visible_text
from tests.chat.conftest import Talk, start_talk, until
from tests.chat.people import change, inbox, join, scope_of
from tests.conftest import Account, SignUp
from tests.live import LiveServer, greet, live


@dataclass
class Team:
    """Alice owns the workspace and the conversation; the others are its member, admin and viewer."""

    alice: Account
    member: Account
    admin: Account
    viewer: Account
    stranger: Account
    talk: Talk

    @property
    def others(self) -> tuple[Account, ...]:
        return (self.member, self.admin, self.viewer)

    def seen_by(self, who: Account) -> Talk:
        """The conversation as someone else uses it."""
        return Talk(who, self.talk.id)

    @property
    def path(self) -> str:
        return f"/api/v1/conversations/{self.talk.id}"


@pytest.fixture
async def team(alice: Account, sign_up: SignUp, admin: asyncpg.Connection, talk: Talk) -> Team:
    """The team."""
    member, chief, viewer = [await join(admin, alice, await sign_up(), role) for role in ("member", "admin", "viewer")]
    return Team(alice, member, chief, viewer, await sign_up(), talk)


async def listed(who: Account, **params: Any) -> list[str]:
    answer = await who.http.get("/api/v1/conversations", params=params)
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()["data"]]


# -- who sees it -------------------------------------------------------------------------------------------------------


async def test_nobody_sees_what_is_not_shared(team: Team) -> None:
    _, reply = await team.talk.send("deltas=2 rate=0")
    await team.talk.ended(reply)
    for who in (*team.others, team.stranger):
        assert (await who.http.get(team.path)).status_code == 404
        assert (await who.http.get(team.talk.path)).status_code == 404
        pinned = await who.http.patch(team.path, json={"pinned": True})
        # A viewer may change nothing at all.
        assert pinned.status_code == (403 if who is team.viewer else 404)
        assert (await who.http.get(f"/api/v1/channels/conversation:{team.talk.id}/events")).status_code == 404
        for kind in ("mine", "shared", "all"):
            assert await listed(who, filter=kind) == []


async def test_shared_means_to_be_read(team: Team) -> None:
    _, reply = await team.talk.send("deltas=2 rate=0")
    await team.talk.ended(reply)
    shared = await change(team.alice, team.talk.id, shared=True)
    assert (shared["shared"], shared["shared_access"]) == (True, "read")
    for who in team.others:
        found = (await who.http.get(team.path)).json()["data"]
        assert (found["shared_access"], found["owner_id"]) == ("read", str(team.alice.user_id))
        assert [message["id"] for message in await team.seen_by(who).messages()][-1] == str(reply)
        assert await listed(who, filter="shared") == [str(team.talk.id)]
        assert await listed(who, filter="all") == [str(team.talk.id)]
        assert await listed(who) == []
    assert (await team.stranger.http.get(team.path)).status_code == 404
    assert await listed(team.stranger, filter="all") == []
    assert await listed(team.alice, filter="shared") == []
    assert await listed(team.alice, filter="mine") == await listed(team.alice, filter="all") == [str(team.talk.id)]


def attempts(team: Team, question: UUID, reply: UUID) -> list[tuple[str, str, dict[str, Any] | None]]:
    """Return all that a reader must not do."""
    return [
        ("POST", team.talk.path, {"text": "hello"}),
        ("PATCH", f"/api/v1/messages/{question}", {"text": "other"}),
        ("POST", f"/api/v1/replies/{reply}/regenerate", None),
        ("POST", f"/api/v1/replies/{reply}/continue", None),
        ("POST", f"/api/v1/replies/{reply}/cancel", None),
        ("PATCH", team.path, {"current_id": str(question)}),
        *((verb, team.path, body) for verb, body in owners_own),
    ]


owners_own: list[tuple[str, dict[str, Any] | None]] = [
    ("PATCH", {"title": "Mine now"}),
    ("PATCH", {"archived": True}),
    ("PATCH", {"shared": False}),
    ("PATCH", {"shared_access": "write"}),
    ("PATCH", {"pinned": True, "title": "Mine now"}),
    ("DELETE", None),
]


async def test_a_reader_changes_nothing(team: Team, provider: FakeProvider, admin: asyncpg.Connection) -> None:
    question, reply = await team.talk.send("deltas=2 rate=0")
    await team.talk.ended(reply)
    await change(team.alice, team.talk.id, shared=True)
    before = await admin.fetch("SELECT to_jsonb(c) FROM conversations c")
    for who in team.others:
        for verb, path, body in attempts(team, question, reply):
            answer = await who.http.request(verb, path, json=body)
            assert (answer.status_code, answer.json()["error"]) == (403, "forbidden"), (verb, path, answer.text)
    assert await admin.fetch("SELECT to_jsonb(c) FROM conversations c") == before
    assert len(provider.requests) == 1
    assert await admin.fetchval("SELECT count(*) FROM messages") == 2


async def test_a_writer_sends_as_themself_and_owns_nothing(
    team: Team, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    question, first = await team.talk.send("deltas=2 rate=0")
    await team.talk.ended(first)
    await change(team.alice, team.talk.id, shared_access="write")
    _, reply = await team.seen_by(team.member).send("deltas=3 rate=0")
    ended = await team.talk.ended(reply)
    assert ended["status"] == "completed"
    run = await admin.fetchrow("SELECT user_id FROM replies WHERE id = $1", reply)
    assert run["user_id"] == team.member.user_id
    # The owner hears of it in their inbox, the writer's own stays as it was.
    last = (await inbox(admin, team.alice))[-1]
    assert (last[0], last[1]["current_id"]) == ("conversation.updated", str(reply))
    assert [e for e, _ in await inbox(admin, team.member) if e != "notice"] == []
    again = await team.member.http.post(f"/api/v1/replies/{first}/regenerate")
    assert again.status_code == 202, again.text
    await team.talk.ended(UUID(again.json()["data"]["reply"]["id"]))
    chosen = await change(team.member, team.talk.id, current_id=str(question))
    assert chosen["current_id"] == again.json()["data"]["reply"]["id"]
    for verb, body in owners_own:
        assert (await team.member.http.request(verb, team.path, json=body)).status_code == 403
    # A viewer's role does not let them write, whatever is shared.
    assert (await team.viewer.http.post(team.talk.path, json={"text": "hello"})).status_code == 403
    assert len(provider.requests) == 3


async def test_two_people_write_one_after_the_other(team: Team, admin: asyncpg.Connection) -> None:
    """The reply that waits is its own asker's, whoever asked for the one before it."""
    await change(team.alice, team.talk.id, shared_access="write")
    _, first = await team.talk.send("deltas=20 rate=50")
    _, second = await team.seen_by(team.member).send("deltas=2 rate=0")
    assert (await team.talk.message(second))["status"] == "queued"
    await team.talk.ended(first)
    assert (await team.talk.ended(second))["status"] == "completed"
    rows = await admin.fetch("SELECT user_id FROM replies ORDER BY id")
    assert [row["user_id"] for row in rows] == [team.alice.user_id, team.member.user_id]


async def test_a_queued_reply_runs_with_its_own_askers_rights(
    app: FastAPI, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    await change(team.alice, team.talk.id, shared_access="write")
    started: dict[UUID, UUID] = {}
    begin = app.state.chat.turns.on_started

    def note(run: Any, written: Any) -> None:
        started[run.reply_id] = run.scope.user_id
        begin(run, written)

    monkeypatch.setattr(app.state.chat.turns, "on_started", note)
    _, first = await team.talk.send("deltas=20 rate=50")
    _, second = await team.seen_by(team.member).send("deltas=2 rate=0")
    await team.talk.ended(second)
    assert started == {first: team.alice.user_id, second: team.member.user_id}


# -- how it ends -------------------------------------------------------------------------------------------------------


async def test_what_others_have_asked_stops_when_they_may_write_no_more(team: Team) -> None:
    await change(team.alice, team.talk.id, shared_access="write")
    _, running = await team.seen_by(team.member).send("deltas=2000 rate=50")
    await team.talk.when(running, lambda message: len(visible_text(message)) > 10)
    _, own = await team.talk.send("deltas=2 rate=0")
    _, waiting = await team.seen_by(team.admin).send("deltas=2 rate=0")
    await change(team.alice, team.talk.id, shared_access="read")
    assert (await team.talk.ended(running))["status"] == "cancelled"
    assert (await team.talk.ended(own))["status"] == "completed"
    assert (await team.talk.ended(waiting))["status"] == "cancelled"
    assert (await team.member.http.get(team.path)).status_code == 200


async def test_what_waits_ends_too_where_all_who_asked_have_lost_sight_of_it(team: Team) -> None:
    await change(team.alice, team.talk.id, shared_access="write")
    _, running = await team.seen_by(team.member).send("deltas=2000 rate=50")
    await team.talk.when(running, lambda message: len(visible_text(message)) > 10)
    _, waiting = await team.seen_by(team.admin).send("deltas=2 rate=0")
    await change(team.alice, team.talk.id, shared=False)
    assert (await team.talk.ended(running))["status"] == "cancelled"
    assert (await team.talk.ended(waiting))["status"] == "cancelled"


@pytest.fixture
async def two_servers(settings: Settings) -> AsyncIterator[tuple[LiveServer, LiveServer]]:
    """Two servers over one database."""
    started, done = asyncio.Event(), asyncio.Event()
    made: list[LiveServer] = []

    async def run() -> None:
        async with AsyncExitStack() as stack:
            made.extend([await stack.enter_async_context(live(settings)) for _ in range(2)])
            started.set()
            await done.wait()

    task = asyncio.create_task(run())
    waiter = asyncio.create_task(started.wait())
    await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    if task.done():
        task.result()
    yield made[0], made[1]
    done.set()
    await task


async def test_unsharing_ends_others_subscriptions_on_every_process(
    team: Team, two_servers: tuple[LiveServer, LiveServer]
) -> None:
    await change(team.alice, team.talk.id, shared=True)
    channel = f"conversation:{team.talk.id}"
    async with AsyncExitStack() as stack:
        sockets = {}
        for server in two_servers:
            for name, who in (("alice", team.alice), ("member", team.member), ("viewer", team.viewer)):
                socket = await stack.enter_async_context(await greet(server, who.access_token))
                await socket.send(t="sub", id=1, ch=channel)
                await socket.of_type("live")
                sockets[server.port, name] = socket
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=two_servers[1].url, timeout=30))
        headers = {"Authorization": f"Bearer {team.viewer.access_token}"}
        stream = await stack.enter_async_context(
            http.stream("GET", f"/api/v1/channels/{channel}/events", headers=headers)
        )
        assert stream.status_code == 200
        lines = stream.aiter_lines()
        async for line in lines:
            if line.startswith("data:"):
                break
        began = time.monotonic()
        # By a third process: the application of the fixtures.
        await change(team.alice, team.talk.id, shared=False)
        for (_, name), socket in sockets.items():
            if name != "alice":
                gone = await socket.of_type("unsubbed")
                assert (gone["ch"], gone["code"]) == (channel, "not_found")
        async for line in lines:
            if line == "event: unsubbed":
                break
        assert time.monotonic() - began < 2
        # The owner's went on without a break, and nobody else hears what comes now.
        _, reply = await team.talk.send("deltas=2 rate=0")
        for (_, name), socket in sockets.items():
            if name == "alice":
                ended = await socket.until(lambda frame: frame.get("e") == "reply.completed")
                assert ended["d"]["reply"] == str(reply)
                assert [frame for frame in socket.frames if frame["t"] in {"unsubbed", "subbed"}][1:] == []
            else:
                assert [frame for frame in socket.frames if frame.get("d", {}).get("reply") == str(reply)] == []
                await socket.send(t="sub", id=2, ch=channel)
                assert (await socket.of_type("err"))["code"] == "not_found"


async def test_a_change_that_takes_nothing_away_ends_nothing(
    team: Team, two_servers: tuple[LiveServer, LiveServer]
) -> None:
    await change(team.alice, team.talk.id, shared=True)
    channel = f"conversation:{team.talk.id}"
    async with await greet(two_servers[0], team.member.access_token) as socket:
        await socket.send(t="sub", id=1, ch=channel)
        await socket.of_type("live")
        await change(team.alice, team.talk.id, shared_access="write", title="Together")
        told = await socket.until(lambda frame: frame.get("e") == "conversation.changed")
        assert (told["d"]["shared_access"], told["d"]["title"]) == ("write", "Together")
        _, reply = await team.seen_by(team.member).send("deltas=2 rate=0")
        await socket.until(lambda frame: frame.get("e") == "reply.completed")
        assert [frame["t"] for frame in socket.frames].count("subbed") == 1
        assert str(reply) in str(socket.frames)


async def test_a_subscription_that_was_being_made_while_access_ended_is_none(
    app: FastAPI, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked up before the change and attached after it: it is looked up once more."""
    await change(team.alice, team.talk.id, shared=True)
    authorise = Channels.authorise
    looked: list[str] = []

    async def slow(self: Channels, scope: Any, name: str) -> Any:
        found = await authorise(self, scope, name)
        if not looked and scope.user_id == team.member.user_id:
            looked.append(name)
            await change(team.alice, team.talk.id, shared=False)
        return found

    monkeypatch.setattr(Channels, "authorise", slow)
    # Only what comes from now on, so that no state is read, which would be looked up anew.
    async with asyncio.timeout(20):
        answer = await team.member.http.get(
            f"/api/v1/channels/conversation:{team.talk.id}/events", params={"since": ":-1"}
        )
    assert looked
    assert answer.status_code == 404
    assert app.state.realtime.bus.withdrawals > 0


# -- what the wish may say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"shared": None}, {"pinned": None}, {"archived": None}, {"shared": False, "shared_access": "read"},
        {"shared": True, "shared_access": None}, {"shared_access": "own"}, {"owner_id": str(uuid4())},
    ],
)  # fmt: skip
async def test_wishes_that_contradict_themselves_are_refused(talk: Talk, alice: Account, body: dict[str, Any]) -> None:
    answer = await alice.http.patch(f"/api/v1/conversations/{talk.id}", json=body)
    assert answer.status_code == 422, answer.text


async def test_sharing_again_keeps_what_was_given(talk: Talk, alice: Account) -> None:
    assert (await change(alice, talk.id, shared_access="write"))["shared"] is True
    assert (await change(alice, talk.id, shared=True))["shared_access"] == "write"
    ended = await change(alice, talk.id, shared_access=None)
    assert (ended["shared"], ended["shared_access"]) == (False, None)


# -- being told --------------------------------------------------------------------------------------------------------


async def test_the_others_are_told_what_is_shared_with_them(team: Team, admin: asyncpg.Connection) -> None:
    async def told(who: Account, count: int) -> list[dict[str, Any]]:
        async def came() -> bool:
            return len([e for e, _ in await inbox(admin, who) if e == "notice"]) == count

        await until(came, timeout_s=30)
        return [d for e, d in await inbox(admin, who) if e == "notice"]

    await change(team.alice, team.talk.id, shared=True, title="Together")
    for who in team.others:
        (notice,) = await told(who, 1)
        assert notice["kind"] == "conversation_shared"
        assert notice["text"] == "You may read a conversation of this workspace: Together"
        assert notice["conversation"] == {
            "id": str(team.talk.id), "title": "Together", "owner_id": str(team.alice.user_id), "shared_access": "read"
        }  # fmt: skip
    # What takes nothing and gives nothing is no news.
    await change(team.alice, team.talk.id, shared=True, archived=True)
    await change(team.alice, team.talk.id, shared=False)
    for who in team.others:
        gone = (await told(who, 2))[-1]
        assert (gone["kind"], gone["conversation"]) == ("conversation_unshared", {"id": str(team.talk.id)})
    for who in (team.alice, team.stranger):
        assert await told(who, 0) == []


# -- pins and lists ----------------------------------------------------------------------------------------------------


async def test_a_pin_is_ones_own_and_comes_first(team: Team, admin: asyncpg.Connection) -> None:
    newer = await start_talk(team.alice)
    assert await listed(team.alice) == [str(newer.id), str(team.talk.id)]
    pinned = await change(team.alice, team.talk.id, pinned=True)
    assert pinned["pinned"] is True
    assert await listed(team.alice) == [str(team.talk.id), str(newer.id)]
    assert await listed(team.alice, pinned=True) == [str(team.talk.id)]
    assert await listed(team.alice, pinned=False) == [str(newer.id)]
    for one in (team.talk, newer):
        await change(team.alice, one.id, shared=True)
    seen = (await team.member.http.get(team.path)).json()["data"]
    assert seen["pinned"] is False
    assert (await change(team.member, newer.id, pinned=True))["pinned"] is True
    assert await listed(team.member, filter="shared", pinned=True) == [str(newer.id)]
    assert await listed(team.member, filter="all") == [str(newer.id), str(team.talk.id)]
    assert await listed(team.alice, pinned=True) == [str(team.talk.id)]
    assert (await change(team.member, newer.id, pinned=False))["pinned"] is False
    assert await admin.fetchval("SELECT count(*) FROM conversation_pins") == 0
    # It does not bring the conversation to the top of what moved.
    moved = (await team.alice.http.get(team.path)).json()["data"]["updated_at"]
    await change(team.alice, team.talk.id, pinned=False)
    assert (await team.alice.http.get(team.path)).json()["data"]["updated_at"] == moved


async def test_archived_ones_are_listed_apart(team: Team) -> None:
    await change(team.alice, team.talk.id, shared=True, archived=True)
    assert await listed(team.alice) == []
    assert await listed(team.alice, archived=True) == [str(team.talk.id)]
    assert await listed(team.member, filter="shared") == []
    assert await listed(team.member, filter="shared", archived=True) == [str(team.talk.id)]


async def test_pages_of_a_list_neither_lose_nor_repeat(alice: Account) -> None:
    made = [str((await start_talk(alice)).id) for _ in range(7)]
    for id_ in made[::3]:
        await change(alice, id_, pinned=True)
    whole = await listed(alice, per_page=100)
    assert sorted(whole) == sorted(made)
    assert set(whole[:3]) == set(made[::3])
    assert [id_ for page in (1, 2, 3) for id_ in await listed(alice, page=page, per_page=3)] == whole


async def test_deleting_leaves_nothing(team: Team, admin: asyncpg.Connection) -> None:
    question, reply = await team.talk.send("deltas=2 rate=0")
    await team.talk.ended(reply)
    await change(team.alice, team.talk.id, shared_access="write", title="To go")
    await change(team.member, team.talk.id, pinned=True)
    edited = await team.member.http.patch(f"/api/v1/messages/{question}", json={"text": "deltas=1 rate=0"})
    await team.talk.ended(UUID(edited.json()["data"]["reply"]["id"]))
    assert (await team.alice.http.delete(team.path)).status_code == 204
    for table in ("conversations", "messages", "search_entries", "conversation_pins", "replies"):
        assert await admin.fetchval(f"SELECT count(*) FROM {table}") == 0, table
    left = "SELECT count(*) FROM channel_events WHERE channel = $1"
    assert await admin.fetchval(left, f"conversation:{team.talk.id}") == 0


# -- the layers --------------------------------------------------------------------------------------------------------


async def test_the_inbox_of_another_is_written_for_the_owner_alone(app: FastAPI, team: Team) -> None:
    """A transaction is bound to the owner for that one statement: before and after it is the writer's own."""
    await change(team.alice, team.talk.id, shared_access="write")
    scope = scope_of(team.member)
    async with app.state.database.unit_of_work(scope) as unit:
        connection = await unit.driver()
        rows = await connection.fetch(
            "SELECT seq FROM realtime_append_for($1, $2, $3, $4, $5, $6)",
            team.alice.user_id, scope.workspace_id, [f"user:{team.alice.user_id}"], [team.alice.user_id], ["x"], ["{}"],
        )  # fmt: skip
        assert len(rows) == 1
        assert await connection.fetchval("SELECT app_user()") == team.member.user_id
        seen = "SELECT count(*) FROM channel_events WHERE channel = $1"
        assert await connection.fetchval(seen, f"user:{team.alice.user_id}") == 0


async def test_no_role_makes_anothers_private_conversation_visible(app: FastAPI, team: Team) -> None:
    async with app.state.database.unit_of_work(scope_of(team.admin)) as unit:
        assert await ConversationRepository(unit, scope_of(team.admin)).find(team.talk.id) is None


async def test_the_end_of_anothers_reply_does_not_ask_for_rights(team: Team) -> None:
    """It was begun with them, so it comes to its end without: stopped, with what there was."""
    await change(team.alice, team.talk.id, shared_access="write")
    _, reply = await team.seen_by(team.member).send("deltas=2000 rate=50")
    await team.talk.when(reply, lambda message: len(visible_text(message)) > 10)
    await change(team.alice, team.talk.id, shared=False)
    ended = await team.talk.ended(reply)
    assert ended["status"] == "cancelled"
    assert visible_text(ended)

    async def begun() -> bool:
        _, own = await team.talk.send("deltas=1 rate=0")
        return bool((await team.talk.ended(own))["status"] == "completed")

    await until(begun)
