"""Wires jobs for a request."""

from typing import Annotated

from fastapi import Depends, Request

from parley.core.dependencies import RequestUnit
from parley.jobs.repository import JobRepository
from parley.jobs.service import JobService
from parley.jobs.setup import Jobs


async def _jobs(request: Request, unit: RequestUnit) -> JobService:
    jobs: Jobs = request.app.state.jobs
    return JobService(JobRepository(unit, unit.scope, jobs.registry))


JobServiceDep = Annotated[JobService, Depends(_jobs)]
