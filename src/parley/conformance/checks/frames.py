"""What single frames are answered with (section 2 of the protocol)."""

from collections.abc import Callable
from uuid import uuid4

import orjson

from parley.conformance.bench import SHORT, Bench
from parley.conformance.errors import require
from parley.conformance.section import Section
from parley.conformance.shapes import misshapen
from parley.conformance.transcript import Frame
from parley.conformance.wire import Peer

section = Section("frames")

_BAD = ("{", "[]", '"hb"', "{}", '{"t":"no such frame","id":1}', '{"t":"sub","id":1}', '{"t":"ack"}')


@section.check()
async def three_bad_frames_are_4400(bench: Bench) -> None:
    """Malformed JSON, fields or `t` are `err bad_frame`; the third closes with 4400."""
    for start in range(0, len(_BAD) - 2, 2):
        peer = await bench.join()
        for text in _BAD[start : start + 3]:
            await peer.send_text(text)
        said = await peer.ends_with(4400, "the third bad frame")
        codes = [frame.get("code") for frame in said]
        require(codes == ["bad_frame"] * 3, "each bad frame is answered with `err bad_frame`", *said)


@section.check()
async def two_bad_frames_are_forgiven(bench: Bench) -> None:
    """After two bad frames the connection still serves."""
    peer = await bench.join()
    for text in _BAD[:2]:
        await peer.send_text(text)
        answer = await peer.receive("`err bad_frame`")
        require(answer.get("code") == "bad_frame", "a bad frame is answered with `err bad_frame`", answer)
    await peer.alive()


@section.check()
async def ids_come_back(bench: Bench) -> None:
    """An answer carries its request's id as it was sent, a number or text, on `ok` and on `err`."""
    channel = await bench.conversation()
    peer = await bench.join()
    for id_ in (7, "seven", "семь", 2**53):
        subbed = await peer.ask("sub", id=id_, ch=channel)
        require(subbed["t"] == "subbed", "a `sub` is answered with `subbed`", subbed)
        await peer.ask("unsub", id=id_, ch=channel)
        await peer.refused("not_found", "unsub", id=id_, ch=channel)
    await peer.send_text(orjson.dumps({"t": "no such frame", "id": "mine"}).decode())
    answer = await peer.until("err")
    require(answer.get("id") == "mine", "a bad frame with an id that can be read is answered with it", answer)


@section.check()
async def bad_ids_are_bad_frames(bench: Bench) -> None:
    """An id that is neither a whole number nor text is `bad_frame`, and is not sent back."""
    ids: tuple[object, ...] = ({}, [1], 1.5, None)
    for id_ in ids:
        peer = await bench.join()
        await peer.send("sub", id=id_, ch="user:me")
        answer = await peer.receive("`err bad_frame`")
        require(answer.get("code") == "bad_frame", f"the id {id_!r} is a bad frame", answer)
        require("id" not in answer, "an id that cannot be read is not sent back", answer)
        await peer.close()


@section.check()
async def invalid_content_is_invalid(bench: Bench) -> None:
    """Well-formed frames whose content cannot be taken are `err invalid`, as many as there are: none closes."""
    channel = await bench.conversation()
    peer = await bench.join()
    for parts in ([], [{"type": "text", "text": ""}], [{"type": "picture"}], [{"type": "text"}]) * 2:
        await peer.refused("invalid", "chat.send", ch=channel, cid=str(uuid4()), parts=parts)
    # JSON may hold half a surrogate pair; no text may.
    broken = orjson.dumps(
        {"t": "chat.send", "id": "half", "ch": channel, "cid": str(uuid4()), "parts": [{"type": "text", "text": "@"}]}
    ).decode()
    await peer.send_text(broken.replace('"@"', '"\\ud83d"'))
    answer = await peer.answer("half")
    require(answer.get("code") == "invalid", "half a surrogate pair is `invalid`", answer)
    await peer.alive()
    require(await bench.messages(channel) == [], "nothing of it is stored")


@section.check()
async def frames_up_to_the_limit(bench: Bench) -> None:
    """A frame of exactly `welcome.limits.frame` bytes is taken; one byte more closes with 1009."""
    peer = await bench.join()
    limit = peer.welcome["limits"]["frame"]
    frame: Frame = {"t": "unsub", "id": "large", "ch": "user:me", "pad": ""}
    room = limit - len(orjson.dumps(frame))
    await peer.send_text(orjson.dumps({**frame, "pad": "x" * room}).decode())
    answer = await peer.answer("large")
    require(answer["t"] == "err", "a frame of the largest size is answered", answer)
    await peer.send_text(orjson.dumps({**frame, "pad": "x" * (room + 1)}).decode())
    await peer.ends_with(1009, f"a frame of {limit + 1} bytes")


@section.check()
async def large_is_counted_in_bytes(bench: Bench) -> None:
    """The limit of a frame counts bytes of UTF-8 and not characters."""
    peer = await bench.join()
    limit = peer.welcome["limits"]["frame"]
    await peer.send("unsub", id=1, ch="user:me", pad="ж" * (limit // 2))
    await peer.ends_with(1009, "a frame whose UTF-8 is too large")


@section.check()
async def unknown_channels_are_not_found(bench: Bench) -> None:
    """A channel that does not exist, or whose name is none, is `err not_found` with its name; `unsub` of it too."""
    peer = await bench.join()
    for channel in (f"conversation:{uuid4()}", "conversation:", "conversation:x", "no-such-kind:1", "no-such-kind"):
        answer = await peer.refused("not_found", "sub", ch=channel)
        require(answer.get("ch") == channel, "the `err` names the channel", answer)
        await peer.refused("not_found", "unsub", ch=channel)


@section.check()
async def errors_say_what_to_do(bench: Bench) -> None:
    """Every `err` has a code of the list, a message and `retry`."""
    peer = await bench.join()
    answers = [
        await peer.request("sub", ch=f"conversation:{uuid4()}"),
        await peer.request("reply.cancel", reply=str(uuid4())),
        await peer.request("chat.send", ch=f"conversation:{uuid4()}", cid=str(uuid4()), parts=[]),
        await peer.request("no such frame"),
    ]
    for answer in answers:
        problem = misshapen(answer)
        require(answer["t"] == "err" and problem is None, problem or "this must be an `err`", answer)


@section.check()
async def second_sub_starts_anew(bench: Bench) -> None:
    """A second `sub` of a channel is answered whole, and its events come once and not twice."""
    channel = await bench.conversation()
    peer = await bench.join()
    await bench.subscribe(peer, channel)
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel, SHORT)
    await bench.finish(peer, oracle, turn.reply)
    oracle.assert_sound()


@section.check()
async def unsub_ends_the_events(bench: Bench) -> None:
    """After the `ok` of an `unsub` nothing comes of the channel."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel)
    await bench.started(peer, oracle, turn.reply)
    await peer.send("unsub", id="end", ch=channel)
    while (frame := await peer.receive("the answer to `unsub`")).get("id") != "end":
        pass
    require(frame["t"] == "ok", "`unsub` is answered with `ok`", frame)
    late = [one for one in await peer.hears(for_s=0.6) if one.get("ch") == channel]
    require(not late, "something came of a channel after its `unsub`", *late[:2])


@section.check()
async def every_frame_has_its_shape(bench: Bench) -> None:
    """All frames of a whole turn have the fields and types that the protocol names."""
    channel = await bench.conversation()
    peer = await bench.join(subs=[{"ch": channel}, {"ch": "user:me"}])
    seen: list[Frame] = [peer.welcome]
    await _read_to(peer, seen, lambda frame: frame["t"] == "live" and frame["ch"] == channel)
    turn = await bench.send(peer, channel, SHORT)
    await _read_to(peer, seen, lambda frame: frame.get("e") == "reply.completed" and frame["d"]["reply"] == turn.reply)
    for frame in seen:
        problem = misshapen(frame)
        require(problem is None, problem or "", frame)


async def _read_to(peer: Peer, seen: list[Frame], holds: Callable[[Frame], bool]) -> None:
    while True:
        frame = await peer.receive("the rest of the turn")
        seen.append(frame)
        if holds(frame):
            return
