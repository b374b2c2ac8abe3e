"""How servers that speak OpenAI's chat completions differ, as data: one row for each, and no branch anywhere else.

A provider's row is the one that its registry entry names (`flavour`), else the one whose host its URL has, else
`generic`. Where a difference can be read from the answer itself, the adapter takes every form and nothing stands here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

SchemaForm = Literal["strict", "plain", "object"]
"""How a server takes a JSON schema: `strict` in OpenAI's restricted form, with a guarantee; `plain` as it is;
`object`: only that the answer is JSON at all."""


@dataclass(frozen=True, slots=True)
class Flavour:
    """What one server does differently from the plainest compatible one."""

    name: str
    hosts: tuple[str, ...] = ()
    """The ends of the host names that are this server's own."""
    bound: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The field that bounds an answer. OpenAI's newer models refuse the old name, most others do not know the new."""
    asks_for_usage: bool = True
    """Whether `stream_options.include_usage` may be sent. Others count without being asked, or refuse the field."""
    schema: SchemaForm = "plain"
    tells_parallel: bool = False
    """Whether it knows `parallel_tool_calls`."""
    thought_tags: tuple[str, str] | None = None
    """Marks around reasoning that comes at the start of the visible text."""
    echoes_prefill: bool = False
    """Whether its answers begin with the prefill. White space at the end of that may be missing."""
    reasoning_back: str | None = None
    """The field in which it wants its reasoning back with the tool calls that came of it."""
    lost_message: Mapping[str, Any] = field(default_factory=dict)
    """What an assistant's message with calls has to hold where its reasoning is not known any more."""
    lost_call: Mapping[str, Any] = field(default_factory=dict)
    """What the first call of such a message has to hold."""
    thoughts_beside_output: bool = False
    """Whether reasoning is in `total_tokens` but not in `completion_tokens`."""
    call_id_length: int | None = None
    """Whether call ids must have exactly so many letters and digits."""
    image_detail: bool = True
    """Whether it knows the `detail` of an image."""


_THINK = ("<think>", "</think>")

FLAVOURS: Mapping[str, Flavour] = {
    flavour.name: flavour
    for flavour in (
        Flavour(
            "openai",
            hosts=("api.openai.com",),
            bound="max_completion_tokens",
            schema="strict",
            tells_parallel=True,
        ),
        Flavour(
            "azure",
            hosts=(".azure.com",),
            bound="max_completion_tokens",
            schema="strict",
            tells_parallel=True,
        ),
        # https://docs.ollama.com/api/openai-compatibility
        Flavour("ollama", thought_tags=_THINK, image_detail=False),
        # https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
        Flavour("vllm", tells_parallel=True, thought_tags=_THINK),
        # https://lmstudio.ai/docs/developer/openai-compat
        Flavour("lmstudio", thought_tags=_THINK, image_detail=False),
        # https://console.groq.com/docs/api-reference
        Flavour("groq", hosts=("api.groq.com",), tells_parallel=True, thought_tags=_THINK),
        # https://docs.mistral.ai/api/ refuses fields that it does not know, and ids in any other form than its own.
        Flavour(
            "mistral",
            hosts=("api.mistral.ai",),
            asks_for_usage=False,
            schema="strict",
            tells_parallel=True,
            echoes_prefill=True,
            call_id_length=9,
        ),
        # https://openrouter.ai/docs/api-reference/overview
        Flavour("openrouter", hosts=("openrouter.ai",), schema="strict", tells_parallel=True),
        # https://ai.google.dev/gemini-api/docs/openai
        Flavour(
            "gemini",
            hosts=("generativelanguage.googleapis.com", "-aiplatform.googleapis.com", "aiplatform.googleapis.com"),
            thought_tags=("<thought>", "</thought>"),
            thoughts_beside_output=True,
            # https://ai.google.dev/gemini-api/docs/thought-signatures: what to send of calls that others made.
            lost_call={"extra_content": {"google": {"thought_signature": "skip_thought_signature_validator"}}},
        ),
        # https://api-docs.deepseek.com/guides/thinking_mode refuses calls without the field.
        Flavour(
            "deepseek",
            hosts=("api.deepseek.com",),
            schema="object",
            reasoning_back="reasoning_content",
            lost_message={"reasoning_content": ""},
        ),
        # https://docs.x.ai/docs/api-reference
        Flavour("xai", hosts=("api.x.ai",), schema="strict", tells_parallel=True, thoughts_beside_output=True),
        Flavour("generic", thought_tags=_THINK),
    )
}


def flavour_of(base_url: str, name: str | None = None) -> Flavour:
    """Return the row of that name, else the one that the host of the URL belongs to."""
    if name is not None:
        return FLAVOURS[name]
    host = urlsplit(base_url).hostname or ""
    for flavour in FLAVOURS.values():
        # A whole name, or what stands behind a dot: notapi.openai.com is somebody else.
        if any(host == end or host.endswith(end if end[0] in ".-" else f".{end}") for end in flavour.hosts):
            return flavour
    return FLAVOURS["generic"]
