"""What bounds one connection."""

from uuid import uuid4

from parley.conformance.bench import Bench
from parley.conformance.errors import Failed, Skipped, require
from parley.conformance.section import Section
from parley.conformance.transcript import Frame
from parley.conformance.wire import Closed

section = Section("limits")

_MOST_SUBS = 400
_MOST_RATE = 200
_HELLO_ROOM = 110
_FLOOD = 2_000
_AT_ONCE = 20


@section.check(limit_s=30)
async def too_many_subscriptions(bench: Bench) -> None:
    """One subscription more than `welcome.limits.subs` is `err limit_subs`; after an `unsub` there is room again."""
    limit = (await bench.join()).welcome["limits"]["subs"]
    if limit > _MOST_SUBS:
        raise Skipped(f"the server takes {limit} subscriptions, more than is made for this")
    channels = [await bench.conversation() for _ in range(limit + 1)]
    # Most in `hello`, where there is room for them; the rest within the burst that a connection may send.
    subs: list[Frame] = [{"ch": channel} for channel in channels[: min(limit, _HELLO_ROOM)]]
    peer = await bench.join(subs=subs)
    rest = channels[len(subs) : limit]
    for number, channel in enumerate(rest):
        await peer.ask("sub", ch=channel)
        if number % 20 == 19:
            await peer.hears(for_s=1.1)
    answer = await peer.refused("limit_subs", "sub", ch=channels[-1])
    require(answer.get("ch") == channels[-1], "the `err` names the channel", answer)
    # What is subscribed already takes no more room, and room that is given back can be taken.
    await peer.ask("sub", ch=channels[0])
    await peer.ask("unsub", ch=channels[0])
    await peer.ask("sub", ch=channels[-1])


@section.check(limit_s=30)
async def too_many_frames(bench: Bench) -> None:
    """Frames beyond the burst are `err rate_limited` and say when to come back; who does not stop is closed, 4429."""
    peer = await bench.join()
    rate = peer.welcome["limits"]["rate"]
    if rate > _MOST_RATE:
        raise Skipped(f"the server takes {rate} frames a second, more than is sent for this")
    channel = f"conversation:{uuid4()}"
    said: list[Frame] = []
    try:
        for start in range(0, _FLOOD, _AT_ONCE):
            for number in range(start, start + _AT_ONCE):
                await peer.send("unsub", id=number, ch=channel)
            said += [await peer.answer(number) for number in range(start, start + _AT_ONCE)]
    except Closed as closed:
        require(closed.code == 4429, f"too many frames must close with 4429; it closed with {closed.code}")
    else:
        raise Failed(f"{_FLOOD} frames in a row were answered; the connection must close with 4429")
    served = [frame for frame in said if frame.get("code") == "not_found"]
    refused = [frame for frame in said if frame.get("code") == "rate_limited"]
    require(len(served) >= rate, f"only {len(served)} frames were served before that, fewer than in a second")
    require(refused, "no frame was answered with `rate_limited` before that", *said[-2:])
    for frame in refused:
        require(frame["retry"] == "backoff" and frame["retry_after_ms"] > 0, "it says when to come back", frame)


@section.check()
async def rate_recovers(bench: Bench) -> None:
    """A connection that was over its rate and waits as it was told is served again."""
    peer = await bench.join()
    rate = peer.welcome["limits"]["rate"]
    if rate > _MOST_RATE:
        raise Skipped(f"the server takes {rate} frames a second, more than is sent for this")
    channel = f"conversation:{uuid4()}"
    ids = list(range(1_000, 1_000 + 4 * rate))
    for id_ in ids:
        await peer.send("unsub", id=id_, ch=channel)
    refused = [answer for id_ in ids if (answer := await peer.answer(id_)).get("code") == "rate_limited"]
    require(refused, f"{len(ids)} frames at once are all answered, at a rate of {rate}")
    await peer.hears(for_s=max(frame["retry_after_ms"] for frame in refused) / 1000 + 0.2)
    await peer.refused("not_found", "unsub", ch=channel)
