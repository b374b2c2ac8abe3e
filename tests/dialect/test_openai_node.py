"""OpenAI's own client for Node, as it is: only its address and its key are ours."""

import asyncio
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest

from benchmarks.fake_provider import FakeProvider, script
from tests.dialect.conftest import Ledger, Person
from tests.dialect.test_access import set_budget

FOLDER = Path(__file__).parent / "openai_node"
NODE = shutil.which("node")
THERE = NODE is not None and (FOLDER / "node_modules" / "openai").is_dir()

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        not THERE and "PARLEY_CI" not in os.environ,
        reason="Node or OpenAI's client is not here; `make ci` installs them",
    ),
]


async def run(*arguments: str) -> dict[str, Any]:
    """Run the conversation; return what it found."""
    assert NODE is not None
    assert THERE, "npm ci in tests/dialect/openai_node"
    process = await asyncio.create_subprocess_exec(
        NODE, "conversation.mjs", *arguments, cwd=FOLDER, env={"PATH": os.environ["PATH"]},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(120):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    found: dict[str, Any] = orjson.loads(out)
    return found


async def test_a_scripted_conversation(
    alice: Person, admin: asyncpg.Connection, provider: FakeProvider, ledger: Ledger
) -> None:
    made = await alice.make_key()
    poor = replace(alice, key=made["key"], key_id=UUID(made["id"]))
    await set_budget(admin, poor, "api_key", "0.000001")

    found = await run(f"{alice.url}/v1", alice.key, poor.key)

    assert {"default", "gpt", "demo"} <= set(found["models"])
    text = "".join(script(3, 12, 4))
    assert (found["whole"]["text"], found["whole"]["request"]) == (text, True)
    assert found["whole"]["usage"]["total_tokens"] == 14
    assert (found["stream"]["text"], found["stream"]["finish"]) == (text, "stop")
    assert found["stream"]["usage"]["completion_tokens"] == 12
    assert found["loop"] == {"rounds": 2, "text": "".join(script(5, 3, 4))}
    assert found["runner"] == {"called": ["Oslo"], "text": "".join(script(5, 3, 4))}
    assert found["parsed"] == {"name": "Ada", "age": 36}
    # The classes that callers catch.
    known = {"request": True, "type": "invalid_request_error"}
    assert found["authentication"] == {
        **known, "name": "AuthenticationError", "status": 401, "code": "invalid_api_key", "param": None,
    }  # fmt: skip
    assert found["notFound"] == {
        **known, "name": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model",
    }  # fmt: skip
    assert found["badRequest"] == {
        **known, "name": "BadRequestError", "status": 400, "code": "invalid_value", "param": "messages[0].content",
    }  # fmt: skip
    assert found["rateLimit"] == {
        "name": "RateLimitError", "status": 429, "code": "insufficient_quota", "param": None,
        "type": "insufficient_quota", "request": True,
    }  # fmt: skip
    assert not [call for call in provider.requests if call.asked.startswith("poor")]
    assert found["again"] == "".join(script(1, 3, 4))
    assert found["broken"]["text"] == "".join(script(3, 9, 4)[:3])
    assert found["broken"]["error"]["code"] == "provider_unavailable"
    # Who stops reading stops the provider.
    (left,) = [call for call in provider.requests if call.asked.startswith("left")]
    await provider.ended(left, within_s=30)
    assert left.closed_early
    rows = await ledger(rows=len(provider.requests))
    assert [row["status"] for row in rows].count("stopped") == 1
    assert {row["purpose"] for row in rows} == {"dialect"}
    assert [row["status"] for row in rows if row["key_id"] == poor.key_id] == ["completed"]
