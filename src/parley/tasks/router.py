"""Tasks over HTTP, twice: in the envelope below `/api/v1/tasks`, and bare below `/api/{user_id}/tasks`."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response

from parley.core.envelope import Envelope, ErrorEnvelope, PageEnvelope, dump, respond, respond_page
from parley.core.errors import Unauthenticated
from parley.core.idempotency import ONCE_RESPONSES, RequestOnce
from parley.core.pagination import MAX_PER_PAGE, Page, PageRequest
from parley.core.scope import CurrentScope, Scope
from parley.tasks.dependencies import TaskReaderDep, TaskServiceDep
from parley.tasks.schemas import TaskCreate, TaskRead, TaskReplace, TaskUpdate, UserTaskRead
from parley.tenancy.permissions import Permission, needs

Completed = Annotated[bool | None, Query(description="Only the completed ones, or only the open ones")]

_REFUSALS: dict[int, str] = {
    400: "The body is not JSON",
    401: "No credential, or one that does not hold",
    404: "No such task, or not the caller's",
    422: "A field or an id is not valid",
    500: "A fault of ours",
}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorEnvelope, "description": _REFUSALS[status]} for status in statuses}


_CREATED: dict[int | str, dict[str, Any]] = {
    201: {"headers": {"Location": {"description": "Where the task is", "schema": {"type": "string"}}}}
}

_READ, _WRITE = needs(Permission.TASKS_READ), needs(Permission.TASKS_WRITE)

router = APIRouter(prefix="/tasks", tags=["tasks"], responses=_refusals(401, 422, 500))


@router.get("", response_model=PageEnvelope[TaskRead], openapi_extra=_READ)
async def list_tasks(tasks: TaskReaderDep, page: Page, completed: Completed = None) -> Response:
    """List the caller's tasks, newest first."""
    rows, total = await tasks.list_tasks(page, completed=completed)
    return respond_page(rows, page=page, total=total)


@router.post(
    "",
    status_code=201,
    response_model=Envelope[TaskRead],
    responses={**_CREATED, **_refusals(400), **ONCE_RESPONSES},
    openapi_extra=_WRITE,
)
async def create_task(request: Request, tasks: TaskServiceDep, once: RequestOnce, body: TaskCreate) -> Response:
    """Add a task of the caller's."""
    task = await tasks.add_task(body)
    return await once.keep(respond(task, status=201, headers={"Location": f"{request.url.path}/{task.id}"}))


@router.get("/{task_id}", response_model=Envelope[TaskRead], responses=_refusals(404), openapi_extra=_READ)
async def get_task(tasks: TaskReaderDep, task_id: UUID) -> Response:
    """Read a task."""
    return respond(await tasks.get_task(task_id))


@router.put("/{task_id}", response_model=Envelope[TaskRead], responses=_refusals(400, 404), openapi_extra=_WRITE)
async def replace_task(tasks: TaskServiceDep, task_id: UUID, body: TaskReplace) -> Response:
    """Replace a task: what the body leaves out takes the value that it has on a new task."""
    return respond(await tasks.replace_task(task_id, body))


@router.patch("/{task_id}", response_model=Envelope[TaskRead], responses=_refusals(400, 404), openapi_extra=_WRITE)
async def change_task(tasks: TaskServiceDep, task_id: UUID, body: TaskUpdate) -> Response:
    """Change a part of a task: what the body leaves out stays."""
    return respond(await tasks.change_task(task_id, body))


@router.delete("/{task_id}", status_code=204, responses=_refusals(404), openapi_extra=_WRITE)
async def delete_task(tasks: TaskServiceDep, task_id: UUID) -> Response:
    """Remove a task."""
    await tasks.delete_task(task_id)
    return Response(status_code=204)


async def _own_path(user_id: str, scope: CurrentScope) -> Scope:
    # Compared as text, since the subject of another issuer need not be a UUID.
    if user_id != scope.subject:
        raise Unauthenticated("The path is another user's.")
    return scope


OwnPath = Annotated[Scope, Depends(_own_path)]

# A dependency of the router comes before those of its routes: a path of someone else learns nothing more.
user_router = APIRouter(
    prefix="/{user_id}/tasks",
    tags=["tasks by user"],
    dependencies=[Depends(_own_path)],
    responses=_refusals(401, 422, 500),
)


def _bare(body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status_code=status, headers=headers, media_type="application/json")


def _for_user(task: TaskRead, scope: Scope) -> UserTaskRead:
    return UserTaskRead.model_construct(**{**task.__dict__, "user_id": scope.subject})


@user_router.get(
    "",
    response_model=list[UserTaskRead],
    responses={
        200: {"headers": {"X-Total-Count": {"description": "How many there are in all", "schema": {"type": "integer"}}}}
    },
    openapi_extra=_READ,
)
async def list_user_tasks(
    scope: OwnPath,
    tasks: TaskReaderDep,
    completed: Completed = None,
    page: Annotated[int, Query(ge=1, le=1_000_000, description="Which page, from 1")] = 1,
    per_page: Annotated[int, Query(ge=1, le=MAX_PER_PAGE, description="Rows per page")] = MAX_PER_PAGE,
) -> Response:
    """List the user's tasks, newest first: a bare list."""
    rows, total = await tasks.list_tasks(PageRequest(page, per_page), completed=completed)
    return _bare(dump([_for_user(row, scope) for row in rows]), headers={"X-Total-Count": str(total)})


@user_router.post(
    "",
    status_code=201,
    response_model=UserTaskRead,
    responses={**_CREATED, **_refusals(400), **ONCE_RESPONSES},
    openapi_extra=_WRITE,
)
async def create_user_task(
    request: Request, scope: OwnPath, tasks: TaskServiceDep, once: RequestOnce, body: TaskCreate
) -> Response:
    """Add a task of the user's."""
    task = await tasks.add_task(body)
    location = {"Location": f"{request.url.path}/{task.id}"}
    return await once.keep(_bare(dump(_for_user(task, scope)), status=201, headers=location))


@user_router.get("/{task_id}", response_model=UserTaskRead, responses=_refusals(404), openapi_extra=_READ)
async def get_user_task(scope: OwnPath, tasks: TaskReaderDep, task_id: UUID) -> Response:
    """Read a task."""
    return _bare(dump(_for_user(await tasks.get_task(task_id), scope)))


@user_router.put("/{task_id}", response_model=UserTaskRead, responses=_refusals(400, 404), openapi_extra=_WRITE)
async def replace_user_task(scope: OwnPath, tasks: TaskServiceDep, task_id: UUID, body: TaskReplace) -> Response:
    """Replace a task: what the body leaves out takes the value that it has on a new task."""
    return _bare(dump(_for_user(await tasks.replace_task(task_id, body), scope)))


@user_router.patch("/{task_id}", response_model=UserTaskRead, responses=_refusals(400, 404), openapi_extra=_WRITE)
async def change_user_task(scope: OwnPath, tasks: TaskServiceDep, task_id: UUID, body: TaskUpdate) -> Response:
    """Change a part of a task: what the body leaves out stays."""
    return _bare(dump(_for_user(await tasks.change_task(task_id, body), scope)))


@user_router.delete("/{task_id}", status_code=204, responses=_refusals(404), openapi_extra=_WRITE)
async def delete_user_task(tasks: TaskServiceDep, task_id: UUID) -> Response:
    """Remove a task."""
    await tasks.delete_task(task_id)
    return Response(status_code=204)
