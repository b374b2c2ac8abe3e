"""Every route is in the contract, asks who is calling, and says what it answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import RouteContext, iter_route_contexts
from starlette.routing import Mount, WebSocketRoute

from parley.core.scope import CurrentScope, Scope, current_scope
from parley.core.settings import load_settings
from parley.main import create_app

_TOKENS = (
    "signup", "signin", "refresh", "signout", "password/forgot", "password/reset", "email/verify", "email/resend",
)  # fmt: skip

# Who has no credential yet, who gives one up, and who only wants to know whether the service is there.
PUBLIC = {
    "GET /",
    "GET /docs",
    "GET /redoc",
    "GET /openapi.json",
    "GET /asyncapi.json",
    "GET /health/live",
    "GET /health/ready",
    "POST /api/v1/webhooks/clerk",
    *(f"POST {prefix}/auth/{name}" for prefix in ("/api/v1", "/v1") for name in _TOKENS),
}

_AREAS = """
POST auth/signup | POST auth/signin | POST auth/refresh | POST auth/signout | POST auth/switch
GET auth/sessions | DELETE auth/sessions | DELETE auth/sessions/{} | POST auth/password/change | POST auth/password/forgot
POST auth/password/reset | POST auth/email/verify | POST auth/email/resend
GET me | PATCH me | DELETE me | POST me/export | GET me/exports/{}
GET workspaces | POST workspaces | GET workspaces/{} | PATCH workspaces/{} | DELETE workspaces/{}
GET workspaces/{}/members | PATCH workspaces/{}/members/{} | DELETE workspaces/{}/members/{}
GET workspaces/{}/invitations | POST workspaces/{}/invitations | DELETE workspaces/{}/invitations/{}
POST invitations/accept
GET api-keys | POST api-keys | DELETE api-keys/{}
GET conversations | POST conversations | GET conversations/{} | PATCH conversations/{} | DELETE conversations/{}
GET conversations/{}/messages | POST conversations/{}/messages | PATCH messages/{}
POST replies/{}/cancel | POST replies/{}/continue | POST replies/{}/regenerate | POST tool-calls/{}/approve
POST attachments | GET attachments/{} | DELETE attachments/{}
GET conversations/{}/export | POST conversations/import | GET search
GET models | GET providers | GET prompts | GET provider-keys | PUT provider-keys/{} | DELETE provider-keys/{}
GET assistants | POST assistants | GET assistants/{} | PATCH assistants/{} | DELETE assistants/{}
POST realtime/tickets | GET channels/{}/events
GET tasks | POST tasks | GET tasks/{} | PUT tasks/{} | PATCH tasks/{} | DELETE tasks/{}
GET exams | POST exams | GET exams/{} | PATCH exams/{} | DELETE exams/{} | POST exams/generate | POST exams/{}/publish
POST exams/{}/attempts | GET attempts/{} | PUT attempts/{}/answers/{} | POST attempts/{}/submit
PUT attempts/{}/marks/{} | GET exams/{}/results
GET instruments | GET market-data/{}/bars
GET accounts | POST accounts | GET accounts/{} | PATCH accounts/{} | DELETE accounts/{}
GET accounts/{}/orders | GET accounts/{}/positions | GET accounts/{}/trades | GET accounts/{}/equity
GET accounts/{}/decisions | GET accounts/{}/events | POST accounts/{}/orders | POST accounts/{}/decisions
DELETE accounts/{}/orders/{}
GET jobs | GET jobs/{} | GET usage | GET budgets | PUT budgets | GET audit
GET webhooks | POST webhooks | GET webhooks/{} | PATCH webhooks/{} | DELETE webhooks/{} | GET webhooks/{}/deliveries
POST webhooks/clerk
"""


def _contract() -> set[str]:
    """Return the HTTP contract as `METHOD /path`, path parameters as `{}`."""
    below_api_v1 = [item.strip().split(" ") for line in _AREAS.strip().splitlines() for item in line.split("|")]
    below_auth = [f"{method} {path}" for method, path in below_api_v1 if path.startswith("auth/")]
    user_tasks = ("GET /api/{}/tasks", "POST /api/{}/tasks",
                  *(f"{method} /api/{{}}/tasks/{{}}" for method in ("GET", "PUT", "PATCH", "DELETE")))  # fmt: skip
    service = ("/", "/health/live", "/health/ready", "/metrics", "/docs", "/redoc", "/openapi.json", "/asyncapi.json")
    return {
        *(f"{method} /api/v1/{path}" for method, path in below_api_v1),
        *(name.replace(" ", " /v1/", 1) for name in below_auth),
        "POST /v1/chat/completions",
        "GET /v1/models",
        "GET /v1/models/{}",
        *user_tasks,
        *(f"GET {path}" for path in service),
    }


def names_of(route: RouteContext) -> list[str]:
    """Return what a route answers to, as `METHOD /path`; HEAD goes with GET."""
    return [f"{method} {route.path_format or route.path}" for method in sorted((route.methods or set()) - {"HEAD"})]


def http_routes(app: FastAPI) -> Iterator[RouteContext]:
    """Yield every HTTP route with its whole path; nothing that answers requests is left out."""
    for route in iter_route_contexts(app.routes):
        if isinstance(route.original_route, WebSocketRoute):
            assert route.path == "/api/v1/realtime"  # its credential comes in the first frame
        elif isinstance(route.original_route, Mount):
            assert route.path == "/docs/assets"  # files of a wheel
        else:
            assert route.methods, route
            yield route


def asks_who_calls(dependant: Dependant | None) -> bool:
    """Whether a route's dependencies verify a credential."""
    if dependant is None:
        return False
    return dependant.call is current_scope or any(asks_who_calls(below) for below in dependant.dependencies)


def open_routes(app: FastAPI) -> set[str]:
    """Return the routes that answer anyone."""
    routes = (route for route in http_routes(app) if not asks_who_calls(getattr(route, "dependant", None)))
    return {name for route in routes for name in names_of(route)}


def without_parameter_names(name: str) -> str:
    """Return a route's name with `{}` for each parameter."""
    return "/".join("{}" if part.startswith("{") else part for part in name.split("/"))


def misnamed(app: FastAPI) -> list[str]:
    """Return operations whose id is not the function's name, or is used twice."""
    seen: dict[str, str] = {}
    found = []
    for route in http_routes(app):
        if not getattr(route, "include_in_schema", False):
            continue
        id_, function = route.unique_id, route.endpoint.__name__ if route.endpoint else None
        if id_ != function:
            found.append(f"{id_} is answered by {function}")
        if id_ in seen:
            found.append(f"{id_} is both {seen[id_]} and {route.path}")
        seen[id_] = str(route.path)
    return found


def _described(content: dict[str, Any]) -> bool:
    # A stream of events has no schema: docs/protocol.md describes it.
    return bool(content) and all(kind == "text/event-stream" or about.get("schema") for kind, about in content.items())


def undocumented(document: dict[str, Any]) -> list[str]:
    """Return the success answers that the document does not describe."""
    found = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            successes = {status: answer for status, answer in operation["responses"].items() if status.startswith("2")}
            if not successes:
                found.append(f"{method} {path}: no success")
            for status, answer in successes.items():
                content = answer.get("content", {})
                if (status == "204") == bool(content) or (content and not _described(content)):
                    found.append(f"{method} {path}: {status}")
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """The application as it is served, not started."""
    return create_app(load_settings(tmp_path_factory.mktemp("data"), env="testing"))


def test_every_route_asks_who_calls_or_is_on_the_public_list(whole: FastAPI) -> None:
    assert open_routes(whole) == PUBLIC


def test_every_route_is_in_the_contract(whole: FastAPI) -> None:
    served = {without_parameter_names(name) for route in http_routes(whole) for name in names_of(route)}

    assert served - _contract() == set()


def test_operations_are_named_after_their_functions(whole: FastAPI) -> None:
    assert misnamed(whole) == []


def test_every_success_is_described(whole: FastAPI) -> None:
    assert undocumented(whole.openapi()) == []


def test_what_needs_a_credential_says_so(whole: FastAPI) -> None:
    said = {
        f"{method.upper()} {path}"
        for path, operations in whole.openapi()["paths"].items()
        for method, operation in operations.items()
        if operation.get("security") != [{"bearer": []}]
    }

    # Signing out takes either token.
    assert said == {name for name in PUBLIC if name.split(" ")[1] in whole.openapi()["paths"]} - {
        "POST /api/v1/auth/signout"
    }


def test_the_document_is_not_open_in_production(tmp_path: Path) -> None:
    settings = load_settings(
        tmp_path, env="production", secret_key="0123456789abcdefghijklmnopqrstuvwxyz", public_url="https://parley.test",
        database={"url": "embedded"},
    )  # fmt: skip

    documents = {"GET /docs", "GET /redoc", "GET /openapi.json", "GET /asyncapi.json"}
    assert not documents & open_routes(create_app(settings))


# -- the rules themselves ------------------------------------------------------------------------------------------


def _app_with(router: APIRouter) -> FastAPI:
    outer = APIRouter(prefix="/api/v1")
    outer.include_router(router)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, generate_unique_id_function=lambda route: route.name)
    app.include_router(outer)
    return app


def test_a_route_that_asks_nobody_is_noticed_two_routers_deep() -> None:
    router = APIRouter()

    @router.get("/secrets")
    async def list_secrets() -> list[str]:
        return []

    async def through_another(scope: CurrentScope) -> Scope:
        return scope

    @router.get("/mine")
    async def list_mine(scope: Annotated[Scope, Depends(through_another)]) -> list[str]:
        return [scope.subject]

    assert open_routes(_app_with(router)) == {"GET /api/v1/secrets"}


def test_a_path_outside_the_contract_is_noticed() -> None:
    router = APIRouter()

    @router.post("/tasks/{task_id}/steal")
    async def steal_task(task_id: str) -> str:
        return task_id

    (route,) = http_routes(_app_with(router))
    assert without_parameter_names(names_of(route)[0]) == "POST /api/v1/tasks/{}/steal"
    assert without_parameter_names(names_of(route)[0]) not in _contract()


def test_operation_ids_that_are_not_function_names_are_noticed() -> None:
    router = APIRouter()

    @router.get("/one", operation_id="number_one")
    async def get_one() -> int:
        return 1

    @router.get("/two", name="get_two")
    @router.get("/deux", name="get_two")
    async def get_two() -> int:
        return 2

    assert misnamed(_app_with(router)) == [
        "number_one is answered by get_one",
        "get_two is both /api/v1/deux and /api/v1/two",
    ]


def test_answers_without_a_model_are_noticed() -> None:
    router = APIRouter()

    @router.get("/described")
    async def get_described() -> int:
        return 1

    @router.get("/anything", response_model=None)
    async def get_anything() -> Any:
        return {}

    @router.delete("/gone", status_code=204)
    async def delete_gone() -> None:
        return None

    assert undocumented(_app_with(router).openapi()) == ["get /api/v1/anything: 200"]
