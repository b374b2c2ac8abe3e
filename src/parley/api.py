"""The whole HTTP surface on one page."""

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from parley.chat.router import router as chat
from parley.core.scope import PERMISSION_KEY
from parley.core.service_router import router as service
from parley.identity.router import auth_router, me_router
from parley.realtime.router import router as realtime
from parley.tasks.router import router as tasks
from parley.tasks.router import user_router as user_tasks

API_PREFIX = "/api/v1"


class PermissionNotDeclared(Exception):
    """A route that does not say who may call it: `openapi_extra=needs(…)` or `PUBLIC`."""


# Routes are tried in this order, so what is asked most comes first.
_ROUTERS: tuple[tuple[str, APIRouter, bool], ...] = (
    (API_PREFIX, tasks, True),
    (API_PREFIX, chat, True),
    (API_PREFIX, auth_router, True),
    (API_PREFIX, me_router, True),
    (API_PREFIX, realtime, True),
    ("", service, True),
    # Some clients write the sign-up below /v1, and the tasks below /api/{user_id}.
    ("/v1", auth_router, False),
    ("/api", user_tasks, True),
)


def install_routes(app: FastAPI) -> None:
    """Register every route on the application itself.

    Flat: FastAPI tries included routers one inside the other, which took a fifth of a request's time.
    """
    for prefix, router, documented in _ROUTERS:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            if PERMISSION_KEY not in (route.openapi_extra or {}):
                raise PermissionNotDeclared(
                    f"{sorted(route.methods or ())} {prefix}{route.path}: see tenancy/permissions.py"
                )
            app.router.add_api_route(
                prefix + route.path,
                route.endpoint,
                methods=route.methods,
                name=route.name,
                tags=route.tags,
                summary=route.summary,
                description=route.description,
                response_description=route.response_description,
                status_code=route.status_code,
                response_model=route.response_model,
                response_class=route.response_class,
                responses=route.responses,
                dependencies=route.dependencies,
                openapi_extra=route.openapi_extra,
                include_in_schema=documented and route.include_in_schema,
            )
