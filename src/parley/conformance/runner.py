"""Runs checks, a few at a time, and hands over each result in the order of the list."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import httpx
from websockets.exceptions import WebSocketException

from parley.conformance.accounts import People
from parley.conformance.bench import Bench, Target
from parley.conformance.errors import CannotStart, Failed, Skipped
from parley.conformance.section import Check, Section
from parley.conformance.transcript import show

Outcome = Literal["ok", "FAILED", "skipped"]


@dataclass(frozen=True)
class Result:
    """How a check went. `frames` show what was wrong, `transcript` is all that was said."""

    check: Check
    outcome: Outcome
    ms: int
    reason: str = ""
    frames: list[str] = field(default_factory=list)
    transcript: list[str] = field(default_factory=list)


def chosen(sections: Sequence[Section], patterns: Sequence[str]) -> list[Check]:
    """Return the checks that a pattern names: a section, a part of an id, or a glob. All where there is none."""
    checks = [check for section in sections for check in section.checks]
    if not patterns:
        return checks
    names = {section.name for section in sections}
    return [check for check in checks if any(_fits(check, one, names) for one in patterns)]


def _fits(check: Check, pattern: str, names: set[str]) -> bool:
    if pattern in names:
        return check.section == pattern
    return pattern in check.id or fnmatchcase(check.id, pattern)


class Runner:
    """Runs checks against one server."""

    def __init__(
        self, target: Target, people: People, http: httpx.AsyncClient, *, limit_s: float, jobs: int, slow: bool
    ) -> None:
        self._target = target
        self._people = people
        self._http = http
        self._limit_s = limit_s
        self._places = asyncio.Semaphore(jobs)
        self._slow = slow

    async def run(self, checks: Sequence[Check]) -> AsyncIterator[Result]:
        """Run them all, and yield each result as soon as those before it are there."""
        tasks = [asyncio.create_task(self._in_turn(check)) for check in checks]
        try:
            for task in tasks:
                yield await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _in_turn(self, check: Check) -> Result:
        if check.slow and not self._slow:
            return Result(check, "skipped", 0, "takes long: --slow runs it")
        async with self._places:
            return await self._run(check)

    async def _run(self, check: Check) -> Result:
        bench = Bench(self._target, self._people, self._http)
        begun = time.monotonic()
        try:
            outcome, reason, frames = await self._outcome(check, bench)
        finally:
            ms = int((time.monotonic() - begun) * 1000)
            said = list(bench.transcript.lines)
            await bench.clean()
        if outcome == "ok" and bench.notes:
            outcome, reason = "FAILED", bench.notes[0]
        if outcome == "FAILED" and not frames:
            frames = said[-4:]
        return Result(check, outcome, ms, reason, frames, said)

    async def _outcome(self, check: Check, bench: Bench) -> tuple[Outcome, str, list[str]]:
        limit_s = max(self._limit_s, check.limit_s or 0)
        try:
            async with asyncio.timeout(limit_s):
                await check.body(bench)
        except Skipped as skipped:
            return "skipped", str(skipped), []
        except Failed as failed:
            return "FAILED", failed.reason, [show(frame) for frame in failed.frames]
        except TimeoutError:
            return "FAILED", f"it was not done within {limit_s:g} s", []
        except (OSError, httpx.HTTPError, WebSocketException, CannotStart) as error:
            return "FAILED", f"the server could not be reached: {str(error) or type(error).__name__}", []
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            # A frame without one of its fields, or with another type in it.
            return (
                "FAILED",
                f"a frame or an answer has not the shape it must have ({type(error).__name__}: {error})",
                [],
            )
        return "ok", "", []
