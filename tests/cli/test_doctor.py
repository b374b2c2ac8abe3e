"""`parley doctor` finds each planted fault and says what to do; warnings alone do not fail it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr

from parley.cli import doctor
from parley.cli.doctor import Finding, check_database, check_disk, check_issuers, check_models, check_redis, check_smtp
from parley.core import db
from parley.core.catalogue import version_fault
from parley.core.db import Database, DatabaseUrls, check_runtime_roles
from parley.core.ids import new_id
from parley.core.settings import DatabaseSettings, Environment, MailSettings, Settings
from tests.conftest import make_settings, running

SECRET = "0123456789abcdefghijklmnopqrstuvwxyz"


async def look(checks: AsyncIterator[Finding]) -> list[Finding]:
    return [finding async for finding in checks]


def problems(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.check, finding.message) for finding in findings if finding.level != "ok"]


async def test_a_database_as_the_migrations_made_it_has_nothing(urls: DatabaseUrls) -> None:
    findings = await look(check_database(urls))
    assert problems(findings) == []
    assert {finding.check for finding in findings} >= {
        "database app", "database system", "database owner", "database direct", "version", "clock", "schema",
        "policies", "jobs",
    }  # fmt: skip


# -- the roles ---------------------------------------------------------------------------------------------------------

# What is given to the role that serves, and what is said of it.
BAD_ROLES = {
    "superuser": ("ALTER ROLE {role} SUPERUSER", "superuser or with BYPASSRLS"),
    "bypassrls": ("ALTER ROLE {role} BYPASSRLS", "superuser or with BYPASSRLS"),
    "owner": ("ALTER TABLE tasks OWNER TO {role}", "the owner of the tables"),
    "member of the owner": ("GRANT parley_owner TO {role}", "is a member of parley_owner"),
    "createrole": ("ALTER ROLE {role} CREATEROLE", "may create roles"),
    "createdb": ("ALTER ROLE {role} CREATEDB", "may create roles or databases"),
    "replication": ("ALTER ROLE {role} REPLICATION", "or replicate"),
    "truncate": ("GRANT TRUNCATE ON tasks TO {role}", "may TRUNCATE tasks"),
    "references": ("GRANT REFERENCES ON tasks TO {role}", "may REFERENCES tasks"),
    "trigger": ("GRANT TRIGGER ON tasks TO {role}", "may TRIGGER tasks"),
    "create in public": ("GRANT CREATE ON SCHEMA public TO {role}", "may create in schema public"),
    "create schemas": ("GRANT CREATE ON DATABASE {database} TO {role}", "may create schemas"),
}


@asynccontextmanager
async def bad_role(admin: asyncpg.Connection, urls: DatabaseUrls, grant: str) -> AsyncIterator[str]:
    """Make a login of its own with one right too many: roles belong to the whole server, which other tests use."""
    role = f"bad_{new_id().hex}"
    await admin.execute(f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA public TO {role}")
    try:
        await admin.execute(grant.format(role=role, database=urls.name))
        yield urls.app.replace("parley_app", role)
    finally:
        await admin.execute(f"REASSIGN OWNED BY {role} TO parley_owner; DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize("fault", BAD_ROLES)
@pytest.mark.parametrize("place", ["app", "system"])
async def test_a_role_with_a_right_too_many_must_not_serve(
    urls: DatabaseUrls, admin: asyncpg.Connection, fault: str, place: str
) -> None:
    """T-04: production refuses it at the start, `doctor` finds it before."""
    grant, said = BAD_ROLES[fault]
    async with bad_role(admin, urls, grant) as address:
        given = {"app": urls.app, "system": urls.system, place: address}
        bad = DatabaseUrls(app=given["app"], system=given["system"], owner=urls.owner, direct=urls.direct)
        database = Database(bad, DatabaseSettings())
        refused = await check_runtime_roles(database)
        await database.close()
        found = problems(await look(check_database(bad)))

    told, *more = refused
    assert said in told
    assert told.startswith("PARLEY_DATABASE_URL" if place == "app" else "PARLEY_DATABASE_SYSTEM_URL")
    assert {check for check, _ in found} == {f"role {place}"}
    assert said in found[0][1]
    # The owner's rights come with a membership; no other fault brings a second one.
    assert (more == []) == (fault != "member of the owner") == (len(found) == 1)


# -- the server and the schema -----------------------------------------------------------------------------------------


async def test_a_database_that_is_away_is_found_for_each_role(urls: DatabaseUrls) -> None:
    away = DatabaseUrls(app=urls.app, system=urls.system, owner="postgresql://o@127.0.0.1:1/x", direct=urls.direct)
    found = problems(await look(check_database(away)))
    assert [check for check, _ in found] == ["database owner"]


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        (180004, None), (170006, None), (160010, None), (170005, "17.5"), (160009, "16.9"), (150014, "too old"),
    ],
)  # fmt: skip
def test_releases_without_the_fixes_are_named(number: int, fault: str | None) -> None:
    """T-15."""
    said = version_fault(number)
    assert (said is None) == (fault is None)
    assert (fault or "") in (said or "")


async def test_the_start_warns_of_a_release_without_the_fixes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """T-15: the server says so, and serves."""
    monkeypatch.setattr(db, "version_fault", lambda _: version_fault(170005))
    async with running(settings):
        pass
    assert "PostgreSQL 17.5 can show rows past row-level security" in caplog.text


async def test_an_old_schema_is_found(urls: DatabaseUrls, admin: asyncpg.Connection) -> None:
    await admin.execute("UPDATE alembic_version SET version_num = '0001'")
    ((check, message),) = problems(await look(check_database(urls)))
    assert check == "schema"
    assert "0001" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ALTER TABLE tasks DISABLE ROW LEVEL SECURITY", "tasks: row-level security is off"),
        ("ALTER TABLE messages NO FORCE ROW LEVEL SECURITY", "messages: row-level security is not forced"),
        ("DROP POLICY tenant ON tasks", "tasks: no policy compares the workspace"),
        ("CREATE POLICY open ON tasks FOR SELECT TO parley_app USING (true)", "tasks: policy open opens it to more"),
        ("CREATE TABLE loose (id int)", "loose: row-level security is off"),
    ],
)
async def test_a_changed_policy_is_found(urls: DatabaseUrls, admin: asyncpg.Connection, change: str, said: str) -> None:
    await admin.execute(change)
    assert ("policies", said) in problems(await look(check_database(urls)))


async def test_jobs_that_failed_or_wait_are_found(urls: DatabaseUrls, admin: asyncpg.Connection) -> None:
    for status, column in (("failed", "finished_at"), ("queued", "run_at")):
        await admin.execute(
            f"INSERT INTO jobs (workspace_id, id, kind, payload, max_attempts, status, {column})"
            " VALUES ($1, $1, 'x', '{}', 1, $2, now() - interval '11 minutes')",
            new_id(),
            status,
        )
    found = problems(await look(check_database(urls)))
    assert [check for check, _ in found] == ["jobs", "jobs"]
    assert {message.split(" ")[0] for _, message in found} == {"1"}


async def test_a_clock_that_is_off_is_found(urls: DatabaseUrls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_CLOCK_WARNING_S", -1.0)
    assert ("clock" in dict(problems(await look(check_database(urls))))) is True


# -- what else ---------------------------------------------------------------------------------------------------------


def test_little_room_is_found(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_disk(settings).level == "ok"
    for free, level in ((1024**3, "warning"), (1024**2, "problem")):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        assert check_disk(settings).level == level


def test_only_the_demo_is_a_warning_and_a_broken_registry_a_problem(settings: Settings, tmp_path: Path) -> None:
    settings._environ = {}
    assert check_models(settings).level == "warning"
    settings._environ = {"OPENAI_API_KEY": "sk-1"}
    assert check_models(settings).level == "ok"
    settings.llm.registry = tmp_path / "registry.yaml"
    settings.llm.registry.write_text("models: 1\n")
    assert check_models(settings).level == "problem"


class _Issuer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = {"/good": b'{"keys": [{}]}', "/empty": b'{"keys": []}', "/odd": b"<html>"}.get(self.path)
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: Any) -> None:
        pass


async def test_issuers_whose_keys_cannot_be_fetched_are_found(settings: Settings) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Issuer)
    thread = Thread(target=server.serve_forever)
    thread.start()
    base = f"http://127.0.0.1:{server.server_port}"
    names = {name: f"{base}/{name}" for name in ("good", "empty", "odd", "absent")} | {"away": "http://127.0.0.1:1/x"}
    settings.issuers = json.dumps([{"name": name, "jwks_url": url} for name, url in names.items()])
    found = await look(check_issuers(settings))
    server.shutdown()
    thread.join()
    server.server_close()

    assert {finding.check: finding.level for finding in found} == {
        "issuer good": "ok", "issuer empty": "problem", "issuer odd": "problem", "issuer absent": "problem",
        "issuer away": "problem",
    }  # fmt: skip
    settings.issuers = "{"
    assert [finding.check for finding in await look(check_issuers(settings))] == ["issuers"]


async def test_a_redis_and_a_mail_server_that_are_away_are_found(settings: Settings) -> None:
    assert await look(check_redis(settings)) == await look(check_smtp(settings)) == []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    settings.redis_url = f"redis://127.0.0.1:{port}/0"
    settings.mail = MailSettings(transport="smtp", host="127.0.0.1", port=port, tls="none", password=SecretStr("x"))
    assert problems(await look(check_redis(settings)))[0][0] == "redis"
    assert problems(await look(check_smtp(settings)))[0][0] == "smtp"


def test_what_production_allows_and_seldom_means_is_a_warning(tmp_path: Path, urls: DatabaseUrls) -> None:
    settings = make_settings(
        tmp_path, urls, env=Environment.PRODUCTION, secret_key=SECRET, public_url="http://parley.test",
        rate_limits="on", cors_origins=["http://app.test"],
    )  # fmt: skip
    warned = [finding for finding in doctor.check_settings(settings) if finding.level == "warning"]
    assert [finding.check for finding in warned] == ["https", "cors", "mail", "ceilings"]
    settings.public_url = "https://parley.test"
    settings.llm.workspace_cost_per_month = Decimal(1)
    found = {finding.check for finding in doctor.check_settings(settings)}
    assert "proxies" in found
    assert "ceilings" not in found


# -- the command -------------------------------------------------------------------------------------------------------


def _run(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("PARLEY_", "OPENAI_", "ANTHROPIC_", "LOCAL_LLM_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return subprocess.run(
        [sys.executable, "-m", "parley.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**clean, "PARLEY_DATA_DIR": str(tmp_path / "d"), **environment},
        timeout=60,
    )


def _to(urls: DatabaseUrls) -> dict[str, str]:
    return {
        "PARLEY_DATABASE_URL": urls.app,
        "PARLEY_DATABASE_SYSTEM_URL": urls.system,
        "PARLEY_DATABASE_OWNER_URL": urls.owner,
    }


def test_warnings_do_not_fail_it_and_problems_do(tmp_path: Path, urls: DatabaseUrls) -> None:
    well = _run(tmp_path, "doctor", "--json", **_to(urls))
    assert well.returncode == 0, well.stdout + well.stderr
    levels = {finding["check"]: finding["level"] for finding in json.loads(well.stdout)}
    assert levels["models"] == "warning"
    assert "problem" not in levels.values()

    ill = _run(tmp_path, "doctor", **{**_to(urls), "PARLEY_DATABASE_OWNER_URL": "postgresql://o@127.0.0.1:1/x"})
    assert ill.returncode == 1
    assert "problem  database owner: not reachable" in ill.stdout
    assert "→ Is PostgreSQL running" in ill.stdout


def test_settings_that_are_refused_are_a_problem_too(tmp_path: Path) -> None:
    ill = _run(tmp_path, "doctor", PARLEY_ENV="production")
    assert ill.returncode == 1
    assert "PARLEY_SECRET_KEY is not set" in ill.stdout


BAD_SECRETS = {
    "missing": "",
    "short": "abcdefghij0123456789",
    "one letter": "a" * 64,
    "sample": "change-me-0123456789-abcdefghijklmnop",
    "says secret": "my-secret-key-0123456789-abcdefghijk",
    "one of two": f"{SECRET},short",
}


@pytest.mark.parametrize("bad", BAD_SECRETS)
def test_production_does_not_start_with_a_bad_secret(tmp_path: Path, bad: str) -> None:
    """A-27: the exit code and the message, which does not repeat the value."""
    run = _run(
        tmp_path, "serve", PARLEY_ENV="production", PARLEY_SECRET_KEY=BAD_SECRETS[bad],
        PARLEY_PUBLIC_URL="https://parley.test", PARLEY_DATABASE_URL="embedded",
    )  # fmt: skip
    assert run.returncode == 2, run.stdout
    assert "PARLEY_SECRET_KEY" in run.stderr
    assert not BAD_SECRETS[bad] or BAD_SECRETS[bad] not in run.stderr
    assert not (tmp_path / "d").exists()


@pytest.mark.process
async def test_production_does_not_start_with_a_bad_role(
    tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection
) -> None:
    """T-04, as an operator sees it: a role that may truncate."""
    async with bad_role(admin, urls, "GRANT TRUNCATE ON tasks TO {role}; GRANT parley_app TO {role}") as address:
        run = _run(
            tmp_path, "serve", "--port", "0",
            **{**_to(urls), "PARLEY_DATABASE_URL": address}, PARLEY_ENV="production", PARLEY_SECRET_KEY=SECRET,
            PARLEY_PUBLIC_URL="https://parley.test", PARLEY_HOST="127.0.0.1",
        )  # fmt: skip
    assert run.returncode == 3, run.stdout + run.stderr
    assert "PARLEY_DATABASE_URL may TRUNCATE tasks" in run.stdout + run.stderr
