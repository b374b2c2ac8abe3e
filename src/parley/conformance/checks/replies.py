"""A reply's life: stopped, continued, answered once more, and ended exactly once."""

import time
from uuid import uuid4

from parley.conformance.bench import SHORT, Bench
from parley.conformance.checks.subscribe import turn_of
from parley.conformance.errors import Skipped, require
from parley.conformance.oracle import TERMINAL, Oracle, visible_text
from parley.conformance.section import Section
from parley.conformance.transcript import Frame
from parley.conformance.wire import Peer

cancel = Section("cancel")
again = Section("again")
termination = Section("termination")

_STOPS_S = 2.0


def one_end(oracle: Oracle, reply: str) -> Frame:
    """Return the terminal event of a reply, which must be its last and its only one."""
    oracle.assert_sound()
    events = oracle.of(reply)
    ends = [event for event in events if event.e in TERMINAL]
    require(len(ends) == 1, f"a reply ended {len(ends)} times", *[{"e": end.e, "seq": end.seq} for end in ends])
    require(events[-1] is ends[0], f"{events[-1].e} came after the end of its reply")
    return oracle.ended[reply]


async def _cut_short(bench: Bench) -> tuple[Peer, Oracle, str, Frame]:
    """Stop a long reply in mid-stream."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel)
    await bench.started(peer, oracle, turn.reply)
    await peer.ask("reply.cancel", reply=turn.reply)
    stopped_at = time.monotonic()
    end = await bench.finish(peer, oracle, turn.reply)
    if end["e"] == "reply.completed":
        took_s = time.monotonic() - stopped_at
        require(took_s < _STOPS_S, f"a reply went on for {took_s:.1f} s after the `ok` of its cancel", end)
        raise Skipped("the reply ended before it could be stopped: choose a longer --prompt")
    return peer, oracle, turn.reply, end


# -- cancel --------------------------------------------------------------------------------------------------------


@cancel.check()
async def in_mid_stream_keeps_the_text(bench: Bench) -> None:
    """A cancel in mid-stream ends the reply as cancelled, with what was written until then, for good."""
    peer, oracle, reply, _ = await _cut_short(bench)
    await bench.listen(peer, oracle, for_s=0.5)
    end = one_end(oracle, reply)
    require(end["e"] == "reply.cancelled", "a reply that was stopped is `cancelled`", end)
    d = end["d"]
    require(d["by"] == peer.welcome["user"], "`by` is who stopped it", end)
    require(d["partial"] is True and d["len"] > 0, "its text is partial, and kept", end)
    stored = await bench.message(oracle.channel, reply)
    require(stored["status"] == "cancelled", f"REST says it is {stored['status']}", stored)
    require(visible_text(stored) == oracle.text(reply), "REST has another text than the events gave", stored)


@cancel.check()
async def before_the_start(bench: Bench) -> None:
    """A reply that waits is cancelled without ever beginning, and those beside it are not touched."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    first = await bench.send(peer, channel)
    second = await bench.send(peer, channel, SHORT)
    third = await bench.send(peer, channel, SHORT)
    await peer.ask("reply.cancel", reply=second.reply)
    end = await bench.finish(peer, oracle, second.reply)
    require(end["e"] == "reply.cancelled" and end["d"]["len"] == 0, "it is cancelled, with no text", end)
    await peer.ask("reply.cancel", reply=first.reply)
    await bench.finish(peer, oracle, first.reply)
    last = await bench.finish(peer, oracle, third.reply)
    require(last["e"] == "reply.completed", "the one behind it is answered", last)
    one_end(oracle, second.reply)
    begun = [event for event in oracle.of(second.reply) if event.e in {"reply.started", "reply.delta"}]
    require(not begun, "a reply that was cancelled while it waited was begun", *[event.d for event in begun])


@cancel.check()
async def twice_is_once(bench: Bench) -> None:
    """A second cancel, at once or over HTTP, is answered like the first; the reply ends once."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel)
    await bench.started(peer, oracle, turn.reply, deltas=1)
    ids = [peer.next_id() for _ in range(3)]
    for id_ in ids:
        await peer.send("reply.cancel", id=id_, reply=turn.reply)
    for id_ in ids:
        answer = await peer.answer(id_)
        require(answer["t"] == "ok", "each cancel is answered with `ok`", answer)
    await bench.rest().call("POST", f"/api/v1/replies/{turn.reply}/cancel", expect=(200, 202))
    await bench.finish(peer, oracle, turn.reply)
    await bench.listen(peer, oracle, for_s=0.5)
    one_end(oracle, turn.reply)


@cancel.check()
async def after_the_end_changes_nothing(bench: Bench) -> None:
    """A cancel of a reply that has ended is `ok`, and the reply stays as it is."""
    peer, oracle, turn = await turn_of(bench, SHORT)
    await peer.ask("reply.cancel", reply=turn.reply)
    late = [frame for frame in await peer.hears(for_s=0.5) if frame["t"] == "ev"]
    require(not late, "a cancel after the end made an event", *late[:2])
    stored = await bench.message(oracle.channel, turn.reply)
    require(stored["status"] == "completed", f"it is {stored['status']} now", stored)


@cancel.check()
async def over_http(bench: Bench) -> None:
    """`POST /replies/{id}/cancel` stops a reply as the frame does."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel)
    await bench.started(peer, oracle, turn.reply, deltas=1)
    await bench.rest().call("POST", f"/api/v1/replies/{turn.reply}/cancel", expect=(200, 202))
    end = await bench.finish(peer, oracle, turn.reply)
    require(end["e"] == "reply.cancelled", "it is cancelled", end)


@cancel.check()
async def of_nothing_is_not_found(bench: Bench) -> None:
    """A cancel of a reply that does not exist is `err not_found`, over HTTP 404."""
    peer = await bench.join()
    await peer.refused("not_found", "reply.cancel", reply=str(uuid4()))
    await bench.rest().call("POST", f"/api/v1/replies/{uuid4()}/cancel", expect=404)


@cancel.check()
async def leaving_is_none(bench: Bench) -> None:
    """A client that goes away stops nothing: its reply is written to the end without it."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel)
    await bench.started(peer, oracle, turn.reply, deltas=1)
    peer.cut()
    other = await bench.join()
    await bench.subscribe(other, channel, oracle=oracle)
    end = await bench.finish(other, oracle, turn.reply)
    require(end["e"] == "reply.completed", "a reply whose reader has gone is completed", end)
    one_end(oracle, turn.reply)


# -- continue and regenerate ---------------------------------------------------------------------------------------


@again.check()
async def continue_goes_on(bench: Bench) -> None:
    """`reply.continue` of a reply that was stopped makes a reply of its own, which ends; the old one stays."""
    peer, oracle, reply, _ = await _cut_short(bench)
    before = oracle.text(reply)
    answer = await peer.ask("reply.continue", reply=reply, cid=str(uuid4()))
    require(answer["reply"] not in {reply, None}, "the new reply has an id of its own", answer)
    turn = bench.noted("", "", answer)
    await peer.ask("reply.cancel", reply=turn.reply)
    await bench.finish(peer, oracle, turn.reply)
    one_end(oracle, turn.reply)
    one_end(oracle, reply)
    stored = await bench.message(oracle.channel, reply)
    require(visible_text(stored) == before, "the reply that was continued has another text now", stored)


@again.check()
async def regenerate_answers_once_more(bench: Bench) -> None:
    """`reply.regenerate` answers the same question beside the first answer, which stays."""
    peer, oracle, turn = await turn_of(bench, SHORT)
    first = oracle.text(turn.reply)
    answer = await peer.ask("reply.regenerate", reply=turn.reply, cid=str(uuid4()))
    require(answer["message"] == turn.message, "`message` is the question", answer)
    require(answer["reply"] != turn.reply, "the new reply has an id of its own", answer)
    await bench.finish(peer, oracle, answer["reply"])
    one_end(oracle, answer["reply"])
    new = await bench.message(oracle.channel, answer["reply"])
    require(new["parent_id"] == turn.message, "both answers belong to the question", new)
    old = await bench.message(oracle.channel, turn.reply)
    require(visible_text(old) == first, "the first answer has another text now", old)
    questions = [one for one in oracle.applied if one.e == "message.created" and one.d["role"] == "user"]
    require(len(questions) == 1, "the question was asked once more in the log", *[one.d for one in questions])


@again.check()
async def same_cid_same_reply(bench: Bench) -> None:
    """The same `cid` again, over the socket or as `Idempotency-Key`, gives the same reply; another one another."""
    peer, oracle, turn = await turn_of(bench, SHORT)
    for verb in ("regenerate", "continue"):
        cid = str(uuid4())
        first = await peer.ask(f"reply.{verb}", reply=turn.reply, cid=cid)
        second = await peer.ask(f"reply.{verb}", reply=turn.reply, cid=cid)
        require((first["message"], first["reply"]) == (second["message"], second["reply"]), verb, first, second)
        path = f"/api/v1/replies/{turn.reply}/{verb}"
        third = await bench.rest().call("POST", path, expect=(200, 201, 202), headers={"Idempotency-Key": cid})
        require(third["reply"]["id"] == first["reply"], f"over HTTP it is another reply: {third['reply']['id']}", first)
        await bench.finish(peer, oracle, first["reply"])
    fresh = await peer.ask("reply.regenerate", reply=turn.reply, cid=str(uuid4()))
    require(fresh["reply"] not in {first["reply"], turn.reply}, "another `cid` makes another reply", fresh)
    await bench.finish(peer, oracle, fresh["reply"])
    oracle.assert_sound()


@again.check()
async def while_it_is_written_is_refused(bench: Bench) -> None:
    """A reply that is still being written can be neither continued nor answered once more."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel)
    await bench.started(peer, oracle, turn.reply, deltas=1)
    for verb in ("continue", "regenerate"):
        answer = await peer.request(f"reply.{verb}", reply=turn.reply, cid=str(uuid4()))
        require(answer.get("code") in {"active_reply", "conflict"}, "it must be refused", answer)


@again.check()
async def of_nothing_is_not_found_either(bench: Bench) -> None:
    """`reply.continue` and `reply.regenerate` of what does not exist are `err not_found`."""
    peer = await bench.join()
    for verb in ("continue", "regenerate"):
        await peer.refused("not_found", f"reply.{verb}", reply=str(uuid4()), cid=str(uuid4()))


# -- termination ---------------------------------------------------------------------------------------------------


@termination.check()
async def nothing_follows_the_end(bench: Bench) -> None:
    """A reply ends exactly once, and neither live nor in a replay anything of it follows."""
    peer, oracle, turn = await turn_of(bench)
    await bench.listen(peer, oracle, for_s=1)
    one_end(oracle, turn.reply)
    replayed = oracle.fork(oracle.applied[0].lo - 1)
    await bench.subscribe(peer, oracle.channel, oracle=replayed)
    one_end(replayed, turn.reply)


@termination.check()
async def end_carries_the_whole(bench: Bench) -> None:
    """The terminal event has the whole message, as REST has it, with `len` and `sha256` of its text."""
    _, oracle, turn = await turn_of(bench)
    end = one_end(oracle, turn.reply)
    stored = await bench.message(oracle.channel, turn.reply)
    whole = end["d"]["message"]
    for field in ("id", "role", "status", "parts", "model", "parent_id"):
        require(whole.get(field) == stored[field], f"`message.{field}` differs from REST", whole.get(field), stored)
    require("usage" in end["d"] and "cost" in end["d"], "usage and cost are told", {**end, "d": list(end["d"])})
    require(oracle.text(turn.reply) == visible_text(stored), "the deltas give another text than REST has")


@termination.check()
async def life_is_in_order(bench: Bench) -> None:
    """Question, reply (queued and empty), started, part, deltas, end: in this order, and nothing waits for nothing."""
    _, oracle, turn = await turn_of(bench)
    events = oracle.applied
    require([one.e for one in events[:2]] == ["message.created"] * 2, "two messages come first", events[0].d)
    reply = events[1].d
    require(
        (reply["id"], reply["role"], reply["status"], reply["parts"]) == (turn.reply, "assistant", "queued", []),
        "the reply is made as an empty message that is queued",
        reply,
    )
    names = [one.e for one in oracle.of(turn.reply)]
    require("reply.queued" not in names, "a reply that need not wait is not queued")
    require(names[0] == "reply.started", f"the first event of a reply is {names[0]}")
    require(names.index("reply.part") < names.index("reply.delta"), "a part begins before its first delta")
    started = oracle.of(turn.reply)[0].d
    require((started["to"], started["attempt"]) == (turn.message, 1), "it answers the question, at first try", started)
