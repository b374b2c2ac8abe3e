"""The tools that models call: under the caller's scope, each call in a transaction of its own."""

import asyncio
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from parley.core.db import Database
from parley.core.error_handlers import translate, validation_errors
from parley.core.errors import Forbidden, OutcomeUnknown
from parley.core.scope import Scope
from parley.llm.ports import ToolCallChunk, ToolSpec
from parley.llm.tool_values import bounded_result, refusal_of
from parley.llm.tools import Tool, ToolContext, checked
from parley.realtime.log import Publisher

logger = logging.getLogger(__name__)

_ERROR_CHARACTERS = 2_000

Output = dict[str, Any]

UNKNOWN: Output = {"error": "The outcome of this call is unknown."}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call that can be made: its tool and the arguments as the tool takes them."""

    tool: Tool
    arguments: BaseModel


class Refused(Exception):
    """A call is not made; `output` is what the model is told."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.output: Output = {"error": message[:_ERROR_CHARACTERS], **details}


class ToolBox:
    """All tools that the modules contribute. Raises `ToolInvalid` for tools that cannot be offered."""

    def __init__(self, tools: Iterable[Tool], *, database: Database, publisher: Publisher, timeout_s: float) -> None:
        self._tools = checked(tools)
        self._database = database
        self._publisher = publisher
        self._timeout_s = timeout_s

    @property
    def names(self) -> frozenset[str]:
        """The tools there are."""
        return frozenset(self._tools)

    def find(self, name: str) -> Tool | None:
        """Return a tool, or None."""
        return self._tools.get(name)

    def specs(self, scope: Scope, names: Collection[str] | None) -> tuple[ToolSpec, ...]:
        """Return what a model is told of the tools that the scope may use; `names` None means all of them."""
        return tuple(
            tool.spec
            for name, tool in self._tools.items()
            if (names is None or name in names) and tool.permission in scope.permissions
        )

    def is_idempotent(self, name: str) -> bool:
        """Whether a call whose outcome is unknown may be made again."""
        tool = self._tools.get(name)
        return tool is not None and tool.idempotent

    def prepare(
        self, scope: Scope, name: str, arguments: dict[str, Any] | None, *, names: Collection[str] | None = None,
        raw: str = "",
    ) -> Prepared:  # fmt: skip
        """Return a call that can be made. Raises `Refused` for one that cannot.

        A model may call what it was never told of: `names` are the tools that this reply has, None for all.
        """
        tool = self._tools.get(name) if names is None or name in names else None
        if tool is None:
            raise Refused("There is no such tool.")
        allow(scope, tool)
        if (fault := refusal_of(arguments, raw)) is not None:
            raise Refused(fault)
        try:
            return Prepared(tool, tool.arguments.model_validate(arguments))
        except ValidationError as error:
            problems = validation_errors(error.errors(include_url=False, include_input=False))
            raise Refused("; ".join(problem["message"] for problem in problems)) from None
        except RecursionError:
            raise Refused("The arguments are nested too deeply.") from None

    async def call(self, scope: Scope, prepared: Prepared, *, timeout_s: float | None = None) -> tuple[str, Output]:
        """Make a call; return its state (`done`, `failed`, `unknown`) and what the model is told.

        Never raises but cancelled.
        """
        tool = prepared.tool
        limit_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        try:
            allow(scope, tool)
            async with self._database.unit_of_work(scope) as unit:
                # Not around the commit: one that is broken off may have happened.
                output = await self._in_time(ToolContext(unit, scope, self._publisher), prepared, limit_s)
                # Inside the transaction: what cannot be told is not done either.
                told = bounded_result(output)
            return "done", told
        except Refused as refused:
            return "failed", refused.output
        except OutcomeUnknown:
            return "unknown", UNKNOWN
        except Exception as error:
            known = translate(error)
            if known is None:
                logger.exception("tool failed", exc_info=error, extra={"tool": tool.name})
            return "failed", {"error": known.detail, **known.details} if known else {"error": "The tool failed."}

    @staticmethod
    async def _in_time(context: ToolContext, prepared: Prepared, limit_s: float) -> Output:
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                return await prepared.tool.run(context, prepared.arguments)
        except TimeoutError:
            # A timeout of something inside is that thing's own.
            if not limit.expired():
                raise
            raise Refused(f"The tool took longer than {limit_s:.3g} s.") from None

    async def run(self, scope: Scope, call: ToolCallChunk) -> tuple[str, Output]:
        """Check and make a call; return its state and what the model is told. Never raises but cancelled."""
        try:
            prepared = self.prepare(scope, call.name, call.arguments, raw=call.raw)
        except Refused as refused:
            return "failed", refused.output
        return await self.call(scope, prepared)


def allow(scope: Scope, tool: Tool) -> None:
    """Raise `Refused` unless the scope may use a tool."""
    if tool.permission not in scope.permissions:
        raise Refused(Forbidden.message, permission=str(tool.permission))
