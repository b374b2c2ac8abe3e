"""The AsyncAPI 3.1 document of the socket, generated from the frame types.

A WebSocket has one AsyncAPI channel, the connection. What the protocol calls channels are names inside it: they are
listed in `x-parley-channels`, with the events that each can carry. Modules say which those are (`ChannelKind`).
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, get_args

from pydantic import BaseModel, Field, JsonValue, create_model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

from parley.realtime import frames
from parley.realtime.channels import Mode
from parley.realtime.frames import Close
from parley.realtime.server_frames import ANSWERS, PLAIN, Batch, Ev, ServerFrame, Snap, example_of

Json = dict[str, Any]

_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_ID = "0193c0dd-12aa-7c33-9b1e-52f3a1c4d5e6"
_CID = "0193c0de-0000-7000-8000-000000000007"

DESCRIPTION = """The frames of `parley.v1`, the WebSocket at `/api/v1/realtime`.

The application that this document describes is the server: it *receives* what clients send. Order, resuming and what a
client does with a frame are in docs/protocol.md, which is normative.

Server frames are described as this version sends them, to the last field, so that a frame that differs is a fault of
the server. **A client must ignore fields, frames and events that it does not know**: a later version may add some."""

# What a code means, and what the client does. 4000 to 4199: come back and resume; 4400 to 4499: stop, with exceptions.
CLOSE_CODES: dict[int, tuple[str, str]] = {
    Close.NORMAL: ("normal", "stop"),
    Close.BINARY: ("a binary frame", "stop"),
    Close.TOO_BIG: ("a frame was too big", "stop"),
    Close.SERVER_ERROR: ("server error", "back off and resume"),
    Close.RESTART: ("restart", "resume after the delay of `goaway`"),
    Close.OVERLOADED: ("overloaded", "back off and resume"),
    Close.RETRY: ("look again", "back off and resume"),
    Close.HEARTBEAT_TIMEOUT: ("no frame in time", "resume"),
    Close.SLOW_CONSUMER: ("no acknowledgement in time", "back off and resume"),
    Close.STATE_LOST: ("the stream's state was lost", "resume"),
    Close.EXPIRED: ("the credential expired", "resume with a new one"),
    Close.BAD_FRAMES: ("three bad frames", "stop"),
    Close.UNAUTHENTICATED: ("unauthenticated", "one new ticket, then stop"),
    Close.FORBIDDEN: ("forbidden or revoked", "stop"),
    Close.WRONG_SUBPROTOCOL: ("wrong subprotocol or version", "stop"),
    Close.NO_HELLO: ("no `hello` in time", "back off and resume"),
    Close.SECOND_HELLO: ("second `hello`", "stop"),
    Close.TOO_MANY: ("too many connections or frames", "resume after `retry_after_ms`"),
}

CLIENT_EXAMPLES: dict[str, dict[str, JsonValue]] = {
    "hello": {
        "t": "hello", "v": 1, "auth": {"ticket": "tk_…"}, "caps": ["batch"],
        "subs": [{"ch": f"conversation:{_ID}", "since": {"ep": "k3f9", "seq": 812}}],
    },
    "sub": {"t": "sub", "id": 3, "ch": "tasks", "since": {"ep": "k3f9", "seq": 4}},
    "unsub": {"t": "unsub", "id": 4, "ch": "tasks"},
    "ack": {"t": "ack", "a": {"tasks": 12}},
    "hb": {"t": "hb", "ts": 1795123401789},
    "auth": {"t": "auth", "id": 5, "auth": {"ticket": "tk_…"}},
    "chat.send": {
        "t": "chat.send", "id": 7, "ch": f"conversation:{_ID}", "cid": _CID,
        "parts": [{"type": "text", "text": "Why is the sky blue?"}], "on_active": "queue",
    },
    "reply.cancel": {"t": "reply.cancel", "id": 8, "reply": _ID},
    "reply.continue": {"t": "reply.continue", "id": 9, "reply": _ID, "cid": _CID},
    "reply.regenerate": {"t": "reply.regenerate", "id": 10, "reply": _ID, "cid": _CID},
    "tool.approve": {"t": "tool.approve", "id": 11, "reply": _ID, "call": _CID, "approved": True},
}  # fmt: skip


class ChannelKind(Protocol):
    """What a module says of its kind of channel for the document; its `ChannelSource` says it."""

    prefix: str
    mode: Mode
    permission: str
    pattern: str
    """The channel's name, an id as `{id}`."""
    events: Mapping[str, type[BaseModel]]
    """The data of every event, by name. A name belongs to one kind of channel."""
    snapshot: type[BaseModel]
    """The state in `snap`."""


class Catalogue:
    """Every frame there is, as a model, by the name of its message."""

    def __init__(self, kinds: Sequence[type[ChannelKind]]) -> None:
        self.kinds = tuple(kinds)
        self.client: dict[str, type[BaseModel]] = {
            f"client.{get_args(model.model_fields['t'].annotation)[0]}": model
            for model in get_args(get_args(frames.ClientFrame)[0])
        }
        self.snapshots: dict[str, type[ServerFrame]] = {}
        self.events: dict[str, type[ServerFrame]] = {}
        for kind in kinds:
            self._add(kind)
        self.server: dict[str, type[ServerFrame]] = {f"server.{name}": model for name, model in PLAIN.items()}
        self.server |= {**self.snapshots, **self.events, "server.batch": Batch}

    def _add(self, kind: type[ChannelKind]) -> None:
        name = _channel_name(kind.pattern)
        self.snapshots[f"server.snap.{kind.prefix}"] = create_model(
            f"Snap{_camel(kind.prefix)}", __base__=Snap, __doc__=_text(kind.snapshot), ch=(name, ...),
            state=(kind.snapshot, ...),
        )  # fmt: skip
        for e, data in kind.events.items():
            if f"server.ev.{e}" in self.events:
                raise ValueError(f"the event {e} is of two kinds of channel")
            self.events[f"server.ev.{e}"] = create_model(
                f"Ev{_camel(e)}", __base__=Ev, __doc__=_text(data), ch=(name, ...),
                e=(_only(e), ...), d=(data, ...),
            )  # fmt: skip

    @property
    def messages(self) -> dict[str, type[BaseModel]]:
        """All of them, clients' first."""
        return {**self.client, **self.server}

    def example(self, name: str) -> Json:
        """Return an example of a message."""
        direction, _, t = name.partition(".")
        if direction == "client":
            return dict(CLIENT_EXAMPLES[t])
        if t == "batch":
            return {"t": "batch", "f": [self.example(event) for event in list(self.events)[:2]]}
        for kind in self.kinds:
            ch = kind.pattern.replace("{id}", _ID)
            if t == f"snap.{kind.prefix}":
                state = example_of(kind.snapshot)
                return {"t": "snap", "ch": ch, "ep": "k3f9", "seq": 845, "part": 0, "more": False, "state": state}
            if t.startswith("ev.") and (data := kind.events.get(t.removeprefix("ev."))):
                e = t.removeprefix("ev.")
                return {"t": "ev", "ch": ch, "seq": 846, "e": e, "d": example_of(data), "ts": 1795123401789}
        return example_of(self.server[name])


def document(kinds: Sequence[type[ChannelKind]], *, title: str, version: str) -> Json:
    """Return the AsyncAPI document of the frames and of these kinds of channel."""
    catalogue = Catalogue(kinds)
    payloads, schemas = _schemas(catalogue)
    messages = {
        name: _message(name, model, payloads[name], catalogue.example(name))
        for name, model in catalogue.messages.items()
    }
    return {
        "asyncapi": "3.1.0",
        "info": {
            "title": f"{title} realtime",
            "version": version,
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"local": {"host": "localhost:3000", "protocol": "ws", "description": "What `make serve` starts"}},
        "channels": {"realtime": _connection(messages)},
        "operations": _operations(catalogue),
        "components": {"messages": messages, "schemas": schemas},
        "x-parley-channels": {kind.prefix: _logical_channel(kind) for kind in kinds},
    }


def _connection(messages: Json) -> Json:
    headers = {
        "type": "object",
        "required": ["Sec-WebSocket-Protocol"],
        "properties": {
            "Sec-WebSocket-Protocol": {"type": "string", "const": frames.SUBPROTOCOL},
            "Origin": {"type": "string", "description": "Browsers send it; it must be allowed (PARLEY_CORS_ORIGINS)"},
        },
    }
    return {
        "address": "/api/v1/realtime",
        "title": "The connection",
        "description": "JSON text frames. The first one is `hello`, within 5 s: the credential is in it.",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
        "bindings": {"ws": {"method": "GET", "headers": headers, "bindingVersion": "0.1.0"}},
        "x-parley-close-codes": {
            str(code): {"meaning": meaning, "client": then} for code, (meaning, then) in CLOSE_CODES.items()
        },
    }


def _operations(catalogue: Catalogue) -> Json:
    channel = {"$ref": "#/channels/realtime"}

    def references(*names: str) -> list[Json]:
        return [{"$ref": f"#/channels/realtime/messages/{name}"} for name in names]

    operations: Json = {}
    for name, model in catalogue.client.items():
        t = name.removeprefix("client.")
        operation = {"action": "receive", "channel": channel, "summary": _text(model), "messages": references(name)}
        if t in ANSWERS:
            answers = references(f"server.{ANSWERS[t]}", "server.err")
            operation["reply"] = {"channel": channel, "messages": answers}
        operations[f"receive{_camel(t)}"] = operation
    sent = {
        "sendSnapshot": tuple(catalogue.snapshots),
        "sendEvent": tuple(catalogue.events),
        **{
            f"send{_camel(name)}": (f"server.{name}",)
            for name in ("live", "eph", "hb", "auth.expiring", "unsubbed", "goaway", "err", "batch")
        },
    }
    for name, names in sent.items():
        summary = {"sendSnapshot": _text(Snap), "sendEvent": _text(Ev)}.get(name) or _text(catalogue.server[names[0]])
        operations[name] = {
            "action": "send", "channel": channel, "summary": summary, "messages": references(*names),
        }  # fmt: skip
    return operations


def _message(name: str, model: type[BaseModel], payload: Json, example: Json) -> Json:
    message: Json = {
        "name": name.partition(".")[2],
        "title": name,
        "summary": _text(model),
        "contentType": "application/json",
        "payload": payload,
        "examples": [{"name": "example", "payload": example}],
    }
    if "id" in model.model_fields:
        message["correlationId"] = {"location": "$message.payload#/id"}
    return message


def _logical_channel(kind: type[ChannelKind]) -> Json:
    return {
        "pattern": kind.pattern,
        "mode": kind.mode,
        "permission": str(kind.permission),
        "description": _text(kind),
        "snapshot": {"$ref": f"#/components/messages/server.snap.{kind.prefix}"},
        "events": {e: {"$ref": f"#/components/messages/server.ev.{e}"} for e in kind.events},
    }


# -- schemas -----------------------------------------------------------------------------------------------------------


class _Schemas(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - the base class's
        return False


def _schemas(catalogue: Catalogue) -> tuple[Json, Json]:
    """Return a reference for each message, and the schemas that they refer to."""
    modes: dict[str, JsonSchemaMode] = {"client": "validation", "server": "serialization"}
    models = catalogue.messages
    wanted = [(model, modes[name.partition(".")[0]]) for name, model in models.items()]
    found, definitions = models_json_schema(
        wanted, ref_template="#/components/schemas/{model}", schema_generator=_Schemas
    )
    schemas: Json = definitions["$defs"]
    references = {name: found[key] for name, key in zip(models, wanted, strict=True)}
    clients = _reachable([references[name] for name in catalogue.client], schemas)
    for name, schema in schemas.items():
        # Messages have their examples themselves.
        schema.pop("examples", None)
        # A discriminator is a property's name here, and an object where Pydantic writes it for OpenAPI.
        _walk(schema, lambda found: found.pop("discriminator", None))
        if name not in clients:
            _walk(schema, _close)
    within = [name for name in catalogue.server if name not in {"server.welcome", "server.batch"}]
    schemas["Batch"]["properties"]["f"]["items"] = {"oneOf": [references[name] for name in within]}
    # Both sides have an `hb`; a frame is to fit one message only.
    schemas["Heartbeat"]["not"] = {"required": ["heads"]}
    return references, schemas


def _close(schema: Json) -> None:
    """Say of a schema of the server's that there is no more than it names, and how the server writes an id."""
    if "properties" in schema and isinstance(schema["properties"], dict):
        schema.setdefault("additionalProperties", False)
    if schema.get("format") == "uuid":
        schema["pattern"] = f"^{_UUID}$"


def _walk(node: Any, change: Any) -> None:
    if isinstance(node, dict):
        if "$ref" in node or "type" in node or "oneOf" in node or "anyOf" in node:
            change(node)
        for value in node.values():
            _walk(value, change)
    elif isinstance(node, list):
        for item in node:
            _walk(item, change)


def _target(reference: Json) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _reachable(nodes: list[Any], schemas: Json) -> set[str]:
    seen: set[str] = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            if (found := node.get("$ref")) and (name := _target({"$ref": found})) not in seen:
                seen.add(name)
                nodes.append(schemas[name])
            nodes.extend(node.values())
        elif isinstance(node, list):
            nodes.extend(node)
    return seen


# -- names -------------------------------------------------------------------------------------------------------------


def _camel(name: str) -> str:
    return "".join(word[:1].upper() + word[1:] for word in name.replace("_", ".").split("."))


def _text(kind: type) -> str:
    """Return what a class says of itself, as one paragraph."""
    return " ".join((inspect.getdoc(kind) or "").split())


def _only(value: str) -> Any:
    return Literal[value]


def _channel_name(pattern: str) -> Any:
    if "{id}" not in pattern:
        return _only(pattern)
    before, _, after = pattern.partition("{id}")
    return Annotated[str, Field(pattern=f"^{before}{_UUID}{after}$")]
