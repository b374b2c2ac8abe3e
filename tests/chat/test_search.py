"""The search: what it finds, how it marks it, and that nothing of others is ever among it."""

import itertools
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parley.chat.search import repository
from parley.chat.search.words import SNIPPET_LENGTH, Words, fold
from parley.core.db import DatabaseUrls, asyncpg_dsn
from parley.core.ids import new_id
from tests.chat.conftest import Talk, start_talk
from tests.chat.people import change, join
from tests.conftest import Account, SignUp

Found = list[dict[str, Any]]


async def search(who: Account, q: str, **params: Any) -> tuple[Found, int]:
    answer = await who.http.get("/api/v1/search", params={"q": q, **params})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["data"], body["meta"]["total"]


def marked(hit: dict[str, Any]) -> list[str]:
    return [hit["snippet"][start:end] for start, end in hit["marks"]]


async def said(talk: Talk, text: str) -> UUID:
    """Say something that the fake provider answers with a few words of its own."""
    question, reply = await talk.send(text)
    await talk.ended(reply)
    return question


# -- what is found -----------------------------------------------------------------------------------------------------


async def test_questions_replies_and_titles_are_found(talk: Talk, alice: Account) -> None:
    question = await said(talk, "Why does Rayleigh scattering paint the sky?")
    hits, total = await search(alice, "rayleigh")
    # The title is the first words of the question: it comes first.
    assert (total, [hit["message_id"] for hit in hits]) == (2, [None, str(question)])
    assert all(hit["conversation_id"] == str(talk.id) and marked(hit) == ["Rayleigh"] for hit in hits)
    assert (hits[0]["role"], hits[1]["role"]) == (None, "user")
    reply = (await talk.messages())[-1]
    words = reply["parts"][0]["text"].split()
    found, _ = await search(alice, f'"{words[0]} {words[1]}"')
    assert reply["id"] in {hit["message_id"] for hit in found}


@pytest.mark.parametrize(
    ("q", "finds"),
    [
        ("SKY", True), ("sca", True), ("scatter paint", False), ("paint scatter", True), ('"scattering paint"', True),
        ('"paint scattering"', False), ("sky -rayleigh", False), ("sky -ocean", True), ("ocean or rayleigh", True),
        ("rayle scattering", False), ("café", True), ("CAFE", True), ("example", True), ("me@example.com", True),
        ("москва", True), ("МОСК", True), ("d'été", True), ("2.5", True),
    ],
)  # fmt: skip
async def test_how_words_are_read(talk: Talk, alice: Account, q: str, finds: bool) -> None:
    await change(alice, talk.id, title="Something else")
    await said(talk, "Rayleigh scattering paint, sky; un Café d’Été d'été, me@example.com/path, Москва, 2.5")
    _, total = await search(alice, q)
    assert total == int(finds)


@pytest.mark.parametrize("q", ["-sky", "or", "!!!", "-", '""', " "])
async def test_what_names_no_word_finds_nothing(talk: Talk, alice: Account, q: str) -> None:
    await said(talk, "The sky or the sea")
    assert await search(alice, q) == ([], 0)


async def test_what_is_no_question_is_refused(alice: Account) -> None:
    for q in ("", "x" * 201, "a\x00b"):
        assert (await alice.http.get("/api/v1/search", params={"q": q})).status_code == 422
    assert (await alice.http.get("/api/v1/search")).status_code == 422


async def test_the_best_come_first_a_page_at_a_time(talk: Talk, alice: Account) -> None:
    await change(alice, talk.id, title="Something else")
    for text in ("one lighthouse", "lighthouse lighthouse lighthouse", "a lighthouse and many other words here"):
        await said(talk, text)
    hits, total = await search(alice, "lighthouse")
    assert total == 3
    assert hits[0]["snippet"] == "lighthouse lighthouse lighthouse"
    pages = [await search(alice, "lighthouse", page=page, per_page=1) for page in (1, 2, 3, 4)]
    assert [hit for page, _ in pages for hit in page] == hits
    assert [count for _, count in pages] == [3, 3, 3, 3]


async def test_a_running_reply_is_found_when_it_ends(talk: Talk, alice: Account) -> None:
    _, reply = await talk.send("deltas=300 rate=300 seed=5")
    part = await talk.when(reply, lambda message: bool(message["parts"]) and len(message["parts"][0]["text"]) > 60)
    phrase = '"' + " ".join(part["parts"][0]["text"].split()[1:4]) + '"'
    before, _ = await search(alice, phrase)
    assert str(reply) not in {hit["message_id"] for hit in before}
    await talk.ended(reply)
    after, _ = await search(alice, phrase)
    assert str(reply) in {hit["message_id"] for hit in after}


async def test_what_is_gone_is_not_found(talk: Talk, alice: Account, admin: asyncpg.Connection) -> None:
    await said(talk, "a very special ornithopter")
    assert (await search(alice, "ornithopter"))[1] == 2
    await change(alice, talk.id, title="Another title")
    assert (await search(alice, "ornithopter"))[1] == 1
    assert (await search(alice, "another"))[1] == 1
    await change(alice, talk.id, title=None)
    assert (await search(alice, "another"))[1] == 0
    await alice.http.delete(f"/api/v1/conversations/{talk.id}")
    assert await search(alice, "ornithopter") == ([], 0)
    assert await admin.fetchval("SELECT count(*) FROM search_entries") == 0


# -- marks -------------------------------------------------------------------------------------------------------------


async def test_nothing_of_a_snippet_is_markup_of_ours(talk: Talk, alice: Account) -> None:
    await said(talk, "<b>lantern</b> <script>alert(1)</script> &lt;lantern&gt;")
    hits, _ = await search(alice, "lantern")
    message = next(hit for hit in hits if hit["message_id"])
    assert message["snippet"] == "<b>lantern</b> <script>alert(1)</script> &lt;lantern&gt;"
    assert marked(message) == ["lantern", "lantern"]


def test_the_stretch_with_most_of_the_words_is_shown() -> None:
    text = "lamp " + "x " * 300 + "a lamp by the window " + "y " * 300
    snippet, marks = Words.of("window lamp").snippet(text)
    assert [snippet[a:b] for a, b in marks] == ["lamp", "window"]
    assert snippet.startswith("…")
    assert snippet.endswith("…")
    assert len(snippet) <= SNIPPET_LENGTH + 2


_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=600)


@given(text=_TEXTS, q=_TEXTS.map(lambda text: text[:200]))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_marks_are_places_of_the_snippet(text: str, q: str) -> None:
    words = Words.of(q)
    snippet, marks = words.snippet(text)
    last = 0
    for start, end in marks:
        assert last <= start < end <= len(snippet)
        last = end
    assert snippet.removeprefix("…").removesuffix("…") in text


# -- isolation ---------------------------------------------------------------------------------------------------------


async def test_another_workspace_and_anothers_private_conversation_are_as_if_they_were_not(
    talk: Talk, alice: Account, sign_up: SignUp, admin: asyncpg.Connection
) -> None:
    bob = await sign_up()
    carol = await join(admin, alice, await sign_up(), "admin")
    await said(talk, "the secret heliotrope")
    own = await start_talk(carol)
    await said(own, "a heliotrope of my own")
    mine = await search(carol, "heliotrope")
    assert mine[1] == 2
    assert {hit["conversation_id"] for hit in mine[0]} == {str(own.id)}
    assert await search(bob, "heliotrope") == ([], 0)
    # However much there is of others': order, ranks, totals and pages stay what they were.
    for _ in range(5):
        await said(talk, "heliotrope heliotrope heliotrope")
    assert await search(carol, "heliotrope") == mine
    assert await search(carol, "heliotrope", page=2) == ([], 2)
    assert await search(bob, "heliotrope", page=2) == ([], 0)


async def test_shared_ones_are_found_while_they_are_shared(
    talk: Talk, alice: Account, sign_up: SignUp, admin: asyncpg.Connection
) -> None:
    viewer = await join(admin, alice, await sign_up(), "viewer")
    stranger = await sign_up()
    await said(talk, "the open heliotrope")
    await change(alice, talk.id, shared=True)
    assert (await search(viewer, "heliotrope"))[1] == 2
    assert (await search(stranger, "heliotrope"))[1] == 0
    await change(alice, talk.id, shared=False)
    assert await search(viewer, "heliotrope") == ([], 0)


@pytest.fixture
async def bound(urls: DatabaseUrls, alice: Account) -> Any:
    """A connection of the app's role, bound to alice by whoever uses it."""
    connection = await asyncpg.connect(asyncpg_dsn(urls.app))
    yield connection
    await connection.close()


async def _bind(connection: asyncpg.Connection, workspace: UUID, user: UUID) -> None:
    await connection.execute(
        "SELECT set_config('app.workspace_id', $1, true), set_config('app.user_id', $2, true)",
        str(workspace), str(user),
    )  # fmt: skip


async def test_without_the_statements_conditions_the_policies_still_hold(
    talk: Talk, alice: Account, bob: Account, bound: asyncpg.Connection
) -> None:
    await said(talk, "the secret heliotrope")
    async with bound.transaction():
        await _bind(bound, bob.workspace_id, bob.user_id)
        # As bob, and asking for alice's.
        rows = await bound.fetch(repository._SEARCH, alice.workspace_id, alice.user_id, "heliotrope", False, 20, 0)
        assert [row["total"] for row in rows] == [0]
        assert await bound.fetchval("SELECT count(*) FROM search_entries") == 0
    async with bound.transaction():
        await _bind(bound, alice.workspace_id, alice.user_id)
        rows = await bound.fetch(repository._SEARCH, alice.workspace_id, alice.user_id, "heliotrope", False, 20, 0)
        assert rows[0]["total"] == 2


async def test_under_row_level_security_the_entries_are_found_by_an_index(
    alice: Account, admin: asyncpg.Connection, bound: asyncpg.Connection
) -> None:
    """Entries of other workspaces and conversations are not even read: the time tells nothing of them."""
    await admin.execute(
        """
        INSERT INTO workspaces (id, name, personal) SELECT gen_random_uuid(), 'W', true FROM generate_series(1, 30);
        INSERT INTO conversations (workspace_id, id, owner_id, assistant, shared, archived)
            SELECT w.id, gen_random_uuid(), gen_random_uuid(), 'general', false, false
            FROM workspaces w, generate_series(1, 5);
        INSERT INTO search_entries (workspace_id, conversation_id, id, tsv)
            SELECT workspace_id, id, gen_random_uuid(), to_tsvector('simple', 'heliotrope number ' || n)
            FROM conversations, generate_series(1, 40) n
        """
    )
    await admin.execute("ANALYZE conversations, search_entries")
    async with bound.transaction():
        await _bind(bound, alice.workspace_id, alice.user_id)
        plan = "\n".join(
            row[0]
            for row in await bound.fetch(
                "EXPLAIN " + repository._SEARCH, alice.workspace_id, alice.user_id, "heliotrope", False, 20, 0
            )
        )
    assert "pk_search_entries" in plan, plan
    assert "Seq Scan on search_entries" not in plan, plan


@pytest.fixture
def ask(bound: asyncpg.Connection, alice: Account) -> Callable[[str], Awaitable[int]]:
    async def total(q: str) -> int:
        words = Words.of(q)
        async with bound.transaction():
            await _bind(bound, alice.workspace_id, alice.user_id)
            rows = await bound.fetch(
                repository._SEARCH, alice.workspace_id, alice.user_id, words.query, words.last_goes_on, 1, 0
            )
        return int(rows[0]["total"])

    return total


async def test_no_question_is_an_error(alice: Account, ask: Callable[[str], Awaitable[int]]) -> None:
    pieces = ['"', "-", "or", "a", "b-c", ":*", "&", "|", "!", "(", ")", "<->", "'", "\\", "–", "ж", "İ", "\u0301", " "]
    for several in itertools.product(pieces, repeat=3):
        for joint in ("", " "):
            assert await ask(joint.join(several)) == 0


async def test_the_database_folds_as_we_do(admin: asyncpg.Connection) -> None:
    for text in ("Café", "ÀÉÎÕÜ", "Москва Ёлка", "Ελλάδα", "ﬁne", "Ａ", "straße", "日本語", "plain"):
        assert (await admin.fetchval("SELECT search_fold($1)", text)) == fold(text), text


async def test_an_entry_of_another_workspaces_conversation_cannot_be_written(
    talk: Talk, bob: Account, bound: asyncpg.Connection
) -> None:
    async with bound.transaction():
        await _bind(bound, bob.workspace_id, bob.user_id)
        with pytest.raises(asyncpg.ForeignKeyViolationError):
            await bound.execute(
                "INSERT INTO search_entries (workspace_id, conversation_id, id, tsv) VALUES ($1, $2, $3, 'x')",
                bob.workspace_id, talk.id, new_id(),
            )  # fmt: skip
