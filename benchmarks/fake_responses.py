"""OpenAI's Responses dialect of the fake provider: answers that go on without a reader and can be read again.

What has been generated of a response follows from the clock and the plan's `rate`, whether somebody reads or not; with
`rate=0` it is all there at once. Words of the plan say how a later reading fails (see `Plan`).
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from benchmarks.fake_dialects import (
    Dialect,
    Frames,
    count_words,
    cut_in_thirds,
    openai_refusal,
    reasoning_pieces,
    text_deltas,
)
from benchmarks.fake_plan import Plan

if TYPE_CHECKING:
    from benchmarks.fake_provider import Record

PATHS = ("/v1/responses", "/responses")
_TOO_OLD = "This response can no longer be streamed because it is more than 5 minutes old"


class Reader(Protocol):
    """A connection that streams a response."""

    def cut(self) -> None:
        """End the stream now."""
        ...


class Background:
    """One response. Its events are numbered from 0; a group of them is one delta of the plan."""

    def __init__(self, id: str, plan: Plan, record: "Record") -> None:
        self.id = id
        self.plan = plan
        self.record = record
        self.began_at = time.monotonic()
        self.cancelled_at: float | None = None
        self.readers: set[Reader] = set()
        self.polls = 0
        self._numbers = itertools.count()
        self.pieces = self._stamps() if plan.stamp else plan.pieces()
        self.opening = [
            self._event(kind, {"response": {"id": id, "object": "response", "status": "queued", "output": []}})
            for kind in ("response.created", "response.in_progress")
        ]
        self.groups = [*self._thoughts(), *self._texts(), *self._calls()]
        ended = self._ended()
        self.ending = [self._event(f"response.{ended['status']}", {"response": ended})]

    def due_at(self, group: int) -> float:
        """Return when a group comes to be, in the time of `time.monotonic`."""
        rate = self.plan.rate
        return self.began_at + self.plan.ttft + (group / rate if rate else 0)

    def frames(self, after: int) -> tuple[Frames, int]:
        """Return the events behind a number, and the first group that is among them."""
        if after >= 0:
            after -= self.plan.overlap
        groups, ending = self.groups, self.ending
        if (end := self.cancelled_at) is not None:
            groups = [group for index, group in enumerate(groups) if self.due_at(index) <= end]
            ending = []
        left, first, number = [], len(groups), itertools.count()
        for index, group in enumerate([self.opening, *groups]):
            rest = [event for event in group if next(number) > after]
            if not index:
                opening = b"".join(rest)
            elif rest:
                first = min(first, index - 1)
                left.append(b"".join(rest))
        last = b"".join(event for event in ending if next(number) > after)
        return Frames(opening, left, last, self.whole(), lambda _: b""), first

    def whole(self) -> dict[str, Any]:
        """Return the response as the API keeps it."""
        if self.cancelled_at is not None:
            return self._object("cancelled")
        return self._ended() if time.monotonic() >= self.due_at(len(self.groups)) else self._object("in_progress")

    def cancel(self) -> None:
        """Stop it. A response that has ended stays as it is, and so does one that was stopped before."""
        if self.whole()["status"] == "in_progress":
            self.cancelled_at = time.monotonic()
            self.record.cancelled = True
            self.record.output_tokens = min(
                len(self.pieces), sum(self.due_at(at) <= self.cancelled_at for at in range(len(self.groups)))
            )
            for reader in list(self.readers):
                reader.cut()

    def left(self, reader: Reader, record: "Record") -> None:
        """Forget a reader whose connection is gone. One that is not in the background ends with its first one."""
        self.readers.discard(reader)
        if record is self.record and not record.body.get("background"):
            self.cancel()

    def _event(self, kind: str, fields: dict[str, Any] | bytes) -> bytes:
        data = fields if isinstance(fields, bytes) else orjson.dumps(fields)[1:-1]
        return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b}\n\n' % (
            kind.encode(),
            kind.encode(),
            next(self._numbers),
            data,
        )

    def _ended(self) -> dict[str, Any]:
        why = {"length": "max_output_tokens", "filter": "content_filter"}.get(self.plan.end)
        if why is None:
            return self._object("completed")
        return self._object("incomplete") | {"incomplete_details": {"reason": why}}

    def _object(self, status: str) -> dict[str, Any]:
        ended = status in {"completed", "incomplete"}
        usage = {
            "input_tokens": count_words(self.record.body),
            "input_tokens_details": {"cached_tokens": 1},
            "output_tokens": len(self.pieces),
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        return {
            "id": self.id,
            "object": "response",
            "status": status,
            "background": True,
            "error": None,
            "incomplete_details": None,
            "model": "fake",
            "output": self._items() if ended else [],
            "usage": usage if ended else None,
        }

    def _stamps(self) -> tuple[str, ...]:
        """Return pieces that tell when each was due: the same for everybody who reads."""
        base_ns = time.monotonic_ns()
        offsets = (round((self.due_at(number) - self.began_at) * 1e9) for number in range(self.plan.deltas))
        return tuple(f"{base_ns + offset}|" for offset in offsets)

    def _items(self) -> list[dict[str, Any]]:
        text = "Another answer than the one that was streamed." if self.plan.other else "".join(self.pieces)
        refused = self.plan.end == "refusal"
        part = {"type": "refusal", "refusal": text} if refused else {"type": "output_text", "text": text}
        return [
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "id": "msg_1", "role": "assistant", "content": [part]},
            *(_call(index, name, arguments) for index, (name, arguments) in enumerate(self.plan.tools, start=2)),
        ]

    def _thoughts(self) -> Iterator[list[bytes]]:
        for number, thought in enumerate(reasoning_pieces(self.plan)):
            group = []
            if not number:
                item = {"type": "reasoning", "id": "rs_1", "summary": []}
                group.append(self._event("response.output_item.added", {"output_index": 0, "item": item}))
                group.append(
                    self._event("response.reasoning_summary_part.added", {"output_index": 0, "summary_index": 0})
                )
            fields = {"item_id": "rs_1", "output_index": 0, "summary_index": 0, "delta": thought}
            group.append(self._event("response.reasoning_summary_text.delta", fields))
            yield group

    def _texts(self) -> Iterator[list[bytes]]:
        place = b'"item_id":"msg_1","output_index":1,"content_index":0'
        deltas = text_deltas(self.plan, lambda text: text)
        if self.plan.stamp:
            deltas = [orjson.dumps(piece) for piece in self.pieces]
        for number, text in enumerate(deltas):
            group = []
            if not number:
                item: dict[str, Any] = {"type": "message", "id": "msg_1", "role": "assistant", "content": []}
                group.append(self._event("response.output_item.added", {"output_index": 1, "item": item}))
                part = b',"part":{"type":"output_text","text":"","annotations":[]}'
                group.append(self._event("response.content_part.added", place + part))
            kind = "response.refusal.delta" if self.plan.end == "refusal" else "response.output_text.delta"
            group.append(self._event(kind, place + b',"logprobs":[],"delta":' + text))
            if number == len(deltas) - 1:
                whole = orjson.dumps("".join(self.pieces))
                group.append(self._event("response.output_text.done", place + b',"text":' + whole))
            yield group

    def _calls(self) -> Iterator[list[bytes]]:
        for index, (name, arguments) in enumerate(self.plan.tools, start=2):
            place = {"output_index": index}
            yield [self._event("response.output_item.added", place | {"item": _call(index, name, "")})]
            for piece in cut_in_thirds(arguments):
                fields = place | {"item_id": f"fc_{index}", "delta": piece}
                yield [self._event("response.function_call_arguments.delta", fields)]
            yield [
                self._event("response.function_call_arguments.done", place | {"arguments": arguments}),
                self._event("response.output_item.done", place | {"item": _call(index, name, arguments)}),
            ]


def _call(index: int, name: str, arguments: str) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{index}",
        "call_id": f"call_{index}",
        "name": name,
        "arguments": arguments,
    }


def answer(background: Background | None, *, stream: bool) -> tuple[int, dict[str, Any]] | None:
    """Return a refusal or the response as an object; None when it is to be streamed."""
    plan = background.plan if background else Plan()
    if background is None or (plan.forget and not stream):
        return 404, _error("Response with that id not found.", "not_found")
    if stream:
        return (plan.expired, _error(_TOO_OLD, None)) if plan.expired else None
    background.polls += 1
    if background.polls <= plan.poll_faults:
        return 503, _error("try again", "server_error")
    return 200, background.whole()


def later_plan(plan: Plan) -> Plan:
    """Return how a later reading goes: its connection fails as `refail` says."""
    return replace(plan, fail=plan.refail, stamp=0, burst=0)


def _error(message: str, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


def _no_frames(_: dict[str, Any], __: Plan) -> Frames:
    """Stand in for a response that is refused. One that is not is made of its `Background`."""
    return Frames(b"", [], b"", {}, lambda _: b"")


RESPONSES = Dialect(
    name="openai_responses",
    frames=_no_frames,
    refusal=openai_refusal,
    error_event=b'event: error\ndata: {"type":"error","code":"server_error","message":"secret overload","param":null}\n\n',
)
