"""API shapes of assistants."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, StringConstraints, model_validator

from parley.chat.assistants.models import DESCRIPTION_LENGTH, INSTRUCTIONS_LENGTH, NAME_LENGTH, TITLE_LENGTH
from parley.chat.assistants.types import ApprovalMode
from parley.core.schemas import ReadModel, RequestModel, Text, storable
from parley.llm.ports import ModelRequest

_TOOLS = 64
# What a budget sets aside for an answer, whoever gives it.
OUTPUT_TOKENS = ModelRequest(messages=()).max_output_tokens

# Never a dash: an id has some, so that the one is not taken for the other.
Name = Annotated[str, StringConstraints(pattern=rf"^[a-z][a-z0-9_]{{0,{NAME_LENGTH - 1}}}$")]
Title = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=TITLE_LENGTH), AfterValidator(storable)
]
Description = Annotated[str, StringConstraints(max_length=DESCRIPTION_LENGTH), AfterValidator(storable)]
Instructions = Annotated[
    str, StringConstraints(pattern=r"\S", max_length=INSTRUCTIONS_LENGTH), AfterValidator(storable)
]
ModelName = Annotated[Text, StringConstraints(min_length=1, max_length=100)]
ToolName = Annotated[str, StringConstraints(min_length=1, max_length=64)]
# One that is named twice is one.
Tools = Annotated[list[ToolName], Field(max_length=_TOOLS), AfterValidator(lambda names: list(dict.fromkeys(names)))]

_EXAMPLE: dict[str, JsonValue] = {
    "name": "shopper",
    "title": "Shopper",
    "description": "Plans what to buy.",
    "instructions": "You help a family with its shopping. Answer in one short paragraph.",
    "tools": ["add_task", "list_tasks"],
    "approval": "writes",
}


class Parameters(RequestModel):
    """How the model is asked. What is left out is the model's own."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    max_output_tokens: Annotated[int, Field(ge=16, le=OUTPUT_TOKENS)] | None = None


class AssistantCreate(RequestModel):
    """A new assistant. `instructions` are plain text: nothing in them is filled in."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    name: Name
    title: Title
    description: Description = ""
    instructions: Instructions
    model: ModelName | None = Field(default=None, description="Answers where neither message nor conversation says")
    tools: Tools | None = Field(default=None, description="The tools that it may call; left out: all")
    approval: ApprovalMode = Field(
        default=ApprovalMode.WRITES, description="Which calls you approve: all, those that change something, none"
    )
    approval_tools: Tools = Field(default_factory=list, description="Tools whose calls you approve in any case")
    parameters: Parameters = Field(default_factory=Parameters)


class AssistantUpdate(RequestModel):
    """What may change of an assistant; what is left out stays."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"instructions": "Answer in rhymes.", "version": 1}]})

    name: Name | None = None
    title: Title | None = None
    description: Description | None = None
    instructions: Instructions | None = None
    model: ModelName | None = None
    tools: Tools | None = None
    approval: ApprovalMode | None = None
    approval_tools: Tools | None = None
    parameters: Parameters | None = None
    version: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="The version that was read: refused if it is not the current one"
    )

    @model_validator(mode="after")
    def _not_null(self) -> "AssistantUpdate":
        for field in ("name", "title", "description", "instructions", "approval", "approval_tools", "parameters"):
            if field in self.model_fields_set and getattr(self, field) is None:
                raise ValueError(f"{field} cannot be null")
        return self


class PromptRead(ReadModel):
    """A prompt file. Replies are marked with `path` and `sha256`; `assistants` and `features` are what use it."""

    path: str
    sha256: str
    assistants: list[str]
    features: list[str]


class ParametersRead(ReadModel):
    """How the model is asked."""

    temperature: float | None
    max_output_tokens: int | None


class AssistantRead(ReadModel):
    """An assistant. A built-in one has no id and is named by its `name`; an own one by either.

    `prompt` is what replies are marked with: the file of a built-in one, `assistant:{id}` of an own one; `sha256` is
    of the file or of the instructions. `tools` null: all of them.
    """

    id: UUID | None
    name: str
    title: str
    description: str
    built_in: bool
    instructions: str | None
    prompt: str
    sha256: str
    model: str | None
    tools: list[str] | None
    approval: ApprovalMode
    approval_tools: list[str]
    parameters: ParametersRead
    created_by: UUID | None
    version: int
    created_at: datetime | None
    updated_at: datetime | None
