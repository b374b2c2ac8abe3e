"""The whole HTTP surface on one page."""

from fastapi import APIRouter

from parley.chat.router import router as chat
from parley.identity.router import router as identity
from parley.identity.router import v1_router as identity_v1
from parley.realtime.router import router as realtime
from parley.tasks.router import router as tasks
from parley.tasks.router import user_router as user_tasks

API_PREFIX = "/api/v1"


def api_routers() -> tuple[APIRouter, ...]:
    """Return every router with its prefix."""
    below_api_v1 = APIRouter(prefix=API_PREFIX)
    for router in (identity, chat, realtime, tasks):
        below_api_v1.include_router(router)
    # Seed 000 writes the sign-up below /v1, seed 004 the tasks below /api/{user_id}.
    below_v1 = APIRouter(prefix="/v1", include_in_schema=False)
    below_v1.include_router(identity_v1)
    below_api = APIRouter(prefix="/api")
    below_api.include_router(user_tasks)
    return (below_api_v1, below_v1, below_api)
