"""Makes the model that a registry entry describes."""

from collections.abc import Callable, Mapping

import httpx

from parley.llm.adapters.anthropic import AnthropicModel
from parley.llm.adapters.demo import DemoModel
from parley.llm.adapters.openai import OpenAIModel
from parley.llm.adapters.responses import ResponsesModel
from parley.llm.ports import ChatModel
from parley.llm.registry import ModelEntry, ProviderKind

ADAPTERS: Mapping[ProviderKind, Callable[[ModelEntry, httpx.AsyncClient], ChatModel]] = {
    "openai": OpenAIModel,
    "openai_responses": ResponsesModel,
    "anthropic": AnthropicModel,
    "demo": DemoModel,
}


def build_model(entry: ModelEntry, http: httpx.AsyncClient) -> ChatModel:
    """Make the adapter for an entry. Adapters hold no state: one serves any number of calls."""
    return ADAPTERS[entry.kind](entry, http)
