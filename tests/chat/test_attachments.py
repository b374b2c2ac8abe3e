"""Attachments, end to end: up, into a message, to the model, down again, and gone; in both stores."""

import asyncio
import base64
import itertools
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from benchmarks.fake_provider import FakeProvider
from parley.chat.attachments.background import clean_objects, clean_unused
from parley.chat.attachments.personal_data import AttachmentData
from parley.chat.attachments.stores import BucketStore
from parley.core import clock
from parley.core.db import Database, DatabaseUrls
from parley.core.personal_data import Person
from parley.core.settings import AttachmentSettings, LlmSettings, Settings
from tests import bucket_server
from tests.bucket_server import BucketServer
from tests.chat.conftest import REGISTRY, Talk, start_talk, until
from tests.chat.pictures import jpeg, png
from tests.conftest import Account, SignUp, make_settings, running
from tests.live import greet, live

PATH = "/api/v1/attachments"
LIMITS: dict[str, Any] = {"image_bytes": 2_000_000, "text_bytes": 200_000, "workspace_bytes": 3_000_000}


@pytest.fixture
def registry_file(tmp_path: Path, provider: FakeProvider) -> Path:
    """One model that takes images behind one that does not."""
    path = tmp_path / "llm_registry.yaml"
    text = REGISTRY.replace("default: [gpt]", "default: [gpt, eyes]\n  blind: [gpt, claude]")
    text = text.replace(
        "aliases:", "  eyes: {{provider: openai, name: fake, retries: 0, capabilities: [tools, images]}}\naliases:"
    )
    path.write_text(text.format(url=provider.url))
    return path


@pytest.fixture
async def bucket() -> AsyncIterator[BucketServer]:
    async with BucketServer(now=clock.now) as made:
        yield made


@pytest.fixture(params=["postgres", "s3"])
def settings(
    request: pytest.FixtureRequest, tmp_path: Path, urls: DatabaseUrls, registry_file: Path, bucket: BucketServer
) -> Settings:
    """Each test runs with both stores."""
    attachments = AttachmentSettings(
        store=request.param, s3_endpoint=bucket.url, s3_bucket=bucket_server.BUCKET, s3_region=bucket_server.REGION,
        s3_access_key=bucket_server.ACCESS_KEY, s3_secret_key=SecretStr(bucket_server.SECRET_KEY), **LIMITS,
    )  # fmt: skip
    return make_settings(tmp_path, urls, llm=LlmSettings(registry=registry_file), attachments=attachments)


async def upload(account: Account, data: bytes, *, name: str = "", status: int = 201, **headers: str) -> dict[str, Any]:
    """Upload; return the attachment, or the refusal."""
    sent = {key.replace("_", "-"): value for key, value in headers.items()}
    answer = await account.http.post(PATH, params={"name": name}, content=data, headers=sent)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found["data"] if status == 201 else found


async def send(talk: Talk, *parts: dict[str, Any], status: int = 202, **body: Any) -> dict[str, Any]:
    answer = await talk.owner.http.post(talk.path, json={"parts": list(parts), **body})
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found["data"] if status == 202 else found


def text(said: str = "deltas=2 rate=0") -> dict[str, Any]:
    return {"type": "text", "text": said}


def part(attachment: dict[str, Any]) -> dict[str, Any]:
    return {"type": attachment["kind"], "attachment": attachment["id"]}


async def bytes_stored(admin: asyncpg.Connection, bucket: BucketServer) -> int:
    """Return how many bytes of files there are, wherever they are."""
    inside = await admin.fetchval("SELECT coalesce(sum(octet_length(data)), 0) FROM attachment_chunks")
    return int(inside) + sum(map(len, bucket.objects.values()))


# -- up and down ---------------------------------------------------------------------------------------------------


async def test_an_image_comes_back_as_it_was(alice: Account, settings: Settings, bucket: BucketServer) -> None:
    data = png(640, 480) + b"\x00" * 700_000
    made = await upload(alice, data, name="sky é.png", content_type="image/png")
    assert {name: made[name] for name in made if name not in {"id", "created_at"}} == {
        "kind": "image", "media_type": "image/png", "name": "sky é.png", "size": len(data), "width": 640, "height": 480,
        "conversation_id": None,
    }  # fmt: skip
    answer = await alice.http.get(f"{PATH}/{made['id']}")
    assert answer.status_code == 200
    assert answer.content == data
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == "inline; filename*=UTF-8''sky%20%C3%A9.png"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "no-store" in answer.headers["cache-control"]
    if settings.attachments.store == "s3":
        assert bucket.objects == {f"workspaces/{alice.workspace_id}/attachments/{made['id']}": data}


async def test_a_page_is_text_to_be_saved(alice: Account) -> None:
    page = b"<!doctype html><script>alert(1)</script>"
    made = await upload(alice, page, name="x.html", content_type="text/html")
    assert (made["kind"], made["media_type"], made["width"]) == ("file", "text/html", None)
    answer = await alice.http.get(f"{PATH}/{made['id']}")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''x.html"


async def test_a_file_without_a_name_gets_one(alice: Account) -> None:
    assert (await upload(alice, jpeg()))["name"] == "image.jpeg"
    assert (await upload(alice, b"hello"))["name"] == "file.txt"


@pytest.mark.parametrize(
    ("data", "name", "content_type", "status", "code"),
    [
        (b"hello", "a.png", "image/png", 422, "type_mismatch"),
        (png(), "a.txt", "text/plain", 422, "type_mismatch"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'>", "a.svg", "image/svg+xml", 422, "unsupported_type"),
        (b"\x00\x01\x02", "a.bin", "application/octet-stream", 422, "unsupported_type"),
        (png()[:20], "a.png", "image/png", 422, "image_damaged"),
        (png(20_000, 20_000), "a.png", "image/png", 413, "too_large"),
        (b"", "a.txt", "text/plain", 422, "validation_error"),
        (b"a" * 200_001, "a.txt", "text/plain", 413, "too_large"),
        (b"a" * 2_000_001, "a.txt", "text/plain", 413, "too_large"),
    ],
)
async def test_what_is_refused_leaves_nothing(
    alice: Account, admin: asyncpg.Connection, bucket: BucketServer,
    data: bytes, name: str, content_type: str, status: int, code: str,
) -> None:  # fmt: skip
    refused = await upload(alice, data, name=name, status=status, content_type=content_type)
    assert refused["error"] == code
    assert await admin.fetchval("SELECT count(*) FROM attachments") == 0
    assert await bytes_stored(admin, bucket) == 0


async def test_other_routes_keep_their_bound(alice: Account) -> None:
    answer = await alice.http.post("/api/v1/conversations", content=b"x" * 1_100_000)
    assert answer.status_code == 413


async def test_a_body_without_a_length_is_bounded_too(alice: Account, admin: asyncpg.Connection) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield png() + b"\x00" * 100_000

    answer = await alice.http.post(PATH, content=endless())
    assert answer.status_code == 413
    assert await admin.fetchval("SELECT count(*) FROM attachments") == 0


async def test_a_workspace_has_a_quota(alice: Account, bob: Account) -> None:
    big = png() + b"\x00" * 1_400_000
    first = await upload(alice, big)
    await upload(alice, big)
    refused = await upload(alice, big, status=409)
    assert (refused["error"], refused["details"]) == ("quota_exceeded", {"limit": 3_000_000})
    await upload(bob, big)
    assert (await alice.http.delete(f"{PATH}/{first['id']}")).status_code == 204
    await upload(alice, big)


async def test_uploads_at_the_same_time_do_not_pass_the_quota(
    alice: Account, admin: asyncpg.Connection, bucket: BucketServer
) -> None:
    big = png() + b"\x00" * 1_000_000
    answers = await asyncio.gather(*(alice.http.post(PATH, content=big) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [201, 201, *[409] * 6]
    assert await bytes_stored(admin, bucket) == 2 * len(big)


async def test_the_same_key_is_one_upload(alice: Account, admin: asyncpg.Connection, bucket: BucketServer) -> None:
    key = str(uuid4())
    first = await upload(alice, b"hello", name="a.txt", idempotency_key=key)
    again = await alice.http.post(PATH, params={"name": "a.txt"}, content=b"hello", headers={"Idempotency-Key": key})
    assert (again.status_code, again.json()["data"]) == (201, first)
    assert again.headers["idempotent-replayed"] == "true"
    other = await upload(alice, b"hullo", name="a.txt", status=422, idempotency_key=key)
    assert other["error"] == "idempotency_key_reused"
    assert await admin.fetchval("SELECT count(*) FROM attachments") == 1
    assert await admin.fetchval("SELECT coalesce(sum(octet_length(data)), 5) FROM attachment_chunks") == 5


# -- whose it is ---------------------------------------------------------------------------------------------------


async def test_an_attachment_is_its_users_alone(alice: Account, bob: Account, talk: Talk) -> None:
    made = await upload(alice, b"secret")
    for id_ in (made["id"], str(uuid4())):
        assert (await bob.http.get(f"{PATH}/{id_}")).status_code == 404
        assert (await bob.http.delete(f"{PATH}/{id_}")).status_code == 404
    theirs = await start_talk(bob)
    refused = await send(theirs, text(), part(made), status=404)
    assert refused["error"] == "not_found"
    assert await theirs.messages() == []
    # It was not taken by the refused send.
    await talk.ended(UUID((await send(talk, text(), part(made)))["reply"]["id"]))


async def test_a_colleague_sees_nothing_of_it(
    alice: Account, sign_up: SignUp, admin: asyncpg.Connection, talk: Talk
) -> None:
    carol = await colleague_of(alice, sign_up, admin)
    unsent, sent = await upload(alice, b"one"), await upload(alice, b"two")
    await talk.ended(UUID((await send(talk, text(), part(sent)))["reply"]["id"]))
    for made in (unsent, sent):
        assert (await carol.http.get(f"{PATH}/{made['id']}")).status_code == 404
        assert (await carol.http.delete(f"{PATH}/{made['id']}")).status_code == 404


# -- in messages ---------------------------------------------------------------------------------------------------


async def test_a_message_carries_what_was_uploaded_to_the_model(
    alice: Account, talk: Talk, provider: FakeProvider
) -> None:
    picture = await upload(alice, png(640, 480), name="sky.png")
    table = await upload(alice, "a,b\né,2".encode(), name="t.csv")
    sent = await send(talk, text("deltas=2 rate=0"), part(picture), part(table), model="eyes")
    assert sent["message"]["parts"] == [
        text("deltas=2 rate=0"),
        {"type": "image", "attachment": picture["id"], "media_type": "image/png", "name": "sky.png",
         "size": picture["size"], "width": 640, "height": 480},
        {"type": "file", "attachment": table["id"], "media_type": "text/csv", "name": "t.csv", "size": 8},
    ]  # fmt: skip
    ended = await talk.ended(UUID(sent["reply"]["id"]))
    assert (ended["status"], ended["model"]) == ("completed", "eyes")
    asked = json.dumps(provider.requests[-1].body)
    assert base64.b64encode(png(640, 480)).decode() in asked
    assert "a,b\\n\\u00e9,2" in asked
    # What comes next knows of both.
    follow = await send(talk, text("deltas=2 rate=0"), model="eyes")
    await talk.ended(UUID(follow["reply"]["id"]))
    assert base64.b64encode(png(640, 480)).decode() in json.dumps(provider.requests[-1].body)


async def test_of_an_alias_the_first_model_that_takes_images_answers(alice: Account, talk: Talk) -> None:
    picture = await upload(alice, png())
    sent = await send(talk, text(), part(picture), model="default")
    assert sent["reply"]["model"] == "eyes"
    await talk.ended(UUID(sent["reply"]["id"]))
    plain = await send(talk, text(), model="default")
    assert plain["reply"]["model"] == "gpt"
    await talk.ended(UUID(plain["reply"]["id"]))


@pytest.mark.parametrize("model", ["gpt", "blind"])
async def test_a_model_without_images_is_refused_before_anything_is_stored(
    alice: Account, talk: Talk, admin: asyncpg.Connection, model: str
) -> None:
    picture = await upload(alice, png())
    refused = await send(talk, text(), part(picture), model=model, status=422)
    assert refused["error"] == "model_without_images"
    assert await talk.messages() == []
    assert await admin.fetchval("SELECT conversation_id FROM attachments") is None


async def test_a_text_file_goes_to_any_model(alice: Account, talk: Talk, provider: FakeProvider) -> None:
    notes = await upload(alice, b"remember the milk", name="notes.md")
    sent = await send(talk, part(notes), text(), model="gpt")
    assert (await talk.ended(UUID(sent["reply"]["id"])))["status"] == "completed"
    assert "remember the milk" in json.dumps(provider.requests[-1].body)


async def test_parts_can_be_sent_as_they_are_read(alice: Account, talk: Talk) -> None:
    """A client that sends a message again gives its parts back; what they say of the file is not believed."""
    notes = await upload(alice, b"remember", name="notes.md")
    first = await send(talk, part(notes), text())
    await talk.ended(UUID(first["reply"]["id"]))
    lied = [{**one, "name": "other", "size": 1} if one["type"] == "file" else one for one in first["message"]["parts"]]
    second = await send(talk, *lied)
    await talk.ended(UUID(second["reply"]["id"]))
    assert second["message"]["parts"] == first["message"]["parts"]


async def test_an_attachment_belongs_to_one_conversation(alice: Account, talk: Talk) -> None:
    notes = await upload(alice, b"remember")
    await talk.ended(UUID((await send(talk, part(notes), text()))["reply"]["id"]))
    elsewhere = await start_talk(alice)
    assert (await send(elsewhere, part(notes), text(), status=404))["error"] == "not_found"
    in_use = await alice.http.delete(f"{PATH}/{notes['id']}")
    assert (in_use.status_code, in_use.json()["error"]) == (409, "attachment_in_use")
    shown = await alice.http.get(f"{PATH}/{notes['id']}")
    assert shown.content == b"remember"


async def test_a_message_takes_ten_at_most(alice: Account, talk: Talk) -> None:
    made = [await upload(alice, f"file {number}".encode()) for number in range(11)]
    refused = await send(talk, *(part(one) for one in made), status=422)
    assert refused["error"] == "too_many_attachments"
    sent = await send(talk, *(part(one) for one in made[:10]), text())
    await talk.ended(UUID(sent["reply"]["id"]))


async def test_the_socket_sends_attachments_too(settings: Settings) -> None:
    async with live(settings) as server, httpx.AsyncClient(base_url=server.url) as http:
        body = {"email": "ann@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}
        session = (await http.post("/api/v1/auth/signup", json=body)).json()["data"]
        http.headers["Authorization"] = f"Bearer {session['access_token']}"
        made = (await http.post(PATH, params={"name": "n.md"}, content=b"remember")).json()["data"]
        talk = (await http.post("/api/v1/conversations", json={})).json()["data"]["id"]
        numbers = itertools.count(1)
        frame = {"t": "chat.send", "ch": f"conversation:{talk}"}
        picture = (await http.post(PATH, content=png(640, 480))).json()["data"]
        subs = [{"ch": f"conversation:{talk}"}]
        async with await greet(server, session["access_token"], subs=subs) as socket:

            async def ask(*parts: dict[str, Any]) -> dict[str, Any]:
                number = next(numbers)
                await socket.send(**frame, id=number, cid=str(uuid4()), parts=list(parts))
                return await socket.until(lambda answer: answer.get("id") == number)

            unknown = await ask({"type": "file", "attachment": str(uuid4())})
            assert (unknown["t"], unknown["code"]) == ("err", "not_found")
            malformed = await ask({"type": "file"})
            assert (malformed["t"], malformed["code"]) == ("err", "invalid")
            sent = await ask(text(), {"type": "file", "attachment": made["id"]}, part(picture))
            assert sent["t"] == "ok", sent
            # What comes is held against the AsyncAPI document: the question's parts, live and in the snapshot.
            await socket.send(t="unsub", id=98, ch=subs[0]["ch"])
            await socket.send(t="sub", id=99, ch=subs[0]["ch"])
            snapshot = await socket.until(lambda frame: frame["t"] == "snap" and bool(frame["state"]["messages"]))
            kinds = [one["type"] for one in snapshot["state"]["messages"][0]["parts"]]
            assert kinds == ["text", "file", "image"]
        messages = (await http.get(f"/api/v1/conversations/{talk}/messages")).json()["data"]
        assert messages[0]["parts"][1]["attachment"] == made["id"]


async def test_a_send_without_attachments_asks_nothing_more(talk: Talk, app: FastAPI) -> None:
    database: Database = app.state.database
    from parley.chat.attachments.service import message_parts
    from parley.core.scope import Role, Scope

    seen: list[str] = []
    scope = Scope(talk.owner.workspace_id, talk.owner.user_id, Role.OWNER)
    async with database.unit_of_work(scope) as unit:
        connection = await unit.driver()
        connection.add_query_logger(lambda record: seen.append(record.query))
        assert await message_parts(unit, scope, talk.id, ("hello",)) == [text("hello")]
        assert seen == []


# -- gone ----------------------------------------------------------------------------------------------------------


def bucket_store(app: FastAPI) -> BucketStore:
    store: BucketStore = app.state.files.attachments._stores["s3"]
    return store


async def clean(app: FastAPI, *, after: timedelta) -> tuple[int, int]:
    database: Database = app.state.database
    with clock.shifted(after.total_seconds()):
        return await clean_unused(database, 1000), await clean_objects(database, 1000, store=bucket_store(app))


async def test_what_was_never_sent_goes_after_a_day(
    app: FastAPI, alice: Account, talk: Talk, admin: asyncpg.Connection, bucket: BucketServer
) -> None:
    sent, unsent = await upload(alice, b"sent"), await upload(alice, b"unsent")
    await talk.ended(UUID((await send(talk, part(sent), text()))["reply"]["id"]))
    await clean(app, after=timedelta(hours=23))
    assert await admin.fetchval("SELECT count(*) FROM attachments") == 2
    await clean(app, after=timedelta(hours=25))
    assert (await alice.http.get(f"{PATH}/{unsent['id']}")).status_code == 404
    assert (await alice.http.get(f"{PATH}/{sent['id']}")).content == b"sent"
    assert await bytes_stored(admin, bucket) == len(b"sent")


async def test_a_deleted_conversation_takes_its_bytes_along(
    app: FastAPI, alice: Account, talk: Talk, admin: asyncpg.Connection, bucket: BucketServer
) -> None:
    made = await upload(alice, png() + b"\x00" * 600_000)
    await talk.ended(UUID((await send(talk, part(made), text(), model="eyes"))["reply"]["id"]))
    assert await bytes_stored(admin, bucket) > 600_000
    assert (await alice.http.delete(f"/api/v1/conversations/{talk.id}")).status_code == 204
    assert (await alice.http.get(f"{PATH}/{made['id']}")).status_code == 404
    await clean(app, after=timedelta(hours=2))
    assert await bytes_stored(admin, bucket) == 0
    assert await admin.fetchval("SELECT count(*) FROM stored_objects") == 0


async def test_a_deleted_workspace_takes_its_bytes_along(
    app: FastAPI, alice: Account, bob: Account, admin: asyncpg.Connection, bucket: BucketServer
) -> None:
    await upload(alice, b"alice's")
    kept = await upload(bob, b"bob's")
    await admin.execute("DELETE FROM workspaces WHERE id = $1", alice.workspace_id)
    await clean(app, after=timedelta(hours=2))
    assert await bytes_stored(admin, bucket) == len(b"bob's")
    assert (await bob.http.get(f"{PATH}/{kept['id']}")).content == b"bob's"


async def test_a_store_that_is_away_is_said_to_be(
    settings: Settings, alice: Account, admin: asyncpg.Connection, bucket: BucketServer
) -> None:
    made = await upload(alice, b"hello")
    bucket.refuse = lambda _: 503
    if settings.attachments.store == "postgres":
        # It does not ask the bucket at all.
        assert (await alice.http.get(f"{PATH}/{made['id']}")).status_code == 200
        return
    assert (await alice.http.get(f"{PATH}/{made['id']}")).status_code == 503
    assert (await upload(alice, b"again", status=503))["error"] == "unavailable"
    # Nothing is left of the attempt but the note that there may be an object.
    assert await admin.fetchval("SELECT count(*) FROM attachments") == 1
    assert await admin.fetchval("SELECT count(*) FROM stored_objects") == 2


async def test_old_files_are_read_from_where_they_are(
    settings: Settings, sign_up: SignUp, alice: Account, bucket: BucketServer
) -> None:
    made = await upload(alice, b"hello")
    other = "s3" if settings.attachments.store == "postgres" else "postgres"
    changed = settings.model_copy(update={"attachments": settings.attachments.model_copy(update={"store": other})})
    async with running(changed) as app:
        from tests.conftest import http_client

        async with http_client(app) as http:
            http.headers.update(alice.http.headers)
            assert (await http.get(f"{PATH}/{made['id']}")).content == b"hello"
            again = await http.post(PATH, content=b"hello")
            assert again.status_code == 201
    assert len(bucket.objects) == 1


# -- who reads along, and whose it was -----------------------------------------------------------------------------


async def colleague_of(alice: Account, sign_up: SignUp, admin: asyncpg.Connection) -> Account:
    carol = await sign_up("carol@example.com")
    await admin.execute(
        "INSERT INTO memberships (workspace_id, user_id, role) VALUES ($1, $2, 'member')",
        alice.workspace_id,
        carol.user_id,
    )
    switched = await carol.http.post("/api/v1/auth/switch", json={"workspace_id": str(alice.workspace_id)})
    carol.http.headers["Authorization"] = f"Bearer {switched.json()['data']['access_token']}"
    return carol


async def test_who_may_read_a_conversation_may_read_what_it_carries(
    alice: Account, sign_up: SignUp, admin: asyncpg.Connection, talk: Talk
) -> None:
    carol = await colleague_of(alice, sign_up, admin)
    unsent, sent = await upload(alice, b"one"), await upload(alice, b"two")
    await talk.ended(UUID((await send(talk, text(), part(sent)))["reply"]["id"]))
    shared = await alice.http.patch(f"/api/v1/conversations/{talk.id}", json={"shared_access": "write"})
    assert shared.status_code == 200, shared.text
    assert (await carol.http.get(f"{PATH}/{sent['id']}")).content == b"two"
    assert (await carol.http.get(f"{PATH}/{unsent['id']}")).status_code == 404
    # Whoever may write there may send it again there, and nowhere else.
    theirs = Talk(carol, talk.id)
    await theirs.ended(UUID((await send(theirs, part(sent), text()))["reply"]["id"]))
    elsewhere = await start_talk(carol)
    assert (await send(elsewhere, part(sent), text(), status=404))["error"] == "not_found"
    await alice.http.patch(f"/api/v1/conversations/{talk.id}", json={"shared": False})
    assert (await carol.http.get(f"{PATH}/{sent['id']}")).status_code == 404


async def test_an_export_of_a_person_has_their_files(
    settings: Settings, app: FastAPI, alice: Account, bob: Account
) -> None:
    await upload(bob, b"bob's")
    made = [await upload(alice, b"one", name="a.txt"), await upload(alice, png() + b"\x00" * 300_000)]
    person = Person(alice.user_id, (alice.workspace_id,))
    rows = [json.loads(record.json) async for record in AttachmentData().export(app.state.database, person)]
    assert [row["id"] for row in rows] == [one["id"] for one in made]
    if settings.attachments.store == "postgres":
        assert base64.b64decode(rows[0]["data"]) == b"one"
        assert len(base64.b64decode(rows[1]["data"])) == len(png()) + 300_000
    else:
        assert [row["data"] for row in rows] == [None, None]


async def test_an_erasure_takes_a_persons_files_from_everywhere(
    app: FastAPI, alice: Account, sign_up: SignUp, admin: asyncpg.Connection, talk: Talk, bucket: BucketServer
) -> None:
    carol = await colleague_of(alice, sign_up, admin)
    await alice.http.patch(f"/api/v1/conversations/{talk.id}", json={"shared_access": "write"})
    kept = await upload(alice, b"alice's")
    await talk.ended(UUID((await send(talk, part(kept), text()))["reply"]["id"]))
    theirs = Talk(carol, talk.id)
    gone = [await upload(carol, b"carol's"), await upload(carol, b"carol's, never sent")]
    await theirs.ended(UUID((await send(theirs, part(gone[0]), text()))["reply"]["id"]))
    person = Person(carol.user_id, (alice.workspace_id, carol.workspace_id))
    await AttachmentData().erase(app.state.database, person)
    await AttachmentData().erase(app.state.database, person)
    await clean(app, after=timedelta(hours=2))
    assert await admin.fetchval("SELECT count(*) FROM attachments") == 1
    assert await bytes_stored(admin, bucket) == len(b"alice's")
    # What is written on below knows that there was something.
    follow = await send(talk, text())
    assert (await talk.ended(UUID(follow["reply"]["id"])))["status"] == "completed"


# -- a model's context ---------------------------------------------------------------------------------------------


async def test_a_question_that_is_too_long_reaches_no_provider(
    alice: Account, talk: Talk, provider: FakeProvider
) -> None:
    book = await upload(alice, b"word " * 30_000, name="book.txt")
    sent = await send(talk, text(), part(book), model="gpt")
    ended = await talk.ended(UUID(sent["reply"]["id"]))
    assert (ended["status"], ended["error"]["code"]) == ("failed", "context_too_long")
    assert list(provider.requests) == []
    # The next question goes on without it.
    follow = await send(talk, text())
    assert (await talk.ended(UUID(follow["reply"]["id"])))["status"] == "completed"
    assert "book.txt" not in json.dumps(provider.requests[-1].body)


async def test_nothing_is_asked_between_the_commit_and_the_call(
    app: FastAPI, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without attachments: what was said before came along with the send."""
    from parley.chat.attachments.service import AttachmentService

    async def never(*_: object) -> None:
        raise AssertionError("the store was asked")

    monkeypatch.setattr(AttachmentService, "contents", never)
    for _ in range(2):
        _, reply = await talk.send("deltas=2 rate=0")
        assert (await talk.ended(reply))["status"] == "completed"


async def test_an_upload_that_breaks_off_leaves_nothing(
    settings: Settings, admin: asyncpg.Connection, bucket: BucketServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with live(settings) as server, httpx.AsyncClient(base_url=server.url) as http:
        body = {"email": "ann@example.com", "password": "correct horse 1", "confirmPassword": "correct horse 1"}
        token = (await http.post("/api/v1/auth/signup", json=body)).json()["data"]["access_token"]
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            f"POST {PATH}?name=a.txt HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
            f"Content-Length: 100000\r\n\r\n".encode()
            + b"a" * 50_000
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        # What comes after it is served, and the one that broke off was no fault of ours.
        answer = await http.post(PATH, content=b"whole", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 201

        async def only_the_whole_one() -> bool:
            return await bytes_stored(admin, bucket) == len(b"whole")

        await until(only_the_whole_one)
        assert await admin.fetchval("SELECT count(*) FROM attachments") == 1
    assert "unexpected error" not in caplog.text
