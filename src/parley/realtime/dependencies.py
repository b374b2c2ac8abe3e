"""What routers ask of the live part."""

from typing import Annotated

from fastapi import Depends, Request

from parley.realtime.log import Publisher
from parley.realtime.service import Realtime


async def _realtime(request: Request) -> Realtime:
    realtime: Realtime = request.app.state.realtime
    return realtime


RealtimeDep = Annotated[Realtime, Depends(_realtime)]


async def _publisher(realtime: RealtimeDep) -> Publisher:
    return realtime.bus


PublisherDep = Annotated[Publisher, Depends(_publisher)]
