"""What OpenAI's clients send: https://platform.openai.com/docs/api-reference/chat/create.

Fields that are not named here are ignored: the clients of tomorrow send new ones. Those that would change the answer
in a way that we cannot provide are named, so that they can be refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_MESSAGES = 5_000
MAX_PARTS = 500
MAX_TOOLS = 128
MAX_STOPS = 4

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
SchemaName = FunctionName
CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, hide_input_in_errors=True)


class TextContent(_Model):
    """Text of a message."""

    type: Literal["text"]
    text: str


class RefusalContent(_Model):
    """What an assistant refused, which it said in words."""

    type: Literal["refusal"]
    refusal: str


class ImageUrl(_Model):
    """Where an image is."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImageContent(_Model):
    """An image of a user's message."""

    type: Literal["image_url"]
    image_url: ImageUrl


_Texts = Annotated[list[TextContent], Field(max_length=MAX_PARTS)]
_UserPart = Annotated[TextContent | ImageContent, Field(discriminator="type")]
_AssistantPart = Annotated[TextContent | RefusalContent, Field(discriminator="type")]


class SystemMessage(_Model):
    """Instructions; `developer` is OpenAI's newer word for them."""

    role: Literal["system", "developer"]
    content: str | _Texts


class UserMessage(_Model):
    """What a person says."""

    role: Literal["user"]
    content: str | Annotated[list[_UserPart], Field(max_length=MAX_PARTS)]


class FunctionCall(_Model):
    """The call of a function, with the text that the model wrote for its arguments."""

    name: FunctionName
    arguments: str


class ToolCall(_Model):
    """A tool call of an assistant."""

    id: CallId
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(_Model):
    """What a model said before."""

    role: Literal["assistant"]
    content: str | Annotated[list[_AssistantPart], Field(max_length=MAX_PARTS)] | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None


class ToolMessage(_Model):
    """What a tool answered."""

    role: Literal["tool"]
    tool_call_id: CallId
    content: str | _Texts


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionDefinition(_Model):
    """A function that the caller has."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolDefinition(_Model):
    """A tool that the caller has. It is the caller who runs it."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Model):
    """Which function must be called."""

    name: FunctionName


class NamedTool(_Model):
    """Which tool must be called."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(_Model):
    """Text, as it is without a format."""

    type: Literal["text"]


class JsonObjectFormat(_Model):
    """A JSON object of any shape."""

    type: Literal["json_object"]


class SchemaDefinition(_Model):
    """A JSON schema with a name."""

    name: SchemaName
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(_Model):
    """A JSON object that fits a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaDefinition


class StreamOptions(_Model):
    """How the answer is streamed."""

    include_usage: bool | None = None


class ChatCompletionCreate(_Model):
    """A request for a completion."""

    model: ModelName
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None

    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )

    # Handed on to providers that have them.
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    reasoning_effort: Annotated[str, StringConstraints(max_length=20)] | None = None
    verbosity: Annotated[str, StringConstraints(max_length=20)] | None = None

    # Refused when they ask for something.
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: list[str] | None = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None
