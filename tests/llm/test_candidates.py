from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest

from parley.core.ids import new_id
from parley.llm.breaker import HealthBoard
from parley.llm.candidates import Candidates
from parley.llm.errors import ModelNotUsable, UnknownModel
from parley.llm.ports import Chunk, ImagePart, ModelMessage, ModelRequest, TextPart
from parley.llm.registry import ModelRegistry
from tests.llm.calls import asking

REGISTRY = """\
providers:
  demo: {kind: demo}
  keyless: {kind: openai, base_url: "http://127.0.0.1:1/v1", api_key: "${NO_KEY:-}"}
models:
  first: {provider: demo, name: one, capabilities: [images], prefill: plain, fallbacks: [blind, none, able, seeing]}
  blind: {provider: demo, name: two}
  none: {provider: keyless, name: three, capabilities: [images], prefill: plain}
  able: {provider: demo, name: four, prefill: plain}
  seeing: {provider: demo, name: five, capabilities: [images]}
aliases:
  default: first
"""


class _Model:
    def stream(self, request: ModelRequest) -> AsyncGenerator[Chunk]:
        raise NotImplementedError


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    path = tmp_path / "registry.yaml"
    path.write_text(REGISTRY)
    return ModelRegistry.load(path, {})


@pytest.fixture
def candidates(registry: ModelRegistry) -> Candidates:
    return Candidates(registry, lambda _: _Model(), HealthBoard())


def chosen(candidates: Candidates, request: ModelRequest, model: str | None = None) -> list[str]:
    return [entry.id for entry in candidates.choose(request, model)]


def test_the_model_and_its_usable_fallbacks_in_order(candidates: Candidates) -> None:
    assert chosen(candidates, asking("x")) == ["first", "blind", "able", "seeing"]
    assert chosen(candidates, asking("x"), "blind") == ["blind"]
    with pytest.raises(ModelNotUsable):
        candidates.choose(asking("x"), "none")
    with pytest.raises(UnknownModel):
        candidates.choose(asking("x"), "nobody")


def test_a_request_with_an_image_goes_to_nobody_who_cannot_look_at_it(candidates: Candidates) -> None:
    image = ModelMessage("user", (TextPart("what is this?"), ImagePart("image/png", b"png")))
    assert chosen(candidates, ModelRequest((image,))) == ["first", "seeing"]


def test_a_long_conversation_goes_to_nobody_whom_it_does_not_fit(
    candidates: Candidates, registry: ModelRegistry
) -> None:
    assert chosen(candidates, asking("word " * 40_000)) == ["first"], "who was named is asked, whatever he takes"


def test_a_beginning_goes_to_those_who_can_go_on_from_it(candidates: Candidates) -> None:
    assert chosen(candidates, asking("x", prefill="so far")) == ["first", "able"]
    with pytest.raises(ModelNotUsable, match="cannot go on"):
        candidates.choose(asking("x", prefill="so far"), "blind")


def test_credentials_of_a_workspace_have_a_model_and_a_health_of_their_own(
    candidates: Candidates, registry: ModelRegistry
) -> None:
    entry = registry.resolve("blind")
    own = replace(entry, owner=new_id())
    assert candidates.of(own) is candidates.of(own)
    assert candidates.of(own).model is not candidates.of(entry).model
    assert candidates.of(own).health is not candidates.of(entry).health
