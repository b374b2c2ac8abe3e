"""The application: `create_app(settings)` says what there is, its lifespan builds it and takes it down."""

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from fastapi.routing import APIRoute

from parley.api import API_PREFIX, install_routes
from parley.chat.channels import ConversationChannel, UserChannel
from parley.chat.setup import build_chat
from parley.core.db import Database, DatabaseUrls, check_runtime_roles
from parley.core.error_handlers import install_error_handlers
from parley.core.http import create_http_client
from parley.core.middleware import CorsMiddleware, GuardMiddleware, RequestIdMiddleware
from parley.core.migrate import current_revision, head
from parley.core.secrets import load_secrets
from parley.core.service_router import install_documents
from parley.core.settings import Settings, SettingsInvalid
from parley.identity.setup import build_identity
from parley.llm.prompts import PromptLibrary
from parley.llm.registry import ModelRegistry
from parley.realtime.bus import Bus
from parley.realtime.channels import Channels, ChannelSource
from parley.realtime.log import LogReader
from parley.realtime.router import socket_route
from parley.realtime.service import Realtime
from parley.realtime.tickets import Tickets
from parley.tasks.channels import TasksChannel
from parley.tasks.tools import TOOLS as TASK_TOOLS
from parley.usage.service import UsageService
from parley.web import install_web

logger = logging.getLogger(__name__)

DESCRIPTION = """A self-hosted, multi-tenant backend for AI products.

Sign up or in for an access token, then press **Authorize**. Live channels are on the WebSocket at
`/api/v1/realtime` (subprotocol `parley.v1`), and as server-sent events below."""


class SchemaNotCurrent(Exception):
    """The database's schema is not the one that this version serves."""


def _operation_id(route: APIRoute) -> str:
    """The function's name: stable, and what generated clients call the operation."""
    return route.name


def create_app(settings: Settings) -> FastAPI:
    """Return the application. Nothing is connected before its lifespan starts."""
    app = FastAPI(
        title="Parley",
        version="0.1.0",
        description=DESCRIPTION,
        # Open outside production; `parley openapi` prints it anywhere.
        openapi_url=None if settings.is_production else "/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
        generate_unique_id_function=_operation_id,
    )
    app.state.settings = settings
    # Read before anything is opened: a mistake in these files stops the start with their line.
    app.state.registry = ModelRegistry.load(settings.llm.registry, settings.environ)
    app.state.prompts = PromptLibrary.load(settings.llm.prompts)
    install_error_handlers(app)
    install_routes(app)
    app.router.routes.append(socket_route(f"{API_PREFIX}/realtime"))
    if not settings.is_production:
        install_documents(app)
    install_web(app)
    app.add_middleware(GuardMiddleware, body_bytes=settings.body_bytes)
    app.add_middleware(
        CorsMiddleware,
        allow_origins=settings.cors_origins,
        allow_origin_regex=None if settings.is_production else r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?",
        allow_credentials=True,
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "X-Request-ID"],
        expose_headers=["X-Request-ID", "X-Total-Count", "Retry-After", "Location"],
    )
    app.add_middleware(RequestIdMiddleware)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    async with AsyncExitStack() as stack:
        database = Database(DatabaseUrls.from_settings(settings.database), settings.database)
        stack.push_async_callback(database.close)
        await _check_database(database, settings)
        app.state.database = database
        app.state.schema_revision = head()

        identity = build_identity(database, settings, load_secrets(settings))
        stack.push_async_callback(identity.close)
        app.state.identity = identity.service
        app.state.authenticator = identity.authenticator

        http = create_http_client()
        stack.push_async_callback(http.aclose)
        bus = Bus(database, settings.realtime)
        chat = build_chat(
            database=database,
            bus=bus,
            usage=UsageService(app.state.registry, http),
            prompts=app.state.prompts,
            tools=TASK_TOOLS,
            settings=settings,
        )
        sources: list[ChannelSource] = [ConversationChannel(bus), UserChannel(bus), TasksChannel()]
        app.state.chat = chat
        app.state.realtime = Realtime(
            settings=settings.realtime,
            authenticator=identity.authenticator,
            tickets=Tickets(database, identity.authenticator, life_s=settings.realtime.ticket_s),
            channels=Channels(database, sources),
            bus=bus,
            log=LogReader(database),
            origins=frozenset({settings.base_url, *settings.cors_origins}),
            allow_loopback_origins=not settings.is_production,
            handlers=chat.frame_handlers,
        )
        identity.authenticator.on_revoked = app.state.realtime.revoke
        bus.start()
        stack.push_async_callback(bus.close)
        await chat.start()
        stack.push_async_callback(chat.close, drain_s=settings.realtime.drain_s)
        yield


async def _check_database(database: Database, settings: Settings) -> None:
    revision = await current_revision(database)
    if revision != head():
        raise SchemaNotCurrent(f"The schema is at {revision}, this version needs {head()}: run `parley db upgrade`.")
    if settings.is_production and (problems := await check_runtime_roles(database)):
        raise SettingsInvalid("These database roles must not serve:\n  " + "\n  ".join(problems))
