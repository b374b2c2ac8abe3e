"""`long-conversation`: opening, sending, searching and choosing a branch in a conversation of 5,000 messages."""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from benchmarks.figures import Figure, Measurement, percentile
from benchmarks.processes import ask
from benchmarks.servers import Account, Parley, parley
from parley.core.ids import new_id

_SIZES = (10, 5000)
_MOST_MS = 100
_QUESTION_WORDS, _ANSWER_WORDS = 20, 150
# Numbered by how common they are, as words of a language are.
_WORDS = 20_000

_FILL = """
    INSERT INTO messages (workspace_id, id, conversation_id, parent_id, role, parts, status, author_id)
    VALUES ($1, $2, $3, $4, $5, $6::json, 'completed', $7)
"""


def vocabulary() -> tuple[list[str], list[float]]:
    """Return the words of a made-up language, and how often each is said, summed up."""
    choose = random.Random(1)
    words = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=choose.randint(3, 9))) for _ in range(_WORDS)]
    return words, list(itertools.accumulate(1 / number for number in range(1, _WORDS + 1)))


async def fill(connection: asyncpg.Connection, account: Account, conversation: str, count: int) -> None:
    """Write so many messages, as a superuser: questions and answers in turns, in one branch."""
    words, weights = vocabulary()
    choose = random.Random(2)
    workspace, user = UUID(account.workspace_id), UUID(account.user_id)
    parent: UUID | None = None
    rows = []
    for number in range(count):
        id_ = new_id()
        length = _ANSWER_WORDS if number % 2 else _QUESTION_WORDS
        text = " ".join(choose.choices(words, cum_weights=weights, k=length))
        parts = orjson.dumps([{"type": "text", "text": text}]).decode()
        role = "assistant" if number % 2 else "user"
        rows.append((workspace, id_, UUID(conversation), parent, role, parts, user))
        parent = id_
    await connection.executemany(_FILL, rows)
    await connection.execute(
        "UPDATE conversations SET current_id = $2, title = 'Long' WHERE id = $1", UUID(conversation), parent
    )


async def _filled(server: Parley, account: Account, conversations: dict[int, str]) -> None:
    connection = await asyncpg.connect(server.database_url("postgres"))
    try:
        for count, conversation in conversations.items():
            await fill(connection, account, conversation, count)
        await connection.execute("ANALYZE")
    finally:
        await connection.close()


def measure(*, full: bool) -> list[Measurement]:
    """Do the same in a short conversation and in a long one, in turns."""
    rounds = 300 if full else 100
    with parley(PARLEY_DEMO_DELAY_MS="0", PARLEY_REALTIME_FRAMES_PER_S="1000") as server:
        account = server.sign_up()
        conversations = dict(zip(_SIZES, server.conversations(account, len(_SIZES)), strict=True))
        asyncio.run(_filled(server, account, conversations))
        found = ask(
            "long_conversation",
            {
                "port": server.port,
                "token": account.token,
                "rounds": rounds,
                "conversations": list(conversations.items()),
                "words": vocabulary()[0][:2000:20],
            },
            timeout_s=60 + rounds * 3,
        )
    figures = []
    for doing, by_size in found["took"].items():
        for size in _SIZES:
            took = by_size[str(size)]
            figures.append(
                Figure(
                    name=f"{doing}, {size:,} messages, p95", value=percentile(took, 0.95), unit="ms",
                    most=_MOST_MS if size == max(_SIZES) else None, note=f"p50 {percentile(took, 0.5):.2g} ms",
                )
            )  # fmt: skip
    method = (
        f"{rounds} times each, one after the other, in a conversation of {_SIZES[0]} and in one of {_SIZES[1]:,} messages "
        f"of {_QUESTION_WORDS} and {_ANSWER_WORDS} words in turns. Open: subscribe on an open socket until `live`, and the "
        "newest page of messages over HTTP. Send: POST until 202, answered by the demo model, whose end is waited for. "
        "Search: words from common to rare, over all of the account's conversations, so alike in both. Choose a branch: "
        "the first message named, the end of its branch found below it."
    )
    return [Measurement(name="long-conversation", method=method, figures=figures)]


async def client(specification: dict[str, Any]) -> dict[str, Any]:
    """Do everything in turns."""
    headers = {"Authorization": f"Bearer {specification['token']}"}
    base, address = f"http://127.0.0.1:{specification['port']}/api/v1", f"ws://127.0.0.1:{specification['port']}"
    took: dict[str, dict[str, list[float]]] = {}
    words = itertools.cycle(specification["words"])
    async with (
        httpx.AsyncClient(base_url=base, headers=headers, timeout=30, trust_env=False) as http,
        connect(
            f"{address}/api/v1/realtime", subprotocols=[Subprotocol("parley.v1")], compression=None, max_size=None
        ) as socket,
    ):
        await socket.send(orjson.dumps({"t": "hello", "v": 1, "auth": {"token": specification["token"]}}).decode())
        await _until(socket, lambda frame: frame["t"] == "welcome")
        first = {size: await _first(http, id_) for size, id_ in specification["conversations"]}
        for number in range(specification["rounds"] + 5):
            for size, id_ in specification["conversations"]:
                doings: dict[str, Callable[[], Awaitable[object]]] = {
                    "open": partial(_open, http, socket, id_),
                    "send": partial(_send, http, id_),
                    "search": partial(_search, http, next(words)),
                    "choose a branch": partial(_choose, http, id_, first[size]),
                }
                for doing, do in doings.items():
                    began = time.perf_counter()
                    await do()
                    if number >= 5:
                        took.setdefault(doing, {}).setdefault(str(size), []).append(1e3 * (time.perf_counter() - began))
                    if doing == "send":
                        await _until(socket, lambda frame: frame.get("e") == "reply.completed")
                await socket.send(orjson.dumps({"t": "unsub", "id": 2, "ch": f"conversation:{id_}"}).decode())
                await _until(socket, lambda frame: frame["t"] == "ok")
    return {"took": took}


async def _ok(asked: Awaitable[httpx.Response]) -> httpx.Response:
    answer = await asked
    answer.raise_for_status()
    return answer


async def _first(http: httpx.AsyncClient, id_: str) -> str:
    cursor, oldest = None, ""
    while True:
        params = {"limit": 100, **({"cursor": cursor} if cursor else {})}
        body = (await _ok(http.get(f"/conversations/{id_}/messages", params=params))).json()
        oldest, cursor = str(body["data"][0]["id"]), body["meta"].get("next_cursor")
        if cursor is None:
            return oldest


async def _search(http: httpx.AsyncClient, q: str) -> None:
    await _ok(http.get("/search", params={"q": q}))


async def _choose(http: httpx.AsyncClient, id_: str, message: str) -> None:
    await _ok(http.patch(f"/conversations/{id_}", json={"current_id": message}))


async def _open(http: httpx.AsyncClient, socket: ClientConnection, id_: str) -> None:
    await socket.send(orjson.dumps({"t": "sub", "id": 1, "ch": f"conversation:{id_}"}).decode())
    page = asyncio.create_task(_ok(http.get(f"/conversations/{id_}/messages")))
    await _until(socket, lambda frame: frame["t"] == "live")
    await page


async def _send(http: httpx.AsyncClient, id_: str) -> None:
    await _ok(http.post(f"/conversations/{id_}/messages", json={"text": "repeat 2 word"}))


async def _until(socket: ClientConnection, holds: Callable[[dict[str, Any]], bool]) -> None:
    async with asyncio.timeout(30):
        while True:
            frame = orjson.loads(await socket.recv())
            if holds(frame):
                break
    if "seq" in frame:
        # Who does not say how far they have come is sent no more after a while.
        await socket.send(orjson.dumps({"t": "ack", "a": {frame["ch"]: frame["seq"]}}).decode())
