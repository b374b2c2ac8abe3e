"""Replies that lost their process. Here a reply is given to a process that never was; the sweep finds it at once."""

from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest
from fastapi import FastAPI

from benchmarks.fake_plan import script
from benchmarks.fake_provider import FakeProvider
from parley.chat.resuming import Place, Step
from parley.core.db import DatabaseUrls
from parley.core.settings import LlmSettings, RealtimeSettings
from parley.realtime.fold import visible_text
from tests.chat.conftest import Talk, start_talk, until
from tests.conftest import SignUp, make_settings, running

NOBODY = 123_456


async def log_of(admin: asyncpg.Connection, reply: UUID) -> list[tuple[str, dict[str, Any]]]:
    rows = await admin.fetch("SELECT e, d::text AS d FROM channel_events ORDER BY channel, seq")
    events = [(row["e"], orjson.loads(row["d"])) for row in rows]
    return [(e, d) for e, d in events if d.get("reply") == str(reply)]


async def lose(admin: asyncpg.Connection, reply: UUID) -> None:
    """Take a reply away from its process, as if that were gone."""
    await admin.execute("UPDATE replies SET owner = $2 WHERE id = $1", reply, NOBODY)


async def attempt(admin: asyncpg.Connection, reply: UUID) -> int:
    found: int = await admin.fetchval("SELECT attempt FROM replies WHERE id = $1", reply)
    return found


async def test_nothing_visible_begins_again_unseen(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send("deltas=5 rate=0 seed=4 ttft=2")
    await until_asked(provider, 1)
    await lose(admin, reply)
    ended = await talk.ended(reply)
    assert (ended["status"], visible_text(ended)) == ("completed", "".join(script(4, 5, 4)))
    log = await log_of(admin, reply)
    assert [e for e, _ in log if e in {"reply.started", "reply.resumed"}] == ["reply.started", "reply.resumed"]
    (resumed,) = [d for e, d in log if e == "reply.resumed"]
    assert (resumed["strategy"], resumed["attempt"]) == ("restart", 2)
    assert sum(e == "reply.completed" for e, _ in log) == 1


async def until_asked(provider: FakeProvider, count: int) -> None:
    async def asked() -> bool:
        return len(provider.requests) >= count

    await until(asked)


async def test_a_model_that_cannot_go_on_keeps_the_partial(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send("deltas=1000 rate=100 seed=5")
    await talk.when(reply, lambda message: len(visible_text(message)) > 20)
    await lose(admin, reply)
    ended = await talk.ended(reply)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "worker_lost")
    text = visible_text(ended)
    assert len(text) > 20
    assert "".join(script(5, 1000, 4)).startswith(text)
    assert len(provider.requests) == 1
    log = await log_of(admin, reply)
    assert "".join(d["x"] for e, d in log if e == "reply.delta") == text
    assert log[-1][0] == "reply.failed"
    assert log[-1][1]["can"] == ["continue", "regenerate"]


async def test_the_third_loss_ends_it(talk: Talk, provider: FakeProvider, admin: asyncpg.Connection) -> None:
    _, reply = await talk.send("deltas=5 rate=0 ttft=30")
    for n in (1, 2, 3):
        await until_asked(provider, n)

        async def begun(wanted: int = n) -> bool:
            return await attempt(admin, reply) == wanted

        await until(begun)
        await lose(admin, reply)
    ended = await talk.ended(reply)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "worker_lost")
    assert len(provider.requests) == 3
    log = await log_of(admin, reply)
    assert {d["attempt"] for e, d in log if e == "reply.resumed"} <= {2, 3}


async def test_a_cancelled_one_is_cancelled(
    talk: Talk, app: FastAPI, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send("deltas=5 rate=0 ttft=30")
    await until_asked(provider, 1)
    await admin.execute(
        "UPDATE replies SET owner = $2, cancel_requested = true, cancelled_by = user_id WHERE id = $1", reply, NOBODY
    )
    ended = await talk.ended(reply)
    assert ended["status"] == "cancelled"
    assert len(provider.requests) == 1


async def test_whoever_has_left_is_not_written_for(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send("deltas=5 rate=0 ttft=30")
    await until_asked(provider, 1)
    await admin.execute("DELETE FROM memberships")
    await lose(admin, reply)

    async def ended() -> bool:
        return bool(await admin.fetchval("SELECT status = 'failed' FROM messages WHERE id = $1", reply))

    await until(ended)
    assert len(provider.requests) == 1


async def test_a_lease_that_its_owner_does_not_renew_runs_out(
    talk: Talk, app: FastAPI, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    """A frozen process holds its lock. Its lease has to be over twice in a row, so that a slow one is not robbed."""
    other = await asyncpg.connect(app.state.database.urls.direct)
    await other.execute("SELECT pg_advisory_lock($1::int, $2::int)", 0x7061726C, NOBODY)
    _, reply = await talk.send("deltas=5 rate=0 ttft=2")
    await until_asked(provider, 1)
    await lose(admin, reply)
    sweep = app.state.chat.take_over.sweep
    assert await sweep() == 0
    await admin.execute("UPDATE replies SET lease_until = now() - interval '1 second' WHERE id = $1", reply)
    ended = await talk.ended(reply)
    assert ended["status"] == "completed"
    assert await attempt(admin, reply) == 2
    await other.close()


async def test_after_the_database_was_away_the_others_get_time_to_come_back(
    talk: Talk, app: FastAPI, provider: FakeProvider, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody's lock was gone with it: who has connected first does not take what the others are writing."""
    _, reply = await talk.send("deltas=5 rate=0 ttft=1")
    await until_asked(provider, 1)
    take_over, writer = app.state.chat.take_over, app.state.chat.writer
    writer._connection.terminate()
    await writer.ensure_connected()
    await lose(admin, reply)
    for _ in range(3):
        assert await take_over.sweep() == 0
    # What was given up on purpose need not wait.
    await admin.execute("UPDATE replies SET owner = NULL WHERE id = $1", reply)
    assert await take_over.sweep() == 1
    assert (await talk.ended(reply))["status"] == "completed"
    assert await attempt(admin, reply) == 2


async def test_a_queued_reply_that_was_forgotten_is_begun(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, running = await talk.send("deltas=5 rate=0 ttft=30")
    _, waiting = await talk.send("deltas=5 rate=0 seed=9")
    await until_asked(provider, 1)
    # Ended behind the server's back: nobody begins the next one for it.
    await admin.execute("UPDATE replies SET status = 'failed', ended_at = now() WHERE id = $1", running)
    ended = await talk.ended(waiting)
    assert visible_text(ended) == "".join(script(9, 5, 4))


async def test_a_tool_call_that_was_not_made_is_made(
    talk: Talk, app: FastAPI, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    """The log has the call and not that it was begun: it was not made, and is made now."""
    _, reply = await talk.send('tool=add_task:{"title":"milk"} deltas=5 rate=0 ttft=2')
    await until_asked(provider, 1)
    channel = f"conversation:{talk.id}"
    call = "01a1fcff-8ab1-74fc-8fcc-2a90489831f7"
    for e, d in (
        ("reply.part", {"part": 0, "kind": "tool", "state": "start"}),
        ("reply.tool", {"part": 0, "call": call, "name": "add_task", "state": "input", "input": {"title": "milk"}}),
    ):
        await append(admin, talk, channel, e, {"reply": str(reply), **d})
    await lose(admin, reply)
    ended = await talk.ended(reply)
    assert ended["status"] == "completed"
    tool = ended["parts"][0]
    assert (tool["call"], tool["state"]) == (call, "done")
    assert await admin.fetchval("SELECT count(*) FROM tasks WHERE title = 'milk'") == 1


@pytest.mark.parametrize(("name", "state", "made"), [("add_task", "unknown", 0), ("list_tasks", "done", 0)])
async def test_a_tool_call_of_unknown_outcome_is_repeated_only_if_that_does_no_harm(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection, name: str, state: str, made: int
) -> None:
    _, reply = await talk.send("deltas=5 rate=0 ttft=2")
    await until_asked(provider, 1)
    channel = f"conversation:{talk.id}"
    arguments = {"title": "milk"} if name == "add_task" else {}
    tool = {"part": 0, "call": "01a1fcff-8ab1-74fc-8fcc-2a90489831f7", "name": name}
    for e, d in (
        ("reply.part", {"part": 0, "kind": "tool", "state": "start"}),
        ("reply.tool", {**tool, "state": "input", "input": arguments}),
        ("reply.tool", {**tool, "state": "running"}),
    ):
        await append(admin, talk, channel, e, {"reply": str(reply), **d})
    await lose(admin, reply)
    ended = await talk.ended(reply)
    assert ended["status"] == "completed"
    assert ended["parts"][0]["state"] == state
    assert await admin.fetchval("SELECT count(*) FROM tasks") == made
    told = provider.requests[-1].body["messages"]
    assert told[-1]["role"] == "tool"
    assert ("unknown" in told[-1]["content"]) == (state == "unknown")


async def append(admin: asyncpg.Connection, talk: Talk, channel: str, e: str, d: dict[str, Any]) -> None:
    await admin.fetch(
        "SELECT * FROM realtime_append($1, $2, $3, $4, $5)",
        talk.owner.workspace_id, [channel], [None], [e], [orjson.dumps(d).decode()],
    )  # fmt: skip


async def lose_often(talk: Talk, admin: asyncpg.Connection, reply: UUID, times: int) -> None:
    """Take a reply from its process in the middle of its text, so many times."""
    for n in range(1, times + 1):
        at = n * 60
        await talk.when(reply, lambda message, at=at: len(visible_text(message)) > at)  # type: ignore[misc]  # a default binds it
        await lose(admin, reply)


@pytest.mark.parametrize("losses", [1, 2])
async def test_a_model_that_goes_on_from_a_beginning_says_the_whole(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection, losses: int
) -> None:
    _, reply = await talk.send("deltas=150 rate=60 seed=7", model="beginning")
    await lose_often(talk, admin, reply, losses)
    ended = await talk.ended(reply)
    whole = "".join(script(7, 150, 4))
    assert (ended["status"], visible_text(ended)) == ("completed", whole)
    log = await log_of(admin, reply)
    assert [(d["strategy"], d["attempt"]) for e, d in log if e == "reply.resumed"] == [
        ("prefill", n + 2) for n in range(losses)
    ]
    assert_offsets(log, whole)
    assert len(provider.requests) == 1 + losses
    assert [part["type"] for part in ended["parts"]] == ["text"]


def assert_offsets(log: list[tuple[str, dict[str, Any]]], whole: str) -> None:
    """Hold that the deltas are the text, each where the one before it ended."""
    text = ""
    for e, d in log:
        if e == "reply.delta":
            assert d["off"] == len(text)
            text += d["x"]
    assert text == whole


@pytest.mark.parametrize("losses", [1, 2])
async def test_an_answer_that_goes_on_by_itself_is_read_on(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection, losses: int
) -> None:
    _, reply = await talk.send("deltas=150 rate=60 seed=8", model="background")
    await lose_often(talk, admin, reply, losses)
    ended = await talk.ended(reply)
    whole = "".join(script(8, 150, 4))
    assert (ended["status"], visible_text(ended)) == ("completed", whole)
    log = await log_of(admin, reply)
    assert {d["strategy"] for e, d in log if e == "reply.resumed"} == {"reattach"}
    assert_offsets(log, whole)
    # It was generated once, whoever read it, and the process that was robbed did not stop it.
    assert sum(record.generated for record in provider.requests) == 1
    assert not any(record.cancelled for record in provider.requests)
    assert ended["usage"]["output_tokens"] == 150


async def test_an_answer_that_cannot_be_read_on_is_completed_from_its_object(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send("deltas=100 rate=60 seed=8 expired=400", model="background")
    await lose_often(talk, admin, reply, 1)
    ended = await talk.ended(reply)
    whole = "".join(script(8, 100, 4))
    assert (ended["status"], visible_text(ended)) == ("completed", whole)
    assert_offsets(await log_of(admin, reply), whole)


async def test_an_answer_that_is_gone_keeps_what_was_read(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send("deltas=100 rate=60 seed=8 expired=404 forget=1", model="background")
    await lose_often(talk, admin, reply, 1)
    ended = await talk.ended(reply)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "worker_lost")
    text = visible_text(ended)
    assert len(text) > 60
    assert "".join(script(8, 100, 4)).startswith(text)


async def test_a_cancel_stops_an_answer_that_goes_on_by_itself(talk: Talk, provider: FakeProvider) -> None:
    _, reply = await talk.send("deltas=1000 rate=60 seed=8", model="background")
    await talk.when(reply, lambda message: len(visible_text(message)) > 20)
    await talk.owner.http.post(f"/api/v1/replies/{reply}/cancel")
    assert (await talk.ended(reply))["status"] == "cancelled"

    async def stopped() -> bool:
        return any(record.cancelled for record in provider.requests)

    await until(stopped)


async def test_continue_gives_the_beginning_to_a_model_that_takes_one(
    talk: Talk, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send("deltas=100 rate=60 seed=7", model="beginning")
    await talk.when(reply, lambda message: len(visible_text(message)) > 60)
    await talk.owner.http.post(f"/api/v1/replies/{reply}/cancel")
    first = visible_text(await talk.ended(reply))
    answer = await talk.owner.http.post(f"/api/v1/replies/{reply}/continue")
    second = UUID(answer.json()["data"]["reply"]["id"])
    # Its process is lost too: the beginning is then both of what was said.
    await talk.when(second, lambda message: len(visible_text(message)) > 60)
    await lose(admin, second)
    ended = await talk.ended(second)
    assert ended["status"] == "completed"
    assert first + visible_text(ended) == "".join(script(7, 100, 4))


@pytest.mark.parametrize("model", ["beginning", "background"])
async def test_what_does_not_end_in_time_is_handed_over(
    tmp_path: Path, urls: DatabaseUrls, registry_file: Path, sign_up: SignUp, admin: asyncpg.Connection,
    provider: FakeProvider, app: FastAPI, model: str,
) -> None:  # fmt: skip
    """One process leaves while it writes; the other goes on at once, and what is sent to the first goes there too."""
    settings = make_settings(tmp_path / "other", urls, llm=LlmSettings(registry=registry_file))
    settings.data_dir.mkdir()
    async with running(settings) as leaving:
        alice = await sign_up(app=leaving)
        talk = await start_talk(alice)

        async def know_each_other() -> bool:
            return not leaving.state.chat.wire.alone and not app.state.chat.wire.alone

        await until(know_each_other)
        _, reply = await talk.send("deltas=150 rate=60 seed=7", model=model)
        await talk.when(reply, lambda message: len(visible_text(message)) > 60)
        await leaving.state.chat.drain(0.05)
        assert leaving.state.chat.running == 0
        # The old one still answers requests.
        elsewhere = await start_talk(alice)
        _, later = await elsewhere.send("deltas=5 rate=0 seed=3")
        assert visible_text(await elsewhere.ended(later)) == "".join(script(3, 5, 4))
        ended = await talk.ended(reply)
        assert (ended["status"], visible_text(ended)) == ("completed", "".join(script(7, 150, 4)))
        owner = app.state.chat.writer.owner
        assert {row["owner"] for row in await admin.fetch("SELECT owner FROM replies")} == {owner}
        if model == "background":
            assert not any(record.cancelled for record in provider.requests)


def test_a_reply_is_cut_where_its_last_call_of_the_model_began() -> None:
    tool = {"type": "tool", "call": "c", "name": "n", "state": "done", "input": {}, "output": {}}
    text, reasoning = {"type": "text", "text": "said"}, {"type": "reasoning", "text": "hm"}
    assert Step.last_of([]) == Step([], "", 0)
    assert Step.last_of([reasoning, text]) == Step([], "said", 2)
    assert Step.last_of([text, tool]) == Step([text, tool], "", 0)
    assert Step.last_of([text, tool, tool, reasoning, text]) == Step([text, tool, tool], "said", 2)


def test_a_place_is_read_as_it_was_written() -> None:
    place = Place("gpt", 12, 3, "resp_1:4|5")
    assert Place.from_text(place.to_text()) == place
    assert Place.from_text(None) is None
    assert Place.from_text("") is None


async def test_a_lease_is_renewed_while_the_model_has_said_nothing(
    tmp_path: Path, urls: DatabaseUrls, registry_file: Path, admin: asyncpg.Connection, sign_up: SignUp
) -> None:
    realtime = RealtimeSettings(lease_s=0.9)
    settings = make_settings(tmp_path, urls, llm=LlmSettings(registry=registry_file), realtime=realtime)
    async with running(settings) as app:
        alice = await sign_up(app=app)
        _, reply = await (await start_talk(alice)).send("deltas=5 rate=0 ttft=30")
        first = await admin.fetchval("SELECT lease_until FROM replies WHERE id = $1", reply)

        async def renewed() -> bool:
            found = await admin.fetchval("SELECT lease_until FROM replies WHERE id = $1", reply)
            return bool((found - first).total_seconds() > 0.9)

        await until(renewed)
        assert (await admin.fetchval("SELECT owner FROM replies WHERE id = $1", reply)) == app.state.chat.writer.owner
        await alice.http.post(f"/api/v1/replies/{reply}/cancel")


async def test_a_tick_that_fails_in_a_way_nobody_knows_loses_no_text(
    talk: Talk, app: FastAPI, provider: FakeProvider, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was taken for the tick comes with the next one. The driver has errors that are of none of its kinds."""
    writer = app.state.chat.writer
    write, failures = writer._write, [RuntimeError("odd"), asyncpg.InternalClientError("odd"), KeyError("odd")]

    async def fail_now_and_then(batch: Any) -> Any:
        if failures and any(batch.events):
            raise failures.pop()
        return await write(batch)

    monkeypatch.setattr(writer, "_write", fail_now_and_then)
    _, reply = await talk.send("deltas=300 rate=150 seed=6")
    ended = await talk.ended(reply)
    assert failures == []
    whole = "".join(script(6, 300, 4))
    assert (ended["status"], visible_text(ended)) == ("completed", whole)
    assert_offsets(await log_of(admin, reply), whole)


async def test_a_reply_that_its_own_process_has_given_up_is_found_by_its_lease(
    talk: Talk, app: FastAPI, provider: FakeProvider, admin: asyncpg.Connection
) -> None:
    _, reply = await talk.send("deltas=5 rate=0 ttft=2 seed=4")
    await until_asked(provider, 1)
    app.state.chat.writer.find(reply).signal(lost=True)
    await admin.execute("UPDATE replies SET lease_until = now() - interval '1 second' WHERE id = $1", reply)
    ended = await talk.ended(reply)
    assert (ended["status"], visible_text(ended)) == ("completed", "".join(script(4, 5, 4)))
    assert await attempt(admin, reply) == 2
