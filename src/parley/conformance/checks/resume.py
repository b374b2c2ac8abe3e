"""Coming back: on any connection, at any point, over the socket and as server-sent events."""

import asyncio
from uuid import uuid4

from parley.conformance.bench import SHORT, Bench, is_end_of
from parley.conformance.checks.subscribe import positions, same_messages, turn_of
from parley.conformance.errors import Failed, Skipped, require
from parley.conformance.oracle import Applied, Oracle
from parley.conformance.rest import EventStream, SseEvent
from parley.conformance.section import Section
from parley.conformance.transcript import Frame
from parley.conformance.wire import Peer

section = Section("resume")
merging = Section("merging")

_CUTS = (1, 2, 1, 3, 5, 1, 8, 2, 13, 4, 1, 6, 3, 10, 2)
_MERGED_BYTES = 32 * 1024


@section.check()
async def cut_at_any_point(bench: Bench) -> None:
    """A client that is cut off again and again in mid-reply, and resumes in `hello`, reads what another one reads."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, steady = await bench.subscribe(peer, channel)
    cut_off = Oracle(channel)
    _, cut_off = await bench.subscribe(await bench.join(), channel)
    turn = await bench.send(peer, channel)
    reading = asyncio.create_task(bench.finish(peer, steady, turn.reply))
    try:
        cuts = 0
        while turn.reply not in cut_off.ended:
            other = await bench.join(subs=[{"ch": channel, "since": cut_off.since}])
            await _read_some(other, cut_off, turn.reply, events=_CUTS[cuts % len(_CUTS)])
            other.cut()
            cuts += 1
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    cut_off.assert_sound()
    steady.assert_sound()
    require(not cut_off.snapshots or cut_off.snapshots == 1, "a resume after a moment is a replay and no snapshot")
    require(cut_off.last == steady.last, f"one client is at {cut_off.last}, the other at {steady.last}")
    same_messages(steady, cut_off)
    if cuts < 4:
        raise Skipped("the reply ended after a few events: choose a longer --prompt")


async def _read_some(peer: Peer, oracle: Oracle, reply: str, *, events: int) -> None:
    read = 0
    while read < events and reply not in oracle.ended:
        frame = await peer.receive("the rest of the reply")
        require(frame["t"] != "err", "a resume was refused", frame)
        oracle.take(frame)
        read += frame["t"] == "ev"


@section.check()
async def two_connections_read_the_same(bench: Bench) -> None:
    """Every connection reads the same events in the same order, and a reply stops for none that is cut off."""
    channel = await bench.conversation()
    first, second = await bench.join(), await bench.join()
    _, one = await bench.subscribe(first, channel)
    _, other = await bench.subscribe(second, channel)
    turn = await bench.send(first, channel)
    await bench.started(first, one, turn.reply, deltas=2)
    first.cut()
    await bench.finish(second, other, turn.reply)
    third = await bench.join()
    subbed, _ = await bench.subscribe(third, channel, oracle=one)
    require(subbed["why"] == "ok", "the connection that was cut off is replayed what it missed", subbed)
    one.assert_sound()
    other.assert_sound()
    same_messages(other, one)


@section.check()
async def snapshot_equals_the_events(bench: Bench) -> None:
    """A snapshot holds exactly what a client holds that has applied every event up to its position."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, reference = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel)
    reading = asyncio.create_task(bench.finish(peer, reference, turn.reply))
    taken: list[tuple[int, str]] = []
    try:
        other = await bench.join()
        while not reading.done() and len(taken) < 20:
            await other.ask("sub", ch=channel)
            snap = await other.until("snap")
            held = Oracle(channel)
            held.take(snap)
            taken.append((snap["seq"], held.text(turn.reply)))
            await other.until("live")
            await other.hears(for_s=0.1)
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    known = {event.seq for event in reference.applied}
    for seq, text in taken:
        if seq in known:
            applied = reference.fork(seq).text(turn.reply)
            require(
                text == applied, f"the snapshot at {seq} has {len(text)} characters, its events give {len(applied)}"
            )


# -- server-sent events --------------------------------------------------------------------------------------------


async def read_events(stream: EventStream, *, reply: str | None = None, count: int | None = None) -> list[SseEvent]:
    """Read events up to the end of a reply, or so many of them."""
    events: list[SseEvent] = []
    while count is None or len(events) < count:
        event = await stream.receive("the next event")
        if event is None:
            raise Failed("the event stream ended before its time")
        events.append(event)
        if reply is not None and is_end_of(reply)(event.frame):
            break
    return events


def _path(channel: str) -> str:
    return f"/api/v1/channels/{channel}/events"


@section.check()
async def sse_reads_the_same_log(bench: Bench) -> None:
    """Server-sent events from a position in mid-reply: the same events, whose ids are EPOCH:SEQ of their frames."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel)
    await bench.started(peer, oracle, turn.reply)
    held = oracle.fork(oracle.last or 0)
    async with bench.rest().events(
        "GET", _path(channel), params={"since": f"{held.ep}:{held.last}"}, patience_s=bench.patience_s
    ) as stream:
        events = await read_events(stream, reply=turn.reply)
    await bench.finish(peer, oracle, turn.reply)
    for event in events:
        require(event.event == event.frame["e"], f"the event is called {event.event}", event.frame)
        wanted = f"{held.ep}:{event.frame['seq']}"
        require(event.id == wanted, f"the id of this event is {wanted}, not {event.id}", event.frame)
        held.take(event.frame)
    held.assert_sound()
    oracle.assert_sound()
    same_messages(oracle, held)


@section.check()
async def sse_begins_with_a_snapshot(bench: Bench) -> None:
    """Without `since` the stream begins with `snap`, whose last part has the id; an id read here resumes a socket."""
    _, oracle, turn = await turn_of(bench, SHORT)
    async with bench.rest().events("GET", _path(oracle.channel), patience_s=bench.patience_s) as stream:
        events = await read_events(stream, count=1)
        while events[-1].frame["more"]:
            events += await read_events(stream, count=1)
    fresh = Oracle(oracle.channel)
    for event in events:
        require(event.event == "snap", f"the stream begins with `snap`, not {event.event}", event.frame)
        whole = not event.frame["more"]
        require((event.id is not None) == whole, "only the last part has an id", event.frame)
        fresh.take(event.frame)
    require(events[-1].id == f"{oracle.ep}:{oracle.last}", f"the id says the position: {events[-1].id}")
    same_messages(oracle, fresh)
    peer = await bench.join()
    subbed, _ = await bench.subscribe(peer, oracle.channel, oracle=fresh)
    require(subbed["why"] == "ok", "the position of a stream holds on a socket", subbed)
    require(turn.reply in fresh.messages, "the reply is in it")


@section.check()
async def last_event_id_beats_since(bench: Bench) -> None:
    """`Last-Event-ID` is where a stream goes on, whatever `since` says."""
    _, oracle, _ = await turn_of(bench, SHORT)
    held = oracle.fork(positions(oracle)[1])
    async with bench.rest().events(
        "GET", _path(oracle.channel), params={"since": f"{oracle.ep}:0"}, patience_s=bench.patience_s,
        headers={"Last-Event-ID": f"{oracle.ep}:{held.last}"},
    ) as stream:  # fmt: skip
        first = (await read_events(stream, count=1))[0]
    lo = first.frame.get("from", first.frame.get("seq"))
    require(lo == (held.last or 0) + 1, f"the stream begins at {lo} and not after {held.last}", first.frame)


@section.check()
async def sse_is_404_before_the_stream(bench: Bench) -> None:
    """A channel that cannot be seen is 404 and no stream; without a credential it is 401."""
    rest = bench.rest()
    await rest.call("GET", _path(f"conversation:{uuid4()}"), expect=404)
    await rest.call("GET", _path("no-such-kind:1"), expect=404)
    await bench.stranger().call("GET", _path("user:me"), expect=401)


# -- merging -------------------------------------------------------------------------------------------------------


@merging.check()
async def only_deltas_of_one_part(bench: Bench) -> None:
    """A merged range stands for neighbouring deltas of one part and nothing else, and has exactly their text."""
    peer, reference, _ = await turn_of(bench)
    merged = 0
    for position in positions(reference, most=12):
        await peer.send("sub", id="again", ch=reference.channel, since={"ep": reference.ep, "seq": position})
        while (frame := await peer.receive("the rest of the replay"))["t"] != "live":
            if frame["t"] == "ev" and "from" in frame:
                merged += 1
                _compare(frame, reference.applied)
    if not merged:
        raise Skipped("nothing was merged: choose a longer --prompt")


def _compare(frame: Frame, singles: list[Applied]) -> None:
    lo, seq, d = frame["from"], frame["seq"], frame["d"]
    require(frame["e"] == "reply.delta", f"{lo} to {seq} is a {frame['e']}: only deltas may be merged", frame)
    size = len(str(frame).encode())
    require(size <= 2 * _MERGED_BYTES and len(d["x"].encode()) <= _MERGED_BYTES, f"it has {size} bytes", frame["seq"])
    for one in singles:
        if not lo <= one.seq <= seq:
            continue
        shown = {"seq": one.seq, "e": one.e, "d": one.d}
        require(one.e == "reply.delta", f"{lo} to {seq} swallowed event {one.seq}, which is a {one.e}", frame, shown)
        same = (one.d["reply"], one.d["part"]) == (d["reply"], d["part"])
        require(same, f"{lo} to {seq} joins deltas of two parts", frame, shown)
        if one.lo >= lo:
            at = one.d["off"] - d["off"]
            text = d["x"][at : at + len(one.d["x"])]
            require(at >= 0 and text == one.d["x"], f"{lo} to {seq} has another text than {one.seq}", frame, shown)


@merging.check()
async def offsets_fit(bench: Bench) -> None:
    """`off` of each delta, merged or not, is the number of code points before it, for text of any script."""
    peer, oracle, turn = await turn_of(bench, "Repeat after me: ärger 数学 🧮🧮 e\u0301 конец")
    held = oracle.fork(positions(oracle)[0])
    await bench.subscribe(peer, oracle.channel, oracle=held)
    held.assert_sound()
    require(held.text(turn.reply) == oracle.text(turn.reply), "merged and single deltas give the same text")
