"""A model that says and calls what a test wrote for it, step by step, in place of the built-in one."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest
from fastapi import FastAPI

from parley.llm.adapters.demo import DemoModel
from parley.llm.ports import (
    Chunk,
    Finish,
    FinishReason,
    ModelRequest,
    TextChunk,
    TextPart,
    ToolCallChunk,
    ToolResultPart,
    UsageChunk,
)
from tests.conftest import Account, http_client

MODEL = "demo"

Call = tuple[str, dict[str, Any] | str | None]
"""A tool's name and its arguments; a text stands for arguments as the model wrote them."""
Step = str | Sequence[Call] | Callable[[ModelRequest], "Step"]


class Script:
    """The steps of one model. After the last it says `done`."""

    def __init__(self, *steps: Step) -> None:
        self.steps: list[Step] = list(steps)
        self.requests: list[ModelRequest] = []

    def results(self, step: int = -1) -> list[ToolResultPart]:
        """Return the tool results that the model was given at a step, of the last message that called."""
        found: list[ToolResultPart] = []
        for message in reversed(self.requests[step].messages):
            parts = [part for part in message.parts if isinstance(part, ToolResultPart)]
            if not parts:
                break
            found[:0] = parts
        return found

    def told(self, step: int = -1) -> list[dict[str, Any]]:
        """Return what those results say."""
        return [orjson.loads(result.content) for result in self.results(step)]

    @property
    def system(self) -> str:
        """The system text of the last request."""
        first = self.requests[-1].messages[0]
        assert first.role == "system"
        return "".join(part.text for part in first.parts if isinstance(part, TextPart))

    async def stream(self, _: DemoModel, request: ModelRequest) -> AsyncGenerator[Chunk]:
        """Answer as the port asks for."""
        self.requests.append(request)
        step: Step = self.steps.pop(0) if self.steps else "done"
        while callable(step):
            step = step(request)
        await asyncio.sleep(0)
        if isinstance(step, str):
            yield TextChunk(step)
            yield UsageChunk(input_tokens=10, output_tokens=2)
            yield Finish(FinishReason.STOP)
            return
        for number, (name, given) in enumerate(step, 1):
            raw = given if isinstance(given, str) else orjson.dumps(given).decode()
            try:
                parsed = orjson.loads(raw)
            except orjson.JSONDecodeError:
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else None
            yield ToolCallChunk(f"call_{len(self.requests)}_{number}", name, arguments, raw)
        yield UsageChunk(input_tokens=10, output_tokens=2)
        yield Finish(FinishReason.TOOL_CALLS)

    def install(self, patch: pytest.MonkeyPatch) -> "Script":
        """Have the demo model follow this script."""

        def stream(model: DemoModel, request: ModelRequest) -> AsyncGenerator[Chunk]:
            return self.stream(model, request)

        patch.setattr(DemoModel, "stream", stream)
        return self


async def newcomer(app: FastAPI) -> Account:
    """Sign someone up with an application that the test runs itself: with no other one on the same database."""
    email, password = f"{uuid4().hex}@example.com", "correct horse 1"
    http = http_client(app)
    body = {"email": email, "password": password, "confirmPassword": password}
    answer = await http.post("/api/v1/auth/signup", json=body)
    assert answer.status_code == 201, answer.text
    data = answer.json()["data"]
    http.headers["Authorization"] = f"Bearer {data['access_token']}"
    return Account(
        http=http, email=email, user_id=UUID(data["user"]["id"]), workspace_id=UUID(data["workspace"]["id"]),
        access_token=data["access_token"], refresh_token=data["refresh_token"],
    )  # fmt: skip
