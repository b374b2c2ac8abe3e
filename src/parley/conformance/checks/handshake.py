"""How a connection begins (section 2 of the protocol)."""

import asyncio
import time
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import orjson

from parley.conformance.bench import Bench
from parley.conformance.errors import require
from parley.conformance.section import Section
from parley.conformance.transcript import Frame

section = Section("handshake")

_HELLO_S = 5.0
_DAY_S = 86_400


def _hello(bench: Bench, **fields: Any) -> Frame:
    return {"t": "hello", "v": 1, "auth": {"token": bench.people.first.token}, **fields}


@section.check()
async def subprotocol_is_echoed(bench: Bench) -> None:
    """The server answers with the subprotocol parley.v1, also where it is one of several."""
    for offered in (["parley.v1"], ["chat", "parley.v1"]):
        peer = await bench.open(subprotocols=offered)
        require(peer.socket.subprotocol == "parley.v1", f"{offered} was answered with {peer.socket.subprotocol}")


@section.check()
async def other_subprotocol_is_4406(bench: Bench) -> None:
    """Without the subprotocol, or with an unknown one, the connection closes with 4406."""
    for offered in ([], ["parley.v999"], ["PARLEY.V1"]):
        peer = await bench.open(subprotocols=offered)
        require(peer.socket.subprotocol is None, f"the server took the subprotocol {peer.socket.subprotocol}")
        await peer.ends_with(4406, f"a connection that offers {offered or 'no subprotocol'}")


@section.check()
async def other_version_is_4406(bench: Bench) -> None:
    """A `hello` of a version that does not exist closes with 4406."""
    peer = await bench.open()
    await peer.send(**{**_hello(bench), "v": 999})
    await peer.ends_with(4406, "a `hello` with v 999")


@section.check()
async def welcome_is_whole(bench: Bench) -> None:
    """`welcome` has all its fields, with the limits of the connection."""
    welcome = (await bench.join()).welcome
    for name, kind in (("conn", str), ("user", str), ("workspace", str), ("durable", bool), ("limits", dict)):
        require(isinstance(welcome.get(name), kind), f"`welcome.{name}` must be a {kind.__name__}", welcome)
    require(welcome.get("v") == 1, "`welcome.v` must be 1", welcome)
    require(welcome["conn"] and welcome["user"] and welcome["workspace"], "no id in `welcome` is empty", welcome)
    require(_is_positive(welcome.get("hb")), "`welcome.hb` is a number of seconds", welcome)
    for name in ("frame", "subs", "rate"):
        require(_is_positive(welcome["limits"].get(name)), f"`welcome.limits.{name}` is a number above 0", welcome)
    for name in ("now", "expires_at"):
        require(_is_positive(welcome.get(name)), f"`welcome.{name}` is a number of seconds since 1970", welcome)
    require(abs(welcome["now"] - time.time()) < _DAY_S, "`welcome.now` is the time, in seconds since 1970", welcome)
    require(welcome["expires_at"] > welcome["now"], "a credential that is taken has not expired", welcome)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


@section.check()
async def no_hello_in_time(bench: Bench) -> None:
    """A client that says no `hello` within 5 s is closed with 4408, and not before."""
    peer = await bench.open()
    begun = time.monotonic()
    await peer.ends_with(4408, "a connection without `hello`", within_s=_HELLO_S + 4)
    took_s = time.monotonic() - begun
    require(took_s > _HELLO_S - 1, f"a client has 5 s for its `hello`; it was closed after {took_s:.1f} s")


@section.check()
async def late_hello_is_welcome(bench: Bench) -> None:
    """A `hello` that comes after 3.5 s, with bad frames before it, is still in time."""
    peer = await bench.open()
    await peer.send_text("{")
    answer = await peer.receive("`err bad_frame`")
    require((answer["t"], answer.get("code")) == ("err", "bad_frame"), "malformed JSON is `bad_frame`", answer)
    await asyncio.sleep(3.5)
    await peer.send(**_hello(bench))
    answer = await peer.receive("`welcome`")
    require(answer["t"] == "welcome", "a `hello` in time is welcome", answer)


@section.check()
async def hello_comes_first(bench: Bench) -> None:
    """Any other first frame is not served, and closes the connection with 4401."""
    for frame in ({"t": "sub", "id": 1, "ch": "user:me"}, {"t": "hb"}, {"t": "ack", "a": {}}):
        peer = await bench.open()
        await peer.send(**frame)
        said = await peer.ends_with(4401, f"a connection that begins with `{frame['t']}`")
        strange = [one for one in said if one["t"] != "err"]
        require(not strange, "nothing but an `err` may come before `welcome`", *strange)


@section.check()
async def second_hello_is_4409(bench: Bench) -> None:
    """A second `hello` closes the connection with 4409."""
    peer = await bench.join()
    await peer.send(**_hello(bench))
    await peer.ends_with(4409, "a second `hello`")


@section.check()
async def bad_credential_is_4401(bench: Bench) -> None:
    """A credential of any kind that does not hold is `err unauthenticated`, then a close with 4401."""
    for auth in ({"token": "not.a.token"}, {"ticket": "tk_nothing"}, {"api_key": "parley_sk_nothing"}, {}):
        peer = await bench.open()
        await peer.send("hello", v=1, auth=auth)
        said = await peer.ends_with(4401, f"a `hello` with a bad {next(iter(auth), 'credential')}")
        codes = [frame.get("code") for frame in said]
        require(codes == ["unauthenticated"], "before the close comes `err unauthenticated`", *said)


@section.check()
async def binary_is_1003(bench: Bench) -> None:
    """A binary frame closes with 1003, before `welcome` and after it."""
    for peer in (await bench.open(), await bench.join()):
        await peer.send_bytes(b'{"t":"hb"}')
        await peer.ends_with(1003, "a binary frame")


@section.check()
async def large_hello_is_1009(bench: Bench) -> None:
    """Before `welcome` a frame may have 8 KiB: a `hello` of that size is welcome, a larger one closes with 1009."""
    for size, fits in ((8 * 1024, True), (8 * 1024 + 1, False)):
        peer = await bench.open()
        hello = _hello(bench, pad="")
        room = size - len(_text(hello))
        await peer.send_text(_text({**hello, "pad": "x" * room}))
        if fits:
            answer = await peer.receive("`welcome`")
            require(answer["t"] == "welcome", "a `hello` of 8 KiB is welcome", answer)
        else:
            await peer.ends_with(1009, "a `hello` of more than 8 KiB")


def _text(frame: Frame) -> str:
    return orjson.dumps(frame).decode()


@section.check()
async def frames_before_welcome_are_answered(bench: Bench) -> None:
    """Frames may follow `hello` without waiting; they are answered after `welcome`, in their order."""
    channel = await bench.conversation()
    peer = await bench.open()
    await peer.send(**_hello(bench))
    await peer.send("sub", id="first", ch=channel)
    await peer.send("unsub", id="second", ch=channel)
    answer = await peer.receive("`welcome`")
    require(answer["t"] == "welcome", "`welcome` comes before any other answer", answer)
    subbed = await peer.answer("first")
    require(subbed["t"] == "subbed", "a `sub` right behind `hello` is answered", subbed)
    done = await peer.answer("second")
    require(done["t"] == "ok", "an `unsub` right behind it too", done)


@section.check()
async def hello_subscribes(bench: Bench) -> None:
    """`hello.subs` subscribes in one round trip; a channel that cannot be seen is an `err` and harms nothing."""
    channel, unknown = await bench.conversation(), f"conversation:{uuid4()}"
    peer = await bench.join(subs=[{"ch": unknown}, {"ch": channel}])
    refused = await peer.until("err")
    require((refused.get("code"), refused.get("ch")) == ("not_found", unknown), "it is `not_found`", refused)
    subbed = await peer.until("subbed")
    require(subbed["ch"] == channel, "the other channel is subscribed", subbed)
    await peer.until("live")


@section.check()
async def unknown_fields_are_ignored(bench: Bench) -> None:
    """Fields that the protocol does not know are ignored, in `hello` and in any other frame."""
    channel = await bench.conversation()
    peer = await bench.open()
    await peer.send(**_hello(bench, from_the_future={"x": [1, None]}, client={"name": "conformance"}))
    welcome = await peer.receive("`welcome`")
    require(welcome["t"] == "welcome", "a `hello` with an unknown field is welcome", welcome)
    await peer.ask("sub", ch=channel, from_the_future=True)


@section.check()
async def ticket_is_good_once(bench: Bench) -> None:
    """A ticket opens one connection, and the second one that shows it is closed with 4401."""
    made = await bench.rest().call("POST", "/api/v1/realtime/tickets", expect=201)
    require(made.get("ticket") and _is_positive(made.get("expires_in")), "a ticket says how long it holds")
    peer = await bench.join(auth={"ticket": made["ticket"]})
    again = await bench.open()
    await again.send("hello", v=1, auth={"ticket": made["ticket"]})
    await again.ends_with(4401, "a ticket that was used")
    await peer.alive()


@section.check()
async def credential_is_not_in_the_url(bench: Bench) -> None:
    """A token in the address lets nobody in: the credential is in `hello`."""
    peer = await bench.open(query=f"?token={quote(bench.people.first.token)}")
    await peer.send("sub", id=1, ch="user:me")
    await peer.ends_with(4401, "a connection without `hello`, with a token in its address")
