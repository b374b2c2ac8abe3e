"""What the chat's channels carry: the data of every event and the states of snapshots (docs/protocol.md)."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from parley.chat.schemas import ConversationRead, MessageRead, Usage
from parley.jobs.schemas import JobRead
from parley.realtime.server_frames import Closed, Count, Deleted, Uuid, absent, example

ReplyErrorCode = Literal[
    "provider_auth", "provider_rate_limited", "provider_unavailable", "provider_timeout", "bad_output",
    "content_filtered", "context_too_long", "over_budget", "worker_lost", "internal",
]  # fmt: skip
ToolState = Literal["input", "approval", "running", "done", "failed", "unknown"]

Attempt = Annotated[int, Field(ge=1, description="Counts the processes that wrote the reply")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Dollars as text, all eight places.
CostText = Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]{8}$")]
ToolInput = dict[str, Any] | None

_REPLY = "0193c0de-9f3a-7bd2-8a51-3f0c9f0e1a2c"
_QUESTION = "0193c0de-9f3a-7bd2-8a51-3f0c9f0e1a2b"
_CONVERSATION = "0193c0dd-12aa-7c33-9b1e-52f3a1c4d5e6"
_CALL = "0193c0de-a001-7d11-8b22-0123456789ab"
_USER = "0193c0dc-7e5f-7aaa-9c0d-fedcba987654"
_TEXT = "Because of Rayleigh scattering."
_SHA256 = "962c4104ccc4ea38e0012df8fa035e0fe44324b52b2c13145ce3389e4aa14902"
_USAGE: dict[str, JsonValue] = {"input_tokens": 12, "cached_tokens": 0, "output_tokens": 6}


def _message(**fields: JsonValue) -> dict[str, JsonValue]:
    return {
        "id": _REPLY, "conversation_id": _CONVERSATION, "role": "assistant", "parts": [{"type": "text", "text": _TEXT}],
        "status": "completed", "model": "default", "parent_id": _QUESTION, "usage": _USAGE, "cost": "0.00012300",
        "error": None, "created_at": "2026-11-21T09:00:00.123456Z", "completed_at": "2026-11-21T09:00:02.654321Z",
        **fields,
    }  # fmt: skip


_CONVERSATION_EXAMPLE: dict[str, JsonValue] = {
    "id": _CONVERSATION, "title": "Why is the sky blue?", "model": None, "assistant": "general", "owner_id": _USER,
    "current_id": _REPLY, "shared": False, "shared_access": None, "archived": False, "pinned": False,
    "created_at": "2026-11-21T08:59:00Z", "updated_at": "2026-11-21T09:00:00Z",
}  # fmt: skip


class TextPart(Closed):
    """Text that a reader sees, or the model's reasoning."""

    type: Literal["text", "reasoning"]
    text: str


class FilePart(Closed):
    """A text file that a user's message carries: `GET attachments/{attachment}`; `size` in bytes."""

    type: Literal["file"]
    attachment: Uuid
    media_type: str
    name: str
    size: Count


class ImagePart(Closed):
    """An image that a user's message carries, with its dimensions in pixels."""

    type: Literal["image"]
    attachment: Uuid
    media_type: str
    name: str
    size: Count
    width: Count
    height: Count


class ToolPart(Closed):
    """A call of a tool. `call` and `name` are null between `reply.part` and the first `reply.tool`."""

    type: Literal["tool"]
    call: Uuid | None
    name: str | None
    state: ToolState
    input: ToolInput
    output: Any


class ReplyError(Closed):
    """Why a reply failed."""

    code: ReplyErrorCode
    msg: str
    retryable: bool


class MessageData(MessageRead):
    """A message, as the HTTP contract has it."""

    model_config = example(**_message())

    parts: list[Annotated[TextPart | ToolPart | ImagePart | FilePart, Field(discriminator="type")]]  # type: ignore[assignment]  # narrower
    cost: CostText | None  # type: ignore[assignment]  # as it is written
    error: ReplyError | None  # type: ignore[assignment]  # narrower


class MessageEvent(MessageData):
    """A message. `cid` is the one that it was sent or asked for with, so that the sender replaces its own copy."""

    model_config = example(
        **_message(
            id=_QUESTION, role="user", parts=[{"type": "text", "text": "Why is the sky blue?"}], model=None,
            parent_id=None, usage=None, cost=None,
        ),
        cid="0193c0de-0000-7000-8000-000000000007",
    )  # fmt: skip

    cid: Uuid | None


class _ReplyEvent(Closed):
    reply: Uuid


class ReplyQueued(_ReplyEvent):
    """A reply waits for those before it; it is number `pos` in the line."""

    model_config = example(reply=_REPLY, to=_QUESTION, pos=1)

    to: Uuid = Field(description="The message that it answers")
    pos: Annotated[int, Field(ge=1)]


class ReplyStarted(_ReplyEvent):
    """A reply is being written."""

    model_config = example(reply=_REPLY, to=_QUESTION, model="default", attempt=1)

    to: Uuid
    model: str
    attempt: Attempt


class ReplyPart(_ReplyEvent):
    """A part begins or ends. `start` precedes the first delta or tool event of its part."""

    model_config = example(reply=_REPLY, part=0, kind="text", state="start")

    part: Count
    kind: Literal["text", "reasoning", "tool"]
    state: Literal["start", "end"]


class ReplyDelta(_ReplyEvent):
    """Text to append: `off` is the offset of `x` in its part, in code points."""

    model_config = example(reply=_REPLY, part=0, off=0, x=_TEXT)

    part: Count
    off: Count
    x: str


class ReplyTool(_ReplyEvent):
    """How a tool call stands."""

    model_config = example(
        reply=_REPLY, part=1, call=_CALL, name="add_task", state="done", output={"id": _QUESTION, "title": "Buy milk"}
    )

    part: Count
    call: Uuid
    name: str
    state: ToolState
    input: ToolInput = absent()
    output: Any = absent()


class ReplyResumed(_ReplyEvent):
    """Another process writes on, or another model (`fallback`). `strategy` says how: what stands stays as it is."""

    model_config = example(reply=_REPLY, attempt=2, model="default", strategy="reattach")

    attempt: Attempt
    model: str
    strategy: Literal["restart", "reattach", "prefill", "fallback"]


class ReplyReset(_ReplyEvent):
    """Text is taken back, for a model that begins anew: the part ends at `to_off`, later parts are gone.

    No other event shortens text.
    """

    model_config = example(reply=_REPLY, attempt=2, part=0, to_off=0)

    attempt: Attempt
    part: Count
    to_off: Count


class _Ended(_ReplyEvent):
    message: MessageData
    usage: Usage | None
    cost: CostText | None
    len: Count = Field(description="Code points of the visible text")
    sha256: Sha256 = Field(description="Of the visible text's UTF-8")


_ENDED: dict[str, JsonValue] = {
    "reply": _REPLY, "message": _message(), "usage": _USAGE, "cost": "0.00012300", "len": len(_TEXT), "sha256": _SHA256,
}  # fmt: skip


class ReplyCompleted(_Ended):
    """The reply is whole."""

    model_config = example(**_ENDED)


_ERROR: dict[str, JsonValue] = {
    "code": "provider_unavailable", "msg": "The model provider is not available.", "retryable": True,
}  # fmt: skip


class ReplyFailed(_Ended):
    """The reply ended early; what there was of it is kept."""

    model_config = example(
        **{**_ENDED, "message": _message(status="failed", error=_ERROR)},
        error=_ERROR, partial=True, can=["continue", "regenerate"],
    )  # fmt: skip

    error: ReplyError
    partial: bool
    can: list[Literal["continue", "regenerate"]]


class ReplyCancelled(_Ended):
    """The reply was stopped by someone; what there was of it is kept."""

    model_config = example(**{**_ENDED, "message": _message(status="cancelled")}, by=_USER, partial=True)

    by: Uuid
    partial: bool


class ConversationData(ConversationRead):
    """A conversation, as the HTTP contract has it."""

    model_config = example(**_CONVERSATION_EXAMPLE)


class ConversationShown(Closed):
    """A conversation as all who read it have it: whether one has pinned it is one's own."""

    model_config = example(**{key: value for key, value in _CONVERSATION_EXAMPLE.items() if key != "pinned"})

    id: Uuid
    title: str | None
    model: str | None
    assistant: str
    owner_id: Uuid
    current_id: Uuid | None
    shared: bool
    shared_access: Literal["read", "write"] | None
    archived: bool
    created_at: datetime
    updated_at: datetime


class ConversationState(Closed):
    """The conversation and its newest messages of all branches, ascending; a reply being written is `streaming`."""

    model_config = example(conversation=_CONVERSATION_EXAMPLE, messages=[_message()])

    conversation: ConversationData
    messages: list[MessageData]


class InboxState(Closed):
    """The newest conversations, the one that moved last first, and the jobs that are not done."""

    model_config = example(conversations=[_CONVERSATION_EXAMPLE], jobs=[])

    conversations: list[ConversationData]
    jobs: list[JobRead]


class Notice(BaseModel):
    """Something that the caller is to be told of. A notice that comes twice has the same `id`.

    `kind` says what it is about, and what else is in it: `budget_alert` and `budget_used_up` have the `budget`,
    `conversation_shared` and `conversation_unshared` the `conversation`.
    """

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "id": "0193c0de-9f3a-7bd2-8000-0a1b2c3d4e5f",
                    "kind": "budget_alert",
                    "text": "The workspace's daily budget is used up to 80%.",
                    "budget": {
                        "id": "0193c0de-9f3a-7bd2-8000-0a1b2c3d4e60",
                        "subject": "workspace",
                        "subject_id": None,
                        "set_by": "workspace",
                        "period": "day",
                        "spent": "4.00000000",
                        "limit": "5.00000000",
                        "resets_at": "2026-11-22T00:00:00Z",
                    },
                }
            ]
        },
    )

    id: str
    kind: str
    text: str


CONVERSATION_EVENTS: Mapping[str, type[BaseModel]] = {
    "message.created": MessageEvent,
    "message.updated": MessageEvent,
    "message.deleted": Deleted,
    "reply.queued": ReplyQueued,
    "reply.started": ReplyStarted,
    "reply.part": ReplyPart,
    "reply.delta": ReplyDelta,
    "reply.tool": ReplyTool,
    "reply.resumed": ReplyResumed,
    "reply.reset": ReplyReset,
    "reply.completed": ReplyCompleted,
    "reply.failed": ReplyFailed,
    "reply.cancelled": ReplyCancelled,
    "conversation.changed": ConversationShown,
}

INBOX_EVENTS: Mapping[str, type[BaseModel]] = {
    "conversation.created": ConversationData,
    "conversation.updated": ConversationData,
    "conversation.deleted": Deleted,
    "job.updated": JobRead,
    "notice": Notice,
}
