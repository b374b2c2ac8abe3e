"""Whatever a model's attempts bring, the log folds to what the draft holds, at every moment a process may be lost."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any, cast

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parley.chat.draft import Draft
from parley.chat.endings import Stopped
from parley.chat.reading import Reading
from parley.chat.resuming import Place, Step
from parley.chat.written import Written
from parley.core.ids import new_id
from parley.core.scope import Role, Scope
from parley.llm.ports import (
    AttemptStarted,
    CursorChunk,
    Finish,
    FinishReason,
    ReasoningChunk,
    TextChunk,
    ToolCallChunk,
    UsageChunk,
)
from parley.realtime.events import Channel
from parley.realtime.fold import apply_reply_events
from parley.realtime.runs import Run
from parley.realtime.tick import TickWriter
from parley.usage.calls import ModelCall


class _Writer:
    """A tick writer that writes nothing: the test reads the run's buffer."""

    def written(self, run: Run, *, urgent: bool = False) -> None:
        """Take note."""


class _Call:
    """A call that yields what the test says."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._list = list(items)
        self.entry = _Entry("none")
        self._items = self._run()

    async def _run(self) -> AsyncGenerator[Any]:
        for item in self._list:
            if isinstance(item, AttemptStarted):
                self.entry = _Entry(item.model_id)
            yield item

    def __aiter__(self) -> AsyncGenerator[Any]:
        return self._items


class _Entry:
    def __init__(self, id: str) -> None:
        self.id = id


def make_run() -> Run:
    scope = Scope(new_id(), new_id(), Role.OWNER, subject="s")
    channel = Channel(scope.workspace_id, "conversation:x", "conversation:x")
    return Run(scope=scope, reply_id=new_id(), question_id=new_id(), channel=channel, fence=1)


def events_of(run: Run) -> list[tuple[str, dict[str, Any]]]:
    return [(e, orjson.loads(d) if isinstance(d, str) else dict(d)) for e, d in run.buffer]


def fold(run: Run) -> list[dict[str, Any]]:
    message: dict[str, Any] = {"status": "queued", "parts": [], "model": None}
    assert apply_reply_events(message, events_of(run)), "every event fits"
    parts: list[dict[str, Any]] = message["parts"]
    return parts


def without_empty(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for part in parts if part["type"] == "tool" or part["text"]]


async def read(run: Run, draft: Draft, items: Iterable[Any]) -> Reading:
    reading = Reading(run, draft, cast("TickWriter", _Writer()))
    await reading.read(cast("ModelCall", _Call(items)))
    return reading


def test_a_second_answer_takes_the_place_of_the_first() -> None:
    run = make_run()
    draft = Draft(run, cast("TickWriter", _Writer()))
    reading = asyncio.run(
        read(run, draft, [
            AttemptStarted("a", 1), CursorChunk("a1"), ReasoningChunk("hm"), TextChunk("one"),
            ToolCallChunk("c", "n", {}, "{}"), CursorChunk("a2"),
            AttemptStarted("b", 2, strategy="fallback", after_text=True), CursorChunk("b1"), TextChunk("two"),
            CursorChunk("b2"),
        ])
    )  # fmt: skip
    assert draft.written == fold(run) == [{"type": "text", "text": "two"}]
    assert (reading.model, reading.calls) == ("b", [])
    assert [part.text for part in reading.said] == ["two"]
    assert run.cursor == Place("b", 3, 0, "b2").to_text()
    resets = [(d["part"], d["to_off"]) for e, d in events_of(run) if e == "reply.reset"]
    assert resets == [(0, 0)]


def test_a_second_answer_that_goes_on_has_no_place_of_its_own() -> None:
    """Its stream holds only the rest: to read it on would need what the first model said."""
    run = make_run()
    draft = Draft(run, cast("TickWriter", _Writer()))
    reading = asyncio.run(
        read(run, draft, [
            AttemptStarted("a", 1), TextChunk("one "), CursorChunk("a1"),
            AttemptStarted("b", 2, strategy="fallback", after_text=True, continues=True), TextChunk("two"),
            CursorChunk("b1"),
        ])
    )  # fmt: skip
    assert draft.written == fold(run) == [{"type": "text", "text": "one two"}]
    assert [part.text for part in reading.said] == ["one two"]
    assert run.cursor == ""
    assert not any(e == "reply.reset" for e, _ in events_of(run))


def test_an_attempt_that_says_nothing_changes_nothing() -> None:
    run = make_run()
    draft = Draft(run, cast("TickWriter", _Writer()))
    items = [AttemptStarted("a", 1), TextChunk("one"), AttemptStarted("b", 2, after_text=True), UsageChunk(1, 1, 1)]
    reading = asyncio.run(read(run, draft, items))
    assert draft.written == [{"type": "text", "text": "one"}]
    assert reading.model == "a"
    assert not {"reply.reset", "reply.resumed"} & {e for e, _ in events_of(run)}


def test_a_filter_stops_the_reply() -> None:
    run = make_run()
    draft = Draft(run, cast("TickWriter", _Writer()))
    with pytest.raises(Stopped) as caught:
        asyncio.run(read(run, draft, [AttemptStarted("a", 1), TextChunk("x"), Finish(FinishReason.CONTENT_FILTER)]))
    assert caught.value.error["code"] == "content_filtered"


_WORDS = st.text(alphabet="aé😀 \n", min_size=1, max_size=4)
_CHUNKS = st.one_of(
    st.builds(TextChunk, _WORDS), st.builds(TextChunk, _WORDS), st.builds(ReasoningChunk, _WORDS),
    st.just(CursorChunk("c")), st.just(UsageChunk(1, 0, 1)), st.builds(ToolCallChunk, st.just("c"), st.just("n"), st.just({}), st.just("{}")),
)  # fmt: skip
_ATTEMPT = st.tuples(st.lists(_CHUNKS, max_size=6), st.booleans())
_STEP = st.lists(_ATTEMPT, min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.lists(_STEP, min_size=1, max_size=3))
def test_the_log_is_what_the_draft_holds(steps: list[list[tuple[list[Any], bool]]]) -> None:
    run = make_run()
    draft = Draft(run, cast("TickWriter", _Writer()))

    def check() -> None:
        assert without_empty(fold(run)) == without_empty(draft.written)
        written = Written.from_events(events_of(run))
        assert without_empty(written.parts) == without_empty(draft.written)
        # What goes on from the log writes where the draft would have.
        again = Draft(make_run(), cast("TickWriter", _Writer()), written)
        assert Step.last_of(again.written).said == Step.last_of(draft.written).said

    async def follow() -> None:
        for number, attempts in enumerate(steps):
            items: list[Any] = []
            seen = False
            for count, (chunks, continues) in enumerate(attempts, 1):
                goes_on = seen and continues
                items.append(AttemptStarted(f"m{count}", count, after_text=seen, continues=goes_on))
                items += chunks
                seen = seen or any(isinstance(chunk, TextChunk | ReasoningChunk | ToolCallChunk) for chunk in chunks)
            reading = Reading(run, draft, cast("TickWriter", _Writer()))
            for end in range(1, len(items) + 1):
                # One item at a time, as a loop that may be interrupted between any two.
                call = _Call(items[end - 1 : end])
                if not isinstance(items[end - 1], AttemptStarted):
                    call.entry = _Entry(
                        next(one.model_id for one in reversed(items[:end]) if isinstance(one, AttemptStarted))
                    )
                await reading.read(cast("ModelCall", call))
                check()
                if run.cursor:
                    place = Place.from_text(run.cursor)
                    assert place is not None
                    step = Step.last_of(draft.written)
                    assert place.said <= len(step.said)
                    assert place.reasoned <= step.reasoned
            assert "".join(part.text for part in reading.said) == Step.last_of(draft.written).said
            if number + 1 < len(steps):
                index, _ = draft.tool_call("tool", {})
                draft.tool_ended(index, state="done", output={})
                run.cursor = ""
                check()

    asyncio.run(follow())
