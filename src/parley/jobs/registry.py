"""Kinds of jobs: what a module lists in its `background.py`, and what a handler gets."""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from parley.core.db import Database
from parley.core.errors import AppError


class JobFailed(AppError):
    """Raised by a handler: the job has failed for good. `detail` is stored and shown, so it holds no secret."""

    code = "job_failed"
    message = "The job failed."


Report = Callable[[int, int | None, str | None], Awaitable[None]]


async def _unheard(done: int, total: int | None, note: str | None) -> None:
    pass


@dataclass(frozen=True, slots=True)
class JobRun:
    """One attempt at a job, for its handler.

    A job is delivered at least once: an attempt whose process was lost is repeated. A handler therefore makes its
    effect idempotent by `id`, which is the same in every attempt. `attempt` counts from 1.
    """

    id: UUID
    workspace_id: UUID
    user_id: UUID | None
    payload: dict[str, Any]
    attempt: int
    database: Database
    report: Report = field(default=_unheard, repr=False)

    async def progress(self, done: int, total: int | None = None, note: str | None = None) -> None:
        """Say how far the job is: its user sees it. Cheap to call often; what comes too fast is left out."""
        await self.report(done, total, note)


Handler = Callable[[JobRun], Awaitable[dict[str, Any] | None]]


@dataclass(frozen=True, slots=True)
class JobType:
    """A kind of job and who does it.

    `handle` returns the result that the job's user may see, plain JSON, or None. Whatever it raises makes the job run
    again after a while, at most `max_attempts` times in all; `JobFailed` ends it at once. After `timeout_s` an attempt
    is cancelled and counts as failed. `shown`: the user finds it in the list of jobs and in the inbox.
    """

    kind: str
    handle: Handler
    timeout_s: float = 60
    max_attempts: int = 8
    shown: bool = True


@dataclass(frozen=True, slots=True)
class Periodic:
    """Work of the installation that happens once in every period, over all processes together."""

    kind: str
    every: timedelta
    handle: Handler
    timeout_s: float = 300


class DuplicateKind(ValueError):
    """Two job types have the same kind."""


class JobRegistry:
    """The kinds that this process can do."""

    def __init__(self, types: Iterable[JobType]) -> None:
        self._types: dict[str, JobType] = {}
        for type_ in types:
            self.add(type_)

    def add(self, type_: JobType) -> None:
        """Add a kind. Raises `DuplicateKind`."""
        if type_.kind in self._types:
            raise DuplicateKind(type_.kind)
        self._types[type_.kind] = type_

    def __iter__(self) -> Iterator[JobType]:
        return iter(self._types.values())

    def find(self, kind: str) -> JobType | None:
        """Return the type of a kind, or None when this process does not know it."""
        return self._types.get(kind)

    @property
    def kinds(self) -> list[str]:
        """Every kind."""
        return list(self._types)

    @property
    def shown(self) -> list[str]:
        """The kinds that users see."""
        return [type_.kind for type_ in self if type_.shown]
