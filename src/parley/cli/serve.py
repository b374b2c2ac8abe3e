"""`parley serve`: the process that owns the port and the database server, if it is ours, and serves or has workers."""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from parley.cli.database import embedded_urls
from parley.cli.problems import CommandFailed, explained
from parley.cli.workers import Workers, WorkersFailed
from parley.core import migrate
from parley.core.db import DatabaseUrls, asyncpg_dsn
from parley.core.embedded_postgres import EmbeddedPostgres
from parley.core.http_protocol import RequestProtocol
from parley.core.logging import configure_logging
from parley.core.settings import Settings, load_settings
from parley.llm.registry import ModelRegistry
from parley.main import create_app
from parley.realtime.drain import drain
from parley.realtime.protocol import SocketProtocol

logger = logging.getLogger(__name__)

# The kernel keeps up to this much for a client that does not read; without a bound it is about 4 MB each.
_SEND_BUFFER_BYTES = 256 * 1024
_WATCH_S = 0.5
# Less often than Python does: most of what is made for a delta is gone before the next one.
_COLLECT = (10_000, 20, 20)
# How long one connection has to move; and all of them when a person at a keyboard waits.
_LEAVE_S = 5.0
_LAST_ACCEPTED_S = 0.5
_HURRY_S = 1.0


def serve(overrides: dict[str, Any]) -> None:
    """Serve until a signal comes."""
    settings = load_settings(**overrides)
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    configure_logging(settings)
    # Before anything is started: a mistake in these files is told at once.
    app = create_app(settings)
    with ExitStack() as stack:
        listening = stack.enter_context(_listen(settings))
        settings.port = listening.getsockname()[1]
        connections = max(200, settings.workers * 24 + 40)
        server = (
            stack.enter_context(EmbeddedPostgres(settings.data_dir, max_connections=connections))
            if settings.uses_embedded_postgres
            else None
        )
        if server is not None:
            urls = embedded_urls(server)
            settings.database.url, settings.database.system_url = urls.app, urls.system
            settings.database.owner_url = urls.owner
        _prepare_schema(settings, embedded=server is not None)

        def greet() -> None:
            print(_greeting(settings, app.state.registry), flush=True)

        if settings.workers == 1:
            asyncio.run(_run(app, settings, listening, server, started=greet), loop_factory=_loop_factory())
        else:
            _serve_in_workers(app, settings, listening, server, greet)


def _serve_in_workers(
    app: FastAPI,
    settings: Settings,
    listening: socket.socket,
    server: EmbeddedPostgres | None,
    greet: Callable[[], None],
) -> None:
    def work(number: int, ready: Callable[[], None]) -> None:
        configure_logging(settings, worker=number)
        with explained():
            # Each fork has its own copy of the application, and starts it.
            asyncio.run(_run(app, settings, listening, None, started=ready), loop_factory=_loop_factory())

    _settle_memory()

    def look() -> None:
        if server is not None and not server.is_alive():
            logger.error("PostgreSQL is gone, starting it again")
            server.restart_if_dead()

    try:
        Workers(settings.workers, work, look=look, all_ready=greet).run()
    except WorkersFailed as failed:
        raise CommandFailed(str(failed)) from None


def _settle_memory() -> None:
    """Take what was loaded out of the collector's sight: walking through it took a tenth of a second each time.

    Nothing else runs meanwhile, so it was the longest wait of a delta. In workers the pages stay shared, too.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT)


def _prepare_schema(settings: Settings, *, embedded: bool) -> None:
    """Migrate what is ours or in development; production migrates by command, and is refused what is not at head."""
    urls = DatabaseUrls.from_settings(settings.database)
    if embedded or not settings.is_production:
        if urls.become:
            from parley.core.database_roles import ensure_roles  # noqa: PLC0415 - only a single external address needs it

            asyncio.run(ensure_roles(asyncpg_dsn(urls.owner), urls.name))
        migrate.upgrade(urls)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named, asyncio too sends small answers at once.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as problem:
        listening.close()
        raise CommandFailed(
            f"cannot listen on {settings.host}:{settings.port} ({problem.strerror}); set PARLEY_PORT to a free port"
        ) from None
    listening.listen(2048)
    listening.setblocking(False)
    return listening


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - not there on Windows
    except ImportError:
        return None
    loop: type[asyncio.AbstractEventLoop] = uvloop.Loop
    return loop


class _Server(uvicorn.Server):
    """Says when it answers; leaves in its own time at the first signal and at once at the second."""

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, settings: Settings, *, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._app = app
        self._settings = settings
        self._say_started = started
        self._loop = asyncio.get_running_loop()
        self._leaving: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            _settle_memory()
            self._say_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:
            super().handle_exit(sig, frame)
        elif self._leaving is None:
            self._loop.call_soon_threadsafe(self._leave, sig == signal.SIGINT)
        else:
            self._loop.call_soon_threadsafe(self._app.state.chat.generator.stop)
            super().handle_exit(sig, frame)
        # uvicorn would raise the signal again when it is done, and our PostgreSQL would not be stopped in order.
        self._captured_signals.clear()

    def _leave(self, in_a_hurry: bool) -> None:
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._drain(in_a_hurry=in_a_hurry), name="drain")

    async def _drain(self, *, in_a_hurry: bool) -> None:
        """Let clients move to another process and replies end, both at once; then stop."""
        state, realtime = self._app.state, self._settings.realtime
        state.draining = True
        if self._settings.workers > 1:
            # The port is the parent's and the others': whoever comes now is theirs, and nobody is cut off at the end.
            for server in self.servers:
                server.close()
            await asyncio.sleep(_LAST_ACCEPTED_S)
        logger.info("leaving", extra={"sockets": len(state.realtime.connections), "replies": state.chat.running})
        try:
            window_s = min(realtime.drain_window_s, _HURRY_S) if in_a_hurry else realtime.drain_window_s
            await asyncio.gather(
                drain(state.realtime, window_s=window_s, deadline_s=min(_LEAVE_S, window_s)),
                state.chat.drain(realtime.drain_s),
                state.dialect.running.drain(realtime.drain_s),
            )
        except Exception:
            logger.exception("not everything was brought to its end")
        self.should_exit = True


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Return how the server speaks: uvloop, httptools, no compression (it costs 100 KB a connection and much CPU)."""
    return uvicorn.Config(
        app,
        http=RequestProtocol,
        ws=SocketProtocol,
        ws_max_size=settings.realtime.frame_bytes,
        ws_per_message_deflate=False,
        access_log=False,
        log_config=None,
        server_header=False,
        # Forwarded headers are believed only once a proxy is configured.
        proxy_headers=False,
        # Longer than the minute that proxies and clients keep a connection: whoever closes first races a request.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
    )


async def _run(
    app: FastAPI,
    settings: Settings,
    listening: socket.socket,
    server: EmbeddedPostgres | None,
    *,
    started: Callable[[], None],
) -> None:
    config = uvicorn_config(app, settings)
    serving = _Server(config, app, settings, started=started)
    watch = asyncio.create_task(_watch(server)) if server is not None else None
    try:
        await serving.serve(sockets=[listening])
    finally:
        if watch is not None:
            watch.cancel()
    if not serving.started:
        raise CommandFailed("the server could not start; the reason is in the lines above")


async def _watch(server: EmbeddedPostgres) -> None:
    """Bring our PostgreSQL back if it dies. In the main thread: the server follows the thread that started it."""
    while True:
        await asyncio.sleep(_WATCH_S)
        if not server.is_alive():
            logger.error("PostgreSQL is gone, starting it again")
            server.restart_if_dead()


def _greeting(settings: Settings, registry: ModelRegistry) -> str:
    base = settings.base_url
    usable = [entry.id for entry in registry.entries() if entry.usable]
    default = registry.resolve(None).id
    rest = [f"{entry.id} ({entry.unusable})" for entry in registry.entries() if not entry.usable]
    lines = [
        "",
        f"  Parley is ready at {base}",
        "",
        f"  API        {base}/api/v1",
        *([] if settings.is_production else [f"  Documents  {base}/docs"]),
        f"  Sign up    .venv/bin/parley chat --server {base} --sign-up",
        f"             or POST {base}/api/v1/auth/signup",
        f"  Models     {', '.join(usable)} (default: {default})",
    ]
    if default == "demo":
        lines.append(
            "             No provider is configured: set OPENAI_API_KEY or ANTHROPIC_API_KEY, or LOCAL_LLM_URL."
        )
    if rest:
        lines.append(f"  Not usable {'; '.join(rest)}")
    lines += [f"  Data       {settings.data_dir.resolve()}", "", "  Ctrl-C stops it.", ""]
    return "\n".join(lines)
