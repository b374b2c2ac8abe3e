"""Text that is taken back, as the client and `parley chat` show it: against the real server, over a network that breaks."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest

from benchmarks.fake_provider import FakeProvider, script
from parley.client import ConnectionChange, ParleyHTTP, RealtimeClient
from parley.client.states import find_message
from parley.core.db import DatabaseUrls
from parley.core.settings import LlmSettings, Settings
from parley.realtime.fold import visible_text
from tests.client.relay import Relay
from tests.client.test_chat_command import Command
from tests.conftest import make_settings
from tests.live import live

PASSWORD = "correct horse 1"
DEADLINE_S = 30
REGISTRY = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1", api_key: test-key}}
  anthropic: {{kind: anthropic, base_url: "{url}", api_key: test-key}}
models:
  able: {{provider: anthropic, name: fake, prefill: plain}}
  other: {{provider: anthropic, name: fake}}
  goes-on: {{provider: openai, name: fake, fallbacks: [able]}}
  begins-anew: {{provider: openai, name: fake, fallbacks: [other]}}
aliases: {{default: [begins-anew]}}
"""


@pytest.fixture
async def provider() -> AsyncIterator[FakeProvider]:
    """A provider that does what the prompt says."""
    async with FakeProvider() as made:
        yield made


@pytest.fixture
def settings(tmp_path: Path, urls: DatabaseUrls, provider: FakeProvider) -> Settings:
    """Settings with models of that provider."""
    path = tmp_path / "llm_registry.yaml"
    path.write_text(REGISTRY.format(url=provider.url))
    return make_settings(tmp_path, urls, llm=LlmSettings(registry=path))


@pytest.fixture
async def relay(settings: Settings) -> AsyncIterator[Relay]:
    """The server behind a network that can be cut."""
    async with live(settings) as server, Relay.to(server.port) as made:
        yield made


@pytest.mark.parametrize("model", ["begins-anew", "goes-on"])
async def test_a_client_that_keeps_losing_its_connection_has_the_second_answer(relay: Relay, model: str) -> None:
    changes: list[ConnectionChange] = []
    async with ParleyHTTP(relay.url) as http, asyncio.timeout(DEADLINE_S):
        await http.sign_up(f"{uuid4().hex}@example.com", PASSWORD)
        ch = f"conversation:{(await http.create_conversation())['id']}"
        client = RealtimeClient(http.realtime_url, http.credentials, on_connection=changes.append, random=lambda: 0.02)
        async with client:
            await client.subscribe(ch)
            text = "deltas=120 rate=80 seed=7 fail=die_at:60 fail_first=1"
            sent = await client.send(ch, text, model=model)
            ended = asyncio.create_task(client.wait_terminal(sent["reply"]))
            chance = random.Random(7)
            while not ended.done():
                await asyncio.wait({ended}, timeout=chance.uniform(0.05, 0.2))
                relay.cut()
            message = await ended
            assert message["status"] == "completed", message["error"]
            assert visible_text(message) == "".join(script(7, 120, 4))
            assert find_message(client.state(ch), sent["reply"]) == message
            assert client.integrity_failures == 0
    assert len(changes) > 3


async def test_a_script_reads_what_was_taken_back_and_what_came_instead(relay: Relay, tmp_path: Path) -> None:
    """What stands in a pipe cannot be taken back: the second answer begins on a line of its own."""
    command = await Command(relay.url, tmp_path).signed_up()
    text = "deltas=12 seed=3 size=2 fail=stall_at:6 fail_first=1 rate=50"
    code, out, err = await command.run("-m", text.replace("stall_at", "die_at"))
    assert code == 0, err
    first, whole = "".join(script(3, 12, 2)[:6]), "".join(script(3, 12, 2))
    assert out == f"{first}\n{whole}\n"
    assert err == "… the reply goes on from an earlier point\n… the reply goes on with other\n"
    code, out, err = await command.run("--model", "goes-on", "-m", text.replace("stall_at", "end_at"))
    assert code == 0, err
    assert out == f"{whole}\n"
    assert err == "… the reply goes on with able\n"
