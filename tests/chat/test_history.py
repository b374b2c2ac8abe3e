"""What a model is given of a long conversation: the rule, its edges, and that nothing is torn apart."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parley.chat import history as history_module
from parley.chat.history import model_history, model_messages
from parley.llm.errors import ContextTooLong
from parley.llm.estimates import (
    IMAGE_TOKENS,
    can_take,
    message_tokens,
    output_room,
    request_tokens,
    text_tokens,
    tool_tokens,
)
from parley.llm.ports import (
    ImagePart,
    ModelMessage,
    ModelRequest,
    TextPart,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
)
from parley.llm.registry import Capability, ModelEntry

Stored = tuple[str, list[dict[str, Any]]]


def entry(context: int = 1000, output: int = 100, **values: Any) -> ModelEntry:
    return ModelEntry(
        id="m", provider="p", kind="openai", name="m", context=context, max_output_tokens=output, **values
    )


def user(text: str) -> Stored:
    return "user", [{"type": "text", "text": text}]


def assistant(text: str) -> Stored:
    return "assistant", [{"type": "text", "text": text}]


def tool_part(output: Any = None, *, state: str = "done") -> dict[str, Any]:
    return {"type": "tool", "call": str(uuid4()), "name": "look", "state": state, "input": {}, "output": output}


def attached(kind: str, *, size: int = 10, name: str = "a") -> dict[str, Any]:
    media_type = "image/png" if kind == "image" else "text/plain"
    return {"type": kind, "attachment": str(uuid4()), "media_type": media_type, "name": name, "size": size}


def texts(messages: Sequence[ModelMessage]) -> list[str]:
    return ["".join(part.text for part in message.parts if isinstance(part, TextPart)) for message in messages]


class Files:
    """Attachments' bytes, and which were asked for."""

    def __init__(self, found: Mapping[str, bytes] | None = None) -> None:
        self.found = {UUID(id_): data for id_, data in (found or {}).items()}
        self.asked: list[UUID] = []

    async def load(self, ids: Sequence[UUID]) -> Mapping[UUID, bytes]:
        self.asked += ids
        return {id_: self.found[id_] for id_ in ids if id_ in self.found}


# -- the rule ------------------------------------------------------------------------------------------------------


async def test_a_conversation_that_fits_is_given_whole() -> None:
    path = [user("one"), assistant("two"), user("three")]
    found = await model_history(path, system="be kind", entry=entry())
    assert [message.role for message in found.messages] == ["system", "user", "assistant", "user"]
    assert texts(found.messages) == ["be kind", "one", "two", "three"]
    assert found.left_out == 0


async def test_the_oldest_turns_are_left_out_whole() -> None:
    path = [message for n in range(50) for message in (user(f"question {n} " + "x" * 150), assistant("y" * 150))]
    path.append(user("the last"))
    found = await model_history(path, system="be kind", entry=entry(context=1000, output=100))
    assert found.messages[0].role == "system"
    assert found.messages[1].role == "user"
    assert texts(found.messages)[-1] == "the last"
    assert found.left_out == len(path) + 1 - len(found.messages)
    assert 0 < found.left_out < len(path) - 1
    used = sum(message_tokens(message) for message in found.messages)
    assert used <= 900
    # One more turn would not have fitted.
    assert used + 2 * text_tokens("x" * 150) > 900


async def test_the_prompt_and_the_tools_take_their_room() -> None:
    path = [message for _ in range(30) for message in (user("x" * 60), assistant("y" * 60))]
    path.append(user("now"))
    tools = (ToolSpec("look", "Looks. " * 40, {"type": "object"}),)
    bare = await model_history(path, system="s", entry=entry())
    with_tools = await model_history(path, system="s", entry=entry(), tools=tools)
    with_prompt = await model_history(path, system="s" * 900, entry=entry())
    assert len(with_tools.messages) < len(bare.messages)
    assert len(with_prompt.messages) < len(bare.messages)
    assert sum(map(message_tokens, with_tools.messages)) + tool_tokens(tools) <= 900


async def test_a_question_that_alone_is_too_long_is_refused_before_anything_is_loaded() -> None:
    files = Files()
    question = ("user", [{"type": "text", "text": "x" * 4000}, attached("file")])
    with pytest.raises(ContextTooLong) as refused:
        await model_history([user("hello"), assistant("hi"), question], system="s", entry=entry(), load=files.load)
    assert refused.value.code == "context_too_long"
    assert files.asked == []


async def test_the_room_for_the_answer_is_never_all_there_is() -> None:
    found = await model_history([user("hello")], system="s", entry=entry(context=4096, output=4096))
    assert texts(found.messages) == ["s", "hello"]
    assert output_room(entry(context=4096, output=4096)) == 2048


async def test_a_path_that_was_cut_in_a_turn_begins_with_the_next_question() -> None:
    path = [("assistant", [tool_part({"a": 1}), {"type": "text", "text": "so"}]), user("next"), assistant("yes")]
    found = await model_history([*path, user("and?")], system="s", entry=entry())
    assert texts(found.messages) == ["s", "next", "yes", "and?"]


async def test_a_path_without_any_question_is_given_as_it_is() -> None:
    found = await model_history([assistant("I said")], system="s", entry=entry())
    assert texts(found.messages) == ["s", "I said"]


async def test_stored_system_messages_stay_in_front() -> None:
    path = [("system", [{"type": "text", "text": "speak French"}]), user("hello")]
    found = await model_history(path, system="s", entry=entry())
    assert [message.role for message in found.messages] == ["system", "system", "user"]


# -- tools ---------------------------------------------------------------------------------------------------------


def calls_and_results_are_together(messages: Sequence[ModelMessage]) -> bool:
    open_calls: set[str] = set()
    for message in messages:
        if message.role == "tool":
            (result,) = message.parts
            if not isinstance(result, ToolResultPart) or result.call_id not in open_calls:
                return False
            open_calls.discard(result.call_id)
            continue
        if open_calls:
            return False
        open_calls = {part.call_id for part in message.parts if isinstance(part, ToolCallPart)}
    return not open_calls


_text = st.text(alphabet="abc é漢", min_size=1, max_size=120)
_part = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, _text),
    st.builds(lambda text: tool_part({"x": text}), _text),
    st.builds(lambda: tool_part(None, state="unknown")),
    st.builds(lambda text: {"type": "reasoning", "text": text}, _text),
)
_stored = st.one_of(
    st.builds(user, _text),
    st.builds(lambda parts: ("assistant", parts), st.lists(_part, max_size=6)),
)


@settings(max_examples=300, deadline=None)
@given(path=st.lists(_stored, max_size=30), question=_text, context=st.integers(200, 3000))
async def test_whatever_is_cut_no_result_is_without_its_call(path: list[Stored], question: str, context: int) -> None:
    try:
        found = await model_history([*path, user(question)], system="s", entry=entry(context=context, output=50))
    except ContextTooLong:
        assert text_tokens(question) + 60 > context - 50
        return
    assert calls_and_results_are_together(found.messages[1:])
    assert texts(found.messages)[-1] == question
    assert sum(map(message_tokens, found.messages)) <= context - 50
    given_roles = [message.role for message in found.messages[1:]]
    assert given_roles[0] == "user" or not any(role == "user" for role in given_roles[:-1]) or path[0][0] != "user"
    # What is left is the end of the conversation, in order and without a gap.
    everything = [message for role, parts in [*path, user(question)] for message in model_messages(role, parts)]
    kept = found.messages[1:]
    assert texts(everything)[len(everything) - len(kept) :] == texts(kept)


async def test_a_tool_loop_that_grows_pushes_old_turns_out_and_then_fails() -> None:
    path = [message for n in range(6) for message in (user(f"q{n}" + "x" * 200), assistant("y" * 200))]
    found = await model_history([*path, user("now")], system="s", entry=entry())
    before = len(found.messages)
    for number in range(4):
        call = ToolCallPart(f"c{number}", "look", {})
        found.messages.append(ModelMessage("assistant", (call,)))
        found.messages.append(ModelMessage("tool", (ToolResultPart(f"c{number}", "look", "z" * 500),)))
        found.fit()
        assert sum(map(message_tokens, found.messages)) <= 900
        assert found.messages[0].role == "system"
        assert found.messages[1].role == "user"
        assert calls_and_results_are_together(found.messages[1:])
    assert len(found.messages) < before + 8
    assert "now" in texts(found.messages)
    found.messages.append(ModelMessage("user", (TextPart("z" * 3000),)))
    with pytest.raises(ContextTooLong):
        found.fit()


# -- attachments ---------------------------------------------------------------------------------------------------

SEES = (Capability.IMAGES,)


async def test_images_and_files_are_given_with_their_bytes() -> None:
    picture, table = attached("image", name="sky.png"), attached("file", size=8, name="a.csv")
    files = Files({picture["attachment"]: b"png", table["attachment"]: "é,1\n2,3".encode()})
    parts = [{"type": "text", "text": "look"}, picture, table]
    found = await model_history([("user", parts)], system="s", entry=entry(4000, capabilities=SEES), load=files.load)
    image, file, text = found.messages[1].parts
    assert image == ImagePart("image/png", b"png")
    assert isinstance(file, TextPart)
    assert 'name="a.csv"' in file.text
    assert "é,1\n2,3" in file.text
    assert text == TextPart("look")


async def test_only_what_is_given_is_loaded() -> None:
    old, new = attached("file", size=4000), attached("file", size=30)
    files = Files({old["attachment"]: b"x" * 4000, new["attachment"]: b"y" * 30})
    path = [("user", [old]), assistant("ok"), ("user", [new])]
    found = await model_history(path, system="s", entry=entry(), load=files.load)
    assert files.asked == [UUID(new["attachment"])]
    assert found.left_out == 2


async def test_a_model_that_sees_no_images_is_told_that_there_was_one() -> None:
    picture = attached("image", name='a"b.png')
    files = Files({picture["attachment"]: b"png"})
    path = [("user", [picture]), assistant("nice"), user("what was it?")]
    found = await model_history(path, system="s", entry=entry(4000), load=files.load)
    assert texts(found.messages)[1] == '[image "a\\"b.png": this model sees no images]'
    assert files.asked == []


async def test_the_oldest_images_of_too_many_become_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "IMAGES", 2)
    pictures = [attached("image", name=f"{n}.png") for n in range(4)]
    files = Files({picture["attachment"]: b"png" for picture in pictures})
    path = [message for picture in pictures for message in (("user", [picture]), assistant("ok"))]
    found = await model_history(
        [*path, user("and now?")], system="s", entry=entry(40_000, capabilities=SEES), load=files.load
    )
    kinds = [type(message.parts[0]) for message in found.messages[1::2]]
    assert kinds == [TextPart, TextPart, ImagePart, ImagePart, TextPart]
    assert len(files.asked) == 2


async def test_images_take_their_flat_figure() -> None:
    pictures = [attached("image") for _ in range(4)]
    path = [message for picture in pictures for message in (("user", [picture]), assistant("ok"))]
    files = Files({picture["attachment"]: b"png" for picture in pictures})
    found = await model_history(
        [*path, user("and now?")], system="s", entry=entry(2 * IMAGE_TOKENS + 300, capabilities=SEES), load=files.load
    )
    assert sum(isinstance(part, ImagePart) for message in found.messages for part in message.parts) == 2


async def test_what_is_gone_is_said_to_be_gone() -> None:
    path = [("user", [attached("file", name="notes.md"), {"type": "text", "text": "read it"}])]
    found = await model_history(path, system="s", entry=entry(), load=Files().load)
    assert texts(found.messages)[1] == '[file "notes.md": no longer there]read it'


# -- other models --------------------------------------------------------------------------------------------------


def test_a_request_is_given_only_to_models_that_can_take_it() -> None:
    request = ModelRequest((ModelMessage("user", (TextPart("x" * 3000),)),), max_output_tokens=100)
    assert request_tokens(request) > 1000
    assert can_take(entry(context=1200), request)
    assert not can_take(entry(context=1050), request)
    picture = ModelRequest((ModelMessage("user", (ImagePart("image/png", b""),)),))
    assert not can_take(entry(context=100_000), picture)
    assert can_take(entry(context=100_000, capabilities=SEES), picture)


@pytest.mark.parametrize(("text", "least"), [("a" * 300, 100), ("漢" * 100, 100), ("é" * 100, 66), ("", 0)])
def test_texts_are_estimated_by_their_bytes(text: str, least: int) -> None:
    assert least <= text_tokens(text) <= least + 1
