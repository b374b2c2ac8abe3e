"""API shapes of conversations and messages."""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, ConfigDict, Field, PlainSerializer, StringConstraints, model_validator

from parley.core.schemas import ReadModel, RequestModel, Text, storable

TEXT_LENGTH = 32_000

# The constraints come before `storable`: behind another validator Pydantic checks the length but strips nothing.
Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200), AfterValidator(storable)]
ModelName = Annotated[Text, StringConstraints(min_length=1, max_length=100)]
AssistantName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


class ConversationCreate(RequestModel):
    """A new conversation; everything has a default."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"title": "Why is the sky blue?", "model": "default"}]})

    title: Title | None = None
    model: ModelName | None = None
    assistant: AssistantName = "general"


class ConversationUpdate(RequestModel):
    """What may change of a conversation; what is left out stays."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"title": "The sky"}]})

    title: Title | None = None
    model: ModelName | None = None
    archived: bool | None = None

    @model_validator(mode="after")
    def _not_null(self) -> "ConversationUpdate":
        if "archived" in self.model_fields_set and self.archived is None:
            raise ValueError("archived must be true or false")
        return self


class ConversationRead(ReadModel):
    """A conversation. `current_id` is the message that is its visible end."""

    id: UUID
    title: str | None
    model: str | None
    owner_id: UUID
    current_id: UUID | None
    shared: bool
    archived: bool
    created_at: datetime
    updated_at: datetime


class TextPartSent(RequestModel):
    """Text of a message that is sent."""

    type: Literal["text"]
    text: Annotated[Text, Field(min_length=1, max_length=TEXT_LENGTH)]


class MessageSend(RequestModel):
    """A message to be answered: exactly one of `text` and `parts`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "Why is the sky blue?"}]})

    text: Annotated[Text, Field(min_length=1, max_length=TEXT_LENGTH)] | None = None
    parts: Annotated[list[TextPartSent], Field(min_length=1, max_length=64)] | None = None
    model: ModelName | None = None
    parent: UUID | None = None
    on_active: Literal["queue", "reject", "interrupt"] = "queue"

    @model_validator(mode="after")
    def _one_content(self) -> "MessageSend":
        if (self.text is None) == (self.parts is None):
            raise ValueError("exactly one of text and parts is needed")
        if sum(len(text) for text in self.texts) > TEXT_LENGTH:
            raise ValueError(f"a message has at most {TEXT_LENGTH} characters")
        return self

    @property
    def texts(self) -> list[str]:
        """The texts of the message's parts."""
        return [self.text] if self.text is not None else [part.text for part in self.parts or []]


# Dollars as text, all eight places: "0.00012300", never "1.23E-4".
Cost = Annotated[Decimal, PlainSerializer(lambda value: f"{value:f}", return_type=str)]


class Usage(ReadModel):
    """Tokens that a reply used."""

    input_tokens: int
    cached_tokens: int
    output_tokens: int


class MessageRead(ReadModel):
    """A message. Parts are `{type: text|reasoning, text}` or `{type: tool, call, name, state, input, output}`."""

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
