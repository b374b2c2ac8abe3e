"""The tool calls of a reply: together, one after the other, and within bounds."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from fastapi import FastAPI

from parley import main
from parley.chat.turns import Send
from parley.core.errors import Invalid
from parley.core.settings import Settings
from parley.llm.errors import ToolInvalid
from parley.llm.tool_values import ARGUMENT_CHARACTERS
from parley.llm.tools import Tool, ToolContext, tool
from parley.tasks.tools import TOOLS
from parley.tenancy.permissions import Permission
from tests.chat.conftest import Talk, until
from tests.chat.scripted import MODEL, Script, newcomer
from tests.conftest import running

Log = Callable[[UUID], Awaitable[list[tuple[int, str, dict[str, Any]]]]]


@dataclass
class Workshop:
    """Tools that a test looks into."""

    running: int = 0
    most: int = 0
    order: list[str] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    on_call: Callable[[], Awaitable[None]] | None = None

    async def work(self, name: str, wait: bool) -> dict[str, Any]:
        self.running += 1
        self.most = max(self.most, self.running)
        self.order.append(name)
        try:
            if self.on_call is not None:
                await self.on_call()
            if wait:
                await self.gate.wait()
        finally:
            self.running -= 1
        return {"name": name}

    @property
    def tools(self) -> tuple[Tool, ...]:
        """A tool that reads and one that writes; both wait at the gate if they are told to. And one that fails."""

        async def look(context: ToolContext, *, name: str, wait: bool = False) -> dict[str, Any]:
            """Look at something."""
            assert context.scope.permissions
            return await self.work(name, wait)

        async def change(context: ToolContext, *, name: str, wait: bool = False) -> dict[str, Any]:
            """Change something."""
            assert context.scope.permissions
            return await self.work(name, wait)

        async def fail(context: ToolContext, *, how: str = "told") -> dict[str, Any]:
            """Fail."""
            assert context.scope.permissions
            if how == "told":
                raise Invalid("That does not fit.")
            raise RuntimeError("secret detail")

        async def flood(context: ToolContext) -> dict[str, Any]:
            """Say too much."""
            assert context.scope.permissions
            return {"text": "x" * 10_000_000}

        reads = tool(permission=Permission.TASKS_READ, side_effects=False)
        writes = tool(permission=Permission.TASKS_WRITE, side_effects=True)
        return (reads(look), writes(change), reads(fail), reads(flood))


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """The tools, beside those that there are; to be asked for before the application is started."""
    made = Workshop()
    monkeypatch.setattr(main, "TASK_TOOLS", (*TOOLS, *made.tools))
    return made


Begin = Callable[..., Awaitable[Talk]]


@pytest.fixture
async def begin(settings: Settings, workshop: Workshop) -> AsyncIterator[Begin]:
    """Start an application with settings of tools, and a conversation in it."""
    del workshop
    stop, tasks = asyncio.Event(), []

    async def start(**llm: Any) -> Talk:
        started: asyncio.Future[FastAPI] = asyncio.get_running_loop().create_future()
        changed = settings.model_copy(update={"llm": settings.llm.model_copy(update=llm)})

        async def hold() -> None:
            async with running(changed) as app:
                started.set_result(app)
                await stop.wait()

        tasks.append(asyncio.create_task(hold()))
        app = await started
        owner = await newcomer(app)
        answer = await owner.http.post("/api/v1/conversations", json={"model": MODEL})
        return Talk(owner, UUID(answer.json()["data"]["id"]))

    yield start
    stop.set()
    await asyncio.gather(*tasks)


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tool parts of a message."""
    return [part for part in message["parts"] if part["type"] == "tool"]


def states(message: dict[str, Any]) -> list[str]:
    """Return the states of its calls."""
    return [call["state"] for call in calls_of(message)]


async def all_run(workshop: Workshop, count: int) -> None:
    """Return when so many calls run at the same time."""

    async def holds() -> bool:
        return workshop.running == count

    await until(holds, timeout_s=20)


# -- together ----------------------------------------------------------------------------------------------------------


async def test_calls_that_only_look_are_made_at_the_same_time(
    begin: Begin, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", "b", "c"]
    script = Script([("look", {"name": name, "wait": True}) for name in names]).install(monkeypatch)
    talk = await begin()
    _, reply = await talk.send("go")
    await all_run(workshop, 3)
    workshop.gate.set()
    ended = await talk.ended(reply)
    assert states(ended) == ["done"] * 3
    assert [told["name"] for told in script.told()] == names


async def test_no_more_are_made_at_once_than_may_be(
    begin: Begin, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script([("look", {"name": str(n), "wait": True}) for n in range(7)]).install(monkeypatch)
    talk = await begin(tools_at_once=2)
    _, reply = await talk.send("go")
    await all_run(workshop, 2)
    workshop.gate.set()
    assert states(await talk.ended(reply)) == ["done"] * 7
    assert workshop.most == 2
    assert [told["name"] for told in script.told()] == [str(n) for n in range(7)]


async def test_calls_that_change_something_keep_their_order(
    begin: Begin, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(n) for n in range(8)]
    Script([("change", {"name": name}) for name in names]).install(monkeypatch)
    talk = await begin(tools_at_once=8)
    _, reply = await talk.send("go")
    assert states(await talk.ended(reply)) == ["done"] * 8
    assert (workshop.order, workshop.most) == (names, 1)


async def test_one_that_fails_stops_no_other(begin: Begin, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(
        [("fail", {}), ("look", {"name": "a"}), ("fail", {"how": "oddly"}), ("change", {"name": "b"}), ("flood", {})]
    ).install(monkeypatch)
    talk = await begin()
    _, reply = await talk.send("go")
    ended = await talk.ended(reply)
    assert (ended["status"], states(ended)) == ("completed", ["failed", "done", "failed", "done", "done"])
    told = script.told()
    assert [told[0]["error"], told[2]["error"]] == ["That does not fit.", "The tool failed."]
    assert (told[1], told[3]) == ({"name": "a"}, {"name": "b"})
    assert ("longer than" in told[4]["error"], len(str(told[4])) < 20_000) == (True, True)
    assert sorted(workshop.order) == ["a", "b"]


async def test_every_call_is_in_the_log_before_the_first_is_made(
    begin: Begin, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, log_of: Log
) -> None:
    Script([("look", {"name": str(n)}) for n in range(5)]).install(monkeypatch)
    talk = await begin(tools_at_once=1)
    seen: list[list[tuple[str, str]]] = []

    async def look_at_the_log() -> None:
        log = await log_of(talk.id)
        seen.append([(d["call"], d["state"]) for _, e, d in log if e == "reply.tool"])

    workshop.on_call = look_at_the_log
    _, reply = await talk.send("go")
    calls = [call["call"] for call in calls_of(await talk.ended(reply))]
    assert len(seen) == 5
    for number, found in enumerate(seen):
        assert {call for call, state in found if state == "input"} == set(calls)
        assert [call for call, state in found if state == "running"] == calls[: number + 1], "each is said to run first"


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (("add_task", {"title": "a", "workspace_id": str(uuid4())}), "workspace_id"),
        (("add_task", {"title": ["a"]}), "title"),
        (("add_task", {}), "title"),
        (("add_task", "[1]"), "not a JSON object"),
        (("add_task", "{oops"), "not a JSON object"),
        (("add_task", {"title": "a\0"}), "NUL"),
        (("add_task", {"title": "x" * (ARGUMENT_CHARACTERS + 1)}), "too long"),
        (("add_task", '{"title":' + '{"x":' * 200 + "1" + "}" * 201), "deeply"),
        (("drop_tables", {}), "no such tool"),
    ],
)
async def test_what_a_model_gets_wrong_it_is_told(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, log_of: Log, call: tuple[str, Any], word: str
) -> None:
    script = Script([call]).install(monkeypatch)
    talk = await begin()
    _, reply = await talk.send("go")
    ended = await talk.ended(reply)
    assert (ended["status"], states(ended)) == ("completed", ["failed"])
    assert word in script.told()[0]["error"]
    assert (await talk.owner.http.get("/api/v1/tasks")).json()["data"] == []
    log = await log_of(talk.id)
    assert all(len(str(d)) < 3 * ARGUMENT_CHARACTERS // 10 for _, e, d in log if e == "reply.tool"), "not kept either"


@pytest.mark.parametrize(
    ("own", "offered"),
    [(None, ["list_tasks"]), (["list_tasks", "add_task"], ["list_tasks"]), (["add_task"], []), ([], [])],
)
async def test_a_reply_has_the_tools_that_it_was_asked_with_and_no_others(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, own: list[str] | None, offered: list[str]
) -> None:
    script = Script([("drop_tables", {}), ("complete_task", {"task": "a"})]).install(monkeypatch)
    talk = await begin()
    body = {"name": "helper", "title": "Helper", "instructions": "Help.", "tools": own, "approval": "never"}
    assert (await talk.owner.http.post("/api/v1/assistants", json=body)).status_code == 201
    changed = await talk.owner.http.patch(f"/api/v1/conversations/{talk.id}", json={"assistant": "helper"})
    assert changed.status_code == 200, changed.text
    app: FastAPI = talk.owner.http._transport.app  # type: ignore[attr-defined]  # an ASGI transport
    scope = (await app.state.authenticator.authenticate(talk.owner.access_token)).scope
    sent = await app.state.chat.turns.send(
        scope, Send(conversation_id=talk.id, cid=uuid4(), contents=("go",), tools=("list_tasks",))
    )
    ended = await talk.ended(UUID(sent.reply["id"]))
    assert [spec.name for spec in script.requests[0].tools] == offered
    assert states(ended) == ["failed", "failed"]
    assert script.told() == [{"error": "There is no such tool."}] * 2


def test_tools_that_cannot_be_offered_stop_the_start(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "TASK_TOOLS", (*TOOLS, TOOLS[0]))

    async def start() -> None:
        async with running(settings):
            pass

    with pytest.raises(ToolInvalid, match="add_task"):
        asyncio.run(start())


# -- caps --------------------------------------------------------------------------------------------------------------


async def test_calls_beyond_those_of_a_step_are_refused_and_told(
    begin: Begin, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script([("change", {"name": str(n)}) for n in range(5)]).install(monkeypatch)
    talk = await begin(calls_per_step=3)
    _, reply = await talk.send("go")
    ended = await talk.ended(reply)
    assert (ended["status"], states(ended)) == ("completed", ["done"] * 3 + ["failed"] * 2)
    assert ["error" in told for told in script.told()] == [False] * 3 + [True] * 2
    assert "at most 3 calls" in script.told()[4]["error"]
    assert workshop.order == ["0", "1", "2"]


async def test_calls_without_measure_end_the_reply(
    begin: Begin, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    Script("Let me see.", [("change", {"name": str(n)}) for n in range(13)]).install(monkeypatch)
    talk = await begin(calls_per_step=3)
    _, first = await talk.send("go")
    assert (await talk.ended(first))["status"] == "completed"
    _, reply = await talk.send("go")
    ended = await talk.ended(reply)
    assert (ended["status"], ended["error"]["code"], workshop.order) == ("failed", "bad_output", [])


async def test_calls_beyond_those_of_a_reply_are_refused_and_told(
    begin: Begin, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [[("change", {"name": f"{step}{n}"}) for n in range(2)] for step in range(3)]
    script = Script(*steps).install(monkeypatch)
    talk = await begin(calls_per_reply=3)
    _, reply = await talk.send("go")
    ended = await talk.ended(reply)
    assert (ended["status"], states(ended)) == ("completed", ["done"] * 3 + ["failed"] * 3)
    assert workshop.order == ["00", "01", "10"]
    assert "at most 3 calls" in script.told()[1]["error"]
    # Another reply begins anew.
    script.steps.append([("change", {"name": "next"})])
    _, reply = await talk.send("go")
    assert states(await talk.ended(reply)) == ["done"]


async def test_the_tools_of_a_reply_have_so_much_time_together(
    begin: Begin, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(
        [("look", {"name": "slow", "wait": True})], [("look", {"name": "late"})], "That took long."
    ).install(monkeypatch)
    talk = await begin(tools_timeout_s=0.3, tool_timeout_s=30)
    _, reply = await talk.send("go")
    ended = await talk.ended(reply)
    assert (ended["status"], states(ended)) == ("completed", ["failed", "failed"])
    assert "longer than" in script.told(1)[0]["error"]
    assert "have used their" in script.told(2)[0]["error"]
    assert (workshop.order, workshop.running) == (["slow"], 0)


async def test_one_call_has_so_much_time(
    begin: Begin, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, admin: asyncpg.Connection
) -> None:
    script = Script([("change", {"name": "slow", "wait": True}), ("look", {"name": "quick"})]).install(monkeypatch)
    talk = await begin(tool_timeout_s=0.2)
    _, reply = await talk.send("go")
    assert states(await talk.ended(reply)) == ["failed", "done"]
    assert "longer than 0.2 s" in script.told()[0]["error"]
    assert workshop.running == 0
    assert await admin.fetchval("SELECT count(*) FROM tasks") == 0


async def test_a_model_that_goes_on_calling_is_stopped(
    begin: Begin, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(*[[("look", {"name": str(n)})] for n in range(20)]).install(monkeypatch)
    talk = await begin(max_steps=4)
    _, reply = await talk.send("go")
    ended = await talk.ended(reply)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "bad_output")
    assert (len(script.requests), len(workshop.order)) == (4, 4)


async def test_a_reply_costs_no_more_than_one_may(
    settings: Settings, begin: Begin, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The demo model costs something here: a dollar a token.
    registry = settings.llm.registry
    text = registry.read_text()
    registry.write_text(
        text.replace(
            "demo: {provider: demo, name: demo}", "demo: {provider: demo, name: demo, price: {output: 500000}}"
        )
    )
    script = Script(*[[("look", {"name": str(n)})] for n in range(5)]).install(monkeypatch)
    talk = await begin(max_cost=Decimal("1.5"))
    _, reply = await talk.send("go")
    ended = await talk.ended(reply)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "over_budget")
    assert "$1.5" in ended["error"]["msg"]
    # A dollar for each call of the model: after the second it is enough, and what that one asked for is not done.
    assert (len(script.requests), workshop.order, states(ended)) == (2, ["0"], ["done"])
    assert Decimal(ended["cost"]) == 2
