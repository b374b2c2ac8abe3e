"""Jobs over HTTP: the caller's own."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Response

from parley.core.envelope import Envelope, ErrorEnvelope, PageEnvelope, respond, respond_page
from parley.core.pagination import Page
from parley.jobs.dependencies import JobServiceDep
from parley.jobs.schemas import JobRead, JobStatus
from parley.tenancy.permissions import Permission, needs

_READ = needs(Permission.JOBS_READ)

router = APIRouter(
    prefix="/jobs",
    tags=["jobs"],
    responses={
        401: {"model": ErrorEnvelope, "description": "No credential, or one that does not hold"},
        403: {"model": ErrorEnvelope, "description": "The credential does not allow it"},
        422: {"model": ErrorEnvelope, "description": "A field or an id is not valid"},
        500: {"model": ErrorEnvelope, "description": "A fault of ours"},
    },
)


@router.get("", response_model=PageEnvelope[JobRead], openapi_extra=_READ)
async def list_jobs(
    jobs: JobServiceDep, page: Page, status: Annotated[JobStatus | None, Query(description="Only those")] = None
) -> Response:
    """List the caller's jobs, newest first."""
    rows, total = await jobs.list_jobs(page, status=status)
    return respond_page(rows, page=page, total=total)


@router.get(
    "/{job_id}",
    response_model=Envelope[JobRead],
    responses={404: {"model": ErrorEnvelope, "description": "No such job, or not the caller's"}},
    openapi_extra=_READ,
)
async def get_job(jobs: JobServiceDep, job_id: UUID) -> Response:
    """Read a job."""
    return respond(await jobs.get_job(job_id))
