"""Tools that a model may call. Modules declare them in their `tools.py`; the chat runs them.

A tool runs under the caller's scope in a transaction of its own. Its arguments are validated against its model;
workspace, user and role never come from a model.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from parley.core.db import UnitOfWork
from parley.core.scope import Scope
from parley.llm.ports import ToolSpec
from parley.realtime.log import Publisher


@dataclass(frozen=True, slots=True)
class ToolContext:
    """What a tool may use."""

    unit: UnitOfWork
    scope: Scope
    publisher: Publisher


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call. `run` returns what the model is told, as JSON.

    `permission` is what the scope of the reply must have: an API key's tools reach no further than its scopes.
    `idempotent`: running it twice does what running it once does, so a call whose outcome is unknown may be repeated.
    """

    name: str
    description: str
    arguments: type[BaseModel]
    run: Callable[[ToolContext, Any], Awaitable[dict[str, Any]]]
    permission: str
    idempotent: bool = False

    @property
    def spec(self) -> ToolSpec:
        """The tool as a model is told of it."""
        schema = self.arguments.model_json_schema()
        schema.pop("title", None)
        schema.pop("description", None)
        return ToolSpec(self.name, self.description, schema)
