"""Each way in which a server can be wrong is found by the check that is there for it."""

from typing import Any
from uuid import uuid4

import pytest

from parley.conformance.command import examine, parser
from parley.conformance.runner import Result
from tests.conformance.proxy import Fault, Frame, wrong_server
from tests.process import ServerProcess

pytestmark = pytest.mark.process

_CONTROL = "frames.errors_say_what_to_do"


def _is(frame: Frame, e: str) -> bool:
    return frame["t"] == "ev" and bool(frame["e"] == e)


class DropsAnEvent(Fault):
    """The fifth event of a connection is lost."""

    def __init__(self) -> None:
        self._events = 0

    def to_client(self, frame: Frame) -> list[Frame]:
        self._events += frame["t"] == "ev"
        return [] if frame["t"] == "ev" and self._events == 5 else [frame]


class DoublesAnEvent(Fault):
    """Every started reply is told twice."""

    def to_client(self, frame: Frame) -> list[Frame]:
        return [frame, frame] if _is(frame, "reply.started") else [frame]


class SwapsEvents(Fault):
    """The start of a part comes after its first delta."""

    def __init__(self) -> None:
        self._held: list[Frame] = []

    def to_client(self, frame: Frame) -> list[Frame]:
        if _is(frame, "reply.part") and not self._held:
            self._held = [frame]
            return []
        held, self._held = self._held, []
        return [frame, *held]


class MergesAcrossParts(Fault):
    """A delta is joined with the start of its part."""

    def __init__(self) -> None:
        self._swallowed: Frame = {}

    def to_client(self, frame: Frame) -> list[Frame]:
        if _is(frame, "reply.part") and frame["d"]["state"] == "start":
            self._swallowed = frame
            return []
        if _is(frame, "reply.delta") and self._swallowed:
            first, self._swallowed = self._swallowed["seq"], {}
            return [{**frame, "from": first}]
        return [frame]


class MergesInReplays(Fault):
    """In a replay the first delta swallows what came before it; live all is well."""

    def __init__(self) -> None:
        self._replaying = False
        self._swallowed: Frame = {}

    def to_client(self, frame: Frame) -> list[Frame]:
        if frame["t"] in {"subbed", "live"}:
            self._replaying = frame["t"] == "subbed"
        if self._replaying and _is(frame, "reply.part") and frame["d"]["state"] == "start":
            self._swallowed = frame
            return []
        if self._swallowed and _is(frame, "reply.delta"):
            first, self._swallowed = self._swallowed["seq"], {}
            return [{**frame, "from": first}]
        return [frame]


class CountsInUtf16(Fault):
    """Offsets count as JavaScript does."""

    def __init__(self) -> None:
        self._more: dict[str, int] = {}

    def to_client(self, frame: Frame) -> list[Frame]:
        if not _is(frame, "reply.delta"):
            return [frame]
        d = frame["d"]
        more = self._more.get(d["reply"], 0)
        self._more[d["reply"]] = more + sum(ord(letter) > 0xFFFF for letter in d["x"])
        return [{**frame, "d": {**d, "off": d["off"] + more}}]


class _Closes(Fault):
    code, instead = 0, 0

    def close_code(self, code: int) -> int:
        return self.instead if code == self.code else code


class ClosesSilentOnesNormally(_Closes):
    """No `hello` in time is 1000."""

    code, instead = 4408, 1000


class ClosesSecondHelloAsBad(_Closes):
    """A second `hello` is 4400."""

    code, instead = 4409, 4400


class ClosesRevokedAsRetry(_Closes):
    """A revoked credential is told to come back."""

    code, instead = 4403, 4000


class ClosesExpiredAsForbidden(_Closes):
    """An expired credential is told to stay away."""

    code, instead = 4004, 4403


class AnswersAgain(Fault):
    """Each send is a new one, whatever its key."""

    def to_server(self, frame: Frame) -> list[Frame]:
        return [{**frame, "cid": str(uuid4())}] if frame.get("t") == "chat.send" else [frame]


class NeverLive(Fault):
    """The answer to a `sub` has no end."""

    def to_client(self, frame: Frame) -> list[Frame]:
        return [] if frame["t"] == "live" else [frame]


class LiveTwice(Fault):
    """The answer to a `sub` ends twice."""

    def to_client(self, frame: Frame) -> list[Frame]:
        return [frame, frame] if frame["t"] == "live" else [frame]


class ForgetsTheLastMessage(Fault):
    """A snapshot lacks its newest message."""

    def to_client(self, frame: Frame) -> list[Frame]:
        if frame["t"] != "snap" or not frame["state"].get("messages"):
            return [frame]
        return [{**frame, "state": {**frame["state"], "messages": frame["state"]["messages"][:-1]}}]


class SaysItRecovered(Fault):
    """A snapshot is called a replay."""

    def to_client(self, frame: Frame) -> list[Frame]:
        return [{**frame, "recovered": True}] if frame["t"] == "subbed" else [frame]


class TakesAnyEpoch(Fault):
    """A position of another epoch is taken as if it were of this one."""

    def to_server(self, frame: Frame) -> list[Frame]:
        since = frame.get("since")
        if frame.get("t") != "sub" or not since or "ep" not in since:
            return [frame]
        return [{**frame, "since": {"seq": since["seq"]}}]


class SpeaksAfterTheEnd(Fault):
    """A delta follows the end of its reply."""

    def to_client(self, frame: Frame) -> list[Frame]:
        if not _is(frame, "reply.completed"):
            return [frame]
        d = {"reply": frame["d"]["reply"], "part": 0, "off": frame["d"]["len"], "x": "!"}
        return [frame, {**frame, "seq": frame["seq"] + 1, "e": "reply.delta", "d": d}]


class EndsTwice(Fault):
    """A reply is completed and then cancelled."""

    def to_client(self, frame: Frame) -> list[Frame]:
        if not _is(frame, "reply.cancelled"):
            return [frame]
        return [frame, {**frame, "seq": frame["seq"] + 1}]


class MiscountsTheText(Fault):
    """`sha256` is of another text."""

    def to_client(self, frame: Frame) -> list[Frame]:
        if not _is(frame, "reply.completed"):
            return [frame]
        return [{**frame, "d": {**frame["d"], "sha256": "0" * 64}}]


class DoesNotCancel(Fault):
    """A cancel is answered and not done."""

    def to_server(self, frame: Frame) -> list[Frame]:
        if frame.get("t") == "reply.cancel":
            return [{"t": "sub", "id": frame["id"], "ch": "user:me"}]
        return [frame]

    def to_client(self, frame: Frame) -> list[Frame]:
        if frame["t"] == "subbed" and frame["ch"] == "user:me":
            return [{"t": "ok", "id": frame.get("id"), "reply": ""}]
        return [frame]


class CancelsWhenTheClientLeaves(Fault):
    """A disconnect is taken for a cancel."""

    def __init__(self) -> None:
        self._reply: Any = None

    def to_client(self, frame: Frame) -> list[Frame]:
        if _is(frame, "reply.started"):
            self._reply = frame["d"]["reply"]
        return [frame]

    def after_the_client(self) -> list[Frame]:
        return [{"t": "reply.cancel", "reply": self._reply}] if self._reply else []


class TellsOthersApart(Fault):
    """What is somebody else's is forbidden and not absent."""

    def to_client(self, frame: Frame) -> list[Frame]:
        return [{**frame, "code": "forbidden"}] if frame.get("code") == "not_found" else [frame]


class LimitsSends(Fault):
    """Not wrong: it takes no messages for a minute."""

    def __init__(self) -> None:
        self._ids: list[Any] = []

    def to_server(self, frame: Frame) -> list[Frame]:
        if frame.get("t") != "chat.send":
            return [frame]
        self._ids.append(frame["id"])
        return [{"t": "unsub", "id": frame["id"], "ch": "no-such-kind"}]

    def to_client(self, frame: Frame) -> list[Frame]:
        if frame.get("id") not in self._ids:
            return [frame]
        return [{**frame, "code": "rate_limited", "retry": "backoff", "retry_after_ms": 60_000}]


class WelcomesWithoutLimits(Fault):
    """`welcome` does not say what may be sent."""

    def to_client(self, frame: Frame) -> list[Frame]:
        return [{key: value for key, value in frame.items() if key != "limits"}]


class ForgetsIds(Fault):
    """Answers to ids that are text come back as if they were numbers."""

    def to_client(self, frame: Frame) -> list[Frame]:
        return [{**frame, "id": 0}] if isinstance(frame.get("id"), str) else [frame]


class JumpsTheQueue(Fault):
    """A message that should wait interrupts."""

    def to_server(self, frame: Frame) -> list[Frame]:
        return [{**frame, "on_active": "interrupt"}] if frame.get("t") == "chat.send" else [frame]


WRONG: list[tuple[type[Fault], str]] = [
    (DropsAnEvent, "subscribe.since_is_exact"),
    (DropsAnEvent, "resume.cut_at_any_point"),
    (DoublesAnEvent, "resume.two_connections_read_the_same"),
    (DoublesAnEvent, "frames.second_sub_starts_anew"),
    (SwapsEvents, "termination.life_is_in_order"),
    (MergesAcrossParts, "merging.only_deltas_of_one_part"),
    (MergesInReplays, "merging.only_deltas_of_one_part"),
    (CountsInUtf16, "merging.offsets_fit"),
    (ClosesSilentOnesNormally, "handshake.no_hello_in_time"),
    (ClosesSecondHelloAsBad, "handshake.second_hello_is_4409"),
    (ClosesRevokedAsRetry, "credentials.key_opens_a_socket"),
    (ClosesExpiredAsForbidden, "credentials.expired_is_4004"),
    (AnswersAgain, "idempotency.same_cid_same_ids"),
    (NeverLive, "subscribe.live_ends_every_answer"),
    (LiveTwice, "subscribe.live_ends_every_answer"),
    (ForgetsTheLastMessage, "subscribe.without_since_is_a_snapshot"),
    (SaysItRecovered, "subscribe.subbed_is_whole"),
    (TakesAnyEpoch, "subscribe.another_epoch_is_a_snapshot"),
    (SpeaksAfterTheEnd, "termination.nothing_follows_the_end"),
    (EndsTwice, "cancel.in_mid_stream_keeps_the_text"),
    (MiscountsTheText, "termination.end_carries_the_whole"),
    (DoesNotCancel, "cancel.in_mid_stream_keeps_the_text"),
    (CancelsWhenTheClientLeaves, "cancel.leaving_is_none"),
    (TellsOthersApart, "isolation.channels_of_others_are_not_found"),
    (WelcomesWithoutLimits, "handshake.welcome_is_whole"),
    (ForgetsIds, "frames.ids_come_back"),
    (JumpsTheQueue, "queueing.second_message_waits"),
]


_TOUCH_THE_CONTROL = {TellsOthersApart, ForgetsIds, WelcomesWithoutLimits, DoesNotCancel}


async def results_of(url: str, *ids: str, words: int = 40) -> dict[str, Result]:
    """Make some of the checks and return how they went."""
    only = [argument for id_ in ids for argument in ("--only", id_)]
    options = parser("test").parse_args([url, *only, "--prompt", f"repeat {words} word", "--patience", "3"])
    return {result.check.id: result for result in await examine(options)}


async def test_nothing_is_wrong_with_the_proxy_itself(conforming: ServerProcess) -> None:
    async with wrong_server(conforming, Fault) as url:
        results = await results_of(url, _CONTROL, *{id_ for _, id_ in WRONG})
    assert {id_: result.reason for id_, result in results.items() if result.outcome != "ok"} == {}
    assert len(results) == len({id_ for _, id_ in WRONG}) + 1


@pytest.mark.parametrize(("fault", "check"), WRONG, ids=[f"{fault.__name__}-{check}" for fault, check in WRONG])
async def test_what_is_wrong_is_found(conforming: ServerProcess, fault: type[Fault], check: str) -> None:
    control = _CONTROL if fault not in _TOUCH_THE_CONTROL else "handshake.second_"
    async with wrong_server(conforming, fault) as url:
        # Long enough for a reply that nobody stops to be told from one that was about to end.
        results = await results_of(url, check, control, words=150 if fault is DoesNotCancel else 40)
    found = results.pop(check)
    assert found.outcome == "FAILED", found
    # Why, in words, and the frames that show it.
    assert " " in found.reason
    assert found.frames
    assert [result.outcome for result in results.values()] == ["ok"], results


async def test_a_limit_is_no_fault(conforming: ServerProcess) -> None:
    ids = ("idempotency.same_cid_same_ids", "queueing.reject_stores_nothing", "frames.invalid_content_is_invalid")
    async with wrong_server(conforming, LimitsSends) as url:
        results = await results_of(url, *ids)
    for id_ in ids:
        assert results[id_].outcome == "skipped", results[id_]
        assert "for 60 s: wait, or raise its limits" in results[id_].reason
