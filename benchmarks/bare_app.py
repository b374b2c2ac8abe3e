"""What a task read is compared with: the same query in the same kind of transaction, and nothing else around it.

A bare ASGI application on uvicorn with the options of `parley serve`, asyncpg's own pool of the same size. It checks
no token and knows no workspace but the one it is started with. `python -m benchmarks.bare_app PORT DSN WORKSPACE USER`.
"""

import sys
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import uvicorn

_POOL = 10
_BIND = "SELECT set_config('app.workspace_id', $1, true), set_config('app.user_id', $2, true)"
_READ = """
    SELECT id, workspace_id, user_id, title, description, completed, due_at, created_at, updated_at FROM tasks
    WHERE workspace_id = $1 AND user_id = $2 AND id = $3
"""
_SHOWN = ("id", "user_id", "title", "description", "completed", "due_at", "created_at", "updated_at")


class BareApp:
    """Answers `GET /tasks/ID`."""

    def __init__(self, dsn: str, workspace: str, user: str) -> None:
        self._dsn = dsn
        self._workspace, self._user = workspace, user
        self._keys = (UUID(workspace), UUID(user))
        self._pool: asyncpg.Pool

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Serve a request, or the start and the end of the process."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        task = UUID(scope["path"].rpartition("/")[2])
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.fetchrow(_BIND, self._workspace, self._user)
            row = await connection.fetchrow(_READ, *self._keys, task)
        body = orjson.dumps({"data": {name: row[name] for name in _SHOWN}}, default=str)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _live(self, receive: Any, send: Any) -> None:
        await receive()
        # Without the pool's reset: its round trip would be one more than the transaction needs.
        self._pool = await asyncpg.create_pool(self._dsn, min_size=_POOL, max_size=_POOL, reset=_nothing)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._pool.close()
        await send({"type": "lifespan.shutdown.complete"})


async def _nothing(_: object) -> None:
    pass


def main() -> None:
    port, dsn, workspace, user = sys.argv[1:]
    uvicorn.run(
        BareApp(dsn, workspace, user),
        host="127.0.0.1",
        port=int(port),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=True,
        proxy_headers=False,
    )


if __name__ == "__main__":
    main()
