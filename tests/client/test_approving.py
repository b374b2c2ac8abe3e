"""Approving tool calls: by the client's own functions, at a terminal, and where nobody can be asked."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from parley.client import ApiError, ParleyHTTP, RealtimeClient
from parley.client.states import find_message
from tests.client.relay import Relay
from tests.client.test_chat_command import DEADLINE_S, PASSWORD, Command, command, relay, terminal

__all__ = ["command", "relay"]

pytestmark = pytest.mark.process


async def _asking(http: ParleyHTTP) -> str:
    """Sign in, and make an assistant that asks; return its name."""
    await http.sign_in("ann@example.com", PASSWORD)
    body = {"name": "asks", "title": "Asks", "instructions": "Be brief.", "approval": "writes"}
    await http._authorised("POST", "/assistants", json=body)
    assert [one["name"] for one in await http.list_assistants()] == ["general", "planner", "asks"]
    return "asks"


async def _titles(http: ParleyHTTP) -> list[str]:
    answer = await http._authorised("GET", "/tasks")
    return [task["title"] for task in answer["data"]]


def _waiting(client: RealtimeClient, ch: str, reply: str) -> dict[str, Any] | None:
    message = find_message(client.state(ch), reply) or {"parts": []}
    return next((part for part in message["parts"] if part.get("state") == "approval"), None)


@pytest.mark.parametrize("by", ["socket", "http"])
async def test_the_client_says_yes_and_no(relay: Relay, tmp_path: Path, by: str) -> None:
    await Command(relay.url, tmp_path).signed_up()
    async with ParleyHTTP(relay.url) as http:
        conversation = await http.create_conversation(assistant=await _asking(http))
        ch = f"conversation:{conversation['id']}"
        changed = asyncio.Event()
        async with RealtimeClient(http.realtime_url, http.credentials, on_event=lambda *_: changed.set()) as client:
            await client.subscribe(ch)
            for approved, state in ((False, "failed"), (True, "done")):
                reply = (await client.send(ch, "add task buy milk", model="demo"))["reply"]
                async with asyncio.timeout(DEADLINE_S):
                    while (part := _waiting(client, ch, reply)) is None:
                        changed.clear()
                        await changed.wait()
                call: str = part["call"]

                async def say(answer: bool, call: str = call, reply: str = reply) -> dict[str, Any]:
                    if by == "http":
                        return await http.approve(call, approved=answer)
                    return await client.approve(reply, call, approved=answer)

                assert await say(approved) == {"call": call, "reply": reply, "approved": approved}
                message = await client.wait_terminal(reply)
                assert [part["state"] for part in message["parts"] if part["type"] == "tool"] == [state]
                assert (await say(approved))["approved"] is approved
                with pytest.raises(ApiError) as refused:
                    await say(not approved)
                assert refused.value.code in {"conflict", "already_decided"}
            assert client.integrity_failures == 0
        assert await _titles(http) == ["buy milk"]


async def test_a_script_is_not_asked(command: Command, relay: Relay) -> None:
    await command.signed_up()
    async with ParleyHTTP(relay.url) as http:
        name = await _asking(http)
        code, out, err = await command.run("--assistant", name, "-m", "add task buy milk")
        assert code == 0, err
        assert "there is nobody to ask" in err
        assert "✗ The user refused this call" in out
        assert await _titles(http) == []


async def test_a_person_is_asked(command: Command, relay: Relay) -> None:
    await command.signed_up()
    async with ParleyHTTP(relay.url) as http:
        name = await _asking(http)
        async with terminal(command, "--new", "--assistant", name) as screen:
            await screen.shows("> ")
            for answer, sign in (("n", "✗"), ("", "✗"), ("y", "✓")):
                screen.type("add task buy milk ü\n")
                # As ASCII: what a model writes cannot steer the terminal.
                await screen.shows('Allow add_task {"title": "buy milk \\u00fc"}? [y/N] ')
                screen.type(f"{answer}\n")
                assert sign in await screen.shows("\n> ")
            assert await _titles(http) == ["buy milk ü"]
            # Whoever answers elsewhere takes the question away.
            screen.type("add task buy tea\n")
            await screen.shows('buy tea"}? [y/N] ')
            conversation = (await http.list_conversations())[0]["id"]
            messages, _ = await http.list_messages(conversation)
            call = next(part["call"] for part in messages[-1]["parts"] if part.get("state") == "approval")
            await http.approve(call, approved=True)
            assert "answered elsewhere" in await screen.shows("\n> ")
            screen.type("/quit\n")
            async with asyncio.timeout(DEADLINE_S):
                assert await screen.process.wait() == 0
        assert sorted(await _titles(http)) == ["buy milk ü", "buy tea"]
