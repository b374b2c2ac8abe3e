"""A real Better Auth in Node: whoever signs up there is somebody here."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import jwt
import pytest

from parley.core import clock
from parley.core.db import DatabaseUrls
from parley.core.embedded_postgres import EmbeddedPostgres
from parley.identity.jwks import UNKNOWN_KEY_S
from tests.identity.issuers import SECRET, Made
from tests.identity.test_issuers import me, service

FOLDER = Path(__file__).parent / "better_auth"
NODE = shutil.which("node")
THERE = NODE is not None and (FOLDER / "node_modules" / "better-auth").is_dir()

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        not THERE and "PARLEY_CI" not in os.environ, reason="Node or Better Auth is not here; `make ci` installs them"
    ),
]


@asynccontextmanager
async def better_auth(postgres: EmbeddedPostgres, name: str, **env: str) -> AsyncIterator[str]:
    """Run one in a database of its own; give its address."""
    assert NODE is not None
    assert THERE, "npm ci in tests/identity/better_auth"
    admin = await asyncpg.connect(postgres.admin_url())
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        process = await asyncio.create_subprocess_exec(
            NODE, "server.mjs", cwd=FOLDER, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "DATABASE_URL": postgres.admin_url(name), **env},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            async with asyncio.timeout(60):
                line = await process.stdout.readline()
            yield json.loads(line)["url"]
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


async def sign_up(http: httpx.AsyncClient) -> str:
    """Sign up there; return the user's id there."""
    body = {"email": "ada@example.com", "password": "correct horse 1", "name": "Ada"}
    answer = await http.post("/api/auth/sign-up/email", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["user"]["id"])


async def token_of(http: httpx.AsyncClient) -> str:
    answer = await http.get("/api/auth/token")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["token"])


def client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, headers={"Origin": url}, timeout=30)


def entry(url: str, **changes: Any) -> Made:
    made = {
        "name": "better", "issuer": url, "audience": url, "create_users": True, "workspace": "personal", **changes,
    }  # fmt: skip
    return Made("better", url, made["algorithm"], made)


async def test_its_users_by_its_published_keys_and_through_a_rotation(
    tmp_path: Path, urls: DatabaseUrls, postgres: EmbeddedPostgres, admin: asyncpg.Connection
) -> None:
    async with better_auth(postgres, "better_auth_keys") as url, client(url) as http:
        issuer = entry(url, algorithm="EdDSA", jwks_url=f"{url}/api/auth/jwks")
        async with service(tmp_path, urls, issuer) as app:
            subject, token = await sign_up(http), await token_of(http)
            first = await me(app, token)
            assert first.status_code == 200, first.text
            assert (first.json()["data"]["email"], first.json()["data"]["name"]) == ("ada@example.com", "Ada")
            assert await admin.fetchval("SELECT subject FROM identities WHERE issuer = 'better'") == subject

            theirs = await asyncpg.connect(postgres.admin_url("better_auth_keys"))
            await theirs.execute("""UPDATE jwks SET "expiresAt" = now() - interval '1 second'""")
            await theirs.close()
            rotated = await token_of(http)
            kids = [jwt.get_unverified_header(made)["kid"] for made in (token, rotated)]
            assert kids[0] != kids[1]
            # The keys were fetched a moment ago; a name that is not known is asked for after five minutes.
            assert (await me(app, rotated)).status_code == 401
            with clock.shifted(UNKNOWN_KEY_S + 1):
                again = await me(app, rotated)
                assert again.status_code == 200, again.text
                # What the old key signed holds until it expires.
                assert (await me(app, token)).status_code == 200
            assert again.json()["data"]["id"] == first.json()["data"]["id"]


async def test_its_users_by_a_shared_secret(tmp_path: Path, urls: DatabaseUrls, postgres: EmbeddedPostgres) -> None:
    async with better_auth(postgres, "better_auth_secret", SHARED_SECRET=SECRET) as url, client(url) as http:
        issuer = entry(url, algorithm="HS256", secret_env="SHARED_SECRET")
        async with service(tmp_path, urls, issuer) as app:
            await sign_up(http)
            token = await token_of(http)
            assert jwt.get_unverified_header(token)["alg"] == "HS256"
            answer = await me(app, token)
            assert answer.status_code == 200, answer.text
            assert answer.json()["data"]["email"] == "ada@example.com"
