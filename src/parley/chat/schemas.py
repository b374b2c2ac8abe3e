"""API shapes of conversations and messages."""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import AfterValidator, ConfigDict, Field, PlainSerializer, StringConstraints, model_validator

from parley.core.schemas import ReadModel, RequestModel, Text, storable

TEXT_LENGTH = 32_000

# The constraints come before `storable`: behind another validator Pydantic checks the length but strips nothing.
Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200), AfterValidator(storable)]
ModelName = Annotated[Text, StringConstraints(min_length=1, max_length=100)]
# The name of a built-in one, or the name or id of one of the workspace's own.
AssistantName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class ConversationCreate(RequestModel):
    """A new conversation; everything has a default."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"title": "Why is the sky blue?", "model": "default"}]})

    title: Title | None = None
    model: ModelName | None = None
    assistant: AssistantName = "general"


class ConversationUpdate(RequestModel):
    """What may change of a conversation; what is left out stays."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"title": "The sky", "pinned": True}]})

    title: Title | None = Field(default=None, description="null gives the title back to the first words")
    model: ModelName | None = None
    archived: bool | None = None
    assistant: AssistantName | None = Field(default=None, description="Who answers: a name, or the id of an own one")
    pinned: bool | None = Field(default=None, description="At the top of the caller's own lists")
    shared: bool | None = Field(default=None, description="With the workspace: `read` unless `shared_access` says more")
    shared_access: Literal["read", "write"] | None = None
    current_id: UUID | None = Field(
        default=None, description="A message of the branch to show: its newest end becomes the conversation's"
    )

    @model_validator(mode="after")
    def _holds(self) -> "ConversationUpdate":
        for name in ("archived", "assistant", "pinned", "shared", "current_id"):
            if name in self.model_fields_set and getattr(self, name) is None:
                raise ValueError(f"{name} must not be null")
        if "shared_access" in self.model_fields_set and self.shared not in {None, self.shared_access is not None}:
            raise ValueError("shared and shared_access must say the same")
        return self


class ConversationRead(ReadModel):
    """A conversation. `current_id` is the message that is its visible end."""

    id: UUID
    title: str | None
    model: str | None
    assistant: str
    owner_id: UUID
    current_id: UUID | None
    shared: bool
    shared_access: Literal["read", "write"] | None
    archived: bool
    pinned: bool
    created_at: datetime
    updated_at: datetime


class TextPartSent(RequestModel):
    """Text of a message that is sent."""

    type: Literal["text"]
    text: Annotated[Text, Field(min_length=1, max_length=TEXT_LENGTH)]


class AttachmentPartSent(RequestModel):
    """An uploaded image or text file. What a stored part says of it may come along and is not looked at."""

    type: Literal["image", "file"]
    attachment: UUID
    media_type: Annotated[str, Field(max_length=100)] | None = None
    name: Annotated[str, Field(max_length=200)] | None = None
    size: int | None = None
    width: int | None = None
    height: int | None = None


PartSent = Annotated[TextPartSent | AttachmentPartSent, Field(discriminator="type")]


class MessageEdit(RequestModel):
    """Another version of a message, to be answered: exactly one of `text` and `parts`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "Why is the sky blue?"}]})

    text: Annotated[Text, Field(min_length=1, max_length=TEXT_LENGTH)] | None = None
    parts: Annotated[list[PartSent], Field(min_length=1, max_length=64)] | None = None
    model: ModelName | None = None
    on_active: Literal["queue", "reject", "interrupt"] = "queue"

    @model_validator(mode="after")
    def _one_content(self) -> Self:
        if (self.text is None) == (self.parts is None):
            raise ValueError("exactly one of text and parts is needed")
        if sum(len(text) for text in self.texts) > TEXT_LENGTH:
            raise ValueError(f"a message has at most {TEXT_LENGTH} characters")
        return self

    @property
    def texts(self) -> list[str]:
        """The texts of the message's parts."""
        return [content for content in self.contents if isinstance(content, str)]

    @property
    def contents(self) -> tuple[str | UUID, ...]:
        """What the message has, in order: texts, and the ids of attachments."""
        if self.text is not None:
            return (self.text,)
        return tuple(part.text if isinstance(part, TextPartSent) else part.attachment for part in self.parts or [])


class MessageSend(MessageEdit):
    """A message to be answered: exactly one of `text` and `parts`."""

    parent: UUID | None = None


# Dollars as text, all eight places: "0.00012300", never "1.23E-4".
Cost = Annotated[Decimal, PlainSerializer(lambda value: f"{value:f}", return_type=str)]


class Usage(ReadModel):
    """Tokens that a reply used."""

    input_tokens: int
    cached_tokens: int
    output_tokens: int


class MessageRead(ReadModel):
    """A message. Parts are `{type: text|reasoning, text}` or `{type: tool, call, name, state, input, output}`.

    Those of a user can also be `{type: image|file, attachment, media_type, name, size}`, an image's with `width` and
    `height`.
    """

    id: UUID
    conversation_id: UUID
    role: Literal["user", "assistant", "system"]
    parts: list[dict[str, Any]]
    status: Literal["queued", "streaming", "completed", "failed", "cancelled"]
    model: str | None
    parent_id: UUID | None
    usage: Usage | None
    cost: Cost | None
    error: dict[str, Any] | None
    created_at: datetime
    completed_at: datetime | None


class Turn(ReadModel):
    """A question and the reply that is being written to it."""

    message: MessageRead
    reply: MessageRead
