"""What the command prints, and what it never prints."""

import io
import json
import re
from pathlib import Path

import pytest

from parley.conformance.catalogue import SECTIONS
from parley.conformance.command import base_url, main
from parley.conformance.errors import CannotStart, Skipped, require
from parley.conformance.report import Report
from parley.conformance.runner import Result, chosen
from parley.conformance.section import Check, Section
from parley.conformance.transcript import Transcript, show

CHECKS = chosen(SECTIONS, [])
ROOT = Path(__file__).parents[2]


def test_every_check_has_a_name_of_its_own_and_a_sentence() -> None:
    ids = [check.id for check in CHECKS]
    assert len(set(ids)) == len(ids)
    for check in CHECKS:
        assert re.fullmatch(r"[a-z]+\.[a-z0-9_]+", check.id)
        assert re.fullmatch(r"\S.*\.", check.says), check.id
        assert "\n" not in check.says


def test_every_section_of_the_list_has_checks() -> None:
    names = [section.name for section in SECTIONS]
    assert names == [
        "handshake", "frames", "subscribe", "resume", "merging", "idempotency", "queueing", "cancel", "again",
        "termination", "limits", "acks", "heartbeat", "credentials", "isolation",
    ]  # fmt: skip
    assert all(section.checks for section in SECTIONS)


@pytest.mark.parametrize(
    ("patterns", "ids"),
    [
        (["heartbeat"], {"heartbeat.clients_heartbeat_is_taken", "heartbeat.tells_the_heads"}),
        (["acks.no_ack_is_4002"], {"acks.no_ack_is_4002"}),
        (["*.tells_the_heads", "no_ack"], {"heartbeat.tells_the_heads", "acks.no_ack_is_4002"}),
        (["nothing like that"], set()),
    ],
)
def test_a_pattern_names_checks(patterns: list[str], ids: set[str]) -> None:
    assert {check.id for check in chosen(SECTIONS, patterns)} == ids


def test_a_sections_name_means_that_section_only() -> None:
    assert {check.section for check in chosen(SECTIONS, ["frames"])} == {"frames"}


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [check.id for check in CHECKS]


def test_without_a_server_there_is_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["http://x", "--only", "nothing like that"]) == 2
    assert main(["ftp://x"]) == 2
    assert main(["http://x", "--email", "me@example.com"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert "which server" in said[0]
    assert "belong together" in said[3]


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("localhost:3000", "http://localhost:3000"),
        ("http://localhost:3000/", "http://localhost:3000"),
        ("https://chat.example.com/api/v1/", "https://chat.example.com"),
        ("https://example.com/chat", "https://example.com/chat"),
    ],
)
def test_an_address_may_be_written_in_many_ways(given: str, url: str) -> None:
    assert base_url(given) == url


@pytest.mark.parametrize("given", ["ws://x", "http://", ""])
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(CannotStart):
        base_url(given)


# -- the report ----------------------------------------------------------------------------------------------------


async def _nothing(_: object) -> None:
    """Nothing is checked."""


def _results() -> list[Result]:
    def check(name: str) -> Check:
        return Check("cancel", name, f"It is {name}.", _nothing)

    return [
        Result(check("fine"), "ok", 12),
        Result(check("wrong"), "FAILED", 34, "it came twice", ['{"t":"ev"}'], ["first line", "second line"]),
        Result(check("elsewhere"), "skipped", 0, "takes long: --slow runs it"),
    ]


def test_a_line_for_each_check_and_the_reason_in_words() -> None:
    out = io.StringIO()
    report = Report(out)
    for result in _results():
        report.result(result)
    report.summary(_results(), seconds=1.25, url="http://x")
    text = out.getvalue()
    assert "ok       cancel       fine  (12 ms)\n" in text
    assert "FAILED   cancel       wrong  (34 ms)\n" in text
    assert "but: it came twice\n" in text
    assert '{"t":"ev"}' in text
    assert "skipped  cancel       elsewhere  (0 ms)\n" in text
    assert "http://x: 1 ok, 1 failed, 1 skipped in 1.2 s\n  cancel.wrong: it came twice\n" in text
    assert "first line" not in text


def test_verbose_shows_all_that_was_said() -> None:
    out = io.StringIO()
    Report(out, verbose=True).result(_results()[1])
    assert "first line\n" in out.getvalue()
    assert "second line\n" in out.getvalue()


def test_json_for_machines() -> None:
    out = io.StringIO()
    Report(out).json(_results(), seconds=1.25, url="http://x")
    document = json.loads(out.getvalue())
    assert (document["ok"], document["failed"], document["skipped"]) == (1, 1, 1)
    assert document["checks"][1] == {
        "id": "cancel.wrong", "says": "It is wrong.", "outcome": "failed", "ms": 34, "reason": "it came twice",
        "frames": ['{"t":"ev"}'],
    }  # fmt: skip


def test_no_credential_is_ever_shown() -> None:
    secret = "eyJhbGciOiJIUzI1NiJ9.e30.xyz"
    transcript = Transcript()
    transcript.sent("socket 1", {"t": "hello", "v": 1, "auth": {"token": secret}})
    transcript.received("http", {"ticket": secret, "t": "x"})
    transcript.sent("socket 1", {"t": "auth", "id": 1, "auth": {"api_key": secret}})
    assert len(transcript.lines) == 3
    assert secret not in "\n".join(transcript.lines)
    assert secret not in show({"auth": {"token": secret}})


def test_long_frames_are_cut() -> None:
    assert len(show({"x": "y" * 10_000})) < 500


def test_require_and_skip() -> None:
    section = Section("acks")

    @section.check(slow=True)
    async def a_thing(_: object) -> None:
        """It holds."""
        raise Skipped("not here")

    assert [(check.id, check.says, check.slow) for check in section.checks] == [("acks.a_thing", "It holds.", True)]
    require(1, "fine")


def test_the_page_names_every_section() -> None:
    page = (ROOT / "docs" / "conformance.md").read_text()
    for section in SECTIONS:
        assert f"| `{section.name}` |" in page
