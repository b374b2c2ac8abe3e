import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from parley.llm.breaker import HealthBoard
from parley.llm.candidates import Candidates
from parley.llm.errors import UnknownModel
from parley.llm.ports import Chunk, ModelRequest
from parley.llm.registry import ModelRegistry
from parley.llm.registry_watch import RegistryWatch
from tests.llm.calls import asking

ONE = """\
providers:
  demo: {kind: demo}
models:
  first: {provider: demo, name: "${NAME:-one}", fallbacks: [second]}
  second: {provider: demo, name: two}
aliases:
  default: first
"""
TWO = ONE.replace("first", "third").replace("name: two", "name: zwei")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "registry.yaml"
    made.write_text(ONE)
    return made


@pytest.fixture
def registry(path: Path) -> ModelRegistry:
    return ModelRegistry.load(path, {"NAME": "eins"})


@pytest.fixture
def watch(path: Path, registry: ModelRegistry) -> RegistryWatch:
    return RegistryWatch(registry, path, {"NAME": "eins"}, every_s=0.01)


def write(path: Path, text: str) -> None:
    path.write_text(text)


def gone(path: Path) -> None:
    path.unlink()


def put_in_place(path: Path, text: str) -> None:
    other = path.with_suffix(".new")
    other.write_text(text)
    found = path.stat()
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(path)


async def test_a_changed_file_is_read_anew_as_a_whole(
    path: Path, registry: ModelRegistry, watch: RegistryWatch
) -> None:
    assert not await watch.look()
    before = registry.resolve("first")
    write(path, TWO)
    assert await watch.look()
    assert registry.resolve().id == "third"
    assert registry.resolve().name == "eins"
    assert [entry.name for entry in registry.entries()] == ["eins", "zwei"]
    with pytest.raises(UnknownModel):
        registry.resolve("first")
    # One from before still finds those of its fallbacks that are there.
    assert [entry.name for entry in registry.fallbacks(before)] == ["zwei"]
    assert not await watch.look()


async def test_an_invalid_file_is_refused_with_its_line_and_the_old_one_goes_on(
    path: Path, registry: ModelRegistry, watch: RegistryWatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, ONE.replace("fallbacks: [second]", "fallbacks: [nobody]"))
    for _ in range(3):
        assert not await watch.look()
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert f"{path}, line 4: unknown model" in line
    assert registry.resolve().id == "first"
    write(path, TWO)
    assert await watch.look()
    assert registry.resolve().id == "third"


async def test_a_file_that_is_gone_changes_nothing(path: Path, registry: ModelRegistry, watch: RegistryWatch) -> None:
    gone(path)
    assert not await watch.look()
    assert registry.resolve().id == "first"
    write(path, TWO)
    assert await watch.look()


async def test_a_file_that_was_only_touched_is_not_read_anew(path: Path, watch: RegistryWatch) -> None:
    os.utime(path, (1, 1))
    assert not await watch.look()


async def test_a_file_that_was_put_in_its_place_is_seen(
    path: Path, registry: ModelRegistry, watch: RegistryWatch
) -> None:
    """As deployments do it: another file of the same size and time."""
    await watch.look()
    put_in_place(path, ONE.replace("name: two", "name: owt"))
    assert await watch.look()
    assert registry.resolve("second").name == "owt"


async def test_it_looks_by_itself(path: Path, registry: ModelRegistry, watch: RegistryWatch) -> None:
    watch.start()
    write(path, TWO)
    deadline = time.monotonic() + 10
    while "third" not in {entry.id for entry in registry.entries()}:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    await watch.close()


async def test_without_an_interval_it_does_not_look(path: Path, registry: ModelRegistry) -> None:
    watch = RegistryWatch(registry, path, {}, every_s=0)
    watch.start()
    await watch.close()
    assert watch._task is None


class _Model:
    def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        raise NotImplementedError


async def test_models_are_made_once_until_the_registry_is_another(
    path: Path, registry: ModelRegistry, watch: RegistryWatch
) -> None:
    candidates = Candidates(registry, lambda _: _Model(), HealthBoard())
    first, second = [candidates.of(entry) for entry in candidates.choose(asking("x"), None)]
    assert (first.entry.id, second.entry.id) == ("first", "second")
    assert candidates.of(registry.resolve("first")) is first
    assert first.health is second.health, "the health is the provider's"
    write(path, ONE.replace("name: two", "name: zwei"))
    await watch.look()
    again = candidates.of(registry.resolve("second"))
    assert again is not second
    assert (second.entry.name, again.entry.name) == ("two", "zwei"), "who has the old one keeps it"
    assert again.health is second.health
