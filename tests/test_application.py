"""The application as a whole: what is left of one that has ended."""

import gc
import weakref

from fastapi import FastAPI

from parley.core.settings import Settings
from tests.conftest import http_client, running


async def _serve_and_end(settings: Settings) -> weakref.ref[FastAPI]:
    async with running(settings) as app, http_client(app) as http:
        for path in ("/", "/docs", "/redoc", "/asyncapi.json", "/openapi.json", "/health/ready", "/api/v1/me"):
            assert (await http.get(path)).status_code in {200, 401}
        return weakref.ref(app)


async def test_an_application_that_has_ended_is_not_kept(settings: Settings) -> None:
    """FastAPI remembers the functions of routes, with all that they enclose.

    One that encloses its application keeps it: each is 2 MB, and thousands of tests later a garbage collection takes
    seconds.
    """
    ended = await _serve_and_end(settings)
    gc.collect()
    assert ended() is None
