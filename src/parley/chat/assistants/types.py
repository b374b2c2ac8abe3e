"""What an assistant says of the replies that it gives."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from parley.llm.prompts import RenderedPrompt
from parley.llm.tools import Tool


class ApprovalMode(StrEnum):
    """Which tool calls whoever asked has to approve: all, those that change something, or none."""

    ALWAYS = "always"
    WRITES = "writes"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Profile:
    """What one reply goes by. `tools` None: every tool that there is; `approval_tools` are asked for in any mode."""

    prompt: RenderedPrompt
    tools: frozenset[str] | None = None
    approval: ApprovalMode = ApprovalMode.NEVER
    approval_tools: frozenset[str] = frozenset()
    temperature: float | None = None
    max_output_tokens: int | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """How the model is asked, as far as it differs from how it is asked otherwise."""
        wanted = {"temperature": self.temperature, "max_output_tokens": self.max_output_tokens}
        return {name: value for name, value in wanted.items() if value is not None}

    def only(self, names: Iterable[str]) -> frozenset[str]:
        """Return which of these tools are among its own."""
        return frozenset(names) if self.tools is None else self.tools.intersection(names)

    def asks(self, tool: Tool) -> bool:
        """Whether a call of a tool has to be approved."""
        match self.approval:
            case ApprovalMode.ALWAYS:
                return True
            case ApprovalMode.WRITES if tool.side_effects:
                return True
        return tool.name in self.approval_tools


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """An assistant that comes with the service. `tools` None: every tool that there is.

    `prompt` is its file below the prompts' directory, as in `chat/general`.
    """

    name: str
    title: str
    description: str
    prompt: str
    tools: frozenset[str] | None = None
    approval: ApprovalMode = ApprovalMode.NEVER


def own_assistant(conversation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the workspace's own assistant that answers in a conversation, where its row has brought it along."""
    text: str | None = conversation["own_assistant"]
    return orjson.loads(text) if text else None


BUILT_IN: tuple[BuiltIn, ...] = (
    BuiltIn(
        "general",
        "General",
        "Answers questions of any kind, with all the tools that you may use yourself.",
        "chat/general",
    ),
    BuiltIn(
        "planner",
        "Planner",
        "Keeps your list of tasks: adds to it, looks through it, ticks things off.",
        "chat/planner",
        frozenset({"add_task", "list_tasks", "complete_task"}),
    ),
)
"""One is offered where all its tools are."""

DEFAULT = "general"
