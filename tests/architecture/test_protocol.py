"""docs/protocol.md says what the code does: frames, fields, close codes, error codes."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from parley.chat.events import CONVERSATION_EVENTS, ReplyErrorCode
from parley.core.error_handlers import CATEGORIES
from parley.core.errors import AppError
from parley.llm.errors import ModelError
from parley.main import CHANNEL_KINDS
from parley.realtime import frames, server_frames
from parley.realtime.asyncapi import Catalogue

DOCUMENT = (Path(__file__).parents[2] / "docs/protocol.md").read_text()

# Named in the document, for a later version: section 7 says that they are refused.
LATER: set[str] = set()


def section(title: str) -> str:
    """Return the text below a heading."""
    found = re.search(rf"^#+ {re.escape(title)}$(.*?)(?=^#+ |\Z)", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found.group(1)


def rows(table: str) -> list[list[str]]:
    """Return the cells of a table's rows."""
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def client_frames() -> dict[str, type[BaseModel]]:
    """Return the types of frames that a client may send, by `t`."""
    union = get_args(frames.ClientFrame)[0]
    return {get_args(model.model_fields["t"].annotation)[0]: model for model in get_args(union)}


def documented_fields(text: str) -> set[str]:
    """Return the names of the fields in a cell."""
    flat = re.sub(r"\{[^{}]*\}|\[[^\[\]]*\]", "", re.sub(r"\{[^{}]*\}|\[[^\[\]]*\]", "", text))
    return {name for name in re.findall(r"`(\w+)\??(?::[^`]*)?`", flat) if name}


def test_every_frame_of_a_client_is_in_the_document() -> None:
    documented = {}
    for names, fields, _ in rows(section("Client to server")):
        for name in re.findall(r"`([\w.]+)`", names):
            documented[name] = documented_fields(fields)
    typed = client_frames()
    assert set(documented) - LATER == set(typed)
    for name, model in typed.items():
        assert documented[name] == set(model.model_fields) - {"t"}, name


def required_and_optional(text: str) -> tuple[set[str], set[str]]:
    """Return the names of the fields in a cell: those that are always there, and those with a question mark."""
    # What stands after a colon explains.
    fields = text.partition("`: ")[0] + "`"
    optional = set(re.findall(r"`(\w+)\?", fields))
    return documented_fields(fields) - optional, optional


def of_type(model: type[BaseModel]) -> tuple[set[str], set[str]]:
    """Return the same of a type."""
    fields = {info.alias or name: info.is_required() for name, info in model.model_fields.items() if name != "t"}
    return {name for name, required in fields.items() if required}, {name for name in fields if not fields[name]}


def words(text: str, field: str) -> set[str]:
    """Return the words that a field in a cell may hold."""
    found = re.search(rf'`{field}\??:((?:"\w+"\|?)+)`', text)
    assert found, f"no words for {field} in {text}"
    return set(re.findall(r'"(\w+)"', found.group(1)))


def server_rows() -> dict[str, str]:
    """Return the cell of each frame of the server, by `t`."""
    found: dict[str, str] = {}
    for names, fields in rows(section("Server to client")):
        cells = fields.split(" / ") if " / " in names else [fields]
        found.update(zip(re.findall(r"`([\w.]+)`", names), cells, strict=True))
    return found


def event_rows() -> dict[str, str]:
    """Return the cell of each event of a conversation but those of its messages."""
    table = rows(section("Events of `conversation:{id}`"))
    return {names.strip("`"): fields for names, fields in table if not names.startswith("`message.")}


def test_every_frame_of_the_server_is_in_the_document() -> None:
    catalogue = Catalogue(CHANNEL_KINDS)
    typed = {name.removeprefix("server."): model for name, model in catalogue.server.items()}
    documented = server_rows()
    assert set(documented) == {catalogue.example(f"server.{name}")["t"] for name in typed}
    for name, model in typed.items():
        t = catalogue.example(f"server.{name}")["t"]
        if t == "ok":
            continue  # its fields are the request's
        assert required_and_optional(documented[t]) == of_type(model), name


def test_the_words_of_the_servers_fields() -> None:
    documented = server_rows()
    assert words(documented["err"], "retry") == set(get_args(server_frames.Retry))
    assert words(documented["subbed"], "why") == set(get_args(server_frames.Why))
    events = event_rows()
    for e, field in (
        ("reply.part", "kind"), ("reply.part", "state"), ("reply.tool", "state"), ("reply.resumed", "strategy"),
    ):  # fmt: skip
        annotation = CONVERSATION_EVENTS[e].model_fields[field].annotation
        assert words(events[e], field) == set(get_args(annotation)), (e, field)


def test_every_event_of_a_conversation_is_in_the_document() -> None:
    documented = event_rows()
    assert set(documented) | {"message.created", "message.updated", "message.deleted"} == set(CONVERSATION_EVENTS)
    for e, fields in documented.items():
        assert required_and_optional(fields) == of_type(CONVERSATION_EVENTS[e]), e
    table = section("Channels")
    for kind in CHANNEL_KINDS:
        assert f"`{kind.pattern}` | {kind.mode} |" in table


def codes_after(beginning: str) -> set[str]:
    """Return the codes of the line that begins like this."""
    line = next(line for line in DOCUMENT.splitlines() if line.startswith(beginning))
    return set(re.findall(r"`([^`]+)`", line)[1].split())


def test_codes_of_errors_and_of_failed_replies() -> None:
    assert set(get_args(server_frames.ErrorCode)) == codes_after("`err.code`:")
    assert set(get_args(ReplyErrorCode)) == codes_after("`reply.failed.error.code`:")

    def codes(kind: type[ModelError]) -> set[str]:
        return {kind.code}.union(*(codes(child) for child in kind.__subclasses__()))

    # These two are said before there is a reply.
    assert codes(ModelError) - {"unknown_model", "model_not_usable"} <= set(get_args(ReplyErrorCode))


def test_a_field_that_differs_is_noticed() -> None:
    class Surprise(server_frames.Live):
        surprise: int = 0

    assert required_and_optional("`ch`, `seq`: no `e`") == of_type(server_frames.Live) != of_type(Surprise)
    assert required_and_optional("`id?`, `ch`") == ({"ch"}, {"id"})
    assert required_and_optional('`reply`, `error:{code,msg}`, `can:["a"]`, `x?`') == ({"reply", "error", "can"}, {"x"})
    assert words('`retry:"never"|"now"`, `why:"ok"`', "retry") == {"never", "now"}
    with pytest.raises(AssertionError):
        words("`retry`", "retry")


def test_close_codes() -> None:
    codes = {value for key, value in vars(frames.Close).items() if key.isupper()}
    documented = {
        int(code) for code in re.findall(r"\b([14]\d{3}) [a-z]", section("5. Close codes").split("\n4000–")[0])
    }
    assert codes == documented


def test_error_codes() -> None:
    line = next(line for line in DOCUMENT.splitlines() if line.startswith("`err.code`:"))
    documented = set(re.findall(r"`([^`]+)`", line)[1].split())
    used = {code for _, code, _ in CATEGORIES.values()} | {"bad_frame", "limit_subs"}

    def frame_codes(kind: type[AppError]) -> set[str]:
        own = {kind.frame_code} if kind.frame_code else set()
        return own.union(*(frame_codes(child) for child in kind.__subclasses__()))

    assert used | frame_codes(AppError) <= documented


def test_an_undocumented_field_is_noticed() -> None:
    class Surprise(frames.Ack):
        surprise: Any = None

    assert documented_fields("`a:{ch:seq}`") != set(Surprise.model_fields) - {"t"}
