"""Tasks over HTTP, in the envelope and below the user's own path."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import asyncpg
import httpx
import orjson
import pytest
from fastapi import FastAPI
from pydantic import TypeAdapter

from parley.core.envelope import Envelope, ErrorEnvelope, PageEnvelope
from parley.core.ids import new_id
from parley.core.scope import Scope
from parley.tasks.schemas import TaskRead, UserTaskRead
from tests.conftest import Account
from tests.tasks.conftest import CountQueries, SignInAs

V1 = "/api/v1/tasks"
TASK_ENVELOPE = TypeAdapter(Envelope[TaskRead])
PAGE_ENVELOPE = TypeAdapter(PageEnvelope[TaskRead])
ERROR_ENVELOPE = TypeAdapter(ErrorEnvelope)
USER_TASKS = TypeAdapter(list[UserTaskRead])


def both_paths(scope: Scope) -> tuple[str, str]:
    """Return the two addresses of the caller's tasks."""
    return V1, f"/api/{scope.subject}/tasks"


@pytest.fixture(params=["v1", "user"])
def tasks_path(request: pytest.FixtureRequest, scope: Scope) -> str:
    """One address of the caller's tasks, and in another run of the test the other."""
    return dict(zip(("v1", "user"), both_paths(scope), strict=True))[request.param]


async def add(http: httpx.AsyncClient, title: str = "Buy milk", **values: Any) -> dict[str, Any]:
    answer = await http.post(V1, json={"title": title, **values})
    assert answer.status_code == 201, answer.text
    task: dict[str, Any] = answer.json()["data"]
    return task


def payload(answer: httpx.Response) -> Any:
    """Return the body without the envelope, if there is one."""
    body = answer.json()
    return body["data"] if isinstance(body, dict) and "meta" in body else body


def refusal(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check a refusal's status and shape; return it without what differs from request to request."""
    assert answer.status_code == status, answer.text
    ERROR_ENVELOPE.validate_python(body := answer.json(), strict=True)
    assert body["error"] == code
    assert body["errors"][0] == {name: body[name] for name in ("error", "message", "details")}
    assert body.pop("meta") == {"request_id": answer.headers["x-request-id"]}
    found: dict[str, Any] = body
    return found


async def test_create_read_change_replace_delete(http: httpx.AsyncClient, scope: Scope) -> None:
    body = {"title": "  Buy milk ", "description": "Two litres", "due_at": "2027-03-01T18:00:00+01:00"}
    created = await http.post(V1, json=body)
    task = created.json()["data"]
    path = created.headers["location"]
    read = await http.get(path)
    changed = await http.patch(path, json={"completed": True, "description": None})
    replaced = await http.put(path, json={"title": "Buy tea"})
    deleted = await http.delete(path)
    gone = await http.get(path)

    assert created.status_code == 201
    assert path == f"{V1}/{task['id']}"
    assert task == {
        "id": task["id"],
        "user_id": str(scope.user_id),
        "title": "Buy milk",
        "description": "Two litres",
        "completed": False,
        "due_at": "2027-03-01T17:00:00Z",
        "created_at": task["created_at"],
        "updated_at": task["created_at"],
    }
    assert (read.status_code, read.json()["data"]) == (200, task)
    assert changed.status_code == 200
    task |= {"completed": True, "description": None, "updated_at": changed.json()["data"]["updated_at"]}
    assert changed.json()["data"] == task
    assert replaced.status_code == 200
    task |= {"title": "Buy tea", "completed": False, "due_at": None}
    assert replaced.json()["data"] == {**task, "updated_at": replaced.json()["data"]["updated_at"]}
    assert (deleted.status_code, deleted.content) == (204, b"")
    refusal(gone, 404, "task_not_found")
    for answer in (created, read, changed, replaced):
        TASK_ENVELOPE.validate_json(answer.content, strict=True)
        assert answer.json()["meta"] == {"request_id": answer.headers["x-request-id"]}


async def test_list_in_pages(http: httpx.AsyncClient) -> None:
    added = [await add(http, f"Task {number}", completed=number == 1) for number in range(3)]

    answer = await http.get(V1, params={"per_page": 2})
    last = await http.get(V1, params={"per_page": 2, "page": 2})
    done = await http.get(V1, params={"completed": "true"})
    still_open = await http.get(V1, params={"completed": "false"})

    PAGE_ENVELOPE.validate_json(answer.content, strict=True)
    assert answer.json()["data"] == [added[2], added[1]]
    request_id = answer.headers["x-request-id"]
    assert answer.json()["meta"] == {"request_id": request_id, "page": 1, "per_page": 2, "total": 3}
    assert last.json()["data"] == [added[0]]
    assert done.json()["data"] == [added[1]]
    assert still_open.json()["data"] == [added[2], added[0]]


async def test_an_account_has_tasks_from_the_start(alice: Account, bob: Account) -> None:
    """Through sign-up and the real credential."""
    task = await add(alice.http)

    assert task["user_id"] == str(alice.user_id)
    assert (await alice.http.get(f"/api/{alice.user_id}/tasks/{task['id']}")).json() == task
    refusal(await bob.http.get(f"{V1}/{task['id']}"), 404, "task_not_found")
    assert (await bob.http.get(V1)).json()["data"] == []


# The same requests at both addresses.


@pytest.mark.parametrize(
    "method_and_path", ["GET ", "POST ", "GET /{id}", "PUT /{id}", "PATCH /{id}", "DELETE /{id}", "GET /malformed"]
)
async def test_a_credential_is_required(method_and_path: str, app: FastAPI, client: httpx.AsyncClient) -> None:
    method, path = method_and_path.split(" ")
    for start in (V1, f"/api/{new_id()}/tasks"):
        for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic YTpi"}):
            answer = await client.request(method, start + path.format(id=new_id()), headers=headers)

            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.status_code == 401


VALID: list[dict[str, Any]] = [
    {"title": "a"},
    {"title": "x" * 200},
    {"title": "\U0001f9c0" * 200, "description": "\U0001f9c0" * 5000},
    {"title": "שלום 你好", "description": ""},
    {"title": "a", "description": None, "due_at": None, "completed": True},
    {"title": "'; DROP TABLE tasks; --", "description": "<script>alert(1)</script>"},
    {"title": "a", "due_at": "2027-03-01T17:00:00Z"},
    {"title": "a", "due_at": "2027-03-01T17:00:00.123456+05:30"},
    {"title": "a", "due_at": "9999-12-31T23:59:59Z"},
    {"title": "a", "due_at": "0001-01-01T00:00:01Z"},
]


@pytest.mark.parametrize("body", VALID, ids=range(len(VALID)))
async def test_what_is_valid_is_kept_as_it_is(body: dict[str, Any], scope: Scope, http: httpx.AsyncClient) -> None:
    expected = {name: value for name, value in body.items() if name != "due_at"}
    for start in both_paths(scope):
        created = await http.post(start, json=body)

        assert created.status_code == 201, created.text
        read = payload(await http.get(created.headers["location"]))
        assert read == payload(created)
        assert {name: read[name] for name in expected} == expected


# What is wrong → the field that the answer names, and the bound where there is one.
INVALID: list[tuple[str, str | None, str | None]] = [
    ("{}", "title", "missing"),
    ('{"title": null}', "title", "string_type"),
    ('{"title": ""}', "title", "min_length=1"),
    ('{"title": " \\t\\n "}', "title", "min_length=1"),
    (f'{{"title": "{"x" * 201}"}}', "title", "max_length=200"),
    ('{"title": 7}', "title", "string_type"),
    ('{"title": ["a"]}', "title", "string_type"),
    ('{"title": "a\\u0000b"}', "title", "unstorable_text"),
    ('{"title": "a\\ud800b"}', "title", "string_unicode"),
    (f'{{"title": "a", "description": "{"x" * 5001}"}}', "description", "max_length=5000"),
    ('{"title": "a", "description": 7}', "description", "string_type"),
    ('{"title": "a", "description": "\\u0000"}', "description", "unstorable_text"),
    ('{"title": "a", "description": "\\udfff"}', "description", "string_unicode"),
    ('{"title": "a", "completed": null}', "completed", "bool_type"),
    ('{"title": "a", "completed": "yes"}', "completed", "bool_type"),
    ('{"title": "a", "completed": 1}', "completed", "bool_type"),
    ('{"title": "a", "due_at": "tomorrow"}', "due_at", "datetime_parsing"),
    ('{"title": "a", "due_at": 1700000000}', "due_at", "datetime_parsing"),
    ('{"title": "a", "due_at": "1700000000"}', "due_at", "datetime_parsing"),
    ('{"title": "a", "due_at": "2027-03-01"}', "due_at", "datetime_parsing"),
    ('{"title": "a", "due_at": "2027-03-01T17:00:00"}', "due_at", "timezone_aware"),
    ('{"title": "a", "due_at": "2027-13-01T17:00:00Z"}', "due_at", None),
    ('{"title": "a", "due_at": "9999-12-31T23:59:59-01:00"}', "due_at", "datetime_range"),
    ('{"title": "a", "due_at": "0001-01-01T00:00:00+01:00"}', "due_at", "datetime_range"),
    ('{"title": "a", "due_at": "0001-01-01T00:00:00Z"}', "due_at", "datetime_range"),
    ('{"title": "a", "priority": 1}', "priority", "extra_forbidden"),
    ('{"title": "a", "id": "019f0000-0000-7000-8000-000000000000"}', "id", "extra_forbidden"),
    ('{"title": "a", "user_id": "019f0000-0000-7000-8000-000000000000"}', "user_id", "extra_forbidden"),
    ('{"title": "a", "workspace_id": "019f0000-0000-7000-8000-000000000000"}', "workspace_id", "extra_forbidden"),
    ('{"title": "a", "\\ud800": 1}', None, None),
    ("[]", None, None),
    ("null", None, None),
    ('"a"', None, None),
]


@pytest.mark.parametrize(("body", "field", "constraint"), INVALID, ids=range(len(INVALID)))
async def test_what_is_invalid_is_refused(
    body: str,
    field: str | None,
    constraint: str | None,
    scope: Scope,
    http: httpx.AsyncClient,
    admin: asyncpg.Connection,
) -> None:
    task = await add(http)
    for start in both_paths(scope):
        requests = [("POST", start), ("PUT", f"{start}/{task['id']}"), ("PATCH", f"{start}/{task['id']}")]
        # An empty change is one that changes nothing.
        for method, path in requests[:2] if body == "{}" else requests:
            answer = await http.request(method, path, content=body, headers={"Content-Type": "application/json"})

            details = refusal(answer, 422, "validation_error")["details"]
            assert details["field"] == field
            assert constraint is None or details["constraint"] == constraint
            assert "xxxx" not in answer.text
    assert payload(await http.get(f"{V1}/{task['id']}")) == task
    assert await admin.fetchval("SELECT count(*) FROM tasks") == 1
    assert await admin.fetchval("SELECT count(*) FROM channel_events") == 1


@pytest.mark.parametrize("body", ['{"title": ', "title=a", "{'title': 'a'}", b"\xff\xfe"])
async def test_what_is_not_json_is_refused(body: str | bytes, scope: Scope, http: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json"}
    for start in both_paths(scope):
        for method, path in (("POST", ""), ("PUT", f"/{new_id()}"), ("PATCH", f"/{new_id()}")):
            refusal(await http.request(method, start + path, content=body, headers=headers), 400, "bad_request")


@pytest.mark.parametrize("task_id", ["1", "not-an-id", "019f0000-0000-7000-8000-00000000000g", "%00", "a" * 500])
async def test_a_malformed_id_is_refused(task_id: str, scope: Scope, http: httpx.AsyncClient) -> None:
    for start in both_paths(scope):
        for method in ("GET", "PUT", "PATCH", "DELETE"):
            json = {"title": "a"} if method in {"PUT", "PATCH"} else None

            answer = await http.request(method, f"{start}/{task_id}", json=json)

            assert refusal(answer, 422, "validation_error")["details"]["field"] == "task_id"


@pytest.mark.parametrize("query", ["page=0", "page=x", "per_page=0", "per_page=101", "completed=perhaps"])
async def test_a_malformed_query_is_refused(query: str, scope: Scope, http: httpx.AsyncClient) -> None:
    for start in both_paths(scope):
        answer = await http.get(f"{start}?{query}")

        assert refusal(answer, 422, "validation_error")["details"]["field"] == query.split("=", maxsplit=1)[0]


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
async def test_anothers_id_looks_like_no_id(
    method: str, tasks_path: str, http: httpx.AsyncClient, sign_in_as: SignInAs, stranger: Scope
) -> None:
    theirs = sign_in_as(stranger)
    task = await add(theirs)
    json = {"title": "Taken"} if method in {"PUT", "PATCH"} else None

    existing = await http.request(method, f"{tasks_path}/{task['id']}", json=json)
    absent = await http.request(method, f"{tasks_path}/{new_id()}", json=json)

    assert refusal(existing, 404, "task_not_found") == refusal(absent, 404, "task_not_found")
    assert {name.lower() for name in existing.headers} == {name.lower() for name in absent.headers}
    assert payload(await theirs.get(f"{V1}/{task['id']}")) == task


async def test_a_list_holds_only_the_callers(
    tasks_path: str, http: httpx.AsyncClient, sign_in_as: SignInAs, stranger: Scope
) -> None:
    mine = await add(http)
    await add(sign_in_as(stranger))

    assert payload(await http.get(tasks_path)) == [mine]


async def test_each_change_is_one_event(tasks_path: str, http: httpx.AsyncClient, admin: asyncpg.Connection) -> None:
    path = (await http.post(tasks_path, json={"title": "Buy milk"})).headers["location"]
    await http.get(path)
    await http.patch(path, json={"completed": True})
    await http.put(path, json={"title": "Buy tea"})
    await http.patch(path, json={"title": ""})
    await http.get(tasks_path)
    await http.delete(path)
    await http.delete(path)

    rows = await admin.fetch("SELECT seq, e, d::text AS d FROM channel_events ORDER BY seq")

    assert [(row["seq"], row["e"]) for row in rows] == [
        (1, "task.created"),
        (2, "task.updated"),
        (3, "task.updated"),
        (4, "task.deleted"),
    ]
    assert orjson.loads(rows[3]["d"]) == {"id": path.rsplit("/", 1)[1]}


async def test_a_fault_of_ours_tells_nothing_and_keeps_nothing(
    tasks_path: str, http: httpx.AsyncClient, admin: asyncpg.Connection
) -> None:
    await admin.execute("ALTER TABLE channel_events RENAME TO elsewhere")

    answer = await http.post(tasks_path, json={"title": "Buy milk"})

    body = refusal(answer, 500, "internal")
    assert "elsewhere" not in answer.text
    assert "channel_events" not in answer.text
    assert body["details"] == {}
    assert await admin.fetchval("SELECT count(*) FROM tasks") == 0


Request = Callable[[httpx.AsyncClient, str], Any]

ONCE = {"Idempotency-Key": "the-first"}

# A call, and how many statements it may take: the work, the event. The binding of the workspace goes with BEGIN.
QUERIES: dict[str, tuple[Request, int]] = {
    "read": (lambda http, path: http.get(path), 1),
    "list": (lambda http, path: http.get(path.rsplit("/", 1)[0]), 2),
    "create": (lambda http, path: http.post(path.rsplit("/", 1)[0], json={"title": "a"}), 1 + 1),
    "create once": (lambda http, path: http.post(path.rsplit("/", 1)[0], json={"title": "a"}, headers=ONCE), 1 + 1 + 2),
    "change": (lambda http, path: http.patch(path, json={"title": "b"}), 2 + 1),
    "replace": (lambda http, path: http.put(path, json={"title": "c"}), 2 + 1),
    "change nothing": (lambda http, path: http.patch(path, json={}), 1),
    "delete": (lambda http, path: http.delete(path), 2 + 1),
    "refuse": (lambda http, path: http.post(path.rsplit("/", 1)[0], json={"title": ""}), 0),
}


@pytest.mark.parametrize(("call", "expected"), QUERIES.values(), ids=QUERIES.keys())
async def test_queries_of_a_call(
    call: Request, expected: int, app: FastAPI, alice: Account, count_queries: CountQueries
) -> None:
    task = await add(alice.http)

    async with count_queries(app.state.database) as statements:
        answer = await call(alice.http, f"{V1}/{task['id']}")

    assert answer.status_code in {200, 201, 204, 422}
    assert len(statements) == expected, statements


# The user's own path.


@pytest.fixture
async def other_issuers(scope: Scope, sign_in_as: SignInAs) -> tuple[Scope, httpx.AsyncClient]:
    """A user whose credential names them as another issuer does: not by a UUID."""
    named = replace(scope, subject="user_2f.ab-C")
    return named, sign_in_as(named)


async def test_below_the_users_path_bodies_are_bare(other_issuers: tuple[Scope, httpx.AsyncClient]) -> None:
    scope, http = other_issuers
    start = f"/api/{scope.subject}/tasks"
    created = await http.post(start, json={"title": "Buy milk", "description": "Two litres"})
    path = created.headers["location"]
    read = await http.get(path)
    listed = await http.get(start)
    changed = await http.patch(path, json={"completed": True})
    replaced = await http.put(path, json={"title": "Buy tea"})
    deleted = await http.delete(path)
    gone = await http.get(path)

    assert [created.status_code, read.status_code, changed.status_code, replaced.status_code] == [201, 200, 200, 200]
    task = created.json()
    assert path == f"{start}/{task['id']}"
    assert set(task) == {
        "id", "user_id", "title", "description", "completed", "due_at", "created_at", "updated_at"
    }  # fmt: skip
    assert task["user_id"] == scope.subject
    assert read.json() == task
    assert listed.json() == [task]
    assert changed.json()["completed"] is True
    assert (replaced.json()["title"], replaced.json()["user_id"]) == ("Buy tea", scope.subject)
    assert (deleted.status_code, deleted.content) == (204, b"")
    refusal(gone, 404, "task_not_found")
    USER_TASKS.validate_json(listed.content, strict=True)


async def test_the_bare_list_says_in_a_header_how_many_there_are(http: httpx.AsyncClient, scope: Scope) -> None:
    added = [await add(http, f"Task {number}") for number in range(30)]
    start = f"/api/{scope.subject}/tasks"

    whole = await http.get(start)
    page = await http.get(start, params={"per_page": 10, "page": 3, "completed": "false"})

    assert whole.json() == added[::-1]
    assert page.json() == added[9::-1]
    assert whole.headers["x-total-count"] == page.headers["x-total-count"] == "30"


async def test_both_addresses_show_the_same_tasks(http: httpx.AsyncClient, scope: Scope) -> None:
    task = await add(http)
    path = f"/api/{scope.subject}/tasks/{task['id']}"

    assert (await http.get(path)).json() == task
    await http.delete(path)
    refusal(await http.get(f"{V1}/{task['id']}"), 404, "task_not_found")


async def test_a_path_of_another_user_is_refused_before_anything_else(
    http: httpx.AsyncClient,
    sign_in_as: SignInAs,
    scope: Scope,
    colleague: Scope,
    app: FastAPI,
    count_queries: CountQueries,
) -> None:
    task = await add(sign_in_as(colleague))
    mine = await add(http)
    names = [colleague.subject, str(new_id()), "someone", scope.subject.upper(), f"{scope.subject}%20", "%00"]

    async with count_queries(app.state.database) as statements:
        refusals = []
        for name in names:
            start = f"/api/{name}/tasks"
            refusals += [
                await http.get(start),
                await http.get(f"{start}?page=0"),
                await http.post(start, json={"title": "Taken"}),
                await http.post(start, json={"title": ""}),
            ]
            for task_id in (task["id"], mine["id"], new_id(), "malformed"):
                path = f"{start}/{task_id}"
                refusals += [
                    await http.get(path),
                    await http.put(path, json={"title": "Taken"}),
                    await http.patch(path, json={"nonsense": 1}),
                    await http.delete(path),
                ]

    bodies = [refusal(answer, 401, "unauthenticated") for answer in refusals]
    assert all(body == bodies[0] for body in bodies)
    assert {answer.headers["www-authenticate"] for answer in refusals} == {"Bearer"}
    assert statements == []


async def test_v1_is_nobodys_name(sign_in_as: SignInAs, scope: Scope) -> None:
    http = sign_in_as(replace(scope, subject="v1"))

    answer = await http.get("/api/v1/tasks")

    PAGE_ENVELOPE.validate_json(answer.content, strict=True)


# The document.


async def test_the_document_tells_of_every_answer(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    operations = {
        (path, method): operation
        for path, methods in paths.items()
        if path.startswith((V1, "/api/{user_id}/tasks"))
        for method, operation in methods.items()
    }

    assert len(operations) == 12
    for (path, method), operation in operations.items():
        statuses = set(operation["responses"])
        assert {"401", "422", "500"} <= statuses
        assert ("404" in statuses) == ("{" in path)
        assert ("400" in statuses) == (method in {"post", "put", "patch"})
        assert {"post": "201", "delete": "204"}.get(method, "200") in statuses
        assert operation["responses"]["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorEnvelope")
        assert operation["security"]
    ids = {operation["operationId"] for operation in operations.values()}
    assert len(ids) == 12
    assert {"list_tasks", "create_task", "get_task", "replace_task", "change_task", "delete_task"} < ids
    schemas = app.openapi()["components"]["schemas"]
    assert all(schemas[name]["examples"] for name in ("TaskCreate", "TaskReplace", "TaskUpdate", "TaskRead"))
    title = schemas["TaskUpdate"]["properties"]["title"]
    assert title == {"type": "string", "maxLength": 200, "minLength": 1, "title": "Title"}
    assert "required" not in schemas["TaskUpdate"]
