"""Sending: the same key has one effect, and a second message waits, is refused or interrupts."""

import asyncio
from itertools import pairwise
from uuid import uuid4

from parley.conformance.bench import SHORT, Bench
from parley.conformance.checks.resume import read_events
from parley.conformance.errors import require
from parley.conformance.oracle import Applied, visible_text
from parley.conformance.section import Section
from parley.conformance.transcript import Frame
from parley.conformance.wire import Peer, not_now

idempotency = Section("idempotency")
queueing = Section("queueing")

_TOGETHER = 8


def _text(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _path(channel: str) -> str:
    return f"/api/v1/conversations/{channel.partition(':')[2]}/messages"


@idempotency.check()
async def send_is_answered_with_ids(bench: Bench) -> None:
    """A send is answered with the ids of its message and its reply, and both are in the log with its `cid`."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel, SHORT)
    await bench.finish(peer, oracle, turn.reply)
    created = [event for event in oracle.applied if event.e == "message.created"]
    require([event.d["id"] for event in created] == [turn.message, turn.reply], "two messages are made", created)
    require(created[0].d.get("cid") == turn.cid, "the question has the `cid` of its send", created[0].d)
    require(visible_text(created[0].d) == SHORT, "the question is what was sent", created[0].d)


@idempotency.check()
async def same_cid_same_ids(bench: Bench) -> None:
    """The same send from several connections at once, and later again: the same ids, one message, one reply."""
    channel = await bench.conversation()
    peers = [await bench.join() for _ in range(2)]
    _, oracle = await bench.subscribe(peers[0], channel)
    cid = str(uuid4())
    ids = [(peer, peer.next_id()) for peer in peers for _ in range(_TOGETHER // 2)]
    sends = (peer.send("chat.send", id=id_, ch=channel, cid=cid, parts=_text(SHORT)) for peer, id_ in ids)
    await asyncio.gather(*sends)
    answers = [await peer.answer(id_) for peer, id_ in ids]
    _all_the_same(answers)
    turn = bench.noted(cid, SHORT, answers[0])
    await bench.finish(peers[0], oracle, turn.reply)
    later = await bench.send(await bench.join(), channel, SHORT, cid=cid)
    require((later.message, later.reply) == (turn.message, turn.reply), "later too it has the same ids", later)
    late = [frame for frame in await peers[0].hears(for_s=0.5) if frame["t"] == "ev"]
    require(not late, "a send that came again made an event", *late[:2])
    oracle.assert_sound()
    made = [event.d["id"] for event in oracle.applied if event.e == "message.created"]
    require(made == [turn.message, turn.reply], f"one send made {len(made)} messages", made)


def _all_the_same(answers: list[Frame]) -> None:
    for answer in answers:
        not_now(answer)
        require(answer["t"] == "ok", "a send that comes again is answered as the first one", answer)
    pairs = {(answer["message"], answer["reply"]) for answer in answers}
    require(len(pairs) == 1, f"{len(answers)} sends with one `cid` got {len(pairs)} pairs of ids", *answers[:4])


@idempotency.check()
async def other_content_is_a_conflict(bench: Bench) -> None:
    """The same `cid` with another text, or for another conversation, is `err conflict`."""
    channel, other = await bench.conversation(), await bench.conversation()
    peer = await bench.join()
    turn = await bench.send(peer, channel, SHORT)
    await peer.refused("conflict", "chat.send", ch=channel, cid=turn.cid, parts=_text("Something else."))
    await peer.refused("conflict", "chat.send", ch=other, cid=turn.cid, parts=_text(SHORT))
    require(await bench.messages(other) == [], "nothing of it is stored")


@idempotency.check()
async def key_of_http_is_the_cid(bench: Bench) -> None:
    """`Idempotency-Key` is the `cid`: a send over HTTP and one over the socket with one key are one send."""
    channel = await bench.conversation()
    peer = await bench.join()
    turn = await bench.send(peer, channel, SHORT)
    rest = bench.rest()
    again = await rest.call(
        "POST", _path(channel), expect=(200, 202), body={"text": SHORT}, headers={"Idempotency-Key": turn.cid}
    )
    ids = (again["message"]["id"], again["reply"]["id"])
    require(ids == (turn.message, turn.reply), f"over HTTP it got other ids: {ids}")
    key = str(uuid4())
    first = await rest.call(
        "POST", _path(channel), expect=(200, 202), body={"text": SHORT}, headers={"Idempotency-Key": key}
    )
    second = await bench.send(peer, channel, SHORT, cid=key)
    require(second.reply == first["reply"]["id"], "over the socket it got another reply", second)
    await rest.call(
        "POST", _path(channel), expect=(409, 422), body={"text": "Something else."}, headers={"Idempotency-Key": key}
    )


@idempotency.check()
async def turn_as_events(bench: Bench) -> None:
    """A send that asks for events gets its turn from the question to the end; the same key replays the same ids."""
    channel = await bench.conversation()
    key = str(uuid4())
    headers = {"Idempotency-Key": key}
    async with bench.rest().events(
        "POST", _path(channel), body={"text": SHORT}, headers=headers, patience_s=bench.patience_s
    ) as stream:
        first = await read_events(stream, count=1)
        reply = (await read_events(stream, count=1))[0]
        first += [reply, *await read_events(stream, reply=reply.frame["d"]["id"])]
        require(await stream.receive("the end") is None, "the stream ends with the end of its reply")
    require(first[0].event == "message.created" and first[0].frame["d"]["cid"] == key, "it begins with the question")
    require(first[-1].event.startswith("reply."), "it ends with the reply's end", first[-1].frame)
    async with bench.rest().events(
        "POST", _path(channel), body={"text": SHORT}, headers=headers, patience_s=bench.patience_s
    ) as stream:
        again = await read_events(stream, reply=reply.frame["d"]["id"])
    ids = [event.id for event in first]
    strange = [event.frame for event in again if event.id not in ids and "from" not in event.frame]
    require(not strange, "the replay has an id that the first stream had not", *strange[:1])
    require((again[0].id, again[-1].id) == (ids[0], ids[-1]), "the replay is not the same stretch of the log")


# -- queueing ------------------------------------------------------------------------------------------------------


@queueing.check()
async def second_message_waits(bench: Bench) -> None:
    """Messages that come while a reply is being written wait in their order: `reply.queued` says at which place."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    first = await bench.send(peer, channel)
    waiting = [await bench.send(peer, channel, SHORT) for _ in range(2)]
    await bench.started(peer, oracle, first.reply)
    await peer.ask("reply.cancel", reply=first.reply)
    for turn in (first, *waiting):
        await bench.finish(peer, oracle, turn.reply)
    oracle.assert_sound()
    require(not [one for one in oracle.of(first.reply) if one.e == "reply.queued"], "the first one does not wait")
    places = [one.d for turn in waiting for one in oracle.of(turn.reply) if one.e == "reply.queued"]
    require([one["pos"] for one in places] == [1, 2], "the second waits at place 1, the third at 2", *places)
    require([one["to"] for one in places] == [turn.message for turn in waiting], "`to` is the question", *places)
    _one_after_the_other(oracle.applied, [turn.reply for turn in (first, *waiting)])


def _one_after_the_other(applied: list[Applied], replies: list[str]) -> None:
    for before, after in pairwise(replies):
        end = max(one.seq for one in applied if one.d.get("reply") == before)
        begun = [one.seq for one in applied if one.e == "reply.started" and one.d["reply"] == after]
        require(len(begun) == 1, "a reply that waited is started once")
        require(begun[0] > end, f"a reply began at {begun[0]}, and the one before it ended at {end}")


@queueing.check()
async def reject_stores_nothing(bench: Bench) -> None:
    """`on_active: reject` while a reply is being written is `err active_reply`, and leaves no trace."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel)
    await bench.started(peer, oracle, turn.reply, deltas=1)
    cid = str(uuid4())
    await peer.refused("active_reply", "chat.send", ch=channel, cid=cid, parts=_text(SHORT), on_active="reject")
    await peer.ask("reply.cancel", reply=turn.reply)
    await bench.finish(peer, oracle, turn.reply)
    require(len(await bench.messages(channel)) == 2, "a message that was rejected is stored")
    # Its key had no effect: the same send is taken once nothing is in its way.
    again = await bench.send(peer, channel, SHORT, cid=cid, on_active="reject")
    await bench.finish(peer, oracle, again.reply)


@queueing.check()
async def interrupt_cancels(bench: Bench) -> None:
    """`on_active: interrupt` cancels the reply that is being written, keeps its text, and is answered next."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    first = await bench.send(peer, channel)
    await bench.started(peer, oracle, first.reply)
    second = await bench.send(peer, channel, SHORT, on_active="interrupt")
    end = await bench.finish(peer, oracle, first.reply)
    require(end["e"] == "reply.cancelled", "the first reply is cancelled", end)
    require(end["d"]["len"] > 0, "what it had written is kept", end)
    await bench.finish(peer, oracle, second.reply)
    oracle.assert_sound()
    _one_after_the_other(oracle.applied, [first.reply, second.reply])


@queueing.check()
async def answer_and_events_name_the_same(bench: Bench) -> None:
    """Two connections that send to one conversation at once both get a turn of their own, one after the other."""
    channel = await bench.conversation()
    peers = [await bench.join() for _ in range(2)]
    _, oracle = await bench.subscribe(peers[0], channel)
    turns = await asyncio.gather(*(_send(bench, peer, channel) for peer in peers))
    for turn in turns:
        await bench.finish(peers[0], oracle, turn)
    oracle.assert_sound()
    begun = [one.d["reply"] for one in oracle.applied if one.e == "reply.started"]
    require(sorted(begun) == sorted(turns), "each reply is started once", begun)
    _one_after_the_other(oracle.applied, begun)


async def _send(bench: Bench, peer: Peer, channel: str) -> str:
    return (await bench.send(peer, channel, SHORT)).reply
