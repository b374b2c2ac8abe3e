"""The table of all that the shared suite runs against: every adapter, and every flavour of the compatible ones."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import SecretStr

from parley.llm.adapters.anthropic_events import MessageParser
from parley.llm.adapters.openai_events import CompletionParser
from parley.llm.adapters.reply_stream import ReplyParser
from parley.llm.adapters.responses_events import ResponseParser
from parley.llm.flavours import FLAVOURS
from parley.llm.ports import Chunk, CursorChunk, ReasoningChunk, TextChunk, ToolCallChunk, UsageChunk
from parley.llm.registry import Capability, ModelEntry, ProviderKind, Timeouts
from parley.llm.sse import EventSplitter
from tests.llm.adapters.voices import AnthropicVoice, OpenAIVoice, ResponsesVoice, Voice


@dataclass(frozen=True)
class Subject:
    """One row: an entry, how its provider speaks, and the parser that reads it."""

    kind: ProviderKind
    voice: Callable[[], Voice]
    parser: Callable[[], ReplyParser]
    flavour: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def entry(self, url: str, **fields: Any) -> ModelEntry:
        """Make an entry whose provider is at that URL."""
        values: dict[str, Any] = {
            "id": "m",
            "provider": "p",
            "kind": self.kind,
            "name": "wire-name",
            "base_url": url,
            "api_key": SecretStr("test-key"),
            "flavour": self.flavour,
            "capabilities": tuple(Capability),
            "timeouts": Timeouts(connect=10, first_token=30, idle=30, total=60),
        }
        return ModelEntry(**(values | dict(self.fields) | fields))


def _compatible(name: str, **voice: Any) -> Subject:
    return Subject("openai", lambda: OpenAIVoice(**voice), lambda: CompletionParser(FLAVOURS[name]), flavour=name)


SUBJECTS: Mapping[str, Subject] = {
    "openai": _compatible("openai"),
    "azure": _compatible("azure"),
    "ollama": _compatible("ollama", thinks="reasoning", calling="whole"),
    "vllm": _compatible("vllm"),
    "lmstudio": _compatible("lmstudio", thinks="tags"),
    "groq": _compatible("groq", thinks="reasoning", calling="whole", counts="x_groq"),
    "mistral": _compatible("mistral", thinks="blocks", calling="whole", counts="with_reason", cached_in="num_cached_tokens"),
    "openrouter": _compatible("openrouter", thinks="reasoning"),
    "gemini": _compatible(
        "gemini", thinks="tags", tags=("<thought>", "</thought>"), calling="no_index", counts="always", beside=3
    ),
    "deepseek": _compatible("deepseek", counts="with_reason", cached_in="prompt_cache_hit_tokens"),
    "xai": _compatible("xai", calling="whole", counts="always", beside=3),
    "generic": _compatible("generic", thinks="tags", calling="no_index_no_id", has_ids=False),
    "anthropic": Subject("anthropic", AnthropicVoice, MessageParser),
    "responses": Subject("openai_responses", ResponsesVoice, ResponseParser),
    "responses not in the background": Subject(
        "openai_responses", ResponsesVoice, lambda: ResponseParser(places=False), fields={"background": False}
    ),
}  # fmt: skip

# These ask nobody, so nothing can be said to them.
WITHOUT_A_WIRE: Mapping[str, str] = {"demo": "tests/llm/adapters/test_demo.py"}


def missing(kinds: Collection[str], flavours: Collection[str]) -> set[str]:
    """Return the adapters and flavours that no row of the table is about."""
    tested = {subject.kind for subject in SUBJECTS.values()} | WITHOUT_A_WIRE.keys()
    return (set(kinds) - tested) | (set(flavours) - {subject.flavour for subject in SUBJECTS.values()})


def read(parser: ReplyParser, pieces: Iterable[bytes]) -> list[Chunk]:
    """Read pieces of a stream as `stream_reply` does, without a connection."""
    splitter = EventSplitter()
    chunks: list[Chunk] = []
    for piece in pieces:
        for event in splitter.feed(piece):
            chunks.extend(parser.feed(event))
        if parser.done:
            break
    else:
        for event in splitter.flush():
            chunks.extend(parser.feed(event))
    assert parser.finished, "the answer did not end"
    return [*chunks, *parser.end()]


def merged(chunks: Sequence[object], *, ids: bool = True) -> list[Chunk]:
    """Return chunks with neighbours of a kind joined, only the last count, no places, and no ids where none are sent."""
    found: list[Chunk] = []
    usage: UsageChunk | None = None
    for chunk in chunks:
        last = found[-1] if found else None
        if isinstance(chunk, UsageChunk):
            usage = chunk
        elif isinstance(chunk, TextChunk) and isinstance(last, TextChunk):
            found[-1] = TextChunk(last.text + chunk.text)
        elif isinstance(chunk, ReasoningChunk) and isinstance(last, ReasoningChunk):
            found[-1] = ReasoningChunk(last.text + chunk.text)
        elif isinstance(chunk, ToolCallChunk):
            found.append(ToolCallChunk(chunk.call_id if ids else "", chunk.name, chunk.arguments, chunk.raw))
        elif not isinstance(chunk, CursorChunk):
            found.append(chunk)  # type: ignore[arg-type]  # what is left is a chunk
    return [usage, *found] if usage is not None else found
