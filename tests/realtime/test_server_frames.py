"""What the server says is in the AsyncAPI document: every frame that a test receives, and every one in the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import TypeAdapter, ValidationError

from parley.chat.channels import UserChannel
from parley.main import CHANNEL_KINDS
from parley.realtime.asyncapi import Catalogue
from tests.documented import NotDocumented, documented
from tests.live import Socket

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
CATALOGUE = Catalogue(CHANNEL_KINDS)


# -- the hook -------------------------------------------------------------------------------------------------------------


class _Line:
    """The connection of a test's socket, without a network."""

    def __init__(self, *incoming: Json) -> None:
        self._incoming = [orjson.dumps(frame) for frame in incoming]
        self.outgoing: list[str] = []

    async def recv(self) -> bytes:
        return self._incoming.pop(0)

    async def send(self, text: str) -> None:
        self.outgoing.append(text)


async def test_the_sockets_of_tests_refuse_what_is_not_in_it() -> None:
    good, wrong = CATALOGUE.example("server.live"), {**CATALOGUE.example("server.live"), "surprise": 1}
    socket = Socket(_Line(good, wrong, {"t": "batch", "f": [good, wrong]}))  # type: ignore[arg-type]  # enough of one
    assert await socket.receive() == good
    for _ in range(2):
        with pytest.raises(NotDocumented):
            await socket.receive()
    assert socket.frames == [good]


async def test_the_sockets_of_tests_may_send_what_is_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    line = _Line()
    socket = Socket(line)  # type: ignore[arg-type]  # enough of one
    await socket.send(t="sub", id=1, ch=5)
    await socket.send(t="nothing")
    await socket.send(t="sub", id=1, ch="tasks", surprise=1)
    assert len(line.outgoing) == 3
    # A frame that the server takes and that the document does not have cannot be sent unseen.
    monkeypatch.delitem(documented().document["components"]["messages"], "client.reply.regenerate")
    monkeypatch.setattr(documented(), "_validators", {})
    with pytest.raises(NotDocumented):
        await socket.send(**CATALOGUE.example("client.reply.regenerate"))


# -- the frames in the source ------------------------------------------------------------------------------------------


def _fields_by_t() -> dict[str, dict[str, list[Any]]]:
    """Return the fields of the server's frames by `t`, each with what it may hold."""
    found: dict[str, dict[str, list[Any]]] = {}
    for name, model in CATALOGUE.server.items():
        t = CATALOGUE.example(name)["t"]
        for field, info in model.model_fields.items():
            found.setdefault(t, {}).setdefault(info.alias or field, []).append(info.annotation)
    return found


FIELDS = _fields_by_t()
EVENTS = {e for kind in CHANNEL_KINDS for e in kind.events}
_EMITTERS = {"emit": 0, "_emit": 0, "_tell": 0, "_announce": 0, "NewEvent": 1}


def _holds(types: list[Any], value: object) -> bool:
    for annotation in types:
        try:
            TypeAdapter(annotation).validate_python(value, strict=True)
        except ValidationError:
            continue
        return True
    return False


def _frame_faults(t: object, fields: dict[str, ast.expr]) -> Iterator[str]:
    known = FIELDS.get(str(t))
    if known is None:
        yield f"no frame {t}"
        return
    for name, value in fields.items():
        if name not in known:
            yield f"{t} has no {name}"
        elif isinstance(value, ast.Constant) and not _holds(known[name], value.value):
            yield f"{t}: {name} is {value.value!r}"


def _is_logging(function: ast.expr) -> bool:
    """Whether `logger.error` is called: its two arguments are no frame."""
    return (
        isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "logger"
    )


def undocumented(tree: ast.AST) -> list[str]:
    """Return the frames and events of a source that the document does not have."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            items = {
                key.value: value
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant)
            }
            if isinstance(t := items.get("t"), ast.Constant):
                found += _frame_faults(t.value, {str(key): value for key, value in items.items()})
        elif isinstance(node, ast.JoinedStr):
            constants = [part.value for part in node.values if isinstance(part, ast.Constant)]
            text = "".join(part for part in constants if isinstance(part, str))
            found += [f"no frame {t}" for t in re.findall(r'"t":"([\w.]+)"', text) if t not in FIELDS]
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            fields = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            if name == "encode" and isinstance(t := fields.get("t"), ast.Constant):
                found += _frame_faults(t.value, fields)
            elif _is_logging(node.func):
                continue
            elif name == "error" and len(node.args) == 2 and isinstance(code := node.args[0], ast.Constant):
                found += _frame_faults("err", {**fields, "code": code})
            elif name in _EMITTERS and len(node.args) > _EMITTERS[name]:
                e = node.args[_EMITTERS[name]]
                if isinstance(e, ast.Constant) and e.value not in EVENTS:
                    found.append(f"no event {e.value!r}")
    return found


def _server_sources() -> Iterator[Path]:
    for path in sorted((ROOT / "src/parley").rglob("*.py")):
        # These two speak as clients; the last holds what the document is made from.
        if not {"client", "conformance"} & set(path.parts) and path.name != "asyncapi.py":
            yield path


def test_every_frame_in_the_source_is_in_it() -> None:
    seen = 0
    for path in _server_sources():
        tree = ast.parse(path.read_text())
        assert undocumented(tree) == [], path
        seen += path.read_text().count("encode(")
    assert seen > 10


@pytest.mark.parametrize(
    "source",
    [
        'frames.encode(t="welcom", v=1)', 'encode(t="live", ch=name, at=1)', 'encode(t="unsubbed", ch=c, code="gone")',
        'encode(t="unsubbed", ch=c, code="expired", retry="later")', 'frames.error("nope", "No.")',
        'frames.error("invalid", "No.", retry="soon")', 'frames.error("invalid", "No.", because=1)', '{"t": "subd"}',
        """f'{{"t":"evt","ch":{name}}}'""", 'NewEvent(channel, "message.made", d)', 'self._emit("reply.word", part=1)',
    ],
)  # fmt: skip
def test_a_frame_that_is_not_in_it_is_noticed(source: str) -> None:
    assert undocumented(ast.parse(source)) != []


def test_frames_that_are_in_it_are_not_reported() -> None:
    fine = """
frames.encode(t="unsubbed", ch=c, code="expired", retry="now")
frames.error("invalid", "No.", retry="never", id=frame.id, ch=frame.ch)
logger.error("reply failed", exc_info=problem)
NewEvent(channel, "message.created", d)
"""
    assert undocumented(ast.parse(fine)) == []


def test_the_inbox_has_the_events_of_the_protocol() -> None:
    assert set(UserChannel.events) == {
        "conversation.created", "conversation.updated", "conversation.deleted", "job.updated", "notice",
    }  # fmt: skip
