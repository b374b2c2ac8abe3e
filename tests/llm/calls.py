"""How the tests of models ask the fake provider."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal, get_args

from pydantic import SecretStr

from benchmarks.fake_provider import FakeProvider
from parley.llm.ports import Chunk, ModelMessage, ModelRequest, ReasoningChunk, TextChunk, TextPart, ToolSpec
from parley.llm.registry import ModelEntry, Price, Timeouts

Kind = Literal["openai", "openai_responses", "anthropic"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def entry_for(
    kind: Kind, provider: FakeProvider, *, timeouts: dict[str, float] | None = None, **fields: Any
) -> ModelEntry:
    """Make an entry whose provider is the fake one."""
    values: dict[str, Any] = {
        "id": kind,
        "provider": kind,
        "kind": kind,
        "name": "fake-model",
        "base_url": provider.url if kind == "anthropic" else f"{provider.url}/v1",
        "api_key": SecretStr("test-key"),
        "price": Price.model_validate({"input": 3, "cached_input": "0.3", "output": 15}),
        "timeouts": Timeouts.model_validate(
            {"connect": 2, "first_token": 10, "idle": 10, "total": 30} | (timeouts or {})
        ),
    }
    return ModelEntry(**(values | fields))


def asking(text: str, *, tools: Sequence[ToolSpec] = (), **fields: Any) -> ModelRequest:
    """Make a request of one user message."""
    return ModelRequest((ModelMessage("user", (TextPart(text),)),), tools=tuple(tools), **fields)


async def collect(chunks: AsyncGenerator[Chunk]) -> list[Chunk]:
    """Read an answer to its end."""
    return [chunk async for chunk in chunks]


def text_of(chunks: Sequence[object]) -> str:
    """Join the visible text."""
    return "".join(chunk.text for chunk in chunks if isinstance(chunk, TextChunk))


def reasoning_of(chunks: Sequence[object]) -> str:
    """Join the reasoning."""
    return "".join(chunk.text for chunk in chunks if isinstance(chunk, ReasoningChunk))
