"""What a check works with: connections, conversations and replies of its own, and the removal of all of it."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx

from parley.conformance.accounts import Account, People
from parley.conformance.errors import Failed, Skipped, require
from parley.conformance.oracle import TERMINAL, Oracle
from parley.conformance.rest import Rest
from parley.conformance.transcript import Frame, Transcript
from parley.conformance.wire import Peer

SHORT = "Say hello."
_ACK_EVERY = 32
_ACK_BYTES = 64 * 1024
_CLEANING_S = 5.0


@dataclass(frozen=True)
class Target:
    """The server, and how to go about it."""

    http_url: str
    prompt: str
    patience_s: float

    @property
    def ws_url(self) -> str:
        """Where the socket is."""
        return f"ws{self.http_url.removeprefix('http')}/api/v1/realtime"


@dataclass(frozen=True)
class Turn:
    """What was sent, and the ids that it got."""

    cid: str
    text: str
    message: str
    reply: str


class Bench:
    """One check's own bench."""

    def __init__(self, target: Target, people: People, http: httpx.AsyncClient) -> None:
        self.target = target
        self.people = people
        self.transcript = Transcript()
        self.notes: list[str] = []
        self._http = http
        self._peers: list[Peer] = []
        self._made: list[tuple[Rest, str]] = []
        self._replies: dict[str, Rest] = {}

    @property
    def patience_s(self) -> float:
        """How long to wait for one frame."""
        return self.target.patience_s

    def rest(self, account: Account | None = None) -> Rest:
        """Return the HTTP side of an account, the first one's unless told."""
        account = account or self.people.first
        return Rest(self._http, self.transcript, name="http", token=account.token)

    def stranger(self) -> Rest:
        """Return HTTP without a credential."""
        return Rest(self._http, self.transcript, name="http", token=None)

    # -- connections ---------------------------------------------------------------------------------------------

    async def open(self, *, subprotocols: list[str] | None = None, query: str = "") -> Peer:
        """Open a socket; nothing is said yet."""
        peer = await Peer.open(
            self.target.ws_url + query, self.transcript, name=f"socket {len(self._peers) + 1}",
            patience_s=self.patience_s, subprotocols=subprotocols,
        )  # fmt: skip
        self._peers.append(peer)
        return peer

    async def join(
        self, account: Account | None = None, *, subs: list[Frame] | None = None, auth: Frame | None = None
    ) -> Peer:
        """Open a socket and be welcome."""
        peer = await self.open()
        auth = auth or {"token": (account or self.people.first).token}
        await peer.send("hello", v=1, auth=auth, client="parley-conformance", subs=subs or [])
        welcome = await peer.receive("`welcome`")
        require(welcome["t"] == "welcome", "a valid `hello` must be answered with `welcome`", welcome)
        peer.welcome = welcome
        return peer

    # -- conversations -------------------------------------------------------------------------------------------

    async def conversation(self, account: Account | None = None) -> str:
        """Make a conversation and return its channel."""
        rest = self.rest(account)
        made = await rest.call("POST", "/api/v1/conversations", expect=201, body={"title": "Conformance"})
        self._made.append((rest, made["id"]))
        return f"conversation:{made['id']}"

    async def messages(self, channel: str) -> list[dict[str, Any]]:
        """Return a conversation's messages as REST has them."""
        path = f"/api/v1/conversations/{channel.partition(':')[2]}/messages"
        return list(await self.rest().call("GET", path, expect=200))

    async def message(self, channel: str, id: str) -> dict[str, Any]:
        """Return one message as REST has it."""
        for message in await self.messages(channel):
            if message["id"] == id:
                return message
        raise Failed(f"message {id} is not among the conversation's messages")

    async def send(
        self, peer: Peer, channel: str, text: str | None = None, *, cid: str | None = None, **fields: Any
    ) -> Turn:
        """Send a message, the long one unless told, and return its ids."""
        cid, text = cid or str(uuid4()), self.target.prompt if text is None else text
        parts = [{"type": "text", "text": text}]
        answer = await peer.ask("chat.send", ch=channel, cid=cid, parts=parts, **fields)
        return self.noted(cid, text, answer)

    def noted(self, cid: str, text: str, answer: dict[str, Any]) -> Turn:
        """Return the ids of a turn, and see that its reply is stopped when the check ends."""
        turn = Turn(cid, text, answer["message"], answer["reply"])
        self._replies[turn.reply] = self.rest()
        return turn

    # -- reading -------------------------------------------------------------------------------------------------

    async def subscribe(
        self, peer: Peer, channel: str, *, since: Frame | None = None, oracle: Oracle | None = None
    ) -> tuple[Frame, Oracle]:
        """Subscribe, read to `live`, and return the `subbed` and what the client holds.

        `oracle` is a client that was there before; `since` is then its position unless told.
        """
        if oracle is not None:
            since = since or oracle.since
        oracle = oracle or Oracle(channel)
        wanted: Frame = {"ch": channel} if since is None else {"ch": channel, "since": since}
        subbed = await peer.ask("sub", **wanted)
        oracle.take(subbed)
        await self.follow(peer, oracle, lambda frame: frame["t"] == "live" and frame["ch"] == channel, "`live`")
        return subbed, oracle

    async def follow(
        self, peer: Peer, oracle: Oracle, until: Callable[[Frame], bool], what: str, *, within_s: float | None = None
    ) -> Frame:
        """Read as a client does, acknowledging, until a frame of which it holds."""
        ends = time.monotonic() + (within_s or self.patience_s * 3)
        unacked = size = 0
        while True:
            left = ends - time.monotonic()
            if left <= 0:
                raise Failed(f"{what} did not come in time", f"the client is at {oracle.last} of {oracle.channel}")
            frame = await peer.receive(what, within_s=min(left, self.patience_s))
            oracle.take(frame)
            if frame["t"] == "ev":
                unacked, size = unacked + 1, size + len(str(frame).encode())
            done = until(frame)
            if unacked >= _ACK_EVERY or size > _ACK_BYTES or (done and unacked):
                unacked = size = 0
                await peer.send("ack", a={oracle.channel: oracle.last})
            if done:
                return frame

    async def finish(self, peer: Peer, oracle: Oracle, reply: str, *, within_s: float | None = None) -> Frame:
        """Read to the end of a reply, and return its terminal event."""
        if reply in oracle.ended:
            return oracle.ended[reply]
        end = await self.follow(peer, oracle, is_end_of(reply), "the end of the reply", within_s=within_s)
        self._replies.pop(reply, None)
        return end

    async def listen(self, peer: Peer, oracle: Oracle, *, for_s: float) -> None:
        """Read on for a while, where nothing more should come."""
        for frame in await peer.hears(for_s=for_s):
            oracle.take(frame)

    async def started(self, peer: Peer, oracle: Oracle, reply: str, *, deltas: int = 3) -> None:
        """Read until a reply is well under way. Raises `Skipped` where it ends before it is."""

        def under_way(frame: Frame) -> bool:
            ended = is_end_of(reply)(frame)
            return ended or len([one for one in oracle.of(reply) if one.e == "reply.delta"]) >= deltas

        await self.follow(peer, oracle, under_way, "the beginning of the reply")
        if (end := oracle.ended.get(reply)) is not None:
            require(end["e"] == "reply.completed", f"nobody stopped this reply, and it ended with {end['e']}", end)
            raise Skipped("the reply ended at once: choose a longer --prompt")

    # -- afterwards ----------------------------------------------------------------------------------------------

    async def clean(self) -> None:
        """Close the connections, stop the replies and delete the conversations."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLEANING_S):
                await asyncio.gather(*(peer.close() for peer in self._peers), return_exceptions=True)
                for reply, rest in self._replies.items():
                    await rest.send("POST", f"/api/v1/replies/{reply}/cancel")
                for rest, id_ in self._made:
                    response = await rest.send("DELETE", f"/api/v1/conversations/{id_}")
                    if response.status_code not in {204, 404}:
                        self.notes.append(f"conversation {id_} could not be deleted")


def is_end_of(reply: str) -> Callable[[Frame], bool]:
    """Return whether a frame is the terminal event of a reply."""
    return lambda frame: frame["t"] == "ev" and frame["e"] in TERMINAL and frame["d"]["reply"] == reply
