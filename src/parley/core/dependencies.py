"""What routers of every module ask for."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Request

from parley.core.db import Database, UnitOfWork
from parley.core.scope import CurrentScope


async def _unit_of_work(request: Request, scope: CurrentScope) -> AsyncIterator[UnitOfWork]:
    database: Database = request.app.state.database
    async with database.unit_of_work(scope) as unit:
        yield unit


# Function scope: the commit comes before the answer. With FastAPI's default the client would hear 200 first.
RequestUnit = Annotated[UnitOfWork, Depends(_unit_of_work, scope="function")]
