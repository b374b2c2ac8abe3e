"""Requests at an even pace beside a measurement, each on a connection of its own: what they were answered, and how soon."""

import asyncio
import math
import time
from pathlib import Path
from typing import Any

import orjson

from benchmarks.figures import percentile

_PER_S = 20
_ANSWERED_WITHIN_S = 30.0
_LONGEST_S = 600.0


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Ask until a file says that it is enough; returns of each request its start in ns, status and duration in ms.

    A status of 0 is a connection that was refused or broken, or no answer in time.
    """
    port, token, stop = specification["port"], specification["token"], Path(specification["stop"]).exists
    found: list[tuple[int, int, float]] = []

    async def one(method: str, path: str, body: dict[str, Any] | None) -> None:
        began = time.monotonic_ns()
        try:
            async with asyncio.timeout(_ANSWERED_WITHIN_S):
                status = await _ask(port, token, method, path, body)
        except (OSError, ValueError, IndexError):
            status = 0
        found.append((began, status, (time.monotonic_ns() - began) / 1e6))

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        number = 0
        while not stop() and time.monotonic() - began < _LONGEST_S:
            # In turns: one that reads and one that writes.
            body = {"title": f"probe {number}"} if number % 2 else None
            group.create_task(one("POST" if body else "GET", "tasks", body))
            number += 1
            await asyncio.sleep(began + number / _PER_S - time.monotonic())
    return {"probes": found}


async def _ask(port: int, token: str, method: str, path: str, body: dict[str, Any] | None) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = orjson.dumps(body) if body else b""
        writer.write(
            f"{method} /api/v1/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
            f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        answer = await reader.read()
        return int(answer.split(b" ", 2)[1])
    finally:
        writer.close()


class Probes:
    """What was found in a stretch of time."""

    def __init__(self, found: dict[str, Any], since: int, until: int) -> None:
        self._all = [(status, ms) for at, status, ms in found["probes"] if since <= at <= until]

    @property
    def count(self) -> int:
        return len(self._all)

    @property
    def failed(self) -> int:
        """How many were answered with a 5xx, or not at all."""
        return sum(status >= 500 or status == 0 for status, _ in self._all)

    @property
    def refused(self) -> int:
        """How many got any other answer than the one that was asked for."""
        return sum(status not in {200, 201} for status, _ in self._all) - self.failed

    def percentile_ms(self, share: float) -> float:
        return percentile([ms for _, ms in self._all], share) if self._all else math.nan
