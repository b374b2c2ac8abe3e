"""The whole HTTP surface on one page."""

from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute

from parley.chat.approvals.router import router as approvals
from parley.chat.assistants.prompt_router import router as prompts
from parley.chat.assistants.router import router as assistants
from parley.chat.attachments.router import router as attachments
from parley.chat.router import router as chat
from parley.chat.search.router import router as search
from parley.chat.transfer.router import router as transfer
from parley.core.envelope import ErrorEnvelope
from parley.core.scope import PERMISSION_KEY, PUBLIC
from parley.core.service_router import router as service
from parley.dialect.router import router as dialect
from parley.identity.api_key_router import router as api_keys
from parley.identity.invitation_router import router as invitations
from parley.identity.me_router import router as me
from parley.identity.password_router import router as passwords
from parley.identity.router import auth_router
from parley.identity.webhook_router import router as webhooks
from parley.jobs.router import router as jobs
from parley.llm.health_router import router as providers
from parley.llm.provider_key_router import router as provider_keys
from parley.realtime.router import router as realtime
from parley.tasks.router import router as tasks
from parley.tasks.router import user_router as user_tasks
from parley.tenancy.router import audit_router as audit
from parley.tenancy.router import router as workspaces
from parley.usage.router import router as usage

API_PREFIX = "/api/v1"


class PermissionNotDeclared(Exception):
    """A route that does not say who may call it: `openapi_extra=needs(…)` or `PUBLIC`."""


# Routes are tried in this order, so what is asked most comes first.
_ROUTERS: tuple[tuple[str, APIRouter, bool], ...] = (
    (API_PREFIX, tasks, True),
    (API_PREFIX, chat, True),
    (API_PREFIX, search, True),
    (API_PREFIX, approvals, True),
    (API_PREFIX, assistants, True),
    (API_PREFIX, prompts, True),
    (API_PREFIX, attachments, True),
    (API_PREFIX, transfer, True),
    (API_PREFIX, auth_router, True),
    (API_PREFIX, passwords, True),
    (API_PREFIX, me, True),
    (API_PREFIX, api_keys, True),
    (API_PREFIX, workspaces, True),
    (API_PREFIX, invitations, True),
    (API_PREFIX, provider_keys, True),
    (API_PREFIX, providers, True),
    (API_PREFIX, audit, True),
    (API_PREFIX, jobs, True),
    (API_PREFIX, usage, True),
    (API_PREFIX, webhooks, True),
    (API_PREFIX, realtime, True),
    ("", service, True),
    # Some clients write the sign-up below /v1, and the tasks below /api/{user_id}.
    ("/v1", auth_router, False),
    ("/v1", passwords, False),
    ("/v1", dialect, False),
    ("/api", user_tasks, True),
)


# How any route may refuse, beside what it says itself.
_REFUSALS: dict[int, str] = {
    400: "The body is not JSON",
    401: "No credential, or one that does not hold",
    403: "The credential does not have the permission",
    404: "Absent, or not the caller's to see",
    413: "The body is too large",
    422: "A parameter or a field does not hold; `details.field` says which",
    429: "Over a limit; see Retry-After",
    500: "A fault of ours",
    503: "A part that is needed is away; see Retry-After",
}


def _refusals(route: APIRoute) -> dict[int | str, dict[str, Any]]:
    """Return the refusals that a route's shape brings along, for the document."""
    statuses = {429, 500, 503}
    if (route.openapi_extra or {}).get(PERMISSION_KEY) != PUBLIC[PERMISSION_KEY]:
        statuses |= {401, 403}
    if route.body_field is not None:
        statuses |= {400, 413, 422}
    if "{" in route.path:
        statuses |= {404, 422}
    if get_flat_params(route.dependant):
        statuses |= {422}
    return {status: {"model": ErrorEnvelope, "description": _REFUSALS[status]} for status in sorted(statuses)}


def install_routes(app: FastAPI, *, only: str | None = None) -> None:
    """Register every route on the application itself, or those of one tag.

    Flat: FastAPI tries included routers one inside the other, which took a fifth of a request's time.
    """
    for prefix, router, documented in _ROUTERS:
        if only is not None and only not in router.tags:
            continue
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
                summary=route.summary or route.name.replace("_", " ").capitalize(),
                description=route.description,
                response_description=route.response_description,
                status_code=route.status_code,
                response_model=route.response_model,
                response_class=route.response_class,
                responses={**_refusals(route), **route.responses},
                dependencies=route.dependencies,
                openapi_extra=route.openapi_extra,
                include_in_schema=documented and route.include_in_schema,
            )
