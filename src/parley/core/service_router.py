"""What operators and browsers ask of the service itself: health, and the API's documents without a CDN."""

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import DBAPIError
from starlette.staticfiles import StaticFiles

from parley.core.db import Database, is_connection_lost
from parley.core.envelope import Envelope, respond
from parley.core.migrate import current_revision
from parley.core.scope import PUBLIC
from parley.core.security_headers import page_policy

router = APIRouter(tags=["service"])


class Live(BaseModel):
    """The process answers."""

    status: Literal["live"]


class Ready(BaseModel):
    """Whether requests can be served, and what stands in the way."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, str]


@router.get("/health/live", response_model=Envelope[Live], openapi_extra=PUBLIC)
async def get_liveness() -> Response:
    """Tell that the process answers."""
    return respond(Live(status="live"))


@router.get(
    "/health/ready",
    response_model=Envelope[Ready],
    responses={503: {"model": Envelope[Ready]}},
    openapi_extra=PUBLIC,
)
async def get_readiness(request: Request) -> Response:
    """Tell whether the database is there and its schema is the one that this code expects."""
    database: Database = request.app.state.database
    expected: str = request.app.state.schema_revision
    checks = {"database": "ok", "migrations": "ok"}
    try:
        revision = await current_revision(database)
        if revision != expected:
            checks["migrations"] = f"the schema is at {revision}, this version needs {expected}"
    except (DBAPIError, OSError, TimeoutError) as error:
        if isinstance(error, DBAPIError) and not is_connection_lost(error):
            raise
        checks = {"database": "not reachable", "migrations": "unknown"}
    if getattr(request.app.state, "draining", False):
        # Nothing is wrong, and nothing new is to come here.
        checks["draining"] = "this process is about to stop"
    ready = all(value == "ok" for value in checks.values())
    answer = Ready(status="ready" if ready else "not_ready", checks=checks)
    return respond(answer, status=200 if ready else 503, headers=None if ready else {"Retry-After": "2"})


def _assets() -> Path:
    spec = importlib.util.find_spec("fastapi_offline")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "static"


def _page(page: HTMLResponse, *, workers: bool = False) -> HTMLResponse:
    page.headers["Content-Security-Policy"] = page_policy(bytes(page.body).decode(), workers=workers)
    return page


# Routes of a router and not of one application: FastAPI remembers functions, and with them whatever they enclose.
_documents = APIRouter(include_in_schema=False)


def install_documents(app: FastAPI, *, asyncapi: Callable[[], dict[str, Any]]) -> None:
    """Serve /docs and /redoc with the files of a wheel, and /asyncapi.json beside FastAPI's /openapi.json.

    `asyncapi` is called once, by the first request.
    """
    app.mount("/docs/assets", StaticFiles(directory=_assets()), name="docs-assets")
    app.state.asyncapi = cache(asyncapi)
    app.include_router(_documents)


@_documents.get("/asyncapi.json")
async def _asyncapi_json(request: Request) -> Response:
    return JSONResponse(request.app.state.asyncapi())


@_documents.get("/docs")
async def _swagger_ui(request: Request) -> Response:
    return _page(
        get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=f"{request.app.title} API",
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="/docs/assets/favicon.png",
            swagger_ui_parameters={"persistAuthorization": False, "tryItOutEnabled": True},
        )
    )


@_documents.get("/redoc")
async def _redoc(request: Request) -> Response:
    return _page(
        get_redoc_html(
            openapi_url="/openapi.json",
            title=f"{request.app.title} API",
            redoc_js_url="/docs/assets/redoc.standalone.js",
            redoc_favicon_url="/docs/assets/favicon.png",
            with_google_fonts=False,
        ),
        workers=True,
    )
