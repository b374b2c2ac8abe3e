"""Tools that a model may call. Modules declare them in their `tools.py`; the chat runs them.

A tool runs under the caller's scope in a transaction of its own. Its arguments are validated against its model;
workspace, user and role never come from a model.
"""

import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import orjson
from pydantic import BaseModel, create_model

from parley.core.db import UnitOfWork
from parley.core.schemas import RequestModel
from parley.core.scope import Scope
from parley.llm.errors import ToolInvalid
from parley.llm.ports import ToolSpec
from parley.realtime.log import Publisher

NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")

# What decides in whose name, where and how far something is done: never a model.
NOT_FOR_MODELS: Final = frozenset(
    {
        "workspace", "workspace_id", "workspaces", "wid", "tenant", "tenant_id", "user", "user_id", "users", "owner",
        "owner_id", "member", "member_id", "role", "roles", "permission", "permissions", "scope", "scopes", "subject",
        "on_behalf_of", "actor", "impersonate", "credential", "credentials", "api_key", "key_id", "token",
        "access_token", "password", "secret", "session", "session_id", "budget", "budget_id", "approved", "approval",
    }
)  # fmt: skip
"""Names that no argument of a tool may have, at any depth."""

_DESCRIPTION_LENGTH = 1_024
_SCHEMA_CHARACTERS = 8_000


@dataclass(frozen=True, slots=True)
class ToolContext:
    """What a tool may use."""

    unit: UnitOfWork
    scope: Scope
    publisher: Publisher


Run = Callable[[ToolContext, Any], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. `run` returns what the model is told, as JSON.

    `permission` is what the scope of the reply must have: an API key's tools reach no further than its scopes.
    `idempotent`: running it twice does what running it once does, so a call whose outcome is unknown may be repeated.
    `side_effects`: it changes something. Such calls may have to be approved, and are made one after the other.
    """

    name: str
    description: str
    arguments: type[BaseModel]
    run: Run
    permission: str
    idempotent: bool = False
    side_effects: bool = True

    @cached_property
    def spec(self) -> ToolSpec:
        """The tool as a model is told of it."""
        schema = self.arguments.model_json_schema()
        schema.pop("title", None)
        schema.pop("description", None)
        return ToolSpec(self.name, self.description, schema)


class ToolArguments(RequestModel):
    """The arguments of a tool; a field that it does not have is refused."""


def tool(
    *, permission: str, side_effects: bool, idempotent: bool = False, name: str | None = None
) -> Callable[[Callable[..., Awaitable[dict[str, Any]]]], Tool]:
    """Make a tool of a typed function: `async def add_task(context: ToolContext, *, title: Title) -> dict`.

    The first parameter is the `ToolContext`. The others are the arguments: their types make the JSON schema, with
    `Annotated[…, Field(description=…)]` what the model is told of each. The docstring is the tool's description, the
    function's name its own. Raises `ToolInvalid` for a function that says less.
    """

    def make(function: Callable[..., Awaitable[dict[str, Any]]]) -> Tool:
        called = name or str(getattr(function, "__name__", ""))
        context, *parameters = inspect.signature(function, eval_str=True).parameters.values() or (None,)
        if context is None or context.annotation is not ToolContext:
            raise ToolInvalid(called, "the first parameter is to be a ToolContext")
        fields: dict[str, Any] = {}
        for parameter in parameters:
            if parameter.annotation is inspect.Parameter.empty or parameter.kind is not parameter.KEYWORD_ONLY:
                raise ToolInvalid(called, f"{parameter.name} is to be typed and to be given by name")
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[parameter.name] = (parameter.annotation, default)
        model = create_model(
            "".join(word.title() for word in called.split("_")) + "Arguments", __base__=ToolArguments, **fields
        )

        async def run(context: ToolContext, arguments: BaseModel) -> dict[str, Any]:
            return await function(context, **{field: getattr(arguments, field) for field in fields})

        return Tool(
            name=called, description=inspect.getdoc(function) or "", arguments=model, run=run, permission=permission,
            idempotent=idempotent, side_effects=side_effects,
        )  # fmt: skip

    return make


def checked(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Return tools by name. Raises `ToolInvalid` for one that a model or this service could not work with."""
    found: dict[str, Tool] = {}
    for one in tools:
        if one.name in found:
            raise ToolInvalid(one.name, "two tools have this name")
        if (fault := _fault(one)) is not None:
            raise ToolInvalid(one.name, fault)
        found[one.name] = one
    return found


def _fault(one: Tool) -> str | None:
    if not NAME.fullmatch(one.name):
        return "a tool is named like add_task"
    if not 0 < len(one.description) <= _DESCRIPTION_LENGTH:
        return f"its description is to have 1 to {_DESCRIPTION_LENGTH} characters"
    if one.arguments.model_config.get("extra") != "forbid":
        return "its arguments are to refuse fields that they do not have"
    schema = one.spec.parameters
    if len(orjson.dumps(schema)) > _SCHEMA_CHARACTERS:
        return f"its schema is longer than {_SCHEMA_CHARACTERS} characters"
    if (fault := _fault_of(schema, schema.get("$defs", {}), ())) is not None:
        return fault
    return None if schema.get("type") == "object" else "its arguments are to be an object"


def _fault_of(schema: Any, definitions: Mapping[str, Any], within: tuple[str, ...]) -> str | None:
    """Look at a schema and all below it."""
    if isinstance(schema, list):
        return next((fault for item in schema if (fault := _fault_of(item, definitions, within))), None)
    if not isinstance(schema, dict):
        return None
    if isinstance(reference := schema.get("$ref"), str):
        target = reference.rpartition("/")[2]
        if target in within:
            return f"its arguments contain themselves ({target})"
        return _fault_of(definitions[target], definitions, (*within, target))
    properties = schema.get("properties")
    for field, about in properties.items() if isinstance(properties, dict) else ():
        if field.lower() in NOT_FOR_MODELS:
            return f"a model must not choose {field}"
        if (fault := _fault_of(about, definitions, within)) is not None:
            return fault
    rest = [value for key, value in schema.items() if key not in {"properties", "$defs", "default", "examples"}]
    return _fault_of(rest, definitions, within)
