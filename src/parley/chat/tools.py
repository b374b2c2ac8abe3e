"""Running the tools that a model calls: under the caller's scope, each call in a transaction of its own."""

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

import orjson
from pydantic import ValidationError

from parley.core.db import Database
from parley.core.error_handlers import translate, validation_errors
from parley.core.errors import Forbidden
from parley.core.scope import Scope
from parley.llm.ports import ToolCallChunk, ToolSpec
from parley.llm.tools import Tool, ToolContext
from parley.realtime.log import Publisher

logger = logging.getLogger(__name__)

_OUTPUT_CHARACTERS = 16_000


class ToolBox:
    """All tools that the modules contribute."""

    def __init__(self, tools: Iterable[Tool], *, database: Database, publisher: Publisher, timeout_s: float) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._database = database
        self._publisher = publisher
        self._timeout_s = timeout_s

    @property
    def names(self) -> frozenset[str]:
        """The tools there are."""
        return frozenset(self._tools)

    def specs(self, scope: Scope, names: Iterable[str] | None) -> tuple[ToolSpec, ...]:
        """Return what a model is told of the tools that the scope may use; `names` None means all of them."""
        wanted = self._tools.values() if names is None else [self._tools[n] for n in names if n in self._tools]
        return tuple(tool.spec for tool in wanted if tool.permission in scope.permissions)

    def is_idempotent(self, name: str) -> bool:
        """Whether a call whose outcome is unknown may be made again."""
        tool = self._tools.get(name)
        return tool is not None and tool.idempotent

    async def run(self, scope: Scope, call: ToolCallChunk) -> tuple[str, dict[str, Any]]:
        """Make a call; return its state (`done` or `failed`) and what the model is told. Never raises but cancelled."""
        tool = self._tools.get(call.name)
        if tool is None:
            return "failed", {"error": "There is no such tool."}
        # A model may call what it was never told of.
        if tool.permission not in scope.permissions:
            return "failed", {"error": Forbidden.message, "permission": tool.permission}
        if call.arguments is None:
            return "failed", {"error": "The arguments are not a JSON object."}
        try:
            arguments = tool.arguments.model_validate(call.arguments)
        except ValidationError as error:
            problems = validation_errors(error.errors(include_url=False, include_input=False))
            return "failed", {"error": "; ".join(problem["message"] for problem in problems)[:2000]}
        try:
            async with asyncio.timeout(self._timeout_s), self._database.unit_of_work(scope) as unit:
                output = await tool.run(ToolContext(unit, scope, self._publisher), arguments)
        except TimeoutError:
            return "failed", {"error": f"The tool took longer than {self._timeout_s:g} s."}
        except Exception as error:
            known = translate(error)
            if known is None:
                logger.exception("tool failed", exc_info=error, extra={"tool": call.name})
            return "failed", {"error": known.detail, **known.details} if known else {"error": "The tool failed."}
        text = orjson.dumps(output, default=str).decode()
        return "done", _bounded(orjson.loads(text), text)


def _bounded(output: dict[str, Any], text: str) -> dict[str, Any]:
    """Return a tool's output, or a note where it is too long to be kept and given to a model."""
    if len(text) <= _OUTPUT_CHARACTERS:
        return output
    return {"error": "the result is too long", "characters": len(text), "beginning": text[:2000]}
