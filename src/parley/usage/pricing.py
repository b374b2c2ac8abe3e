"""What calls cost, and what they are estimated at where no provider has counted."""

from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Decimal

from parley.llm.estimates import IMAGE_TOKENS
from parley.llm.ports import ImagePart, ModelRequest, TextPart, ToolCallPart, UsageChunk
from parley.llm.registry import ModelEntry

_MILLION = Decimal(1_000_000)
_COST_STEP = Decimal("0.00000001")
_CHARS_PER_TOKEN = 4


def cost_of(entry: ModelEntry, usage: UsageChunk, *, images: int = 0) -> Decimal:
    """Return the cost in dollars, to 8 decimals.

    Tokens that came from the provider's cache, or went into it, are input tokens with a price of their own.
    """
    price = entry.price
    cached = min(usage.cached_tokens, usage.input_tokens)
    written = min(usage.cache_written_tokens, usage.input_tokens - cached)
    tokens = (
        price.input * (usage.input_tokens - cached - written)
        + price.cached_input * cached
        + price.cache_write * written
        + price.output * usage.output_tokens
    )
    return _rounded(tokens / _MILLION + price.image * images)


def worst_case(entries: Iterable[ModelEntry], *, input_tokens: int, output_tokens: int, images: int = 0) -> Decimal:
    """Return what a call costs at most, whichever of these models answers."""
    return max(
        (
            _rounded(
                (
                    max(entry.price.input, entry.price.cached_input, entry.price.cache_write) * input_tokens
                    + entry.price.output * min(output_tokens, entry.max_output_tokens)
                )
                / _MILLION
                + entry.price.image * images
            )
            for entry in entries
        ),
        default=Decimal(0),
    )


def _rounded(amount: Decimal) -> Decimal:
    return amount.quantize(_COST_STEP, rounding=ROUND_HALF_UP)


def tokens_of(chars: int) -> int:
    """Return about how many tokens so many characters of an answer, or of what was asked, are."""
    return -(-chars // _CHARS_PER_TOKEN)


def images_of(request: ModelRequest) -> int:
    """Return how many images a request has."""
    return sum(isinstance(part, ImagePart) for message in request.messages for part in message.parts)


def input_tokens_of(request: ModelRequest) -> int:
    """Return about how many tokens a request is, for what was sent and not counted.

    What is reserved before is `parley.llm.estimates.request_tokens`, which is on the cautious side.
    """
    return tokens_of(sum(map(len, _texts(request)))) + IMAGE_TOKENS * images_of(request)


def _texts(request: ModelRequest) -> Iterable[str]:
    yield request.prefill or ""
    for tool in request.tools:
        yield from (tool.name, tool.description, str(tool.parameters))
    if request.response_schema is not None:
        yield str(request.response_schema.schema)
    for message in request.messages:
        for part in message.parts:
            if isinstance(part, TextPart):
                yield part.text
            elif isinstance(part, ToolCallPart):
                yield from (part.name, str(part.arguments))
            elif not isinstance(part, ImagePart):
                yield part.content
