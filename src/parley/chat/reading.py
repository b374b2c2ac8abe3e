"""Reads one answer of a model into the draft of its reply, also when another model has to end what one has begun."""

from collections.abc import Callable

from parley.chat.draft import Draft
from parley.chat.endings import Stopped, failure
from parley.chat.resuming import Place, Step
from parley.llm.ports import (
    AttemptStarted,
    Chunk,
    CursorChunk,
    Finish,
    FinishReason,
    ReasoningChunk,
    TextChunk,
    TextPart,
    ToolCallChunk,
)
from parley.realtime.runs import Run
from parley.realtime.tick import TickWriter
from parley.usage.calls import ModelCall

_UNWRITTEN_CHARACTERS = 64 * 1024
_ANSWERS = (TextChunk, ReasoningChunk, ToolCallChunk)


class Reading:
    """One answer on its way into a reply.

    `first` is called when something of it has come. `step` is what the log has of this answer already, `again` how much
    text and reasoning at the start of what comes is part of that.
    """

    def __init__(
        self,
        run: Run,
        draft: Draft,
        writer: TickWriter,
        *,
        first: Callable[[], None] | None = None,
        step: Step | None = None,
        again: tuple[int, int] = (0, 0),
    ) -> None:
        self._run = run
        self._draft = draft
        self._writer = writer
        self._first = first
        self._said: list[str] = []
        self._shown, self._thought = (len(step.said), step.reasoned) if step else (0, 0)
        self._again = again
        self._fresh = True
        self._instead: AttemptStarted | None = None
        self._traced = True
        self.calls: list[ToolCallChunk] = []
        self.model: str | None = None
        """The model whose answer stands: not the one that was asked last, if that one has said nothing."""

    @property
    def said(self) -> tuple[TextPart, ...]:
        """The text that has come, as a part of a message."""
        return (TextPart("".join(self._said)),) if self._said else ()

    async def read(self, call: ModelCall) -> None:
        """Read the answer to its end. Raises `Stopped` and `ModelError`; what has come by then is in the draft."""
        run, draft = self._run, self._draft
        skip_text, skip_reasoning = self._again
        async for item in call:
            if self._first is not None and isinstance(item, Chunk):
                self._first()
                self._first = None
            if self._fresh and isinstance(item, _ANSWERS):
                self._fresh = False
                self.model = call.entry.id
                self._take_the_place()
            match item:
                case TextChunk(text=text):
                    text, skip_text = text[skip_text:], max(skip_text - len(text), 0)
                    if not text:
                        continue
                    draft.text(text)
                    self._said.append(text)
                    self._shown += len(text)
                    if run.buffered > _UNWRITTEN_CHARACTERS:
                        await self._writer.room(run)
                case ReasoningChunk(text=text):
                    text, skip_reasoning = text[skip_reasoning:], max(skip_reasoning - len(text), 0)
                    if text:
                        draft.reasoning(text)
                        self._thought += len(text)
                case CursorChunk(cursor=cursor):
                    if self._traced and self._instead is None:
                        run.cursor = Place(call.entry.id, self._shown, self._thought, cursor).to_text()
                case ToolCallChunk():
                    self.calls.append(item)
                case AttemptStarted(attempt=attempt) if attempt > 1:
                    skip_text = skip_reasoning = 0
                    self._fresh, self._instead = True, item if item.after_text else None
                    # Where the provider's stream could be read on from was another provider's stream.
                    run.cursor = ""
                case Finish(reason=FinishReason.CONTENT_FILTER):
                    raise Stopped(failure("content_filtered", "The provider filtered the answer."))

    def _take_the_place(self) -> None:
        """Make room for the answer that begins now, if another model's stands there."""
        instead, self._instead = self._instead, None
        if instead is None:
            return
        self.calls.clear()
        if instead.continues:
            # Its own stream does not have what the other one said: it cannot be read on from.
            self._traced = False
        else:
            self._traced = True
            self._said.clear()
            self._shown = self._thought = 0
            if not self._draft.reset():
                return
        self._draft.resumed(model=instead.model_id, strategy="fallback")
