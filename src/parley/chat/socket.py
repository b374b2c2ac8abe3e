"""What the chat does with its frames on the socket."""

from typing import Any

from pydantic import TypeAdapter, ValidationError

from parley.chat.approvals.service import Approvals
from parley.chat.ends import Ends
from parley.chat.errors import ConversationNotFound
from parley.chat.messages import conversation_of
from parley.chat.schemas import MessageSend
from parley.chat.tools import ToolBox
from parley.chat.turns import Again, Send, Turns
from parley.core.error_handlers import plain_message
from parley.core.errors import Invalid
from parley.core.scope import Scope
from parley.realtime.frames import ChatSend, ReplyCancel, ReplyContinue, ReplyRegenerate, ToolApprove

_content = TypeAdapter(MessageSend)


class ChatFrames:
    """The handlers of `chat.send` and of the frames about a reply."""

    def __init__(self, turns: Turns, ends: Ends, tools: ToolBox, approvals: Approvals) -> None:
        self._turns = turns
        self._ends = ends
        self._tools = tools
        self._approvals = approvals

    async def send(self, scope: Scope, frame: ChatSend) -> dict[str, Any]:
        """Store a message and begin its reply; `ok` carries both ids."""
        conversation_id = conversation_of(frame.ch)
        if conversation_id is None:
            raise ConversationNotFound
        parts = [part.model_dump(exclude_none=True) for part in frame.parts]
        try:
            content = _content.validate_python({"parts": parts})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise Invalid(f"{where}: {plain_message(first)}"[:200]) from None
        options = frame.opts
        if options and options.tools is not None and (unknown := set(options.tools) - self._tools.names):
            raise Invalid(f"{len(unknown)} of the tools do not exist.")
        sent = await self._turns.send(
            scope,
            Send(
                conversation_id=conversation_id,
                cid=frame.cid,
                contents=content.contents,
                model=options.model if options else None,
                tools=tuple(options.tools) if options and options.tools is not None else None,
                parent=frame.parent,
                on_active=frame.on_active,
            ),
        )
        return {"message": sent.message["id"], "reply": sent.reply["id"]}

    async def cancel(self, scope: Scope, frame: ReplyCancel) -> dict[str, Any]:
        """Stop a reply."""
        await self._ends.cancel(scope, frame.reply)
        return {"reply": str(frame.reply)}

    async def approve(self, scope: Scope, frame: ToolApprove) -> dict[str, Any]:
        """Say yes or no to a tool call that waits."""
        decided = await self._approvals.decide(scope, frame.call, approved=frame.approved, reply=frame.reply)
        return decided.model_dump(mode="json")

    async def continue_(self, scope: Scope, frame: ReplyContinue) -> dict[str, Any]:
        """Go on from where a reply stopped; `ok` carries what is continued and the new reply."""
        return await self._again(scope, Again(frame.reply, frame.cid, "continue"))

    async def regenerate(self, scope: Scope, frame: ReplyRegenerate) -> dict[str, Any]:
        """Answer the same question once more; `ok` carries the question and the new reply."""
        return await self._again(scope, Again(frame.reply, frame.cid, "regenerate"))

    async def _again(self, scope: Scope, wanted: Again) -> dict[str, Any]:
        sent = await self._turns.again(scope, wanted)
        return {"message": sent.message["id"], "reply": sent.reply["id"]}
