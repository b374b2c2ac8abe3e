"""Wires tasks for a request."""

from typing import Annotated

from fastapi import Depends

from parley.core.dependencies import RequestUnit
from parley.realtime.dependencies import PublisherDep
from parley.tasks.repository import TaskRepository
from parley.tasks.service import TaskReader, TaskService

# `async def` though nothing is awaited: FastAPI would run a plain function in a thread.


async def _task_reader(unit: RequestUnit) -> TaskReader:
    return TaskReader(TaskRepository(unit, unit.scope), unit.scope)


async def _task_service(unit: RequestUnit, publisher: PublisherDep) -> TaskService:
    return TaskService(TaskRepository(unit, unit.scope), unit.scope, unit, publisher)


TaskReaderDep = Annotated[TaskReader, Depends(_task_reader)]
TaskServiceDep = Annotated[TaskService, Depends(_task_service)]
