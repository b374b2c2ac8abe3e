"""Reading what others exported: samples, hostile files, and trees that come out whatever goes in."""

import io
import json
import zipfile
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parley.chat.transfer import items as items_module
from parley.chat.transfer.drafts import DraftConversation, DraftMessage, moment_of, place, title_of
from parley.chat.transfer.errors import ItemRefused, NotAnExport
from parley.chat.transfer.importing import read_conversation
from parley.chat.transfer.items import Item, read_items
from tests.chat.others_exports import chatgpt, claude, claude_message, node, said

USER = uuid4()


def read(data: bytes) -> list[Item]:
    return [item for item in read_items(io.BytesIO(data)) if item is not None]


def zipped(files: dict[str, bytes], *, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return target.getvalue()


def shape(draft: DraftConversation) -> list[tuple[str, str | None, str, list[str]]]:
    """Return the tree: each message with its parent, role, and texts."""
    return [(m.source, m.parent, m.role, [part.get("text", part["type"]) for part in m.parts]) for m in draft.messages]


# -- taking a file apart -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64 * 1024])
def test_elements_are_found_wherever_the_reads_fall(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items_module, "_READ_BYTES", size)
    values: list[Any] = [{"a": 'x]}"[{'}, {"b": [1, {"c": "\\"}]}, {"d": '\\\\"'}, {"é": "漢\n"}, {}]
    data = json.dumps(values, ensure_ascii=False).encode()
    assert [item.value for item in read(b"\xef\xbb\xbf" + data if size > 3 else data)] == values
    assert [item.value for item in read(json.dumps(values, indent=2).encode())] == values


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(
        st.dictionaries(
            st.text(max_size=5),
            st.recursive(
                st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=20),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            ),
            max_size=4,
        ),
        max_size=6,
    ),
    size=st.integers(1, 40),
)
def test_any_list_comes_out_as_it_went_in(values: list[Any], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(items_module, "_READ_BYTES", size)
        found = read(orjson.dumps(values))
    assert [item.value for item in found] == values
    assert [item.number for item in found] == list(range(len(values)))


def test_one_object_and_one_per_line_are_taken_too() -> None:
    assert [item.value for item in read(b' {"a": 1}')] == [{"a": 1}]
    assert [item.value for item in read(b'{"a": 1}\n{"b": 2}\n')] == [{"a": 1}, {"b": 2}]


def test_a_broken_element_breaks_no_other() -> None:
    found = read(b'[{"a": 1}, {"b": nonsense}, {"c": 3}]')
    assert [(item.value, item.problem) for item in found] == [
        ({"a": 1}, None),
        (None, "It is not valid JSON."),
        ({"c": 3}, None),
    ]


def test_a_file_that_was_cut_off_gives_what_is_whole() -> None:
    found = read(b'[{"a": 1}, {"b": "tor')
    assert [item.value for item in found] == [{"a": 1}, None]
    assert found[1].problem == "The file ends in the middle of it."


def test_half_surrogates_and_numbers_that_are_none_are_read() -> None:
    (item,) = read(b'[{"a": "x\\ud800y", "b": NaN, "c": Infinity}]')
    assert item.value == {"a": "x?y", "b": None, "c": None}


def test_a_conversation_that_is_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items_module, "ITEM_BYTES", 1000)
    monkeypatch.setattr(items_module, "_READ_BYTES", 100)
    data = orjson.dumps([{"a": 1}, {"b": "x" * 5000, "c": [{"d": "]"}]}, {"e": 2}])
    assert [(item.value, item.problem) for item in read(data)] == [
        ({"a": 1}, None),
        (None, "It is larger than is taken."),
        ({"e": 2}, None),
    ]


def test_one_of_too_many_small_things_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items_module, "TOKENS", 100)
    found = read(orjson.dumps([{"a": [[]] * 200}, {"b": 1}]))
    assert [item.problem for item in found] == ["It is larger than is taken.", None]


@pytest.mark.parametrize("data", [b"", b"   ", b"hello", b"\x00\x01", b"12", b'"text"', b"]", b"<html>"])
def test_what_is_no_json_is_no_export(data: bytes) -> None:
    with pytest.raises(NotAnExport):
        read(data)


def test_brackets_without_end_are_no_harm() -> None:
    assert [item.problem for item in read(b"[" * 200_000)] == ["The file ends in the middle of it."]
    (deep,) = read(b'[{"a":' + b"[" * 5000 + b"]" * 5000 + b"}]")
    assert deep.problem == "It is not valid JSON."
    with pytest.raises(NotAnExport):
        read(b"[]]]")


def test_the_file_of_a_zip_is_found() -> None:
    data = orjson.dumps([{"a": 1}])
    others = {"users.json": b"[]", "chat.html": b"<html>", "__MACOSX/conversations.json": b"x"}
    for name in ("conversations.json", "export-2025/conversations.json", "Conversations.JSON"):
        assert [item.value for item in read(zipped({**others, name: data}))] == [{"a": 1}]
    several = {"conversations-001.json": orjson.dumps([{"b": 2}]), "conversations-000.json": data}
    assert [(item.number, item.value) for item in read(zipped(several))] == [(0, {"a": 1}), (1, {"b": 2})]
    ours = {"one.json": b'{"a": 1}', "two.json": b'{"b": 2}'}
    assert [item.value for item in read(zipped(ours))] == [{"a": 1}, {"b": 2}]


def _many_entries() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for number in range(70_000):
            archive.writestr(f"{number:0100}", b"")
        archive.writestr("conversations.json", b"[]")
    return target.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"PK\x03\x04",
        b"PK\x05\x06" + b"\x00" * 18,
        zipped({"conversations.json": b"[{}]"})[:-30],
        zipped({"conversations.json": b"[{}]"}, method=zipfile.ZIP_STORED).replace(b"[{}]", b"[{]]"),
        zipped({"conversations.json": b"[{}]" * 1000}, method=zipfile.ZIP_BZIP2),
        zipped({"readme.txt": b"hello"}),
    ],
)
def test_a_zip_that_cannot_be_read_is_no_export(data: bytes) -> None:
    with pytest.raises(NotAnExport):
        read(data)


def test_a_zip_that_is_damaged_in_its_data_is_no_export() -> None:
    whole = bytearray(zipped({"conversations.json": orjson.dumps([{"a": "x" * 5000 + str(n)} for n in range(500)])}))
    whole[200:260] = bytes(60)
    with pytest.raises(NotAnExport):
        read(bytes(whole))


def test_an_encrypted_zip_is_no_export() -> None:
    whole = bytearray(zipped({"conversations.json": b"[{}]"}))
    at = whole.rfind(b"PK\x01\x02")
    whole[at + 8] |= 1
    with pytest.raises(NotAnExport, match="encrypted"):
        read(bytes(whole))


def test_a_zip_of_too_many_files_is_not_opened() -> None:
    with pytest.raises(NotAnExport, match="too many"):
        read(_many_entries())


def test_a_zip_bomb_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items_module, "UNPACKED_BYTES", 1_000_000)
    bomb = zipped({"conversations.json": b"[" + b" " * 50_000_000 + b"]"})
    assert len(bomb) < 100_000
    with pytest.raises(NotAnExport, match="more than is taken"):
        read(bomb)


# -- ChatGPT -------------------------------------------------------------------------------------------------------


def test_chatgpts_tree_is_read_without_what_is_hidden() -> None:
    draft = read_conversation(chatgpt())
    assert shape(draft) == [
        ("q1", None, "user", ["What is two and two?"]),
        ("a1", "q1", "assistant", ["Four."]),
        ("a2", "q1", "assistant", ["It is 4."]),
        ("q2", "a2", "user", ["[image: not in the export]\n\nWhat is on it?"]),
        ("t1", "q2", "assistant", ["Looking\n\nAt the image"]),
        ("c1", "t1", "assistant", ["```python\nprint(4)\n```"]),
        ("o1", "c1", "assistant", ["```\n4\n\n```"]),
        ("a3", "o1", "assistant", ["A cat."]),
    ]
    assert draft.messages[4].parts[0]["type"] == "reasoning"
    assert [message.model for message in draft.messages] == [None, *["gpt-4o"] * 2, None, *["gpt-4o"] * 2, None, "o3"]
    assert (draft.title, draft.current, draft.source) == ("Sums and cats", "a3", "chatgpt:67c0-1")
    placed, end = place(USER, draft)
    assert end == placed[-1].id
    assert placed[-1].at.isoformat() == "2024-03-01T08:00:07+00:00"


def test_an_end_that_is_hidden_is_the_message_above() -> None:
    found = chatgpt(current_node="ctx")
    assert read_conversation(found).current is None
    assert read_conversation(chatgpt(current_node="r1")).current == "o1"
    assert read_conversation(chatgpt(current_node="gone")).current is None


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"content_type": "text", "parts": ["a", "", "b"]}, "a\n\nb"),
        ({"content_type": "text", "parts": None}, None),
        ({"content_type": "text"}, None),
        ({"content_type": "from_the_future", "text": "x"}, "x"),
        ({"content_type": "from_the_future", "parts": [{"text": "spoken"}]}, "spoken"),
        ({"content_type": "multimodal_text", "parts": [{"content_type": "audio_transcription", "text": "hi"}]}, "hi"),
        ({"content_type": "multimodal_text", "parts": [{"content_type": "audio_asset_pointer"}]},
         "[audio: not in the export]"),
        ({"content_type": "tether_quote", "text": "said", "url": "https://x.example"}, "> said\n> https://x.example"),
        ({"content_type": "system_error", "name": "E", "text": "failed"}, "> failed"),
        ({"content_type": "code", "language": "js", "text": "a```b"}, "````js\na```b\n````"),
        ({"content_type": "text", "parts": [None, 1, ["x"], "NUL\x00"]}, "NUL"),
        ("no object", None),
    ],
)  # fmt: skip
def test_what_chatgpt_can_say(content: Any, text: str | None) -> None:
    mapping = {"a": node("a", None, message={**said("a", "assistant"), "content": content})}
    draft = read_conversation(chatgpt(mapping=mapping, current_node="a"))
    assert [part["text"] for message in draft.messages for part in message.parts] == ([] if text is None else [text])


@pytest.mark.parametrize("value", [1, "x", None, [], {"mapping": []}, {"a": 1}, {"mapping": {}, "id": ""}])
def test_what_is_no_conversation_is_refused(value: Any) -> None:
    with pytest.raises(ItemRefused):
        read_conversation(value)


# -- Claude --------------------------------------------------------------------------------------------------------


def test_claudes_messages_are_read_one_after_the_other() -> None:
    draft = read_conversation(claude())
    assert shape(draft) == [
        ("m1", None, "user", ["Sum this up", "file", "[cow.png: not in the export]"]),
        ("m2", "m1", "assistant", [
            "They want a summary.",
            'Tool artifacts:\n\n```json\n{\n  "command": "create",\n  "title": "Milk"\n}\n```',
            "> OK",
            "Buy milk.",
        ]),
        ("m3", "m2", "user", ["Thanks"]),
    ]  # fmt: skip
    assert [(file.name, file.read()) for file in draft.messages[0].files] == [("notes.txt", b"remember the milk")]
    assert (draft.title, draft.current, draft.source) == ("Milk", "m3", "claude:c1a0-1")


def test_claudes_branches_are_read_where_they_are_told() -> None:
    root = "00000000-0000-4000-8000-000000000000"
    messages = [
        claude_message("m1", "human", "one", parent_message_uuid=root),
        claude_message("m2", "assistant", "two", parent_message_uuid="m1"),
        claude_message("m3", "human", "", content=[], parent_message_uuid="m2"),
        claude_message("m4", "assistant", "other", parent_message_uuid="m1"),
        claude_message("m5", "assistant", "after nothing", parent_message_uuid="m3"),
    ]
    draft = read_conversation(claude(chat_messages=messages, current_leaf_message_uuid="m4"))
    assert [(m.source, m.parent) for m in draft.messages] == [("m1", root), ("m2", "m1"), ("m4", "m1"), ("m5", "m2")]
    placed, end = place(USER, draft)
    by_source = {one.draft.source: one for one in placed}
    assert by_source["m1"].parent_id is None
    assert by_source["m4"].parent_id == by_source["m1"].id
    assert end == by_source["m4"].id


def test_old_exports_of_claude_have_only_text() -> None:
    messages = [{"uuid": "m1", "text": "hello", "sender": "human", "created_at": "2023-08-01T00:00:00"}]
    draft = read_conversation(claude(chat_messages=messages))
    assert shape(draft) == [("m1", None, "user", ["hello"])]


# -- trees ---------------------------------------------------------------------------------------------------------


def draft_of(edges: Iterable[tuple[str, str | None]], **values: Any) -> DraftConversation:
    messages = [DraftMessage(id_, parent, "user", [{"type": "text", "text": id_}]) for id_, parent in edges]
    return DraftConversation("x", None, messages, **values)


_names = st.sampled_from("abcdefgh")


@settings(max_examples=500, deadline=None)
@given(
    edges=st.dictionaries(_names, st.none() | _names | st.just("nowhere"), max_size=8),
    times=st.lists(st.none() | st.floats(), min_size=8, max_size=8),
)
def test_whatever_the_source_says_a_tree_comes_out(edges: dict[str, str | None], times: list[float | None]) -> None:
    draft = draft_of(edges.items())
    for message, at in zip(draft.messages, times, strict=False):
        message.at = moment_of(at)
    placed, end = place(USER, draft)
    assert {one.draft.source for one in placed} == set(edges)
    assert len({one.id for one in placed}) == len(placed)
    assert [one.id for one in placed] == sorted(one.id for one in placed)
    seen = set()
    for one in placed:
        assert one.parent_id is None or one.parent_id in seen
        assert one.id.version == 7
        seen.add(one.id)
    assert (end is None) == (not placed)
    # A parent that is there and leads upwards is kept.
    kept = {one.draft.source: one.parent_id for one in placed}
    ids = {one.draft.source: one.id for one in placed}
    for source, parent in edges.items():
        if kept[source] is not None:
            assert parent is not None
            assert kept[source] == ids[parent]
    assert {one.hash for one in place(USER, draft)[0]} == {one.hash for one in placed}


def test_the_same_source_gives_the_same_ids_for_one_user() -> None:
    one, again = place(USER, read_conversation(chatgpt()))[0], place(USER, read_conversation(chatgpt()))[0]
    other = place(uuid4(), read_conversation(chatgpt()))[0]
    assert [m.id for m in one] == [m.id for m in again]
    assert not {m.hash for m in one} & {m.hash for m in other}
    assert not {m.hash for m in one} & {m.hash for m in place(USER, read_conversation(chatgpt("67c0-2")))[0]}


def test_a_long_chain_is_no_harm() -> None:
    edges = [(str(number), str(number - 1) if number else None) for number in range(20_000)]
    placed, end = place(USER, draft_of(edges))
    assert (len(placed), end) == (20_000, placed[-1].id)
    assert [one.draft.source for one in placed] == [id_ for id_, _ in edges]
    with pytest.raises(ItemRefused):
        place(USER, draft_of([*edges, ("more", None)]))


def test_a_long_chain_of_hidden_nodes_is_no_harm() -> None:
    mapping: dict[str, Any] = {str(n): node(str(n), str(n - 1)) for n in range(30_000)}
    mapping["0"] = node("0", "29999")
    mapping["end"] = node("end", "29999", message=said("end", "user", "hello"))
    draft = read_conversation(chatgpt(mapping=mapping, current_node="5"))
    assert shape(draft) == [("end", None, "user", ["hello"])]


def test_two_messages_with_one_id_are_refused() -> None:
    with pytest.raises(ItemRefused):
        place(USER, draft_of([("a", None), ("a", None)]))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 1e30, -1e30, "yesterday", "", None, True, [], {}, "9999-99-99"]
)
def test_times_that_are_none_are_none(value: Any) -> None:
    assert moment_of(value) is None


@pytest.mark.parametrize(
    ("value", "title"), [("  a\n b ", "a b"), ("", None), (5, None), ("x" * 300, "x" * 200), ("a\x00", "a")]
)
def test_titles_are_one_line(value: Any, title: str | None) -> None:
    assert title_of(value) == title
