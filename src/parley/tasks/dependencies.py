"""Wires tasks for a request."""

from typing import Annotated

from fastapi import Depends

from parley.core.dependencies import RequestUnit
from parley.core.scope import CurrentScope
from parley.realtime.dependencies import PublisherDep
from parley.tasks.repository import TaskRepository
from parley.tasks.service import TaskReader, TaskService

# `async def` though nothing is awaited: FastAPI would run a plain function in a thread.


async def _task_reader(unit: RequestUnit, scope: CurrentScope) -> TaskReader:
    return TaskReader(TaskRepository(unit, scope), scope)


async def _task_service(unit: RequestUnit, scope: CurrentScope, publisher: PublisherDep) -> TaskService:
    return TaskService(TaskRepository(unit, scope), scope, unit, publisher)


TaskReaderDep = Annotated[TaskReader, Depends(_task_reader)]
TaskServiceDep = Annotated[TaskService, Depends(_task_service)]
