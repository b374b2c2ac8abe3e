"""Reading jobs."""

from uuid import UUID

from parley.core.pagination import PageRequest
from parley.jobs.repository import JobRepository
from parley.jobs.schemas import JobRead

_UNFINISHED = 100


class JobService:
    """What a user sees of their jobs."""

    def __init__(self, repository: JobRepository) -> None:
        self._repository = repository

    async def list_jobs(self, page: PageRequest, *, status: str | None) -> tuple[list[JobRead], int]:
        """Return one page of the caller's jobs, newest first, and how many there are in all."""
        rows, total = await self._repository.list(page, status=status)
        return [JobRead.of_row(row) for row in rows], total

    async def get_job(self, id: UUID) -> JobRead:
        """Return a job of the caller's. Raises `JobNotFound`."""
        return JobRead.of_row(await self._repository.get(id))

    async def unfinished(self) -> list[JobRead]:
        """Return the newest 100 jobs that have not ended: the inbox's."""
        return [JobRead.of_row(row) for row in await self._repository.unfinished(_UNFINISHED)]
