"""The AsyncAPI document: it is one, it is the committed one, and it says what the server says."""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from typer.testing import CliRunner

from parley.chat.channels import ConversationChannel, UserChannel
from parley.cli.app import app as command_line
from parley.core.settings import load_settings
from parley.main import CHANNEL_KINDS, asyncapi_document, create_app
from parley.realtime import asyncapi, frames, server_frames
from parley.realtime.asyncapi import Catalogue
from parley.realtime.frames import Close
from parley.realtime.server_frames import Deleted
from parley.tasks.channels import TasksChannel
from tests.conftest import http_client
from tests.documented import Documented, NotDocumented, documented

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs/asyncapi.json"
CATALOGUE = Catalogue(CHANNEL_KINDS)
MESSAGES = sorted(CATALOGUE.messages)
_ROOT_FIELDS = {
    "asyncapi", "id", "info", "servers", "defaultContentType", "channels", "operations", "components",
}  # fmt: skip
_KEY = re.compile(r"^[a-zA-Z0-9.\-_]+$")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """The document of this version. Not to be changed."""
    return asyncapi_document(create_app(load_settings(tmp_path_factory.mktemp("data"))))


# -- it is a document of AsyncAPI 3.1 --------------------------------------------------------------------------------


def _nodes(node: Any, path: str = "#") -> Iterator[tuple[str, Json]]:
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            # What an example holds is data.
            if key != "examples":
                yield from _nodes(value, f"{path}/{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _nodes(value, f"{path}/{index}")


def _resolve(document: Json, reference: str) -> Any:
    node: Any = document
    for key in reference.removeprefix("#/").split("/"):
        if not isinstance(node, dict) or key not in node:
            return None
        node = node[key]
    return node


def _faults_of_operation(document: Json, name: str, operation: Json) -> Iterator[str]:
    if operation.get("action") not in {"send", "receive"}:
        yield f"{name}: action"
    parts = [operation, *([operation["reply"]] if "reply" in operation else [])]
    for part in parts:
        channel = part.get("channel", {}).get("$ref", "")
        if not re.fullmatch(r"#/channels/\w+", channel) or _resolve(document, channel) is None:
            yield f"{name}: no channel {channel}"
        if not part.get("messages"):
            yield f"{name}: no messages"
        for message in part.get("messages", []):
            # They name the channel's own messages, not the components.
            if not message.get("$ref", "").startswith(f"{channel}/messages/"):
                yield f"{name}: {message} is not of the channel"


def faults(document: Json) -> list[str]:
    """Return what is wrong with a document by the rules of AsyncAPI 3.1.0."""
    found = [f"no field {name}" for name in document if name not in _ROOT_FIELDS and not name.startswith("x-")]
    if document.get("asyncapi") != "3.1.0":
        found.append("not of version 3.1.0")
    found += [f"info: no {name}" for name in ("title", "version") if not document["info"].get(name)]
    for path, node in _nodes(document):
        reference = node.get("$ref")
        if isinstance(reference, str) and _resolve(document, reference) is None:
            found.append(f"{path}: {reference} is not there")
        # Pydantic writes OpenAPI's.
        if not isinstance(node.get("discriminator", ""), str) and "properties" not in path.rsplit("/", 2)[-2:]:
            found.append(f"{path}: a discriminator is a property's name")
    for kind, held in document["components"].items():
        found += [f"{kind}: {key}" for key in held if not _KEY.match(key)]
    for name, operation in document["operations"].items():
        found += _faults_of_operation(document, name, operation)
    used = {
        reference["$ref"].rpartition("/")[2]
        for operation in document["operations"].values()
        for reference in [*operation.get("messages", []), *operation.get("reply", {}).get("messages", [])]
    }
    for name, channel in document["channels"].items():
        found += [f"{name}: {message} is in no operation" for message in channel["messages"] if message not in used]
        found += [f"{name}: no binding"] if channel["bindings"]["ws"].get("method") != "GET" else []
    for name, message in document["components"]["messages"].items():
        found += [f"{name}: no {field}" for field in ("name", "payload", "examples") if not message.get(field)]
        location = message.get("correlationId", {}).get("location", "$message.payload#/id")
        found += [] if location == "$message.payload#/id" else [f"{name}: {location}"]
    return found


def _dangling(document: Json) -> None:
    del document["components"]["schemas"]["ReplyDelta"]


def _other_version(document: Json) -> None:
    document["asyncapi"] = "3.0.0"


def _unknown_message(document: Json) -> None:
    document["operations"]["sendLive"]["messages"] = [{"$ref": "#/channels/realtime/messages/server.alive"}]


def _past_the_channel(document: Json) -> None:
    document["operations"]["sendLive"]["messages"] = [{"$ref": "#/components/messages/server.live"}]


def _no_channel(document: Json) -> None:
    document["operations"]["receiveSub"]["reply"]["channel"] = {"$ref": "#/channels/other"}


def _no_action(document: Json) -> None:
    document["operations"]["sendLive"]["action"] = "publish"


def _idle_message(document: Json) -> None:
    del document["operations"]["sendGoaway"]


def _bad_key(document: Json) -> None:
    document["components"]["schemas"]["a key"] = {}


def _no_example(document: Json) -> None:
    document["components"]["messages"]["server.live"]["examples"] = []


def _openapi_discriminator(document: Json) -> None:
    document["components"]["schemas"]["Batch"]["discriminator"] = {"propertyName": "t"}


def _stray_field(document: Json) -> None:
    document["paths"] = {}


_SPOILERS: list[Callable[[Json], None]] = [
    _dangling, _other_version, _unknown_message, _past_the_channel, _no_channel, _no_action, _idle_message, _bad_key,
    _no_example, _openapi_discriminator, _stray_field,
]  # fmt: skip


def test_it_is_a_document_of_asyncapi(generated: Json) -> None:
    assert faults(generated) == []


@pytest.mark.parametrize("spoil", _SPOILERS)
def test_a_document_that_is_none_is_noticed(generated: Json, spoil: Callable[[Json], None]) -> None:
    spoilt = copy.deepcopy(generated)
    spoil(spoilt)
    assert faults(spoilt) != []


def test_a_name_stands_for_one_frame() -> None:
    class Other(ConversationChannel):
        prefix = "other"

    with pytest.raises(ValueError, match="two kinds"):
        Catalogue([ConversationChannel, Other])


def test_every_request_is_answered_by_ok_or_err(generated: Json) -> None:
    for name, model in CATALOGUE.client.items():
        t = name.removeprefix("client.")
        operation = next(
            found for key, found in generated["operations"].items()
            if found["messages"] == [{"$ref": f"#/channels/realtime/messages/{name}"}]
        )  # fmt: skip
        answered = "id" in model.model_fields or t == "hello"
        assert answered == ("reply" in operation), t
        if answered:
            good, bad = (message["$ref"].rpartition("/")[2] for message in operation["reply"]["messages"])
            assert (good, bad) == (f"server.{server_frames.ANSWERS[t]}", "server.err")


# -- it is the committed one, and the one that is served ---------------------------------------------------------------


def test_what_is_committed_is_what_is_generated(generated: Json) -> None:
    assert json.loads(COMMITTED.read_text()) == generated, "run: make generate"


def test_an_event_more_is_another_document(generated: Json) -> None:
    class More(TasksChannel):
        events: Mapping[str, type[BaseModel]] = {**TasksChannel.events, "task.moved": Deleted}

    kinds = [ConversationChannel, UserChannel, TasksChannel]
    info = {"title": "Parley", "version": generated["info"]["version"]}
    assert asyncapi.document(kinds, **info) == generated
    assert asyncapi.document([*kinds[:2], More], **info) != generated


def test_the_command_prints_and_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARLEY_DATA_DIR", str(tmp_path))
    printed = CliRunner().invoke(command_line, ["asyncapi"])
    assert (printed.exit_code, printed.output) == (0, COMMITTED.read_text())
    written = tmp_path / "out.json"
    assert CliRunner().invoke(command_line, ["asyncapi", "--output", str(written)]).exit_code == 0
    assert written.read_text() == COMMITTED.read_text()


def test_make_check_compares_it() -> None:
    recipes = (ROOT / "Makefile").read_text()
    assert "asyncapi | diff -u docs/asyncapi.json -" in recipes
    assert "asyncapi --output docs/asyncapi.json" in recipes


async def test_it_is_served_to_anyone(app: FastAPI) -> None:
    async with http_client(app) as http:
        answer = await http.get("/asyncapi.json")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == json.loads(COMMITTED.read_text())


async def test_it_is_closed_in_production(tmp_path: Path) -> None:
    settings = load_settings(
        tmp_path, env="production", secret_key="0123456789abcdefghijklmnopqrstuvwxyz", public_url="https://parley.test",
        database={"url": "embedded"},
    )  # fmt: skip
    async with http_client(create_app(settings)) as http:
        assert (await http.get("/asyncapi.json")).status_code == 404


def test_its_channels_are_those_of_the_application(app: FastAPI, generated: Json) -> None:
    assert set(app.state.realtime.channels.prefixes) == set(generated["x-parley-channels"])
    for kind in CHANNEL_KINDS:
        said = generated["x-parley-channels"][kind.prefix]
        assert (said["pattern"], said["mode"], set(said["events"])) == (kind.pattern, kind.mode, set(kind.events))
        source, _ = app.state.realtime.channels.source(kind.pattern.replace("{id}", "x"))
        assert type(source) is kind


def test_a_frame_of_a_module_is_in_it(app: FastAPI) -> None:
    assert set(app.state.realtime.handlers) <= set(server_frames.ANSWERS)
    assert {f"client.{t}" for t in server_frames.ANSWERS} <= set(CATALOGUE.client)


def test_close_codes(generated: Json) -> None:
    codes = {str(value) for key, value in vars(Close).items() if key.isupper()}
    assert set(generated["channels"]["realtime"]["x-parley-close-codes"]) == codes


# -- examples, and what fits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MESSAGES)
def test_each_example_is_its_message_and_no_other(generated: Json, name: str) -> None:
    held = Documented(generated)
    examples = [example["payload"] for example in generated["components"]["messages"][name]["examples"]]
    assert examples
    for example in examples:
        held.check(name, example)
        assert [other for other in MESSAGES if held.validator(other).is_valid(example)] == [name]
        if name.startswith("server."):
            assert held.message_of(example) == name
            assert held.received(example) == example


@pytest.mark.parametrize("name", MESSAGES)
def test_each_example_survives_its_type(name: str) -> None:
    example = CATALOGUE.example(name)
    text = orjson.dumps(example).decode()
    parsed: BaseModel
    if name.startswith("client."):
        parsed = frames.parse(text)
        assert type(parsed) is CATALOGUE.client[name]
    else:
        parsed = CATALOGUE.server[name].model_validate_json(text, strict=True)
    assert parsed.model_dump(mode="json", by_alias=True, exclude_unset=True) == example


_WRONG: tuple[Any, ...] = (None, -2, "wrong", True, [], {}, 2.5)


def _variants(example: Json) -> Iterator[tuple[str, Json]]:
    """Yield an example with each field gone, each value replaced, and a field too many, at every depth."""
    for key, value in example.items():
        yield f"without {key}", {name: item for name, item in example.items() if name != key}
        for wrong in _WRONG:
            if wrong != value:
                yield f"{key}={wrong!r}", {**example, key: wrong}
        inner = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        if isinstance(inner, dict):
            for what, changed in _variants(inner):
                yield f"{key}.{what}", {**example, key: [changed] if isinstance(value, list) else changed}
    yield "with surprise", {**example, "surprise": 1}


# What is in a notice is not settled; a batch's frames are looked at one by one.
_OPEN = {"server.ev.notice", "server.batch"}


@pytest.mark.parametrize("name", [name for name in MESSAGES if name.startswith("server.") and name not in _OPEN])
def test_types_and_schemas_take_and_refuse_the_same(name: str) -> None:
    """Two readings of one definition: where they differ, one of the two does not say what is meant."""
    model, held = CATALOGUE.server[name], documented()
    taken = refused = 0
    for what, frame in _variants(CATALOGUE.example(name)):
        by_schema = held.validator(name).is_valid(frame)
        try:
            model.model_validate_json(orjson.dumps(frame), strict=True, extra="forbid")
        except ValidationError:
            by_type = False
        else:
            by_type = True
        assert by_schema == by_type, f"{what}: the schema says {by_schema}"
        taken, refused = taken + by_schema, refused + (not by_schema)
    assert refused > taken


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("server.err", {"code": "nope"}), ("server.err", {"retry": "later"}), ("server.err", {"id": None}),
        ("server.subbed", {"why": "lost"}), ("server.subbed", {"mode": "stream"}), ("server.welcome", {"hb": 0}),
        ("server.welcome", {"v": 2}), ("server.live", {"seq": -1}), ("server.live", {"seq": "4"}),
        ("server.hb", {"heads": {"tasks": "4"}}), ("server.unsubbed", {"code": "gone"}), ("server.ok", {"extra": 1}),
        ("server.ev.reply.delta", {"ch": "user:me"}), ("server.ev.reply.delta", {"from": None}),
        ("server.ev.reply.delta", {"e": "reply.word"}), ("server.ev.reply.delta", {"seq": 0}),
        ("server.ev.task.deleted", {"ch": "tasks:1"}), ("server.snap.user", {"ch": "user:1"}),
        ("server.goaway", {"deadline_ms": -1}), ("server.eph", {"d": None}), ("server.batch", {"f": []}),
    ],
)  # fmt: skip
def test_a_wrong_frame_is_refused(name: str, change: Json) -> None:
    with pytest.raises(NotDocumented):
        documented().received({**CATALOGUE.example(name), **change})


@pytest.mark.parametrize("t", ["welcom", "OK", "", None, 5])
def test_an_unknown_frame_is_refused(t: object) -> None:
    with pytest.raises(NotDocumented):
        documented().received({"t": t, "id": 1})


def test_a_wrong_frame_in_a_batch_is_refused() -> None:
    good = CATALOGUE.example("server.batch")
    assert documented().received(good) == good
    for wrong in ({"t": "live"}, CATALOGUE.example("server.welcome"), good):
        with pytest.raises(NotDocumented):
            documented().received({**good, "f": [*good["f"], wrong]})
