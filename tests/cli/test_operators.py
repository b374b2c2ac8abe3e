"""Operators' commands: on a database of their own, and beside a running server with the embedded one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from typer.testing import CliRunner, Result

from parley.cli.app import app
from parley.core.db import DatabaseUrls
from tests.process import server_process

PASSWORD = "correct horse 1"

Run = Callable[..., Result]


@pytest.fixture
def run(urls: DatabaseUrls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command on the test's database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARLEY_DATABASE_URL", urls.app)
    monkeypatch.setenv("PARLEY_DATABASE_SYSTEM_URL", urls.system)
    monkeypatch.setenv("PARLEY_DATABASE_OWNER_URL", urls.owner)
    monkeypatch.setenv("PARLEY_DATA_DIR", str(tmp_path / "d"))
    (tmp_path / "d").mkdir(mode=0o700)

    def call(*arguments: str, input: str = "", ok: bool = True) -> Result:
        result = CliRunner().invoke(app, arguments, input=input)
        assert (result.exit_code == 0) == ok, result.output
        assert result.exit_code in {0, 2}, result.output
        return result

    return call


def read(run: Run, *arguments: str, **options: Any) -> Any:
    return json.loads(run(*arguments, "--json", **options).stdout)


def make(run: Run, email: str = "ada@example.com", *options: str) -> dict[str, Any]:
    made: dict[str, Any] = read(run, "user", "create", email, *options, input=f"{PASSWORD}\n")
    return made


def test_an_account_is_made_shown_and_listed(run: Run) -> None:
    ada = make(run, "ada@example.com", "--name", "Ada", "--verified")
    make(run, "bob@example.com")

    (shown,) = [read(run, "user", "show", "Ada@Example.com")]
    assert (shown["id"], shown["name"], shown["email_verified"]) == (ada["id"], "Ada", True)
    assert [place["workspace_id"] for place in shown["workspaces"]] == [ada["workspace_id"]]
    assert [user["email"] for user in read(run, "user", "list")] == ["ada@example.com", "bob@example.com"]
    table = run("user", "list").stdout.splitlines()
    assert table[0].split() == ["id", "email", "name", "email_verified", "disabled_at", "created_at", "erase_after"]
    assert table[1].startswith(ada["id"])


@pytest.mark.parametrize(
    ("arguments", "input", "said"),
    [
        (("user", "create", "ada@example.com"), "", "no password"),
        (("user", "create", "ada@example.com"), "short1\n", "password"),
        (("user", "create", "nobody"), f"{PASSWORD}\n", "e-mail"),
        (("user", "show", "nobody@example.com"), "", "no such account"),
        (("user", "show", "x"), "", "no such account"),
        (("user", "restore", "there@example.com"), "", "not waiting"),
        (("user", "create", "there@example.com"), f"{PASSWORD}\n", "already an account"),
        (("workspace", "show", str(uuid4())), "", "no such workspace"),
        (("workspace", "delete", str(uuid4()), "--yes"), "", "no such workspace"),
        (("key", "revoke", str(uuid4())), "", "No such API key"),
        (("session", "revoke"), "", "name one of"),
        (("session", "revoke", str(uuid4()), "--all"), "", "name one of"),
        (("user", "reapply-erasures", "--ledger", "absent"), "", "cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(run: Run, arguments: tuple[str, ...], input: str, said: str) -> None:
    make(run, "there@example.com")
    result = run(*arguments, input=input, ok=False)
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert PASSWORD not in result.output


async def _audit(admin: asyncpg.Connection) -> set[str]:
    return {row[0] for row in await admin.fetch("SELECT action FROM audit_events WHERE actor = 'operator'")}


@pytest.fixture
def actions(urls: DatabaseUrls, postgres: Any) -> Callable[[], set[str]]:
    """What the audit log says that operators did; for tests that have no loop."""
    import asyncio

    async def ask() -> set[str]:
        connection = await asyncpg.connect(postgres.admin_url(urls.name))
        try:
            return await _audit(connection)
        finally:
            await connection.close()

    return lambda: asyncio.run(ask())


def test_accounts_are_disabled_enabled_erased_and_restored(run: Run, actions: Callable[[], set[str]]) -> None:
    ada = make(run)
    run("user", "disable", "ada@example.com")
    assert read(run, "user", "show", ada["id"])["disabled_at"] is not None
    run("user", "enable", ada["id"])
    assert read(run, "user", "show", ada["id"])["disabled_at"] is None

    assert "closed" in run("user", "erase", ada["id"], "--yes").stdout
    assert "restore" in run("user", "enable", ada["id"], ok=False).stderr
    run("user", "restore", ada["id"])
    assert read(run, "user", "show", ada["id"])["erase_after"] is None
    run("user", "erase", ada["id"], "--yes", "--now")
    run("user", "show", ada["id"], ok=False)
    assert read(run, "workspace", "list") == []
    assert actions() >= {"account.disabled", "account.enabled", "account.erasure_requested"}


def test_after_a_restore_the_ledger_and_the_sessions(run: Run, tmp_path: Path) -> None:
    """O-05: one command ends every session and erases again."""
    ada = make(run)
    run("user", "erase", ada["id"], "--yes", "--now")
    assert "1 entries" in run("user", "export-erasures", "ledger.jsonl").stdout
    assert ada["id"] in (tmp_path / "ledger.jsonl").read_text()
    done = read(run, "user", "reapply-erasures", "--ledger", "ledger.jsonl")
    assert done == {"taken_in": 1, "erased": [ada["id"]], "sessions_ended": 0}


def test_members_of_workspaces(run: Run, actions: Callable[[], set[str]]) -> None:
    ada, bob = make(run), make(run, "bob@example.com")
    place = ada["workspace_id"]
    run("workspace", "add-member", place, "bob@example.com", "--role", "viewer")
    run("workspace", "add-member", place, "bob@example.com", ok=False)
    assert "no owner" in run("workspace", "set-role", place, "ada@example.com", "admin", ok=False).stderr
    run("workspace", "set-role", place, "bob@example.com", "owner")
    run("workspace", "set-role", place, "ada@example.com", "admin")
    roles = {member["email"]: member["role"] for member in read(run, "workspace", "members", place)}
    assert roles == {"ada@example.com": "admin", "bob@example.com": "owner"}
    assert read(run, "workspace", "show", place)[0]["members"] == 2
    assert actions() >= {"member.added", "member.role_changed"}
    run("workspace", "delete", place, "--yes")
    assert [row["id"] for row in read(run, "workspace", "list")] == [bob["workspace_id"]]
    # The workspace's own log has gone with it.
    assert "workspace.deleted" in actions()


def test_keys_are_made_once_and_listed_without_themselves(run: Run) -> None:
    ada = make(run)
    made = read(run, "key", "create", ada["id"], ada["workspace_id"], "--name", "ci", "--scope", "tasks:read")
    listed = run("key", "list", "--user", ada["id"], "--json").stdout
    assert made["key"] not in listed
    assert [key["name"] for key in json.loads(listed)] == ["ci"]
    run("key", "revoke", made["id"])
    run("key", "revoke", made["id"], ok=False)
    assert (
        "cannot be made"
        in run(
            "key", "create", ada["id"], ada["workspace_id"], "--name", "x", "--scope", "members:manage", ok=False
        ).stderr
    )


def test_passwords_are_never_arguments(run: Run) -> None:
    ada = make(run)
    for command in (("user", "create", "x@example.com", "--password", "x"), ("user", "set-password", ada["id"], "new")):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert "password" in result.output.lower() or "argument" in result.output.lower()
    assert "The password is set" in run("user", "set-password", ada["id"], input="another horse 2\n").stdout


def test_names_cannot_move_the_cursor(run: Run) -> None:
    make(run, "ada@example.com", "--name", "A\x1b[2Jda")
    assert "\x1b" not in run("user", "list").stdout


# -- beside a running server -------------------------------------------------------------------------------------------


@pytest.mark.process
def test_commands_work_beside_a_running_server_and_it_hears_of_them(tmp_path: Path) -> None:
    data = tmp_path / "d"

    def command(*arguments: str, input: str = "") -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "parley.cli", *arguments, "--json"],
            capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path, input=input,
            env={**os.environ, "PARLEY_DATA_DIR": str(data)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    credentials = {"email": "ada@example.com", "password": PASSWORD}
    with server_process(data) as server, httpx.Client(base_url=server.url) as http:
        made = command("user", "create", credentials["email"], input=f"{PASSWORD}\n")
        signed_in = http.post("/api/v1/auth/signin", json=credentials)
        assert signed_in.status_code == 200, signed_in.text
        bearer = {"Authorization": f"Bearer {signed_in.json()['data']['access_token']}"}
        assert http.get("/api/v1/me", headers=bearer).status_code == 200
        (session,) = command("session", "list", "--user", credentials["email"])
        assert UUID(session["user_id"]) == UUID(made["id"])

        assert command("session", "revoke", session["id"]) == {"ended": 1}
        assert _until_refused(http, bearer) < 2

        assert server.process.poll() is None
    # And without a server the same command starts the database itself.
    assert [user["id"] for user in command("user", "list")] == [made["id"]]


def _until_refused(http: httpx.Client, headers: dict[str, str]) -> float:
    """Return how many seconds a credential still holds."""
    import time

    began = time.monotonic()
    while http.get("/api/v1/me", headers=headers).status_code != 401:
        assert time.monotonic() - began < 10
    return time.monotonic() - began
