"""A provider that fails again and again is left alone, for everyone who uses this process."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.fake_provider import FakeProvider, script
from parley.core.db import DatabaseUrls
from parley.core.settings import LlmSettings, Settings
from parley.realtime.fold import visible_text
from tests.chat.conftest import Talk, until
from tests.conftest import make_settings

REGISTRY = """
providers:
  openai: {{kind: openai, base_url: "{url}/v1", api_key: sk-canary-key}}
  anthropic: {{kind: anthropic, base_url: "{url}", api_key: sk-canary-key}}
models:
  alone: {{provider: openai, name: fake, retries: 0}}
  helped: {{provider: openai, name: fake, retries: 0, fallbacks: [other]}}
  other: {{provider: anthropic, name: fake, retries: 0}}
aliases: {{default: [alone, other]}}
"""
OPEN_S = 1.5


@pytest.fixture
def registry_file(tmp_path: Path, provider: FakeProvider) -> Path:
    path = tmp_path / "llm_registry.yaml"
    path.write_text(REGISTRY.format(url=provider.url))
    return path


@pytest.fixture
def settings(tmp_path: Path, urls: DatabaseUrls, registry_file: Path) -> Settings:
    llm = LlmSettings(registry=registry_file, breaker_failures=3, breaker_open_s=OPEN_S, registry_poll_s=0.05)
    return make_settings(tmp_path, urls, llm=llm)


async def state_of(talk: Talk, provider: str) -> dict[str, Any]:
    answer = await talk.owner.http.get("/api/v1/providers")
    found: dict[str, Any] = next(row for row in answer.json()["data"] if row["id"] == provider)
    return found


async def ask(talk: Talk, text: str, **body: Any) -> dict[str, Any]:
    _, reply = await talk.send(text, **body)
    return await talk.ended(reply)


async def break_down(talk: Talk) -> None:
    for n in range(3):
        assert (await ask(talk, f"fail=500 n={n}", model="alone"))["error"]["code"] == "provider_unavailable"


async def test_it_is_left_alone_and_then_tried_by_one_call(talk: Talk, provider: FakeProvider) -> None:
    await break_down(talk)
    asked = len(provider.requests)
    ended = await ask(talk, "deltas=5", model="alone")
    assert (ended["status"], ended["error"]["code"], ended["error"]["retryable"]) == (
        "failed", "provider_unavailable", True,
    )  # fmt: skip
    assert "Try again in" in ended["error"]["msg"]
    assert len(provider.requests) == asked, "it was not asked"
    assert ended["cost"] == "0.00000000"
    # Whoever has a fallback is answered by it at once, and so is an alias.
    assert (await ask(talk, "deltas=5", model="helped"))["model"] == "other"
    assert (await ask(talk, "deltas=5"))["model"] == "other"
    row = await state_of(talk, "openai")
    assert row["state"] in {"open", "half_open"}
    assert (row["failures"], row["last_error"]["code"]) == ({"provider_unavailable": 3}, "provider_unavailable")
    assert "secret" not in str(row)

    async def due() -> bool:
        return bool((await state_of(talk, "openai"))["state"] == "half_open")

    await until(due)
    assert (await ask(talk, "deltas=5", model="alone"))["status"] == "completed"
    row = await state_of(talk, "openai")
    assert (row["state"], row["usable"], row["retry_in_s"]) == ("closed", True, None)
    assert row["first_token_p50_ms"] > 0


async def test_models_say_why_they_cannot_be_used(talk: Talk) -> None:
    await break_down(talk)
    answer = await talk.owner.http.get("/api/v1/models")
    models = {model["id"]: model for model in answer.json()["data"]}
    assert set(models["alone"]) == {"id", "provider", "usable", "reason", "capabilities"}
    assert "failed repeatedly and is asked again in" in models["alone"]["reason"]
    assert not models["helped"]["usable"]
    assert models["other"]["usable"]


@pytest.mark.parametrize("fault", ["400ctx", "400filter", "400", "401"])
async def test_what_the_caller_or_the_operator_must_mend_opens_nothing(
    talk: Talk, provider: FakeProvider, fault: str
) -> None:
    for n in range(5):
        await ask(talk, f"fail={fault} n={n}", model="alone")
    assert len(provider.requests) == 5
    row = await state_of(talk, "openai")
    assert row["state"] == "closed"
    assert sum(row["failures"].values()) == 5, "shown all the same"


async def test_a_changed_registry_is_used_without_a_restart(
    talk: Talk, provider: FakeProvider, registry_file: Path
) -> None:
    """The reply that runs keeps its model; the next one has the new registry."""
    _, running = await talk.send("deltas=60 rate=40 seed=4", model="alone")
    await talk.when(running, lambda message: bool(visible_text(message)))
    change(registry_file, "helped:", "renamed:")

    async def seen() -> bool:
        answer = await talk.owner.http.get("/api/v1/models")
        return "renamed" in {model["id"] for model in answer.json()["data"]}

    await until(seen)
    assert visible_text(await talk.ended(running)) == "".join(script(4, 60, 4))
    assert (await ask(talk, "deltas=5", model="renamed"))["status"] == "completed"
    change(registry_file, "kind: anthropic", "kind: nobody")
    assert (await ask(talk, "deltas=5", model="other"))["status"] == "completed"


def change(path: Path, before: str, after: str) -> None:
    path.write_text(path.read_text().replace(before, after))
