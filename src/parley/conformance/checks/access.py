"""Who gets in, for how long, and what they cannot see."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from parley.conformance.accounts import Account
from parley.conformance.bench import SHORT, Bench
from parley.conformance.checks.subscribe import turn_of
from parley.conformance.errors import Skipped, require
from parley.conformance.section import Section

credentials = Section("credentials")
isolation = Section("isolation")

_REVOKED_S = 8.0
_LIFE_S = 4


# -- credentials ---------------------------------------------------------------------------------------------------


@credentials.check()
async def renewed_in_place(bench: Bench) -> None:
    """`auth` with a credential of the same user renews the connection, which goes on where it was."""
    channel = await bench.conversation()
    peer = await bench.join()
    _, oracle = await bench.subscribe(peer, channel)
    ticket = (await bench.rest().call("POST", "/api/v1/realtime/tickets", expect=201))["ticket"]
    for auth in ({"token": bench.people.first.token}, {"ticket": ticket}):
        await peer.ask("auth", auth=auth)
    turn = await bench.send(peer, channel, SHORT)
    await bench.finish(peer, oracle, turn.reply)
    oracle.assert_sound()


@credentials.check()
async def renewal_that_does_not_hold(bench: Bench) -> None:
    """`auth` with a credential that does not hold is `err unauthenticated`, then a close with 4401."""
    peer = await bench.join()
    await peer.send("auth", id="renew", auth={"token": "not.a.token"})
    said = await peer.ends_with(4401, "a renewal that does not hold")
    codes = [(frame.get("id"), frame.get("code")) for frame in said]
    require(codes == [("renew", "unauthenticated")], "before the close comes `err unauthenticated`", *said)


@credentials.check()
async def renewal_as_another_is_4403(bench: Bench) -> None:
    """`auth` with a credential of another user or workspace closes with 4403."""
    second = await bench.people.second()
    peer = await bench.join()
    await peer.send("auth", id=1, auth={"token": second.token})
    await peer.ends_with(4403, "a renewal as somebody else")


@asynccontextmanager
async def _key(bench: Bench, *, lives_s: int | None = None) -> AsyncIterator[str]:
    """Make an API key, and revoke it at the end. `lives_s` is by the server's clock."""
    rest = bench.rest()
    body: dict[str, Any] = {"name": "Conformance"}
    if lives_s is not None:
        now = (await bench.join()).welcome["now"]
        body["expires_at"] = datetime.fromtimestamp(now + lives_s, UTC).isoformat()
    made = await rest.send("POST", "/api/v1/api-keys", body=body)
    if made.status_code == 403:
        raise Skipped("this account may not make API keys")
    require(made.status_code == 201, f"an API key could not be made: {made.status_code}", made.text[:300])
    key = made.json()["data"]
    try:
        yield key["key"]
    finally:
        await rest.call("DELETE", f"/api/v1/api-keys/{key['id']}", expect=(200, 204))


@credentials.check()
async def key_opens_a_socket(bench: Bench) -> None:
    """An API key opens a socket; once it is revoked its connection ends with 4403, and it opens no other."""
    async with _key(bench) as key:
        peer = await bench.join(auth={"api_key": key})
        await peer.alive()
    await peer.ends_with(4403, "a connection whose key was revoked", within_s=_REVOKED_S)
    again = await bench.open()
    await again.send("hello", v=1, auth={"api_key": key})
    await again.ends_with(4401, "a key that was revoked")


@credentials.check()
async def expired_is_4004(bench: Bench) -> None:
    """A connection is told `auth.expiring` in the last minute of its credential, and ends with 4004 when it expires."""
    async with _key(bench, lives_s=_LIFE_S) as key:
        peer = await bench.join(auth={"api_key": key})
        welcome = peer.welcome
        expiring = await peer.until("auth.expiring")
        require(expiring["at"] == welcome["expires_at"], "`at` is when the credential expires", welcome, expiring)
        begun = time.monotonic()
        await peer.ends_with(4004, "a connection whose credential has expired", within_s=_LIFE_S + 4)
        took_s = time.monotonic() - begun
        left_s = welcome["expires_at"] - welcome["now"]
        require(took_s > left_s - 2, f"it had {left_s} s left and was closed after {took_s:.1f} s", welcome)


@credentials.check()
async def renewal_extends(bench: Bench) -> None:
    """A connection that renewed its credential in time outlives the old one."""
    async with _key(bench) as longer, _key(bench, lives_s=_LIFE_S) as key:
        peer = await bench.join(auth={"api_key": key})
        await peer.until("auth.expiring")
        await peer.ask("auth", auth={"api_key": longer})
        await peer.hears(for_s=_LIFE_S + 1)
        await peer.alive()


@credentials.check()
async def stream_ends_with_its_credential(bench: Bench) -> None:
    """An event stream ends when its credential expires, and `unsubbed` is the last that it says."""
    async with _key(bench, lives_s=_LIFE_S) as key:
        rest, path = bench.rest(Account(key)), "/api/v1/channels/user:me/events"
        async with rest.events("GET", path, patience_s=_LIFE_S + 4) as stream:
            last = None
            while (event := await stream.receive("the end of the stream")) is not None:
                last = event
    require(last is not None and last.event == "unsubbed", f"the stream ended with {last and last.event}")


@credentials.check()
async def sign_out_ends_the_connection(bench: Bench) -> None:
    """The end of a session ends its connections with 4403; those of the account's other sessions go on."""
    session = await bench.people.session(bench.people.first)
    kept, ended = await bench.join(), await bench.join(session)
    await bench.rest(session).call("POST", "/api/v1/auth/signout", expect=(200, 204), body={})
    await ended.ends_with(4403, "a connection whose session has ended", within_s=_REVOKED_S)
    await kept.alive()


# -- isolation -----------------------------------------------------------------------------------------------------


@isolation.check()
async def channels_of_others_are_not_found(bench: Bench) -> None:
    """Another workspace's conversation is `not_found` to subscribe, to send to and to stream, as if it were not."""
    second = await bench.people.second()
    _, oracle, _ = await turn_of(bench, SHORT)
    peer = await bench.join(second)
    rest, id_ = bench.rest(second), oracle.channel.partition(":")[2]
    parts = [{"type": "text", "text": SHORT}]
    for channel in (oracle.channel, f"conversation:{uuid4()}"):
        for since in ({"ep": oracle.ep, "seq": 1}, {"seq": -1}):
            refused = await peer.refused("not_found", "sub", ch=channel, since=since)
            require(set(refused) <= {"t", "id", "code", "msg", "retry", "ch"}, "the `err` tells nothing more", refused)
        await peer.refused("not_found", "chat.send", ch=channel, cid=str(uuid4()), parts=parts)
    await rest.call("GET", f"/api/v1/channels/{oracle.channel}/events", expect=404)
    await rest.call("GET", f"/api/v1/conversations/{id_}/messages", expect=404)
    await rest.call("POST", f"/api/v1/conversations/{id_}/messages", expect=404, body={"text": SHORT})
    require(len(await bench.messages(oracle.channel)) == 2, "somebody else's message is in the conversation")


@isolation.check()
async def replies_of_others_are_not_found(bench: Bench) -> None:
    """Another workspace's reply is `not_found` to cancel, to continue and to answer once more, and goes on."""
    second = await bench.people.second()
    channel = await bench.conversation()
    peer, stranger = await bench.join(), await bench.join(second)
    _, oracle = await bench.subscribe(peer, channel)
    turn = await bench.send(peer, channel)
    await stranger.refused("not_found", "reply.cancel", reply=turn.reply)
    for verb in ("continue", "regenerate"):
        await stranger.refused("not_found", f"reply.{verb}", reply=turn.reply, cid=str(uuid4()))
    await bench.rest(second).call("POST", f"/api/v1/replies/{turn.reply}/cancel", expect=404)
    end = await bench.finish(peer, oracle, turn.reply)
    require(end["e"] == "reply.completed", "it was none of theirs to stop", end)


@isolation.check()
async def same_cid_of_two_people(bench: Bench) -> None:
    """The same `cid` from two people is two sends: keys are nobody's but their owner's."""
    second = await bench.people.second()
    mine, theirs = await bench.conversation(), await bench.conversation(second)
    peer, other = await bench.join(), await bench.join(second)
    turn = await bench.send(peer, mine, SHORT)
    parts = [{"type": "text", "text": SHORT}]
    answer = await other.ask("chat.send", ch=theirs, cid=turn.cid, parts=parts)
    require(answer["reply"] != turn.reply, "somebody else got the reply of a key", answer)


@isolation.check()
async def inboxes_are_apart(bench: Bench) -> None:
    """`user:me` is each user's own: nothing of another user comes there."""
    second = await bench.people.second()
    stranger = await bench.join(second)
    _, inbox = await bench.subscribe(stranger, "user:me")
    channel = await bench.conversation()
    id_ = channel.partition(":")[2]
    # Their own event comes after it in time: what was to be seen of the first would be there by then.
    own = (await bench.conversation(second)).partition(":")[2]
    seen = []
    while (frame := await stranger.until("ev"))["d"].get("id") != own:
        seen.append(frame)
    require(not [one for one in seen if one["d"].get("id") == id_], "somebody else's conversation was told", *seen)
    known = [one["id"] for one in inbox.state["conversations"]]
    require(id_ not in known, "somebody else's conversation is in the state")
