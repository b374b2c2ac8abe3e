"""docs/protocol.md says what the code does: frames, fields, close codes, error codes."""

import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from parley.core.error_handlers import CATEGORIES
from parley.core.errors import AppError
from parley.realtime import frames

DOCUMENT = (Path(__file__).parents[2] / "docs/protocol.md").read_text()

# Named in the document, for a later version: section 7 says that they are refused.
LATER = {"reply.continue", "reply.regenerate", "tool.approve"}


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
