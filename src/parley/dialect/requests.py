"""From a request in OpenAI's words to what our models are asked."""

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import orjson
from pydantic import ValidationError

from parley.core.errors import BadRequest
from parley.dialect.errors import NotSupported, RequestInvalid, invalid_fields
from parley.dialect.schemas import (
    AssistantMessage,
    ChatCompletionCreate,
    ImageContent,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    RefusalContent,
    SystemMessage,
    TextContent,
    ToolMessage,
    UserMessage,
)
from parley.llm.flavours import flavour_of
from parley.llm.ports import (
    ImagePart,
    JsonSchema,
    ModelMessage,
    ModelRequest,
    TextPart,
    ToolCallPart,
    ToolChoice,
    ToolResultPart,
    ToolSpec,
)
from parley.llm.registry import Capability, ModelEntry, ProviderKind

MAX_DEPTH: Final = 100
MAX_IMAGES: Final = 100

# What each kind of provider knows under OpenAI's name. All else that a client sends is not handed on.
PASSED_ON: Final[Mapping[ProviderKind, frozenset[str]]] = {
    "openai": frozenset(
        {"top_p", "seed", "frequency_penalty", "presence_penalty", "logit_bias", "reasoning_effort", "verbosity"}
    ),
    "openai_responses": frozenset({"top_p"}),
    "anthropic": frozenset({"top_p"}),
    "demo": frozenset(),
}
# Servers that refuse a request for a field that they do not know, by flavour.
UNKNOWN_TO: Final[Mapping[str, frozenset[str]]] = {
    "mistral": frozenset({"seed", "logit_bias", "reasoning_effort", "verbosity"}),
}

_REFUSED: Final = {
    "logprobs": "Token probabilities are not available here.",
    "top_logprobs": "Token probabilities are not available here.",
    "audio": "Audio is not available here.",
    "functions": "`functions` is the old form: use `tools`.",
    "function_call": "`function_call` is the old form: use `tool_choice`.",
    "web_search_options": "Web search is not available here.",
}
_SIGNATURES: Final = (
    ("image/png", b"\x89PNG\r\n\x1a\n"),
    ("image/jpeg", b"\xff\xd8\xff"),
    ("image/gif", b"GIF8"),
)
_ANY_OBJECT: Final[dict[str, Any]] = {"type": "object"}


def read(body: bytes) -> ChatCompletionCreate:
    """Read a request. Raises `BadRequest` and `RequestInvalid`, which names the field."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise BadRequest("The body is not valid JSON.") from None
    if not isinstance(data, dict):
        raise BadRequest("The body must be a JSON object.")
    if _deeper_than(data, MAX_DEPTH):
        raise BadRequest(f"The body is nested more than {MAX_DEPTH} levels deep.")
    try:
        wanted = ChatCompletionCreate.model_validate(data)
    except ValidationError as error:
        raise invalid_fields(error, data) from None
    _refuse_unsupported(wanted)
    return wanted


def _deeper_than(value: object, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(item for item in one.values() if isinstance(item, dict | list))
            elif isinstance(one, list):
                inner.extend(item for item in one if isinstance(item, dict | list))
        if not inner:
            return False
        level = inner
    return True


def _refuse_unsupported(wanted: ChatCompletionCreate) -> None:
    if wanted.n not in {None, 1}:
        raise NotSupported("One answer at a time: n must be 1.", param="n")
    if wanted.modalities and wanted.modalities != ["text"]:
        raise NotSupported("Answers are text: modalities must be ['text'].", param="modalities")
    for name, why in _REFUSED.items():
        value = getattr(wanted, name)
        # An empty object asks for it too; false, zero and an empty list do not.
        if value or value == {}:
            raise NotSupported(why, param=name)


def addresses_of_images(wanted: ChatCompletionCreate, entry: ModelEntry) -> dict[str, str]:
    """Return the addresses that have to be fetched, each with the field that names it first."""
    found: dict[str, str] = {}
    if Capability.IMAGES not in entry.capabilities:
        return found
    for number, message in enumerate(wanted.messages):
        if isinstance(message, UserMessage) and not isinstance(message.content, str):
            for at, part in enumerate(message.content):
                if isinstance(part, ImageContent) and not part.image_url.url.startswith("data:"):
                    found.setdefault(part.image_url.url, f"messages[{number}].content[{at}].image_url.url")
    return found


def to_model(
    wanted: ChatCompletionCreate,
    entry: ModelEntry,
    fallbacks: Sequence[ModelEntry] = (),
    images: Mapping[str, bytes] | None = None,
) -> ModelRequest:
    """Return what the model is asked. `images` has what was fetched. Raises `RequestInvalid` for what it cannot do."""
    tools = _tools(wanted, entry)
    request = ModelRequest(
        messages=tuple(_messages(wanted, entry, images or {})),
        tools=tools,
        # Never without a bound, and never beyond the model's own.
        max_output_tokens=min(
            bound
            for bound in (wanted.max_completion_tokens, wanted.max_tokens, entry.max_output_tokens)
            if bound is not None
        ),
        temperature=wanted.temperature,
        parameters=_parameters(wanted, (entry, *fallbacks)),
        response_schema=None if _has_own_json(wanted, (entry, *fallbacks)) else _schema(wanted, entry),
        tool_choice=_choice(wanted, tools),
        stop=(wanted.stop,) if isinstance(wanted.stop, str) else tuple(wanted.stop or ()),
        parallel_tools=wanted.parallel_tool_calls if tools else None,
    )
    if not any(message.role != "system" for message in request.messages):
        raise RequestInvalid("There is nothing to answer: a message of the user is needed.", param="messages")
    return request


def _known(entry: ModelEntry) -> frozenset[str]:
    known = PASSED_ON[entry.kind]
    if entry.kind == "openai":
        known -= UNKNOWN_TO.get(flavour_of(entry.base_url, entry.flavour).name, frozenset())
    return known


def _parameters(wanted: ChatCompletionCreate, entries: Sequence[ModelEntry]) -> dict[str, Any]:
    """Return what is handed on as it is: what every model that may answer knows, and no operator has settled."""
    names = frozenset.intersection(*(_known(entry).difference(entry.parameters) for entry in entries))
    found = {name: getattr(wanted, name) for name in sorted(names)}
    if _has_own_json(wanted, entries):
        found["response_format"] = {"type": "json_object"}
    return {name: value for name, value in found.items() if value is not None}


def _has_own_json(wanted: ChatCompletionCreate, entries: Iterable[ModelEntry]) -> bool:
    """Whether a JSON object is asked for, of servers that know it by OpenAI's own word."""
    return isinstance(wanted.response_format, JsonObjectFormat) and all(entry.kind == "openai" for entry in entries)


# -- tools and formats -------------------------------------------------------------------------------------------------


def _tools(wanted: ChatCompletionCreate, entry: ModelEntry) -> tuple[ToolSpec, ...]:
    if not wanted.tools:
        return ()
    if Capability.TOOLS not in entry.capabilities:
        raise NotSupported(f"The model {entry.id} cannot call tools.", param="tools")
    names = [tool.function.name for tool in wanted.tools]
    if len(set(names)) < len(names):
        raise RequestInvalid("Two tools have the same name.", param="tools")
    return tuple(
        ToolSpec(
            tool.function.name,
            tool.function.description or "",
            {**_ANY_OBJECT, "properties": {}, **(tool.function.parameters or {})},
        )
        for tool in wanted.tools
    )


def _choice(wanted: ChatCompletionCreate, tools: Sequence[ToolSpec]) -> ToolChoice | None:
    choice = wanted.tool_choice
    if choice is None or (not tools and choice in {"none", "auto"}):
        return None
    if not tools:
        raise RequestInvalid("tool_choice is only allowed when tools are given.", param="tool_choice")
    if not isinstance(choice, NamedTool):
        return choice
    name = choice.function.name
    # The three words are taken; whoever names a tool so can still let the model choose.
    if name not in {tool.name for tool in tools} or name in {"none", "auto", "required"}:
        raise RequestInvalid("There is no such tool to be chosen.", param="tool_choice")
    return name


def _schema(wanted: ChatCompletionCreate, entry: ModelEntry) -> JsonSchema | None:
    match wanted.response_format:
        case JsonSchemaFormat(json_schema=definition):
            schema, strict = definition.schema_ or _ANY_OBJECT, bool(definition.strict)
            found = JsonSchema(definition.name, schema, strict=strict)
        case JsonObjectFormat():
            found = JsonSchema("object", _ANY_OBJECT, strict=False)
        case _:
            return None
    if Capability.JSON_SCHEMA not in entry.capabilities:
        raise NotSupported(f"The model {entry.id} cannot be held to JSON.", param="response_format")
    return found


# -- messages ----------------------------------------------------------------------------------------------------------


def _messages(wanted: ChatCompletionCreate, entry: ModelEntry, fetched: Mapping[str, bytes]) -> Iterator[ModelMessage]:
    """Yield the history. Results of one round of tools are one message, and carry the names of what was called."""
    names: dict[str, str] = {}
    results: list[ToolResultPart] = []
    images = 0
    for number, message in enumerate(wanted.messages):
        at = f"messages[{number}]"
        if isinstance(message, ToolMessage):
            name = names.get(message.tool_call_id)
            if name is None:
                raise RequestInvalid(
                    "A message of the role tool must answer a tool call of a message before it.",
                    param=f"{at}.tool_call_id",
                )
            results.append(ToolResultPart(message.tool_call_id, name, _text(message.content)))
            continue
        if results:
            yield ModelMessage("tool", tuple(results))
            results = []
        match message:
            case SystemMessage():
                yield ModelMessage("system", (TextPart(_text(message.content)),))
            case UserMessage():
                parts = tuple(_user_parts(message, at, fetched))
                images += sum(isinstance(part, ImagePart) for part in parts)
                if images and Capability.IMAGES not in entry.capabilities:
                    raise NotSupported(f"The model {entry.id} cannot see images.", param=f"{at}.content")
                if images > MAX_IMAGES:
                    raise RequestInvalid(f"There are more than {MAX_IMAGES} images.", param="messages")
                yield ModelMessage("user", parts)
            case AssistantMessage():
                calls = message.tool_calls or []
                names |= {call.id: call.function.name for call in calls}
                said = _text(message.content) or message.refusal or ""
                yield ModelMessage(
                    "assistant",
                    (
                        *([TextPart(said)] if said else []),
                        *(ToolCallPart(c.id, c.function.name, _arguments(c.function.arguments)) for c in calls),
                    ),
                )
    if results:
        yield ModelMessage("tool", tuple(results))


def _text(content: str | Iterable[TextContent | RefusalContent] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n\n".join(part.text if isinstance(part, TextContent) else part.refusal for part in content)


def _arguments(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text) if text.strip() else {}
    except orjson.JSONDecodeError:
        value = None
    # A model that wrote something else sees what it wrote, and the tool's answer to it.
    return value if isinstance(value, dict) else {"unreadable": text}


def _user_parts(message: UserMessage, at: str, fetched: Mapping[str, bytes]) -> Iterator[TextPart | ImagePart]:
    if isinstance(message.content, str):
        yield TextPart(message.content)
        return
    for number, part in enumerate(message.content):
        if isinstance(part, ImageContent):
            yield _image(part, f"{at}.content[{number}].image_url.url", fetched)
        else:
            yield TextPart(part.text)


def _image(part: ImageContent, param: str, fetched: Mapping[str, bytes]) -> ImagePart:
    content = fetched.get(part.image_url.url)
    if content is None:
        content = _from_data_url(part.image_url.url, param)
    media_type = _media_type(content)
    if media_type is None:
        raise RequestInvalid("The image must be a PNG, JPEG, GIF or WebP file.", param=param)
    return ImagePart(media_type, content, part.image_url.detail)


def _from_data_url(url: str, param: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise RequestInvalid("The image must be a data: URL in base64.", param=param)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RequestInvalid("The image is not valid base64.", param=param) from None


def _media_type(content: bytes) -> str | None:
    """Return what the bytes are, whatever was said of them."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for kind, signature in _SIGNATURES if content.startswith(signature)), None)
