"""Frames that nobody honest sends: the right code, the connection or at least the server unharmed, nothing echoed."""

import asyncio
import copy
import json
import logging
import random
import struct
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from tests.conftest import Account
from tests.realtime.conftest import LiveServer, Peer, conversation_of
from tests.realtime.raw import close_code, masked, raw_handshake

CANARY = "canary-8fb1c2"


@pytest.fixture
async def peer(live_server: LiveServer, ada: Account) -> AsyncIterator[Peer]:
    """A connection that is welcome."""
    async with live_server.join(ada) as joined:
        yield joined


def nested(depth: int) -> str:
    return '{"t":"hb","x":' + "[" * depth + "]" * depth + "}"


BAD_FRAMES = {
    "nothing": "",
    "no JSON": f"{{{CANARY}",
    "half a frame": '{"t":"hb"',
    "two values": '{"t":"hb"}{"t":"hb"}',
    "a list": f'["{CANARY}"]',
    "a number": "5",
    "null": "null",
    "a string": f'"{CANARY}"',
    "no t": f'{{"id":1,"ch":"{CANARY}"}}',
    "unknown t": f'{{"t":"{CANARY}"}}',
    "t is a number": '{"t":5}',
    "t is a list": '{"t":["hb"]}',
    "t is null": '{"t":null}',
    "t is a lone surrogate": '{"t":"\\ud800"}',
    "a server's frame": '{"t":"welcome"}',
    "NaN is not JSON": '{"t":"hb","ts":NaN}',
    "Infinity is not JSON": '{"t":"ack","a":{},"x":Infinity}',
    "sub without id": f'{{"t":"sub","ch":"{CANARY}"}}',
    "sub without ch": '{"t":"sub","id":1}',
    "ch is a number": '{"t":"sub","id":1,"ch":5}',
    "ch is empty": '{"t":"sub","id":1,"ch":""}',
    "ch is long": json.dumps({"t": "sub", "id": 1, "ch": CANARY * 50}),
    "id is a list": '{"t":"sub","id":[1],"ch":"tasks"}',
    "id is true": '{"t":"sub","id":true,"ch":"tasks"}',
    "id is null": '{"t":"sub","id":null,"ch":"tasks"}',
    "id is a fraction": '{"t":"sub","id":1.5,"ch":"tasks"}',
    "id is long": json.dumps({"t": "sub", "id": CANARY * 20, "ch": "tasks"}),
    "since is a string": f'{{"t":"sub","id":1,"ch":"tasks","since":"{CANARY}"}}',
    "since without seq": '{"t":"sub","id":1,"ch":"tasks","since":{"ep":"x"}}',
    "since below -1": '{"t":"sub","id":1,"ch":"tasks","since":{"seq":-2}}',
    "since is a fraction": '{"t":"sub","id":1,"ch":"tasks","since":{"seq":0.5}}',
    "ack without a": '{"t":"ack"}',
    "ack of a list": '{"t":"ack","a":[1]}',
    "ack of a word": f'{{"t":"ack","a":{{"tasks":"{CANARY}"}}}}',
    "ack of too many": json.dumps({"t": "ack", "a": {f"c{n}": 1 for n in range(201)}}),
    "ack under a lone surrogate": '{"t":"ack","a":{"\\ud800":"x"}}',
    "auth is a string": f'{{"t":"auth","id":1,"auth":"{CANARY}"}}',
    "auth of a number": '{"t":"auth","id":1,"auth":{"token":5}}',
    "cid is no UUID": json.dumps({"t": "chat.send", "id": 1, "ch": "conversation:x", "cid": CANARY, "parts": []}),
    "parts is no list": json.dumps(
        {"t": "chat.send", "id": 1, "ch": "conversation:x", "cid": str(uuid4()), "parts": CANARY}
    ),
    "unknown on_active": json.dumps(
        {"t": "chat.send", "id": 1, "ch": "conversation:x", "cid": str(uuid4()), "parts": [], "on_active": CANARY}
    ),
    "reply is no UUID": f'{{"t":"reply.cancel","id":1,"reply":"{CANARY}"}}',
    "deep": nested(10_000),
    "an endless number": '{"t":"hb","ts":' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("name", BAD_FRAMES)
async def test_three_bad_frames_close_with_4400(peer: Peer, name: str) -> None:
    for _ in range(2):
        await peer.raw(BAD_FRAMES[name])
        answer = await peer.read()
        assert (answer["t"], answer["code"], answer["retry"]) == ("err", "bad_frame", "never")
        assert CANARY not in answer["msg"]
        await peer.alive()
    await peer.raw(BAD_FRAMES[name])
    assert (await peer.read())["code"] == "bad_frame"
    assert await peer.code() == 4400


@pytest.mark.parametrize("name", ["no JSON", "unknown t", "a list", "t is a lone surrogate"])
async def test_bad_frames_before_hello_are_counted_too(live_server: LiveServer, name: str) -> None:
    async with live_server.open() as peer:
        for _ in range(3):
            await peer.raw(BAD_FRAMES[name])
            assert (await peer.read())["code"] == "bad_frame"
        assert await peer.code() == 4400


HARMLESS: dict[str, dict[str, Any]] = {
    "an id beyond 64 bits": {"t": "unsub", "id": 2**70, "ch": "x"},
    "a negative id beyond 64 bits": {"t": "unsub", "id": -(2**70), "ch": "x"},
    "an id that is half an emoji": {"t": "unsub", "id": "\ud83d", "ch": "x"},
    "a channel that is half an emoji": {"t": "unsub", "id": 1, "ch": "\ud83d"},
    "a channel with a NUL": {"t": "sub", "id": 1, "ch": "conversation:\x00"},
    "a kind with a NUL": {"t": "sub", "id": 1, "ch": "\x00:me"},
    "a channel of spaces": {"t": "sub", "id": 1, "ch": "   "},
    "only a colon": {"t": "sub", "id": 1, "ch": ":"},
    "an epoch with a NUL": {"t": "sub", "id": 1, "ch": "tasks", "since": {"ep": "\x00", "seq": 1}},
    "an epoch that is half an emoji": {"t": "sub", "id": 1, "ch": "tasks", "since": {"ep": "\ud83d", "seq": 1}},
    "a position of 2**63": {"t": "sub", "id": 1, "ch": "tasks", "since": {"seq": 2**63}},
    "a position beyond all": {"t": "sub", "id": 1, "ch": "tasks", "since": {"seq": 10**300}},
    "an ack beyond 64 bits": {"t": "ack", "a": {"tasks": 2**80}},
    "an ack below zero": {"t": "ack", "a": {"tasks": -(2**80)}},
    "an ack of a channel that is not there": {"t": "ack", "a": {"\x00": 1}},
    "a renewal by half an emoji": {"t": "auth", "id": 1, "auth": {"ticket": "tk_\ud83d"}},
    "a model that is half an emoji": {
        "t": "chat.send", "id": 1, "ch": "conversation:x", "cid": str(uuid4()),
        "parts": [{"type": "text", "text": "x"}], "opts": {"model": "\ud83d"},
    },
    "a tool that is half an emoji": {
        "t": "chat.send", "id": 1, "ch": "conversation:" + str(uuid4()), "cid": str(uuid4()),
        "parts": [{"type": "text", "text": "x"}], "opts": {"tools": ["\ud83d", "\x00"]},
    },
    "a kind of part that is half an emoji": {
        "t": "chat.send", "id": 1, "ch": "conversation:" + str(uuid4()), "cid": str(uuid4()),
        "parts": [{"type": "\ud83d", "text": "x"}],
    },
    "a field of the other kind": {"t": "unsub", "id": 1, "ch": "x", "\ud83d": "\ud83d"},
    "max_hz without bound": {"t": "sub", "id": 1, "ch": "x", "max_hz": 1e308},
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
async def test_odd_values_are_an_answer_and_not_the_end(
    peer: Peer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        await peer.send(**HARMLESS[name])
        if HARMLESS[name]["t"] != "ack":
            first = await peer.read()
            if HARMLESS[name]["t"] == "auth":
                assert first["code"] in {"unauthenticated", "bad_frame"}
                return
            assert first["t"] in {"err", "subbed"}, first
            assert first.get("code") in {None, "bad_frame", "invalid", "not_found"}, first
        await peer.alive()
    assert not caplog.records


async def test_an_id_beyond_64_bits_next_to_half_an_emoji(peer: Peer) -> None:
    """The parser that takes half an emoji takes integers of any size, the encoder of answers does not."""
    await peer.raw('{"t":"unsub","id":1180591620717411303424,"ch":"x","y":"\\ud83d"}')
    assert (await peer.read())["code"] in {"bad_frame", "not_found"}
    await peer.alive()


async def test_every_close_is_said(live_server: LiveServer, ada: Account, caplog: pytest.LogCaptureFixture) -> None:
    """A connection that the server ends always gets its close frame, whatever the writer was doing."""

    async def end(frames: list[str], code: int) -> None:
        async with live_server.join(ada) as peer:
            for frame in frames:
                await peer.raw(frame)
            assert await peer.code() == code

    hello = json.dumps({"t": "hello", "v": 1, "auth": {"token": ada.access_token}})
    unsub = json.dumps({"t": "unsub", "id": 1, "ch": "x"})
    with caplog.at_level(logging.ERROR):
        for _ in range(12):
            await asyncio.gather(
                *(end(["{"] * 3, 4400) for _ in range(8)), *(end([unsub] * n + [hello], 4409) for n in range(8))
            )
    assert not [record.getMessage() for record in caplog.records]


async def test_an_id_comes_back_as_it_was_sent(peer: Peer) -> None:
    for id_ in (0, -1, 2**53, 2**63 - 1, -(2**63), "", "7", "é😀", "x" * 64, 'a"b\\c\n'):
        await peer.send("unsub", id=id_, ch="nothing")
        answer = await peer.read()
        assert (answer["t"], answer["id"], type(answer["id"])) == ("err", id_, type(id_))


@pytest.mark.parametrize(
    "part", [{"type": "canary-77"}, {"type": {"a": "canary-77"}}, {"type": "image", "attachment": "canary-77"}]
)
async def test_what_was_sent_is_not_repeated(ada: Account, peer: Peer, part: dict[str, Any]) -> None:
    channel = await conversation_of(ada)
    answer = await peer.ask("chat.send", ch=channel, cid=str(uuid4()), parts=[part])
    assert answer["t"] == "err"
    assert "canary-77" not in answer["msg"]
    assert "`c`" not in answer["msg"]


async def test_unknown_fields_are_ignored(peer: Peer) -> None:
    extra = {"zzz": [{"deep": [1, {"er": None}]}], "__proto__": 1, "": 2}
    assert (await peer.ask("sub", ch="tasks", since={"seq": -1, "more": 1}, **extra))["t"] == "subbed"
    await peer.send("ack", a={"tasks": 0}, **extra)
    await peer.send("hb", ts=5, **extra)
    assert (await peer.ask("unsub", ch="tasks", **extra))["t"] == "ok"


async def test_duplicate_keys_are_no_way_in(peer: Peer) -> None:
    await peer.raw('{"t":"hello","t":"unsub","id":1,"id":2,"ch":"a","ch":"b"}')
    answer = await peer.read()
    assert (answer["t"], answer["id"], answer["ch"]) == ("err", 2, "b")


async def test_a_binary_frame_closes_with_1003(peer: Peer) -> None:
    await peer.raw(b'{"t":"hb"}')
    assert await peer.code() == 1003


async def test_a_binary_frame_before_hello_closes_with_1003(live_server: LiveServer) -> None:
    async with live_server.open() as peer:
        await peer.raw(b"\x00\xff")
        assert await peer.code() == 1003


async def test_64_kib_are_taken_and_one_byte_more_closes_with_1009(peer: Peer) -> None:
    frame = '{"t":"unsub","id":1,"ch":"x","pad":"' + "é" * 30_000
    await peer.raw(frame + "a" * (64 * 1024 - len(frame.encode()) - 2) + '"}')
    assert (await peer.read())["code"] == "not_found"
    await peer.raw(frame + "a" * (64 * 1024 - len(frame.encode()) - 1) + '"}')
    assert await peer.code() == 1009


async def test_8_kib_are_taken_before_welcome_and_one_byte_more_closes_with_1009(
    live_server: LiveServer, ada: Account
) -> None:
    hello = json.dumps({"t": "hello", "v": 1, "auth": {"token": ada.access_token}, "client": "x"})
    async with live_server.open() as peer:
        await peer.raw(hello[:-2] + "x" * (8 * 1024 - len(hello)) + '"}')
        assert (await peer.read())["t"] == "welcome"
    async with live_server.open() as peer:
        await peer.raw(hello[:-2] + "x" * (8 * 1024 - len(hello) + 1) + '"}')
        assert await peer.code() == 1009


async def test_a_message_in_a_thousand_pieces_is_one_frame(peer: Peer) -> None:
    text = json.dumps({"t": "unsub", "id": "pieces", "ch": "é" * 100, "pad": "x" * 800}, ensure_ascii=False)

    async def pieces() -> AsyncIterator[str]:
        for character in text:
            yield character

    await peer.socket.send(pieces())
    assert (await peer.read())["id"] == "pieces"


async def test_pieces_that_never_end_are_bounded(peer: Peer) -> None:
    async def pieces() -> AsyncIterator[str]:
        for _ in range(1000):
            yield "x" * 1000

    with pytest.raises(ConnectionClosed):
        await peer.socket.send(pieces())
        await peer.socket.recv()
    assert await peer.code() == 1009


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (masked(1, b'{"t":"\xff\xfe"}'), 1007),
        (masked(1, b'{"t":"\xed\xa0\x80"}'), 1007),
        (masked(1, b"\xc3", fin=False) + masked(0, b"\x28"), 1007),
        (masked(1, b"{}", rsv=0x40), 1002),
        (masked(3, b"{}"), 1002),
        (masked(0, b"{}"), 1002),
        (masked(9, b"x" * 126), 1002),
        (b"\x81\x02{}", 1002),
        (b"\x81\xff" + struct.pack("!Q", 2**62) + b"\0\0\0\0", 1009),
    ],
    ids=["no UTF-8", "a surrogate", "cut UTF-8", "compressed", "opcode 3", "continues nothing", "a long ping",
         "not masked", "4 EiB announced"],
)  # fmt: skip
async def test_what_is_not_websocket_is_closed_by_its_rules(live_server: LiveServer, frame: bytes, code: int) -> None:
    async with raw_handshake(live_server, "Sec-WebSocket-Extensions: permessage-deflate") as (reader, writer):
        writer.write(frame)
        assert await close_code(reader) == code


async def test_deflate_is_not_spoken(live_server: LiveServer) -> None:
    async with live_server.open(compression="deflate") as peer:
        assert not peer.socket.protocol.extensions


async def test_2000_random_frames_leave_the_others_alone(
    live_server: LiveServer, ada: Account, bob: Account, caplog: pytest.LogCaptureFixture
) -> None:
    choose = random.Random(20)
    channel = await conversation_of(ada)
    valid: list[dict[str, Any]] = [
        {"t": "sub", "id": 1, "ch": channel, "since": {"ep": "x", "seq": 3}},
        {"t": "unsub", "id": "x", "ch": channel},
        {"t": "ack", "a": {channel: 1}},
        {"t": "hb", "ts": 1, "a": {channel: 2}},
        {"t": "auth", "id": 1, "auth": {"token": "x"}},
        {"t": "chat.send", "id": 1, "ch": channel, "cid": str(uuid4()), "parts": [{"type": "text", "text": "x"}]},
        {"t": "reply.cancel", "id": 1, "reply": str(uuid4())},
        {"t": "hello", "v": 1, "auth": {"token": ada.access_token}, "subs": [{"ch": channel}]},
    ]
    odd: list[Any] = [None, True, 0, -1, 2**64, 1e308, "", "\x00", "\ud800", "x" * 70, [], {}, [[]], {"t": 1}, channel]

    def spoil(frame: dict[str, Any]) -> str | bytes:
        frame = json.loads(json.dumps(frame))
        for _ in range(choose.randint(1, 3)):
            holder: Any = frame
            key: Any = choose.choice(list(holder))
            while isinstance(holder[key], dict | list) and holder[key] and choose.random() < 0.7:
                holder = holder[key]
                key = choose.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            holder[key] = copy.deepcopy(choose.choice(odd))
        text = json.dumps(frame)
        match choose.randint(0, 9):
            case 0:
                return text[: choose.randint(0, len(text))]
            case 1:
                at = choose.randint(0, len(text))
                return text[:at] + chr(choose.randint(0, 0xD7FF)) + text[at:]
            case 2:
                return choose.randbytes(40).decode("latin-1")
            case _:
                return text

    codes: set[int] = set()
    sent = 0
    async with live_server.join(bob) as bystander:
        with caplog.at_level(logging.ERROR):
            while sent < 2000:
                async with live_server.open() as peer:
                    if choose.random() < 0.9:
                        await peer.send("hello", v=1, auth={"token": ada.access_token})
                    try:
                        for _ in range(40):
                            await peer.raw(spoil(choose.choice(valid)))
                            sent += 1
                        await peer.send("unsub", id="last", ch="nothing")
                        await peer.until(id="last")
                    except ConnectionClosed:
                        pass
                    else:
                        continue
                    codes.add(await peer.code())
        await bystander.alive()
        assert (await bystander.sub("tasks"))["t"] == "subbed"
    assert codes <= {4400, 4401, 4403, 4406, 4409, 1009}, codes
    assert not [record.getMessage() for record in caplog.records]


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_types = st.sampled_from(["hello", "sub", "unsub", "ack", "hb", "auth", "chat.send", "reply.cancel"])
_fields = st.sampled_from(["id", "ch", "since", "a", "auth", "cid", "parts", "opts", "reply", "v", "ts", "on_active"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(t=_types | st.text(max_size=5), fields=st.dictionaries(_fields, _json, max_size=6))
async def test_any_frame_is_parsed_or_refused(t: str, fields: dict[str, Any]) -> None:
    from parley.realtime.frames import BadFrame, error, parse

    try:
        frame = parse(json.dumps({"t": t, **fields}))
    except BadFrame as bad:
        # What refuses it must itself be sendable.
        error("bad_frame", bad.reason, id=bad.id)
    else:
        if (id_ := getattr(frame, "id", None)) is not None:
            error("not_found", "x", id=id_, ch=getattr(frame, "ch", None))
