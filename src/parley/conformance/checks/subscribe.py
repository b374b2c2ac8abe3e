"""What a `sub` is answered with (section 2 of the protocol)."""

from collections.abc import Callable

from parley.conformance.bench import SHORT, Bench, Turn
from parley.conformance.errors import require
from parley.conformance.oracle import Oracle, visible_text
from parley.conformance.section import Section
from parley.conformance.transcript import Frame, show
from parley.conformance.wire import Peer

section = Section("subscribe")

_PART_BYTES = 64 * 1024
# Two bytes each: 40 KB a message.
_LARGE = 20_000
_POSITIONS = 24


async def turn_of(bench: Bench, text: str | None = None) -> tuple[Peer, Oracle, Turn]:
    """Have one turn from its first event to its last; the long one unless told."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel, text)
    await bench.finish(peer, oracle, turn.reply)
    oracle.assert_sound()
    return peer, oracle, turn


def positions(oracle: Oracle, *, most: int = _POSITIONS) -> list[int]:
    """Return positions at which a client may have stood: ends of what it was sent, from the first to the last."""
    ends = [oracle.applied[0].lo - 1, *(event.seq for event in oracle.applied)]
    step = max(1, -(-len(ends) // most))
    return sorted({*ends[::step], *ends[:3], *ends[-2:]})


def same_messages(one: Oracle, other: Oracle) -> None:
    """Require that two clients hold the same."""
    for id_, message in one.messages.items():
        held = other.messages.get(id_)
        require(held is not None, f"one client has message {id_} and the other has not")
        assert held is not None
        require(
            (visible_text(held), held["status"]) == (visible_text(message), message["status"]),
            "two clients that are at the same position hold different messages",
            show(message),
            show(held),
        )


@section.check()
async def without_since_is_a_snapshot(bench: Bench) -> None:
    """Without `since`: `subbed` (initial), the state as REST has it, `live`; then what happens from there."""
    peer, oracle, turn = await turn_of(bench, SHORT)
    again = await bench.join()
    subbed, fresh = await bench.subscribe(again, oracle.channel)
    require((subbed["why"], subbed["recovered"]) == ("initial", False), "a snapshot was asked for", subbed)
    fresh.assert_sound()
    require(fresh.snapshots == 1, f"there must be one snapshot, there were {fresh.snapshots}", subbed)
    require("conversation" in fresh.state, "the state of a conversation has `conversation`", fresh.state)
    stored = {message["id"]: message for message in await bench.messages(oracle.channel)}
    require(list(stored) == list(fresh.messages), "the snapshot has the messages that REST has, in their order")
    for id_, message in stored.items():
        require(
            fresh.messages[id_]["parts"] == message["parts"], "a message in the snapshot differs from REST", message
        )
    same_messages(oracle, fresh)
    following = await bench.send(peer, oracle.channel, SHORT)
    await bench.finish(again, fresh, following.reply)
    fresh.assert_sound()
    require(turn.reply in fresh.messages, "the first reply is still there")


@section.check()
async def subbed_is_whole(bench: Bench) -> None:
    """`subbed` says where the channel stands; `recovered` is true where `why` is ok and nowhere else."""
    peer, oracle, _ = await turn_of(bench, SHORT)
    for since in (None, oracle.since, {"ep": oracle.ep, "seq": 0}, {"ep": "another", "seq": 0}, {"seq": -1}):
        wanted: Frame = {"ch": oracle.channel} if since is None else {"ch": oracle.channel, "since": since}
        subbed = await peer.ask("sub", **wanted)
        require(subbed["t"] == "subbed" and subbed["mode"] == "log", "a conversation is a `log` channel", subbed)
        require(0 <= subbed["floor"] <= subbed["head"], "0 ≤ floor ≤ head", subbed)
        require(subbed["head"] == oracle.last, f"the head is {oracle.last}", subbed)
        require(subbed["ep"] == oracle.ep, "the epoch of a channel stays the same", subbed)
        require(subbed["recovered"] == (subbed["why"] == "ok"), "recovered goes with `ok`", subbed)
        await peer.until("live")


@section.check()
async def since_is_exact(bench: Bench) -> None:
    """With `since`: every event after it, none before it and none twice, wherever the client stood."""
    peer, reference, turn = await turn_of(bench)
    for position in positions(reference):
        held = reference.fork(position)
        subbed, _ = await bench.subscribe(peer, reference.channel, oracle=held)
        if subbed["floor"] > position:
            continue
        require(subbed["why"] == "ok", f"a client at {position} of {reference.last} must get a replay", subbed)
        require(not held.snapshots, f"a client at {position} was promised a replay and got a snapshot", subbed)
        held.assert_sound()
        require(held.last == reference.last, f"the replay after {position} ends at {held.last}, not {reference.last}")
        require(held.text(turn.reply) == reference.text(turn.reply), f"after {position} the text is another one")


@section.check()
async def since_the_head_is_live_at_once(bench: Bench) -> None:
    """A client that has missed nothing gets `subbed` (ok) and `live`, and nothing between."""
    peer, oracle, _ = await turn_of(bench, SHORT)
    subbed = await peer.ask("sub", ch=oracle.channel, since=oracle.since)
    require(subbed["why"] == "ok", "it has missed nothing", subbed)
    frame = await peer.receive("`live`")
    require((frame["t"], frame["seq"]) == ("live", oracle.last), "the next frame is `live`", frame)


@section.check()
async def minus_one_is_live_only(bench: Bench) -> None:
    """`since` with seq -1: no snapshot and no replay, `live` with the head, and then what happens."""
    peer, oracle, _ = await turn_of(bench, SHORT)
    subbed = await peer.ask("sub", ch=oracle.channel, since={"seq": -1})
    frame = await peer.receive("`live`")
    require((frame["t"], frame["seq"]) == ("live", subbed["head"]), "`live` with the head is next", subbed, frame)
    turn = await bench.send(peer, oracle.channel, SHORT)
    first = await peer.until("ev")
    require(first.get("from", first["seq"]) == subbed["head"] + 1, "then comes the first event after it", first)
    oracle.take(first)
    await bench.finish(peer, oracle, turn.reply)
    oracle.assert_sound()


@section.check()
async def another_epoch_is_a_snapshot(bench: Bench) -> None:
    """A `since` above the head, or of another epoch, is answered with a snapshot whose `why` is epoch."""
    peer, oracle, _ = await turn_of(bench, SHORT)
    assert oracle.last is not None
    for since in ({"ep": oracle.ep, "seq": oracle.last + 1}, {"ep": f"{oracle.ep}x", "seq": oracle.last}):
        subbed, fresh = await bench.subscribe(peer, oracle.channel, since=since)
        require((subbed["why"], subbed["recovered"]) == ("epoch", False), "its position does not hold here", subbed)
        require(fresh.snapshots == 1, "it gets a snapshot", subbed)
        fresh.assert_sound()
        same_messages(oracle, fresh)


@section.check()
async def live_ends_every_answer(bench: Bench) -> None:
    """Each `sub` is answered to its end with one `live`, which says the position that was reached."""
    peer, oracle, _ = await turn_of(bench, SHORT)
    for since in (None, {"ep": oracle.ep, "seq": 1}, oracle.since, {"seq": -1}, {"ep": "another", "seq": 1}):
        wanted: Frame = {"ch": oracle.channel} if since is None else {"ch": oracle.channel, "since": since}
        await peer.ask("sub", **wanted)
        live = await peer.until("live", f"the `live` of a `sub` with since {since}")
        require(live["seq"] == oracle.last, f"`live` says {oracle.last}", live)
        # A heartbeat comes when it comes.
        more = [frame for frame in await peer.hears(for_s=0.15) if frame["t"] != "hb"]
        require(not more, "`live` is the last frame of the answer, and comes once", *more[:2])


@section.check()
async def snapshot_of_a_running_reply(bench: Bench) -> None:
    """Who comes in mid-reply gets it as it stands, `streaming` with its parts so far, and goes on without a gap."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel)
    await bench.started(peer, oracle, turn.reply)
    late = await bench.join()
    subbed, held = await bench.subscribe(late, channel)
    running = held.messages.get(turn.reply)
    require(running is not None, "the reply that is being written is in the snapshot", subbed)
    assert running is not None
    if turn.reply not in held.ended and running["status"] != "completed":
        require(running["status"] == "streaming", "a reply that is being written is `streaming`", running)
        require(held.text(turn.reply), "what was written before the snapshot is in it", running)
        await bench.finish(late, held, turn.reply)
    await bench.finish(peer, oracle, turn.reply)
    oracle.assert_sound()
    held.assert_sound()
    same_messages(oracle, held)


@section.check()
async def snapshot_comes_in_parts(bench: Bench) -> None:
    """The parts of a large snapshot count from 0, are at most 64 KiB, and join to the whole."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    for letter in "абв":
        turn = await bench.send(peer, channel, letter * _LARGE)
        await bench.finish(peer, oracle, turn.reply)
    fresh = Oracle(channel)
    await peer.send("sub", id="large", ch=channel)
    sizes: list[int] = []
    while (frame := await peer.receive("the rest of the snapshot"))["t"] != "live":
        fresh.take(frame)
        if frame["t"] == "snap":
            size = len(show(frame, length=10**9).encode())
            alone = sum(len(value) for value in frame["state"].values() if isinstance(value, list)) <= 1
            require(size <= _PART_BYTES or alone, f"a part of a snapshot has {size} bytes", frame)
            sizes.append(size)
    fresh.assert_sound()
    require(len(sizes) > 1, f"three messages of 40 KB came in {len(sizes)} part", *sizes)
    same_messages(oracle, fresh)


@section.check()
async def inbox_tells_of_conversations(bench: Bench) -> None:
    """`user:me` has the newest conversations, and tells of one that is made and deleted."""
    peer = await bench.join()
    subbed, oracle = await bench.subscribe(peer, "user:me")
    require(subbed["ch"] == "user:me", "the inbox is called `user:me` by its owner", subbed)
    require(isinstance(oracle.state.get("conversations"), list), "its state lists conversations", oracle.state)
    require(isinstance(oracle.state.get("jobs"), list), "its state lists unfinished jobs", oracle.state)
    channel = await bench.conversation()
    id_ = channel.partition(":")[2]

    def tells(e: str) -> Callable[[Frame], bool]:
        return lambda frame: frame["t"] == "ev" and frame["e"] == e and frame["d"]["id"] == id_

    await bench.follow(peer, oracle, tells("conversation.created"), "`conversation.created`")
    watching = await bench.join()
    await bench.subscribe(watching, channel)
    await bench.rest().call("DELETE", f"/api/v1/conversations/{id_}", expect=204)
    await bench.follow(peer, oracle, tells("conversation.deleted"), "`conversation.deleted`")
    gone = await watching.until("unsubbed")
    require(gone["ch"] == channel, "who was subscribed to it is told `unsubbed`", gone)
    oracle.assert_sound()
