"""What is encoded by hand is what a JSON library would have made."""

from decimal import Decimal
from typing import Any

import orjson
import pytest

from parley.dialect.wire import Chunks, completion
from parley.llm.ports import FinishReason, ToolCallChunk
from parley.usage.service import Tally

TALLY = Tally(model_id="gpt", input_tokens=7, cached_tokens=2, output_tokens=3, estimated=False, cost=Decimal(0))
USAGE = {
    "prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 2},
}  # fmt: skip
ODD = ('"quoted"', "line\nbreak\r\n\r\n", "data: [DONE]\n\n", "\\", "\u2028", "👩‍👩‍👧 日本", "\u0000", "")


def read(piece: bytes) -> Any:
    assert piece.startswith(b"data: ")
    assert piece.endswith(b"\n\n")
    # One event and not two, whatever is in it.
    assert piece.count(b"\n") == 2
    return orjson.loads(piece[6:])


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("text", ODD)
def test_every_chunk(text: str, *, include_usage: bool) -> None:
    chunks = Chunks("chatcmpl-1", created=5, model=f"m{text}", include_usage=include_usage)
    call = ToolCallChunk("a", f"f{text}", None, text)
    about = {
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": f"m{text}",
        "system_fingerprint": None, **({"usage": None} if include_usage else {}),
    }  # fmt: skip

    def expected(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**about, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}

    assert read(chunks.role()) == expected({"role": "assistant", "content": "", "refusal": None})
    assert read(chunks.text(text)) == expected({"content": text})
    assert read(chunks.reasoning(text)) == expected({"reasoning_content": text})
    function = {"name": f"f{text}", "arguments": text or "{}"}
    tool_call = {"index": 3, "id": "a", "type": "function", "function": function}
    assert read(chunks.tool_call(3, call)) == expected({"tool_calls": [tool_call]})
    for reason in FinishReason:
        assert read(chunks.finish(reason)) == expected({}, reason.value)
    assert read(chunks.usage(TALLY)) == {**about, "choices": [], "usage": USAGE}


def test_the_model_that_answers_can_change_before_it_has() -> None:
    chunks = Chunks("chatcmpl-1", created=5, model="first", include_usage=False)
    chunks.model = "second"

    assert read(chunks.text("x"))["model"] == "second"
    assert read(chunks.role())["model"] == "second"


def test_a_message_with_nothing_but_tool_calls_has_no_content() -> None:
    call = ToolCallChunk("a", "f", {}, "{}")
    made = orjson.loads(
        completion(
            "chatcmpl-1", created=5, model="gpt", text="", reasoning="", calls=[call],
            finish=FinishReason.TOOL_CALLS, tally=TALLY,
        )
    )  # fmt: skip

    assert made["choices"][0]["message"]["content"] is None
    assert made["usage"] == USAGE
