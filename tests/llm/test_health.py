from pathlib import Path
from typing import Any

import pytest

from parley.core.ids import new_id
from parley.llm.breaker import HealthBoard
from parley.llm.errors import ProviderAuthFailed, ProviderRateLimited, ProviderUnavailable
from parley.llm.health import provider_reads
from parley.llm.registry import ModelRegistry
from tests.conftest import Account

REGISTRY = """\
providers:
  acme: {kind: openai, base_url: "http://127.0.0.1:1/v1", api_key: sk-canary}
  keyless: {kind: openai, base_url: "http://127.0.0.1:1/v1", api_key: "${NO_KEY:-}"}
  demo: {kind: demo}
models:
  first: {provider: acme, name: one}
  second: {provider: keyless, name: two}
  demo: {provider: demo, name: demo}
aliases:
  default: [first, second, demo]
"""


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    path = tmp_path / "registry.yaml"
    path.write_text(REGISTRY)
    return ModelRegistry.load(path, {})


@pytest.fixture
def board(registry: ModelRegistry) -> HealthBoard:
    board = HealthBoard()
    registry.paused = lambda entry: board.pause_s(entry.provider, entry.owner)
    return board


def break_down(board: HealthBoard, provider: str, owner: object = None) -> None:
    for _ in range(5):
        board.of(provider, owner).watch().failed(ProviderUnavailable())


def test_models_tell_of_a_provider_that_is_left_alone(registry: ModelRegistry, board: HealthBoard) -> None:
    assert registry.resolve().id == "first"
    break_down(board, "acme")
    first, second, demo = registry.describe()
    assert not first.usable
    assert first.reason == "its provider has failed repeatedly and is asked again in 30 s"
    assert (second.reason, demo.usable) == ("NO_KEY is not set", True)
    # An alias gives the next one; who names the model is given it, for it may have fallbacks.
    assert registry.resolve().id == "demo"
    assert registry.resolve("first").id == "first"


def test_when_all_are_left_alone_the_first_is_given(registry: ModelRegistry, board: HealthBoard) -> None:
    break_down(board, "acme")
    break_down(board, "demo")
    assert registry.resolve().id == "first"


def test_what_there_is_to_know_of_a_provider(registry: ModelRegistry, board: HealthBoard) -> None:
    watch = board.of("acme").watch()
    watch.first_token()
    watch.succeeded()
    watch.left()
    board.of("acme").watch().failed(ProviderAuthFailed("secret words of theirs"))
    acme, keyless, demo = provider_reads(registry, board, new_id())
    assert (acme.id, acme.kind, acme.usable, acme.reason, acme.state) == ("acme", "openai", True, None, "closed")
    assert (acme.calls, acme.failures) == (2, {"provider_auth": 1})
    assert acme.last_error is not None
    assert acme.last_error.code == "provider_auth"
    assert acme.first_token_p50_ms is not None
    assert (keyless.usable, keyless.reason, keyless.calls) == (False, "NO_KEY is not set", 0)
    assert (demo.usable, demo.last_error, demo.first_token_p50_ms) == (True, None, None)
    assert "secret" not in acme.model_dump_json()
    assert "sk-canary" not in acme.model_dump_json()


def test_calls_with_a_key_of_the_workspace_are_a_row_of_their_own(registry: ModelRegistry, board: HealthBoard) -> None:
    mine, other = new_id(), new_id()
    for _ in range(5):
        board.of("acme", mine).watch().failed(ProviderRateLimited())
    rows = provider_reads(registry, board, mine)
    assert [(row.id, row.own_key, row.state) for row in rows[:2]] == [("acme", False, "closed"), ("acme", True, "open")]
    assert rows[1].retry_in_s is not None
    assert len(provider_reads(registry, board, other)) == 3


async def test_an_admin_sees_the_providers(alice: Account) -> None:
    answer = await alice.http.get("/api/v1/providers")
    assert answer.status_code == 200
    rows: list[dict[str, Any]] = answer.json()["data"]
    assert {row["id"]: row["state"] for row in rows}["demo"] == "closed"
    assert answer.headers["cache-control"] == "no-store"
