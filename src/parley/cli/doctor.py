"""`parley doctor`: looks at everything that a server needs, and says what to do where something is missing."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import asyncpg
import typer

from parley.cli.beside import urls_beside
from parley.cli.options import AsJson
from parley.core.catalogue import POLICY_FAULTS, ROLE_FAULTS, version_fault
from parley.core.db import DatabaseUrls, asyncpg_dsn
from parley.core.embedded_postgres import EmbeddedPostgresError
from parley.core.settings import Settings, SettingsInvalid, load_settings

Level = Literal["ok", "warning", "problem"]

_MIB: Final = 1024 * 1024
_DISK_WARNING: Final = 2048 * _MIB
_DISK_PROBLEM: Final = 256 * _MIB
_CLOCK_WARNING_S: Final = 1.0
_CLOCK_PROBLEM_S: Final = 10.0
_TIMEOUT_S: Final = 5.0

_FAILED_JOBS = "SELECT count(*) FROM jobs WHERE status = 'failed' AND finished_at > now() - interval '1 day'"
_PROVIDER_KEYS = "SELECT workspace_id, provider, sealed, base_url, given_for FROM provider_keys"
_KEYS_NAMED: Final = 10
_LATE_JOBS = "SELECT count(*) FROM jobs WHERE status = 'queued' AND run_at < now() - interval '10 minutes'"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, and what to do about it."""

    check: str
    level: Level
    message: str
    advice: str = ""


# -- settings ----------------------------------------------------------------------------------------------------------


def check_settings(settings: Settings) -> Iterator[Finding]:
    """Look at what is allowed and yet seldom meant. What is refused stopped `load_settings` already."""
    production = settings.is_production
    yield Finding("settings", "ok", f"{settings.env.value}, data in {settings.data_dir.resolve()}")
    if not production:
        return
    url = urlsplit(settings.public_url)
    if url.scheme == "http" and url.hostname not in {"localhost", "127.0.0.1", "::1"}:
        yield Finding("https", "warning", "PARLEY_PUBLIC_URL is plain http", "Serve it through https; cookies need it")
    if url.scheme == "https" and not settings.trusted_proxies:
        yield Finding(
            "proxies",
            "warning",
            "https, and no PARLEY_TRUSTED_PROXIES: every caller has the proxy's address",
            "Name the addresses of the proxy, or the rate limits hold for all callers together",
        )
    for origin in settings.cors_origins:
        if urlsplit(origin).scheme == "http":
            yield Finding("cors", "warning", f"{origin} may call without https", "Take it out, or serve it by https")
    if settings.mail.transport == "console":
        yield Finding("mail", "warning", "mail goes to the console", "Set PARLEY_MAIL_TRANSPORT=smtp and the server")
    if not (settings.llm.workspace_cost_per_day or settings.llm.workspace_cost_per_month):
        yield Finding(
            "ceilings",
            "warning",
            "nothing bounds what a workspace spends on your provider keys but its own budgets",
            "Set PARLEY_LLM_WORKSPACE_COST_PER_DAY or PARLEY_LLM_WORKSPACE_COST_PER_MONTH",
        )


def check_disk(settings: Settings) -> Finding:
    """Look at the room that is left."""
    folder = settings.data_dir if settings.data_dir.exists() else settings.data_dir.resolve().parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError as problem:
        return Finding("disk", "problem", f"{folder} cannot be looked at: {problem.strerror}", "Set PARLEY_DATA_DIR")
    level: Level = "problem" if free < _DISK_PROBLEM else "warning" if free < _DISK_WARNING else "ok"
    return Finding(
        "disk", level, f"{free // _MIB} MiB free", "" if level == "ok" else "Make room in the data directory"
    )


# -- the database ------------------------------------------------------------------------------------------------------


async def check_database(urls: DatabaseUrls) -> AsyncIterator[Finding]:
    """Connect as each role and look at it, then at the server and at the schema."""
    system: asyncpg.Connection | None = None
    for name, url in (("app", urls.app), ("system", urls.system), ("owner", urls.owner), ("direct", urls.direct)):
        try:
            connection = await asyncpg.connect(asyncpg_dsn(url), timeout=_TIMEOUT_S, statement_cache_size=0)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as problem:
            yield Finding(
                f"database {name}",
                "problem",
                f"not reachable ({type(problem).__name__})",
                "Is PostgreSQL running, and are the role and its password right? `parley db init` makes the roles",
            )
            continue
        yield Finding(f"database {name}", "ok", "reachable")
        if name in {"app", "system"} and not urls.become:
            for row in await connection.fetch(ROLE_FAULTS):
                yield Finding(
                    f"role {name}", "problem", f"the role {row['fault']}", "Use the roles that `parley db init` makes"
                )
                if row["rank"] <= 2:
                    break
        if name == "direct":
            system = connection
        else:
            await connection.close()
    if system is None:
        return
    try:
        async for finding in _check_server(system, urls):
            yield finding
    finally:
        await system.close()


async def _check_server(connection: asyncpg.Connection, urls: DatabaseUrls) -> AsyncIterator[Finding]:
    fault = version_fault(int(await connection.fetchval("SHOW server_version_num")))
    version = await connection.fetchval("SHOW server_version")
    yield Finding("version", "problem", fault, "Upgrade it") if fault else Finding("version", "ok", version)

    before = datetime.now(UTC)
    theirs: datetime = await connection.fetchval("SELECT clock_timestamp()")
    off = abs((theirs - (before + (datetime.now(UTC) - before) / 2)).total_seconds())
    level: Level = "problem" if off > _CLOCK_PROBLEM_S else "warning" if off > _CLOCK_WARNING_S else "ok"
    yield Finding("clock", level, f"{off:.1f} s from the database's", "" if level == "ok" else "Set both by NTP")

    from parley.core.migrate import head  # noqa: PLC0415 - Alembic takes long to import

    if urls.become:
        await connection.execute("SET ROLE parley_system")
    try:
        revision = await connection.fetchval("SELECT version_num FROM alembic_version")
    except asyncpg.PostgresError:
        revision = None
    if revision != head():
        yield Finding("schema", "problem", f"at {revision}, this version needs {head()}", "Run `parley db upgrade`")
        return
    yield Finding("schema", "ok", f"at {revision}")
    faults = [row[0] for row in await connection.fetch(POLICY_FAULTS)]
    for text in faults:
        yield Finding("policies", "problem", text, "Somebody changed the schema: restore it as the migrations made it")
    if not faults:
        yield Finding("policies", "ok", "every table is under row-level security")
    failed, late = await connection.fetchval(_FAILED_JOBS), await connection.fetchval(_LATE_JOBS)
    if failed:
        yield Finding("jobs", "warning", f"{failed} failed within a day", "Their errors are in the table and the log")
    if late:
        yield Finding("jobs", "warning", f"{late} wait for more than ten minutes", "Is a server or a worker running?")
    if not failed and not late:
        yield Finding("jobs", "ok", "none failed within a day, none waits")


async def check_provider_keys(urls: DatabaseUrls, settings: Settings) -> AsyncIterator[Finding]:
    """Try to open the workspaces' own keys of providers: a secret that was taken away cannot open them any more."""
    try:
        connection = await asyncpg.connect(asyncpg_dsn(urls.direct), timeout=_TIMEOUT_S, statement_cache_size=0)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError):
        return  # said above
    try:
        if urls.become:
            await connection.execute("SET ROLE parley_system")
        rows = await connection.fetch(_PROVIDER_KEYS)
    except asyncpg.PostgresError:
        return  # an older schema: said above
    finally:
        await connection.close()
    if not rows:
        return
    from parley.core.secrets import key_ring, load_secrets  # noqa: PLC0415 - only with keys
    from parley.llm.provider_key_vault import PURPOSE, Vault  # noqa: PLC0415 - as above
    from parley.llm.provider_keys import StoredKey  # noqa: PLC0415 - as above

    vault = Vault(key_ring(load_secrets(settings), PURPOSE))
    keys = [StoredKey(**row) for row in rows]
    lost = [key for key in keys if vault.open(key.sealed, key.bound_to) is None]
    former = sum(not vault.is_current(key.sealed) for key in keys) - len(lost)
    for key in lost[:_KEYS_NAMED]:
        yield Finding(
            "provider keys",
            "problem",
            f"the key of workspace {key.workspace_id} for {key.provider} cannot be read",
            "Add the former secret to PARLEY_SECRET_KEY, behind the present one, or have the key set again",
        )
    if len(lost) > _KEYS_NAMED:
        yield Finding("provider keys", "problem", f"{len(lost) - _KEYS_NAMED} more cannot be read", "As above")
    if former > 0:
        advice = "Keep the former secret until a server has started: it seals them with the present one"
        yield Finding("provider keys", "warning", f"{former} are sealed with a former secret", advice)
    if not lost:
        yield Finding("provider keys", "ok", f"{len(keys)} of workspaces, all readable")


# -- what else is asked ------------------------------------------------------------------------------------------------


async def check_issuers(settings: Settings) -> AsyncIterator[Finding]:
    """Fetch the keys of other issuers."""
    if not settings.issuers:
        return
    try:
        entries = json.loads(settings.issuers)
        wanted = {str(entry["name"]): entry.get("jwks_url") for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError):
        yield Finding("issuers", "problem", "PARLEY_ISSUERS is no list of issuers", "See .env.example")
        return
    import httpx  # noqa: PLC0415 - only with issuers

    from parley.core.http import create_http_client  # noqa: PLC0415 - as above

    async with create_http_client() as http:
        for name, url in wanted.items():
            if not url:
                continue
            try:
                answer = await http.get(url, timeout=_TIMEOUT_S)
                found = len(answer.json()["keys"]) if answer.status_code == 200 else 0
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as problem:
                yield Finding(
                    f"issuer {name}",
                    "problem",
                    f"its keys cannot be fetched ({type(problem).__name__})",
                    f"Look at {url}",
                )
                continue
            level: Level = "ok" if found else "problem"
            yield Finding(f"issuer {name}", level, f"{found} keys", "" if found else f"Look at {url}")


async def check_redis(settings: Settings) -> AsyncIterator[Finding]:
    """Ask Redis."""
    if not settings.redis_url:
        return
    from redis.asyncio import Redis  # noqa: PLC0415 - only with Redis
    from redis.exceptions import RedisError  # noqa: PLC0415 - as above

    client: Any = None
    try:
        client = Redis.from_url(settings.redis_url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
        await client.ping()
        yield Finding("redis", "ok", "reachable")
    except (RedisError, OSError, ValueError, TimeoutError) as problem:
        yield Finding("redis", "problem", f"not reachable ({type(problem).__name__})", "Look at PARLEY_REDIS_URL")
    finally:
        if client is not None:
            with suppress(RedisError, OSError):
                await client.aclose()


def check_models(settings: Settings) -> Finding:
    """Look at which models could answer."""
    from parley.llm.errors import RegistryInvalid  # noqa: PLC0415 - long to import
    from parley.llm.registry import ModelRegistry  # noqa: PLC0415 - as above

    try:
        entries = ModelRegistry.load(settings.llm.registry, settings.environ).entries()
    except RegistryInvalid as problem:
        return Finding("models", "problem", str(problem), "Mend the registry")
    usable = [entry.id for entry in entries if entry.usable]
    if not set(usable) - {"demo"}:
        advice = "Set OPENAI_API_KEY, ANTHROPIC_API_KEY or LOCAL_LLM_URL"
        return Finding("models", "warning", "only the built-in demo answers" if usable else "no model answers", advice)
    return Finding("models", "ok", ", ".join(usable))


async def check_smtp(settings: Settings) -> AsyncIterator[Finding]:
    """Say hello to the mail server."""
    if settings.mail.transport != "smtp":
        return
    import aiosmtplib  # noqa: PLC0415 - only with SMTP

    mail = settings.mail
    client = aiosmtplib.SMTP(
        hostname=mail.host,
        port=mail.port,
        timeout=_TIMEOUT_S,
        use_tls=mail.tls == "implicit",
        start_tls=mail.tls == "starttls",
        username=mail.username,
        password=mail.password.get_secret_value() if mail.password else None,
    )
    try:
        await client.connect()
        await client.quit()
        yield Finding("smtp", "ok", "reachable")
    except (aiosmtplib.SMTPException, OSError, TimeoutError) as problem:
        yield Finding("smtp", "problem", f"not reachable ({type(problem).__name__})", "Look at PARLEY_MAIL_*")


async def examine(settings: Settings, urls: DatabaseUrls) -> list[Finding]:
    """Run every check that needs no server of ours."""
    found = [*check_settings(settings), check_disk(settings), check_models(settings)]
    for checks in (
        check_database(urls),
        check_provider_keys(urls, settings),
        check_issuers(settings),
        check_redis(settings),
        check_smtp(settings),
    ):
        found += [finding async for finding in checks]
    return found


def diagnose() -> list[Finding]:
    """Look at everything. What stops the rest is a finding too."""
    try:
        settings = load_settings()
    except SettingsInvalid as problem:
        return [Finding("settings", "problem", str(problem), "See .env.example")]
    try:
        with urls_beside(settings) as urls:
            return asyncio.run(examine(settings, urls))
    except EmbeddedPostgresError as problem:
        return [
            *check_settings(settings),
            check_disk(settings),
            Finding("database", "problem", str(problem), "Mend this first"),
        ]


def doctor(as_json: AsJson = False) -> None:
    """Check settings, database, roles, disk, jobs and what else is reached; exit code 1 when something must be done."""
    findings = diagnose()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.level:<8} {finding.check}: {finding.message}")
            if finding.advice:
                print(f"{'':<9}→ {finding.advice}")
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)
