"""Asks at the terminal about tool calls that wait for a yes."""

import asyncio
import json
from typing import Any

from parley.client import ApiError, RealtimeClient
from parley.client.terminal import LineReader, Screen

_ARGUMENTS_LENGTH = 2_000
_YES = frozenset({"y", "yes"})


class Asking:
    """The questions of one reply, one after the other. Where nobody can be asked the answer is no."""

    def __init__(self, client: RealtimeClient, lines: LineReader, screen: Screen, *, interactive: bool) -> None:
        self._client = client
        self._lines = lines
        self._screen = screen
        self._interactive = interactive
        self._waiting: dict[str, dict[str, Any]] = {}
        self._answered: set[str] = set()
        self._news = asyncio.Event()

    def show(self, message: dict[str, Any]) -> None:
        """Take the reply as it is now."""
        calls = {part["call"]: part for part in message["parts"] if part.get("state") == "approval"}
        if calls != self._waiting:
            self._waiting = calls
            self._news.set()

    async def run(self, reply: str) -> None:
        """Ask and answer until cancelled."""
        while True:
            call = next((call for call in self._waiting if call not in self._answered), None)
            if call is None:
                self._news.clear()
                await self._news.wait()
                continue
            approved = await self._ask(call, self._waiting[call])
            self._answered.add(call)
            if approved is not None:
                await self._answer(reply, call, approved=approved)

    async def _ask(self, call: str, part: dict[str, Any]) -> bool | None:
        """Return the answer; None when the call no longer waits for one."""
        if not self._interactive:
            self._screen.note(f"{part['name']} was not allowed: there is nobody to ask")
            return False
        # What a model writes does not steer the terminal: ASCII has no way to.
        arguments = json.dumps(part["input"] or {})
        if len(arguments) > _ARGUMENTS_LENGTH:
            arguments = arguments[:_ARGUMENTS_LENGTH] + "…"
        self._screen.prompt(f"Allow {part['name']} {arguments}? [y/N] ")
        line = asyncio.create_task(self._lines.line())
        try:
            while not line.done() and call in self._waiting:
                self._news.clear()
                news = asyncio.create_task(self._news.wait())
                await asyncio.wait({line, news}, return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
            if not line.done():
                self._screen.line()
                self._screen.note("it was answered elsewhere")
                return None
            return (line.result() or "").strip().lower() in _YES
        finally:
            line.cancel()

    async def _answer(self, reply: str, call: str, *, approved: bool) -> None:
        try:
            await self._client.approve(reply, call, approved=approved)
        except ApiError as error:
            self._screen.note(error.message)
