"""`parley chat` as people and scripts run it: a process with a pipe or a terminal, against a real server."""

import asyncio
import os
import pty
import re
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from parley.core.settings import Settings
from tests.client.relay import Relay
from tests.live import live

pytestmark = pytest.mark.process

PASSWORD = "correct horse 1"
DEADLINE_S = 30
DEMO = "I am Parley's demo model: no provider is configured. You said: "


@dataclass
class Command:
    """Runs the command for one person."""

    url: str
    home: Path
    environ: dict[str, str] = field(default_factory=dict)

    def arguments(self, *more: str) -> list[str]:
        return [sys.executable, "-m", "parley.cli", "chat", "--server", self.url, *more]

    def environment(self) -> dict[str, str]:
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL", "PYTHONPATH") if key in os.environ}
        return {**kept, "HOME": str(self.home), "PYTHONIOENCODING": "utf-8", "TERM": "xterm", **self.environ}

    async def start(self, *more: str) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            *self.arguments(*more), stdin=pipe, stdout=pipe, stderr=pipe, env=self.environment(), cwd=self.home
        )

    async def run(self, *more: str, said: str = "") -> tuple[int, str, str]:
        """Run it to its end; returns its exit code, output and errors."""
        process = await self.start(*more)
        async with asyncio.timeout(DEADLINE_S):
            out, err = await process.communicate(said.encode())
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def signed_up(self) -> "Command":
        self.environ["PARLEY_PASSWORD"] = PASSWORD
        code, _, err = await self.run("--sign-up", "--email", "ann@example.com")
        assert code == 0, err
        return self


@pytest.fixture
async def relay(settings: Settings) -> AsyncIterator[Relay]:
    async with live(settings) as server, Relay.to(server.port) as made:
        yield made


@pytest.fixture
def command(relay: Relay, tmp_path: Path) -> Command:
    return Command(relay.url, tmp_path)


async def read_until(stream: asyncio.StreamReader, wanted: str) -> str:
    """Read up to some text."""
    text = ""
    async with asyncio.timeout(DEADLINE_S):
        while wanted not in text:
            data = await stream.read(4096)
            assert data, f"it ended after {text!r}"
            text += data.decode()
    return text


async def test_a_script_talks_line_by_line(command: Command) -> None:
    command.environ["PARLEY_PASSWORD"] = PASSWORD
    said = "hello there\n\nadd task buy milk\n/model demo\n/nope\n/list\nrepeat 3 w"
    code, out, err = await command.run("--sign-up", "--email", "ann@example.com", said=said)
    assert code == 0, err
    assert out == (
        f'{DEMO}hello there\n→ add_task {{"title": "buy milk"}}\n✓\nDone: added the task "buy milk".\n'
        " 1* hello there\nw1 w2 w3\n"
    )
    assert err == "answers come from demo from now on\nthere is no /nope; /help lists what there is\n"


async def test_messages_can_be_arguments_and_the_session_is_kept(command: Command) -> None:
    await command.signed_up()
    [session] = (command.home / ".config" / "parley").iterdir()
    assert stat.S_IMODE(session.stat().st_mode) == 0o600
    del command.environ["PARLEY_PASSWORD"]
    code, out, err = await command.run("-m", "one", "--message", "two", "--model", "demo")
    assert (code, out, err) == (0, f"{DEMO}one\n{DEMO}two\n", "")
    code, out, err = await command.run("-m", "x", "--model", "no-such-model")
    assert (code, out) == (2, "")
    assert err.startswith("parley: ")
    code, out, err = await command.run(said="/model no-such-model\nhello\n/model demo\nhello\n")
    assert (code, out) == (0, f"{DEMO}hello\n"), "what is refused does not end it"
    assert "not sent: " in err


async def test_a_conversation_goes_on(command: Command, relay: Relay) -> None:
    await command.signed_up()
    from parley.client import ParleyHTTP

    async with ParleyHTTP(relay.url) as http:
        await http.sign_in("ann@example.com", PASSWORD)
        id_ = (await http.create_conversation())["id"]
        for text in ("one", "two"):
            code, _, err = await command.run("--conversation", id_, said=f"{text}\n")
            assert code == 0, err
        messages, _ = await http.list_messages(id_)
    assert [message["parts"][0]["text"] for message in messages if message["role"] == "user"] == ["one", "two"]


async def test_a_message_larger_than_a_frame(command: Command) -> None:
    await command.signed_up()
    code, out, err = await command.run(said="😀" * 30_000 + "\n")
    assert (code, err) == (0, "")
    assert out.startswith(DEMO + "😀")


async def test_what_goes_wrong_is_said(command: Command) -> None:
    code, out, err = await command.run(said="hello\n")
    assert (code, out) == (2, "")
    assert "not signed in" in err
    await command.signed_up()
    code, _, err = await command.run("--sign-up", "--email", "ann@example.com")
    assert code == 2
    assert "Leave out --sign-up" in err
    code, _, err = await command.run("--conversation", "0193c0de-0000-7000-8000-000000000000", "-m", "x")
    assert (code, err) == (2, "parley: No such conversation.\n")
    command.environ["PARLEY_PASSWORD"] = "wrong horse 2"
    code, _, err = await command.run("--no-save", "--email", "ann@example.com", "-m", "x")
    assert code == 2
    assert "Traceback" not in err
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code, _, err = await command.run("--server", f"http://127.0.0.1:{port}", "-m", "x", "--email", "a@example.com")
    assert code == 2
    assert f"http://127.0.0.1:{port} does not answer" in err
    assert "Is it running?" in err


async def test_a_connection_that_breaks_loses_and_repeats_nothing(command: Command, relay: Relay) -> None:
    await command.signed_up()
    process = await command.start("-m", "repeat 150 word")
    assert process.stdout is not None
    assert process.stderr is not None
    out = await read_until(process.stdout, "word20")
    relay.cut()
    err = await read_until(process.stderr, "reconnected")
    out += await read_until(process.stdout, "word60")
    relay.cut()
    async with asyncio.timeout(DEADLINE_S):
        rest, errors = await process.communicate()
    assert out + rest.decode() == " ".join(f"word{n}" for n in range(1, 151)) + "\n"
    told = (err + errors.decode()).splitlines()
    assert told[::2] == ["… connection lost, reconnecting"] * 2
    positions = [re.fullmatch(r"✓ reconnected, resumed at (\d+)", line) for line in told[1::2]]
    first, second = (int(match[1]) for match in positions if match)
    assert first < second
    assert process.returncode == 0


async def test_ctrl_c_stops_the_reply(command: Command) -> None:
    await command.signed_up()
    process = await command.start()
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"repeat 3000 word\n")
    await read_until(process.stdout, "word5")
    process.send_signal(signal.SIGINT)
    assert await read_until(process.stderr, "stopped") == "stopped\n"
    process.stdin.write(b"are you there?\n")
    await read_until(process.stdout, f"{DEMO}are you there?")
    process.stdin.close()
    async with asyncio.timeout(DEADLINE_S):
        assert await process.wait() == 0


async def test_the_last_reply_is_continued_and_made_anew(command: Command, relay: Relay) -> None:
    await command.signed_up()
    code, out, err = await command.run(said="/retry\n/continue\nhello\n/retry\n")
    assert (code, out, err) == (0, f"{DEMO}hello\n{DEMO}hello\n", "there is no reply yet\n" * 2)
    process = await command.start()
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"repeat 3000 word\n")
    out = await read_until(process.stdout, "word5")
    process.send_signal(signal.SIGINT)
    await read_until(process.stderr, "stopped")
    process.stdin.write(b"/continue\n")
    out += await read_until(process.stdout, "\n")
    out += await read_until(process.stdout, "word")
    process.send_signal(signal.SIGINT)
    assert (await read_until(process.stderr, "stopped")).strip() == "stopped", "a reply like any other"
    process.stdin.close()
    async with asyncio.timeout(DEADLINE_S):
        assert await process.wait() == 0
    assert out.startswith("word1 word2 word3")


class Terminal:
    """A person's end of a terminal."""

    def __init__(self, fd: int, process: asyncio.subprocess.Process) -> None:
        self._fd = fd
        self.process = process

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    async def shows(self, wanted: str) -> str:
        """Read until the screen has shown some text."""
        text = ""
        readable = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._fd, readable.set)
        try:
            async with asyncio.timeout(DEADLINE_S):
                while wanted not in text:
                    await readable.wait()
                    readable.clear()
                    with suppress(BlockingIOError):
                        text += os.read(self._fd, 4096).decode(errors="replace")
        except (TimeoutError, OSError) as error:
            raise AssertionError(f"{wanted!r} is not in {text!r}") from error
        finally:
            loop.remove_reader(self._fd)
        return text


@asynccontextmanager
async def terminal(command: Command, *more: str) -> AsyncIterator[Terminal]:
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *command.arguments(*more),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=command.environment(),
        cwd=command.home,
        start_new_session=True,
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        yield Terminal(ours, process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)


async def test_a_person_at_a_terminal(command: Command) -> None:
    command.environ["PARLEY_EMAIL"] = "ann@example.com"
    async with terminal(command, "--sign-up") as screen:
        await screen.shows("Password: ")  # its last space comes when the echo is off
        screen.type(PASSWORD + "\n")
        text = await screen.shows("> ")
        assert PASSWORD not in text
        screen.type("add task buy milk\n")
        text = await screen.shows("\n> ")
        assert '\x1b[2m→ add_task {"title": "buy milk"}\x1b[0m' in text
        screen.type("repeat 3000 word\n")
        await screen.shows("word5")
        screen.process.send_signal(signal.SIGINT)
        await screen.shows("stopped")
        screen.type("/quit\n")
        async with asyncio.timeout(DEADLINE_S):
            assert await screen.process.wait() == 0
    async with terminal(command) as screen:
        await screen.shows("Enter for a new one: ")
        screen.type("1\n")
        text = await screen.shows("\n> ")
        assert "> add task buy milk" in text, "what was said before is shown"
        screen.type("/help\n")
        await screen.shows("/quit")
        screen.type("/new\n/list\n")
        await screen.shows(" 2  add task buy milk")
        screen.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(DEADLINE_S):
            assert await screen.process.wait() == 0
