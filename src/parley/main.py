"""The application: `create_app(settings)` says what there is, its lifespan builds it and takes it down."""

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from parley.api import API_PREFIX, install_routes
from parley.chat import background as chat_background
from parley.chat.approvals.personal_data import ApprovalData
from parley.chat.assistants.personal_data import AssistantData
from parley.chat.attachments.personal_data import AttachmentData
from parley.chat.attachments.router import body_limits
from parley.chat.channels import ConversationChannel, UserChannel
from parley.chat.personal_data import ChatData
from parley.chat.setup import build_chat
from parley.chat.transfer.setup import build_files
from parley.core.api_limits import ApiLimits
from parley.core.buckets import open_bucket
from parley.core.db import Database, DatabaseUrls, check_runtime_roles, check_version
from parley.core.error_handlers import install_error_handlers
from parley.core.http import create_guarded_client, create_http_client
from parley.core.idempotency import clean_idempotency_keys
from parley.core.mail import build_mailer
from parley.core.middleware import CorsMiddleware, GuardMiddleware, RequestIdMiddleware
from parley.core.migrate import current_revision, head
from parley.core.outgoing import Guard
from parley.core.proxies import ProxyMiddleware, parse_networks
from parley.core.rate_limits import RateLimits
from parley.core.revocations import Revocations
from parley.core.scope import Authenticator
from parley.core.secrets import key_ring, load_secrets
from parley.core.security_headers import SecurityHeaders
from parley.core.service_router import install_documents
from parley.core.settings import LlmSettings, Settings, SettingsInvalid
from parley.dialect import images
from parley.dialect.middleware import DialectMiddleware
from parley.dialect.running import RunningCalls
from parley.dialect.service import Dialect
from parley.identity import background as identity_background
from parley.identity.clerk_webhooks import load_webhook_secrets
from parley.identity.cookies import Cookies
from parley.identity.invitations import Invitations
from parley.identity.issuers import load_issuers
from parley.identity.mails import Mails
from parley.identity.people import build_people
from parley.identity.personal_data import IdentityData
from parley.identity.session_repository import leave_workspace as move_sessions
from parley.identity.setup import build_identity, own_issuer
from parley.jobs.cleaning import Cleaner
from parley.jobs.personal_data import JobData
from parley.jobs.registry import Periodic
from parley.jobs.setup import build_jobs
from parley.llm import provider_key_vault
from parley.llm.breaker import BreakerLimits
from parley.llm.personal_data import ProviderKeyData
from parley.llm.prompts import PromptLibrary
from parley.llm.provider_key_vault import Vault
from parley.llm.provider_keys import ProviderKeys
from parley.llm.registry import ModelRegistry
from parley.llm.registry_watch import watching
from parley.realtime import asyncapi, retention
from parley.realtime.bus import Bus
from parley.realtime.channels import Channels, ChannelSource
from parley.realtime.log import LogReader
from parley.realtime.personal_data import RealtimeData
from parley.realtime.personal_data import leave_workspace as stop_replies
from parley.realtime.retention import Retention
from parley.realtime.router import socket_route
from parley.realtime.service import Realtime
from parley.realtime.tickets import Tickets, clean_tickets
from parley.realtime.wire import Wire
from parley.tasks.channels import TasksChannel
from parley.tasks.personal_data import TaskData
from parley.tasks.tools import TOOLS as TASK_TOOLS
from parley.tenancy.personal_data import TenancyData
from parley.tenancy.workspaces import WorkspaceService
from parley.usage.accounts import Accounts
from parley.usage.background import BudgetNotices, sweep_of
from parley.usage.ceilings import Ceilings
from parley.usage.personal_data import UsageData
from parley.usage.service import UsageService
from parley.web import router as web_router

logger = logging.getLogger(__name__)

DESCRIPTION = """A self-hosted, multi-tenant backend for AI products.

Sign up or in for an access token, then press **Authorize**. Live channels are on the WebSocket at
`/api/v1/realtime` (subprotocol `parley.v1`), and as server-sent events below."""

# What every module has of people, in the order of erasure: the account itself comes last.
PERSONAL_DATA = (
    ApprovalData(),
    AssistantData(),
    ChatData(),
    AttachmentData(),
    TaskData(),
    RealtimeData(),
    JobData(),
    UsageData(),
    ProviderKeyData(),
    TenancyData(),
    IdentityData(),
)


# The kinds of live channel there are.
CHANNEL_KINDS = (ConversationChannel, UserChannel, TasksChannel)


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
    load_webhook_secrets(settings)
    app.state.issuers = load_issuers(settings, own_issuer=own_issuer(settings))
    app.state.prompts = PromptLibrary.load(settings.llm.prompts)
    app.state.ceilings = Ceilings.from_settings(settings.llm)
    install_error_handlers(app)
    app.state.draining = False
    if settings.role == "gen":
        # It writes replies and does jobs; only its health is asked.
        install_routes(app, only="service")
    else:
        install_routes(app)
        app.router.routes.append(socket_route(f"{API_PREFIX}/realtime"))
        if not settings.is_production:
            install_documents(app, asyncapi=partial(asyncapi_document, app))
        app.include_router(web_router)
    app.add_middleware(
        GuardMiddleware,
        body_bytes=settings.body_bytes,
        larger={
            "/v1/chat/completions": settings.dialect_body_bytes,
            **body_limits(settings.attachments, API_PREFIX),
        },
    )
    app.add_middleware(
        CorsMiddleware,
        allow_origins=settings.cors_origins,
        allow_origin_regex=None if settings.is_production else r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?",
        allow_credentials=True,
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=[
            "Authorization",
            "Content-Type",
            "Idempotency-Key",
            "Last-Event-ID",
            "X-Parley-Session",
            "X-Request-ID",
        ],
        expose_headers=[
            "X-Request-ID",
            "X-Total-Count",
            "Retry-After",
            "Location",
            "Idempotent-Replayed",
            "RateLimit",
            "RateLimit-Policy",
        ],
    )
    app.add_middleware(DialectMiddleware)
    app.add_middleware(RequestIdMiddleware, security=SecurityHeaders(https=settings.base_url.startswith("https:")))
    app.add_middleware(ProxyMiddleware, trusted=parse_networks(settings.trusted_proxies))
    return app


def asyncapi_document(app: FastAPI) -> dict[str, Any]:
    """Return the AsyncAPI document of the socket."""
    return asyncapi.document(CHANNEL_KINDS, title=app.title, version=app.version)


def _open_accounts(database: Database, ceilings: Ceilings, stack: AsyncExitStack) -> Accounts:
    accounts = Accounts(database, ceilings)
    stack.push_async_callback(accounts.close)
    return accounts


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    async with AsyncExitStack() as stack:
        database = Database(DatabaseUrls.from_settings(settings.database), settings.database)
        stack.push_async_callback(database.close)
        await _check_database(database, settings)
        app.state.database = database
        app.state.schema_revision = head()

        revocations = app.state.revocations = Revocations(database)
        limits = app.state.rate_limits = RateLimits(enabled=settings.rate_limits == "on", redis_url=settings.redis_url)
        stack.push_async_callback(limits.close)
        app.state.api_limits = ApiLimits(limits, settings.limits)
        http = create_http_client()
        stack.push_async_callback(http.aclose)
        guard = Guard.parse(allow=settings.outgoing.allow, ports=settings.outgoing.ports)
        guarded = create_guarded_client(guard, max_bytes=settings.outgoing.max_bytes, total_s=settings.outgoing.total_s)
        stack.push_async_callback(guarded.aclose)
        secrets = load_secrets(settings)
        vault = Vault(key_ring(secrets, provider_key_vault.PURPOSE))
        provider_keys = app.state.provider_keys = ProviderKeys(database, vault, guard, revocations)
        identity = build_identity(
            database,
            settings,
            secrets,
            revocations=revocations,
            limits=limits,
            issuers=app.state.issuers,
            http=http,
        )
        stack.push_async_callback(identity.close)
        app.state.passwords = identity.password_service
        app.state.clerk_webhooks = identity.clerk_webhooks
        app.state.cookies = Cookies.from_settings(settings)
        app.state.identity = identity.service
        app.state.authenticator = identity.bearer
        app.state.api_keys = identity.api_keys

        wire = Wire(database, redis_url=settings.redis_url)
        bus = Bus(database, settings.realtime, wire)
        tickets = Tickets(database, identity.bearer, life_s=settings.realtime.ticket_s)
        app.state.workspaces = WorkspaceService(
            database,
            revocations,
            leaving=[move_sessions, stop_replies],
            per_month=settings.limits.workspaces_per_month if limits.enabled else None,
        )
        invitations = app.state.invitations = Invitations(
            database, identity.invitation_hash, life=timedelta(days=settings.auth.invitation_days)
        )
        mailer = app.state.mailer = getattr(app.state, "mailer", None) or build_mailer(settings)
        mails = Mails(
            database,
            mailer,
            identity.one_time_tokens,
            invitations,
            base_url=settings.base_url,
            settings=settings.auth,
        )
        people = build_people(
            database,
            PERSONAL_DATA,
            settings=settings,
            confirm=identity.password_service.confirm,
            revocations=revocations,
            mailer=mailer,
        )
        app.state.exports, app.state.erasures = people.exports, people.erasures
        identity.service.erasures = people.erasures
        files = app.state.files = build_files(
            database, open_bucket(http, settings.attachments), bus, settings.attachments
        )
        jobs = app.state.jobs = build_jobs(
            database=database,
            publisher=bus,
            settings=settings.job,
            types=[*people.job_types, *mails.job_types(), BudgetNotices(bus).type, files.importer.job_type],
            cleaners=[
                Cleaner("idempotency_keys", clean_idempotency_keys),
                Cleaner("realtime_tickets", clean_tickets),
                *identity_background.cleaners(),
                *files.cleaners,
            ],
            periodic=[
                *people.periodics,
                sweep_of(database, app.state.ceilings),
                Periodic(
                    retention.KIND,
                    retention.EVERY,
                    Retention(database, settings.realtime).handle,
                    timeout_s=retention.TIMEOUT_S,
                ),
            ],
        )
        usage = app.state.usage = UsageService(
            app.state.registry,
            http,
            _open_accounts(database, app.state.ceilings, stack),
            breaker=_breaker(settings.llm),
            keys=provider_keys,
            guarded=guarded,
        )
        app.state.dialect = _build_dialect(app, stack, identity.bearer)
        chat = build_chat(
            database=database,
            bus=bus,
            wire=wire,
            usage=usage,
            prompts=app.state.prompts,
            tools=TASK_TOOLS,
            settings=settings,
            limits=app.state.api_limits,
            authenticator=identity.bearer,
            attachments=files.attachments,
        )
        for job_type in chat_background.job_types(chat.titles, bus):
            jobs.registry.add(job_type)
        sources: list[ChannelSource] = [ConversationChannel(bus), UserChannel(bus, jobs.registry), TasksChannel()]
        app.state.chat = chat
        app.state.realtime = Realtime(
            settings=settings.realtime,
            authenticator=identity.bearer,
            tickets=tickets,
            channels=Channels(database, sources),
            bus=bus,
            log=LogReader(database),
            origins=frozenset({settings.base_url, *settings.cors_origins}),
            allow_loopback_origins=not settings.is_production,
            handlers=chat.frame_handlers,
        )
        revocations.subscribe(app.state.realtime.revoke, reset=app.state.realtime.look_at_everything)
        await provider_keys.start()
        stack.push_async_callback(provider_keys.close)
        await revocations.start()
        stack.push_async_callback(revocations.close)
        await bus.start()
        stack.push_async_callback(bus.close)
        await stack.enter_async_context(watching(app.state.registry, settings.llm, settings.environ))
        await chat.start()
        stack.push_async_callback(chat.close, drain_s=settings.realtime.drain_s)
        if settings.role != "web":
            await jobs.dispatcher.start()
            stack.push_async_callback(jobs.dispatcher.close)
        yield


def _build_dialect(app: FastAPI, stack: AsyncExitStack, authenticator: Authenticator) -> Dialect:
    settings: Settings = app.state.settings
    revocations: Revocations = app.state.revocations
    fetcher = None
    if settings.dialect_fetch_images:
        # What the operator has opened for model servers is not opened for whoever may call a model.
        fetcher = create_guarded_client(Guard(), max_bytes=images.MAX_BYTES, total_s=images.TOTAL_S)
        stack.push_async_callback(fetcher.aclose)
    calls = RunningCalls(authenticator, most=settings.limits.running_calls if app.state.api_limits.enabled else None)
    revocations.subscribe(calls.revoke, reset=calls.look_at_everything)
    stack.push_async_callback(calls.close)
    return Dialect(app.state.usage, calls, images.Images(fetcher))


def _breaker(llm: LlmSettings) -> BreakerLimits:
    return BreakerLimits(llm.breaker_failures, llm.breaker_window_s, llm.breaker_open_s)


async def _check_database(database: Database, settings: Settings) -> None:
    revision = await current_revision(database)
    if revision != head():
        raise SchemaNotCurrent(f"The schema is at {revision}, this version needs {head()}: run `parley db upgrade`.")
    if (fault := await check_version(database)) is not None:
        logger.warning(fault)
    if settings.is_production and (problems := await check_runtime_roles(database)):
        raise SettingsInvalid("These database roles must not serve:\n  " + "\n  ".join(problems))
