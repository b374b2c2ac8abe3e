"""A reply while it is being written: its parts so far, and the events that say so."""

from typing import Any
from uuid import UUID

from parley.chat.written import UNSETTLED, Written, settled, step_start
from parley.core.ids import new_id
from parley.realtime.runs import Run
from parley.realtime.tick import TickWriter


class Draft:
    """Appends to a reply. What is appended here reaches clients after the tick writer has committed it."""

    def __init__(self, run: Run, writer: TickWriter, written: Written | None = None) -> None:
        self._run = run
        self._writer = writer
        self._reply = str(run.reply_id)
        self._parts: list[dict[str, Any]] = written.parts if written else []
        self._pieces: list[str] = []
        self._length = 0
        self._kind = ""
        self.model = written.model if written else None
        """The model that was last said to be writing, by the process before this one."""
        if written and written.is_open:
            last = self._parts[-1]
            self._kind, self._pieces, self._length = last["type"], [last["text"]], len(last["text"])
        run.visible = bool(self._parts)

    def text(self, piece: str) -> None:
        """Append visible text."""
        if self._kind != "text":
            self._open("text")
        self._append(piece)

    def reasoning(self, piece: str) -> None:
        """Append reasoning."""
        if self._kind != "reasoning":
            self._open("reasoning")
        self._append(piece)

    def _append(self, piece: str) -> None:
        run = self._run
        run.emit_delta(len(self._parts) - 1, self._length, piece)
        self._pieces.append(piece)
        self._length += len(piece)
        if run.visible:
            self._writer.written(run)
        else:
            run.visible = True
            self._writer.written(run, urgent=True)

    def _open(self, kind: str) -> None:
        self.close()
        self._kind = kind
        self._parts.append({"type": kind, "text": ""})
        self._emit("reply.part", part=len(self._parts) - 1, kind=kind, state="start")

    def close(self) -> None:
        """End the part that is open."""
        if self._kind:
            self._parts[-1]["text"] = "".join(self._pieces)
            self._emit("reply.part", part=len(self._parts) - 1, kind=self._kind, state="end")
            self._kind, self._pieces, self._length = "", [], 0

    def tool_call(self, name: str, arguments: dict[str, Any] | None) -> tuple[int, UUID]:
        """Open a part for a tool call; return its index and the call's id, which is ours and not the provider's."""
        self.close()
        call = new_id()
        part = {"type": "tool", "call": str(call), "name": name, "state": "input", "input": arguments, "output": None}
        self._parts.append(part)
        index = len(self._parts) - 1
        self._emit("reply.part", part=index, kind="tool", state="start")
        self._emit("reply.tool", part=index, call=str(call), name=name, state="input", input=arguments)
        self._run.visible = True
        self._writer.written(self._run, urgent=True)
        return index, call

    async def tool_running(self, index: int) -> None:
        """Say that the call is about to be made. Returns when that is committed, so that no call is made unseen."""
        self._tool(index, "running")
        await self._writer.flush(self._run)

    def tool_waiting(self, index: int) -> None:
        """Say that the call waits for a yes of whoever asked."""
        self._tool(index, "approval", input=self._parts[index]["input"])
        self._writer.written(self._run, urgent=True)

    def tool_ended(self, index: int, *, state: str, output: dict[str, Any]) -> None:
        """Say how the call went."""
        self._parts[index]["output"] = output
        self._tool(index, state, output=output)
        self._emit("reply.part", part=index, kind="tool", state="end")
        self._writer.written(self._run)

    def _tool(self, index: int, state: str, **fields: Any) -> None:
        part = self._parts[index]
        part["state"] = state
        self._emit("reply.tool", part=index, call=part["call"], name=part["name"], state=state, **fields)

    def _emit(self, e: str, **d: Any) -> None:
        self._run.emit(e, {"reply": self._reply, **d})

    def resumed(self, *, model: str | None, strategy: str) -> None:
        """Say that the reply goes on, after its process was lost or its model failed. What stands does not change."""
        self._emit("reply.resumed", attempt=self._run.attempt, model=model, strategy=strategy)
        self._writer.written(self._run, urgent=True)

    def reset(self) -> bool:
        """Take back what the model has said since the last tool call; False when that is nothing.

        It reaches clients together with what follows in the same moment: nobody sees the reply without either text.
        """
        start = step_start(self._parts)
        if start == len(self._parts):
            return False
        self._kind, self._pieces, self._length = "", [], 0
        del self._parts[start:]
        self._emit("reply.reset", attempt=self._run.attempt, part=start, to_off=0)
        self._writer.written(self._run, urgent=True)
        return True

    def unsettled(self) -> list[tuple[int, dict[str, Any]]]:
        """Return the tool calls that have no outcome yet, with their index."""
        return [(i, part) for i, part in enumerate(self._parts) if part.get("state") in UNSETTLED]

    @property
    def written(self) -> list[dict[str, Any]]:
        """The parts so far, with the text of the one that is open."""
        if not self._kind:
            return list(self._parts)
        return [*self._parts[:-1], {**self._parts[-1], "text": "".join(self._pieces)}]

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The parts so far. A tool call that was cut off before it ended has an unknown outcome."""
        self.close()
        return settled(self._parts)
