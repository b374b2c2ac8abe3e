"""An application whose mail can be read, or kept from leaving."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx
from fastapi import FastAPI

from parley.core.db import DatabaseUrls
from parley.core.mail import Mail, MailNotSent
from parley.main import create_app
from tests.conftest import http_client, make_settings
from tests.jobs.conftest import until

API = "/api/v1"
PUBLIC_URL = "https://chat.example.com"


@dataclass
class Post:
    """A mailer that keeps what it is given."""

    mails: list[Mail] = field(default_factory=list)
    away: bool = False
    tried: int = 0

    async def send(self, mail: Mail) -> None:
        self.tried += 1
        if self.away:
            raise MailNotSent("the mail server is away")
        self.mails.append(mail)

    def to(self, address: str, subject: str = "") -> list[Mail]:
        """Return what was sent to an address, oldest first."""
        return [mail for mail in self.mails if mail.to == address and subject in mail.subject]

    async def next(self, address: str, subject: str, count: int = 1) -> Mail:
        """Return the newest mail to an address once there are so many."""

        async def there() -> bool:
            return len(self.to(address, subject)) >= count

        await until(there)
        return self.to(address, subject)[-1]


def token_of(mail: Mail) -> str:
    """Return the token that a mail holds."""
    (token,) = set(re.findall(r"parley_[a-z]+_[A-Za-z0-9_=-]{20,}", mail.text))
    return str(token)


@dataclass
class Site:
    """A running application, its mail and its database."""

    app: FastAPI
    post: Post
    admin: asyncpg.Connection

    def client(self, **options: Any) -> httpx.AsyncClient:
        return http_client(self.app, **options)

    async def call(self, path: str, body: dict[str, Any], token: str = "", **options: Any) -> httpx.Response:
        headers = {**options.pop("headers", {}), **({"Authorization": f"Bearer {token}"} if token else {})}
        async with self.client() as http:
            return await http.post(f"{API}/{path}", json=body, headers=headers, **options)

    async def settled(self) -> None:
        """Return once no mail is waiting any more."""

        async def none() -> bool:
            query = "SELECT count(*) = 0 FROM jobs WHERE kind = 'mail' AND status NOT IN ('completed', 'failed')"
            return bool(await self.admin.fetchval(query))

        await until(none)


@asynccontextmanager
async def site(tmp_path: Path, urls: DatabaseUrls, admin: asyncpg.Connection, **overrides: Any) -> AsyncIterator[Site]:
    """Run an application for the length of the block."""
    settings = make_settings(tmp_path, urls, **{"public_url": PUBLIC_URL, **overrides})
    app, post = create_app(settings), Post()
    app.state.mailer = post
    started, done = asyncio.Event(), asyncio.Event()

    # A task of its own: set-up and tear-down of a fixture may run in different tasks.
    async def run() -> None:
        async with app.router.lifespan_context(app):
            started.set()
            await done.wait()

    task = asyncio.create_task(run())
    waiter = asyncio.create_task(started.wait())
    await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    if task.done():
        task.result()
    try:
        yield Site(app, post, admin)
    finally:
        done.set()
        await task
