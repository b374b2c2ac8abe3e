"""What a terminal shows of a reply, and where it keeps a session."""

import asyncio
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from parley.client import Tokens
from parley.client.session_file import SessionFile, session_path
from parley.client.terminal import LineReader, Screen
from parley.client.view import ReplyView
from tests.client.author import Author, message, steps


class Tty(io.StringIO):
    """A screen that a person looks at."""

    def isatty(self) -> bool:
        return True


def shown(*states: list[dict[str, Any]], tty: bool = False) -> tuple[str, str]:
    out, err = (Tty(), Tty()) if tty else (io.StringIO(), io.StringIO())
    view = ReplyView(Screen(out, err, colours=False))
    for parts in states:
        view.show(message("r", "assistant", "streaming", parts, None))
    return out.getvalue(), err.getvalue()


def text(value: str, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": value}


def tool(state: str, output: Any = None) -> dict[str, Any]:
    return {
        "type": "tool",
        "call": "c1",
        "name": "add_task",
        "state": state,
        "input": {"title": "mïlk"},
        "output": output,
    }


def test_text_is_shown_once_however_often_the_state_comes() -> None:
    assert shown([], [text("")], [text("a")], [text("a")], [text("abc")])[0] == "abc"


def test_tools_have_lines_of_their_own() -> None:
    out, _ = shown(
        [text("Well")],
        [text("Well"), tool("input") | {"call": None}],
        [text("Well"), tool("input")],
        [text("Well"), tool("running")],
        [text("Well"), tool("done", {"id": 1})],
        [text("Well"), tool("done", {"id": 1}), text("Done.")],
    )
    assert out == 'Well\n→ add_task {"title": "mïlk"}\n✓\nDone.'
    assert shown([tool("done")])[0] == '→ add_task {"title": "mïlk"}\n✓\n', "all at once, as after a resume"
    assert shown([tool("failed", {"error": "no such task"})])[0].endswith("✗ no such task\n")
    assert shown([tool("input") | {"input": {"t": "x" * 500}}])[0].endswith("x…\n")


def test_a_tool_that_ends_after_the_text_went_on() -> None:
    out, _ = shown([tool("running"), text("a")], [tool("done"), text("a")], [tool("done"), text("ab")])
    assert out == '→ add_task {"title": "mïlk"}\na\n✓\nb'


def test_reasoning_is_for_a_person() -> None:
    parts = [text("hm ", "reasoning"), text("blue")]
    assert shown(parts)[0] == "blue"
    assert shown(parts, tty=True)[0] == "hm blue"


def test_a_reset_is_told_and_the_text_goes_on_from_there() -> None:
    out, err = shown([text("abc")], [text("a")], [text("axy")])
    assert (out, err) == ("abc\nxy", "… the reply goes on from an earlier point\n")
    out, _ = shown([text("a"), tool("done"), text("b")], [text("a")], [text("a"), text("c")])
    assert out.endswith("b\nc")
    assert shown([text("abc")], [], [text("z")])[0] == "abc\nz"


def test_a_reply_that_another_process_writes_on_is_told() -> None:
    out, err = io.StringIO(), io.StringIO()
    view = ReplyView(Screen(out, err, colours=False))
    resumed = {"reply": "r", "attempt": 2, "model": "other", "strategy": "restart"}
    view.resumed(resumed)
    assert err.getvalue() == "", "nothing of it was to be seen"
    for strategy, part in (("reattach", "a"), ("prefill", "ab"), ("fallback", "abc")):
        view.show(message("r", "assistant", "streaming", [text(part)], None))
        view.resumed({**resumed, "strategy": strategy})
    view.show(message("r", "assistant", "streaming", [text("abcd")], None))
    assert out.getvalue() == "abcd", "the text stays as it is"
    assert err.getvalue().splitlines() == ["… the reply goes on"] * 2 + ["… the reply goes on with other"]


def test_a_model_does_not_steer_the_terminal() -> None:
    nasty = "a\x1b[2Jb\x07\tc\nd\x9b1m"
    assert shown([text(nasty)], tty=True)[0] == "a[2Jb\tc\nd1m"
    assert shown([text(nasty)])[0] == nasty, "a pipe gets what was said"


def test_notes_leave_a_pipe_as_it_is() -> None:
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(out, err)
    screen.text("half")
    screen.note("lost")
    screen.text(" whole")
    assert (out.getvalue(), err.getvalue()) == ("half whole", "lost\n")
    tty = Tty()
    screen = Screen(tty, tty, colours=True)
    screen.text("half")
    screen.note("lost")
    screen.text("dim", dim=True)
    screen.prompt("> ")
    assert tty.getvalue() == "half\n\x1b[2mlost\x1b[0m\n\x1b[2mdim\x1b[0m\n> "


@given(steps)
@hypothesis_settings(deadline=None, max_examples=100)
def test_what_is_shown_is_the_text(todo: list[tuple[Any, ...]]) -> None:
    """With only text and no resets, a pipe holds exactly the visible text of the reply."""
    author = Author()
    reply = author.ask()
    author.write([step for step in todo if step[0] in {"delta", "part"}])
    out = io.StringIO()
    view = ReplyView(Screen(out, io.StringIO()))
    for state in author.states:
        for found in state["messages"]:
            if found["id"] == reply:
                view.show(found)
    parts = author.state["messages"][1]["parts"]
    assert out.getvalue() == "".join(part["text"] for part in parts if part["type"] == "text")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        try:
            os.close(fd)
        except OSError:
            continue


async def test_lines_come_as_they_are_written(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    lines = LineReader(reading)
    waiting = asyncio.create_task(lines.line())
    os.write(writing, "grü".encode()[:-1])
    await asyncio.sleep(0)
    os.write(writing, "grü".encode()[-1:] + b"n\r\n\nlast")
    assert await waiting == "grün"
    assert await lines.line() == ""
    os.close(writing)
    assert [await lines.line(), await lines.line(), await lines.line()] == ["last", None, None]


async def test_lines_of_a_file_and_of_nothing(tmp_path: Path) -> None:
    file = tmp_path / "in"
    file.write_bytes(b"one\ntwo\xff")
    with file.open("rb") as opened:
        lines = LineReader(opened.fileno())
        assert [await lines.line(), await lines.line(), await lines.line()] == [
            "one",
            "two\N{REPLACEMENT CHARACTER}",
            None,
        ]
    assert await LineReader(None).line() is None


@given(st.lists(st.binary(max_size=20), max_size=5))
@hypothesis_settings(deadline=None, max_examples=30)
def test_lines_are_the_lines(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)

    async def read() -> list[str]:
        reading, writing = os.pipe()
        os.write(writing, whole)
        os.close(writing)
        lines, reader = [], LineReader(reading)
        while (line := await reader.line()) is not None:
            lines.append(line)
        os.close(reading)
        return lines

    expected = whole.decode(errors="replace").split("\n")
    expected = [line.rstrip("\r") for line in expected[:-1]] + ([expected[-1]] if expected[-1] else [])
    assert asyncio.run(read()) == expected


def test_a_session_is_private_and_of_one_server(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    path = session_path("http://localhost:3000", environ)
    assert path == tmp_path / "parley" / "session-localhost_3000.json"
    assert session_path("https://parley.example/", {"HOME": "/home/a"}) == Path(
        "/home/a/.config/parley/session-parley.example.json"
    )
    assert ".." not in session_path("http://../../x", environ).name.replace("session-..", "")
    file = SessionFile(path)
    assert file.load() is None
    tokens = Tokens("a", "r", 12.5, {"email": "a@example.com"}, {"id": "w"})
    file.save(tokens)
    file.save(tokens)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert file.load() == tokens
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    path.write_text("{")
    assert file.load() is None
    file.save(None)
    file.save(None)
    assert not path.exists()
