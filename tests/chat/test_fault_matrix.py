"""Each fault of a provider, with and without another that helps: what docs/providers.md says of it is what happens."""

import re
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from benchmarks.fake_provider import FakeProvider, script
from parley.core.embedded_postgres import EmbeddedPostgres
from parley.core.settings import LlmSettings
from tests.conftest import Account
from tests.held import held
from tests.realtime.conftest import (
    QUICK,
    LiveServer,
    Peer,
    Serve,
    conversation_of,
    serve_with,
    visible_text,
)

__all__ = ["serve_with"]

PAGE = Path(__file__).parents[2] / "docs" / "providers.md"
REGISTRY = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1", api_key: sk-canary-key}}
  anthropic: {{kind: anthropic, base_url: "{url}", api_key: sk-canary-key}}
  responses: {{kind: openai_responses, base_url: "{url}/v1", api_key: sk-canary-key}}
models:
  alone: &first {{provider: openai, name: fake, retries: 0, price: &price {{input: 1, output: 2}}, timeouts: {{connect: 1, first_token: 1, idle: 1, total: 2.5}}}}
  goes-on: {{<<: *first, fallbacks: [able]}}
  begins-anew: {{<<: *first, fallbacks: [other]}}
  anthropic: &second {{<<: *first, provider: anthropic}}
  anthropic-goes-on: {{<<: *second, fallbacks: [able]}}
  anthropic-begins-anew: {{<<: *second, fallbacks: [other]}}
  responses: &third {{<<: *first, provider: responses}}
  responses-goes-on: {{<<: *third, fallbacks: [able]}}
  responses-begins-anew: {{<<: *third, fallbacks: [other]}}
  able: {{provider: anthropic, name: fake, retries: 0, price: *price, prefill: plain}}
  other: {{provider: anthropic, name: fake, retries: 0, price: *price}}
aliases: {{default: [alone]}}
"""
ARRANGEMENTS = ("alone", "goes-on", "begins-anew")
DELTAS, AT = 60, 7
FAULTS = {
    "refuses the key (401)": "401",
    "wants fewer calls (429)": "429",
    "wants fewer calls for a minute (429, `retry-after: 60`)": "429 retry_after=60",
    "has no credit left (429)": "429quota",
    "refuses the request (400)": "400",
    "finds the conversation too long (400)": "400ctx",
    "filters the question (400)": "400filter",
    "fails (500)": "500",
    "is overloaded (503)": "503",
    "sends a page of a proxy": "html",
    "sends nothing at all": "slow_headers",
    "sends headers and then nothing": "stall_at:0",
    "ends without a word": "nothing",
    "breaks off before the first word": "die_at:0",
    "sends garbage before the first word": "garbage:0",
    "stalls in the middle": f"stall_at:{AT}",
    "breaks off in the middle": f"die_at:{AT}",
    "ends the stream without saying why": f"end_at:{AT}",
    "sends an error in the middle": f"error_event_at:{AT}",
    "sends garbage in the middle": f"garbage:{AT}",
    "sends a line of two megabytes": f"huge_line:{AT}",
    "sends a line of a gigabyte": f"endless_line:{AT}",
    "drips until the total timeout": "drip",
    "cuts characters between two packets": "split_utf8",
    "cuts surrogate pairs between two deltas": "surrogates",
    "never sends `[DONE]`": "no_done",
}
# An answer that OpenAI writes in the background is there still when its stream has broken off: the adapter reads it on.
READ_ON = {"breaks off in the middle", "ends the stream without saying why"}


def table() -> dict[str, list[str]]:
    """Return the table of the page: what stands beside each fault."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    start = next(index for index, row in enumerate(rows) if row[0] == "the provider")
    found: dict[str, list[str]] = {}
    for row in rows[start + 2 :]:
        if len(row) == 1:
            break
        found[row[0]] = row[1:]
    return found


TABLE = table()


@pytest.fixture(scope="module")
async def provider() -> AsyncIterator[FakeProvider]:
    """A provider that does what the prompt says."""
    async with FakeProvider() as made:
        yield made


@pytest.fixture(scope="module")
def registry(provider: FakeProvider, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its models."""
    path = tmp_path_factory.mktemp("models") / "llm_registry.yaml"
    path.write_text(REGISTRY.format(url=provider.url))
    return path


@pytest.fixture(scope="module")
async def server(serve_with: Serve, registry: Path) -> AsyncIterator[LiveServer]:
    """A server with these. Their breakers stay shut: every test is a failure."""
    async with held(serve_with(realtime=QUICK, llm=LlmSettings(registry=registry, breaker_failures=0))) as made:
        yield made


@pytest.fixture(scope="module")
async def owner(server: LiveServer) -> AsyncIterator[Account]:
    """Who asks."""
    async with server.sign_up() as account:
        yield account


@pytest.fixture
async def peer(server: LiveServer, owner: Account) -> AsyncIterator[Peer]:
    """The asker's connection; every frame on it is checked against the protocol."""
    async with server.join(owner) as joined:
        yield joined


@pytest.fixture
async def database(server: LiveServer, postgres: EmbeddedPostgres) -> AsyncIterator[asyncpg.Connection]:
    """A superuser's connection to the server's database."""
    connection = await asyncpg.connect(postgres.admin_url(server.urls.name))
    yield connection
    await connection.close()


async def ledger_of(database: asyncpg.Connection, reply: str) -> list[asyncpg.Record]:
    """Return the rows that the ledger has of a reply, in order."""
    return list(
        await database.fetch(
            "SELECT attempt, model, status, error, input_tokens, output_tokens, cost FROM usage_entries"
            " WHERE message_id = $1 ORDER BY attempt",
            UUID(reply),
        )
    )


def test_the_page_has_every_fault_and_no_other() -> None:
    assert list(TABLE) == list(FAULTS)
    assert all(len(cells) == len(ARRANGEMENTS) + 1 for cells in TABLE.values())


# Those that cut an answer are the same for every dialect; what comes before a word is tested with each adapter.
_CASES = [(fault, model) for fault in FAULTS for model in ARRANGEMENTS] + [
    (fault, kind + arrangement)
    for fault in FAULTS
    if TABLE.get(fault, [""])[0].endswith("text kept")
    for kind in ("anthropic", "responses")
    for arrangement in ("", "-goes-on", "-begins-anew")
]


@pytest.mark.parametrize(("fault", "model"), _CASES)
async def test_what_the_page_says_is_what_happens(
    peer: Peer, owner: Account, provider: FakeProvider, database: asyncpg.Connection, fault: str, model: str
) -> None:
    _, _, arrangement = model.partition("-") if model.startswith(("anthropic", "responses")) else ("", "", model)
    column = ARRANGEMENTS.index(arrangement or "alone")
    cell, account = TABLE[fault][column], TABLE[fault][-1]
    if fault in READ_ON and model.startswith("responses"):
        cell, account = "whole", "completed, counted"
    channel = await conversation_of(owner)
    await peer.sub(channel)
    asked = f"deltas={DELTAS} seed=5 fail={FAULTS[fault]} fail_first=1 with={model}"
    sent = await peer.say(channel, asked, opts={"model": model})
    assert sent["t"] == "ok", sent
    ended = await peer.event("reply.completed", "reply.failed", reply=sent["reply"], within_s=20)
    d, whole = ended["d"], "".join(script(5, DELTAS, 4))
    first = provider.generations(asked)

    # What the reader sees: folded from the events, and in the message.
    names = [frame["e"] for frame in peer.seen if frame["t"] == "ev"]
    changes = [
        (frame["e"].removeprefix("reply."), frame["d"].get("strategy"))
        for frame in peer.seen
        if frame["t"] == "ev" and frame["e"] in {"reply.reset", "reply.resumed"}
    ]
    text = visible_text(d["message"])
    assert peer.logs[channel].text(sent["reply"]) == text
    assert names.count("reply.started") == 1
    rows = await messages_of(owner, channel)
    assert [row["id"] for row in rows] == [sent["message"], sent["reply"]], "one message, whoever wrote it"
    assert rows[1] == d["message"]
    helper = {"goes-on": "able", "begins-anew": "other"}.get(arrangement, model)
    if failed := re.fullmatch(r"fails: `(\w+)`(, text kept)?", cell):
        assert (ended["e"], d["error"]["code"]) == ("reply.failed", failed[1])
        assert changes == []
        assert d["message"]["model"] == model
        if failed[2]:
            assert text
            assert whole.startswith(text)
        else:
            assert text == ""
    else:
        assert ended["e"] == "reply.completed", d["error"]
        assert text == whole
        assert (changes, d["message"]["model"]) == {
            "whole": ([], model),
            "another answers": ([], helper),
            "goes on": ([("resumed", "fallback")], helper),
            "taken back": ([("reset", None), ("resumed", "fallback")], helper),
        }[cell]

    # What the ledger has: each attempt, and together what the message says.
    entries = await ledger_of(database, sent["reply"])
    status, counted = account.split(", ")
    assert (entries[0]["model"], entries[0]["status"]) == (model, status)
    assert (entries[0]["cost"] > 0) == (counted == "counted"), dict(entries[0])
    if status == "failed":
        codes = {re.findall(r"`(\w+)`", TABLE[fault][0])[0]}
        assert entries[0]["error"] in codes
    assert [entry["attempt"] for entry in entries] == list(range(1, len(entries) + 1))
    if ended["e"] == "reply.completed" and status == "failed":
        assert len(entries) == 2
        assert (entries[1]["model"], entries[1]["status"]) == (helper, "completed")
        assert entries[1]["cost"] > 0
    else:
        assert len(entries) == 1
    assert Decimal(d["cost"]) == sum(entry["cost"] for entry in entries)
    assert d["usage"]["output_tokens"] == sum(entry["output_tokens"] for entry in entries)
    assert len(first) <= 2


async def messages_of(owner: Account, channel: str) -> list[dict[str, Any]]:
    """Return the conversation's messages."""
    answer = await owner.http.get(f"/api/v1/conversations/{channel.partition(':')[2]}/messages")
    assert answer.status_code == 200
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def test_a_line_of_a_gigabyte_is_left_after_a_megabyte(
    peer: Peer, owner: Account, provider: FakeProvider
) -> None:
    channel = await conversation_of(owner)
    await peer.sub(channel)
    asked = f"deltas=20 seed=5 fail=endless_line:{AT} alone=1"
    sent = await peer.say(channel, asked, opts={"model": "alone"})
    await peer.event("reply.failed", reply=sent["reply"])
    (record,) = provider.generations(asked)
    await provider.ended(record, 5)
    # What is beyond the bound is what the sockets hold on the way.
    assert record.bytes_sent < 16 * 1024 * 1024
