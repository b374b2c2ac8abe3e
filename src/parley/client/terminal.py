"""A terminal for the asyncio loop: lines in without a thread, text out with colours where a person looks."""

import asyncio
import os
from typing import TextIO

_CONTROLS = dict.fromkeys([*range(32), *range(127, 160)])
del _CONTROLS[ord("\n")], _CONTROLS[ord("\t")]
_READ_BYTES = 64 * 1024


class LineReader:
    """Reads lines from a file descriptor: a terminal, a pipe, a file."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._buffer = b""
        self._ended = fd is None

    async def line(self) -> str | None:
        """Return the next line without its end, or None at the end of the input."""
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                return line.decode(errors="replace").rstrip("\r")
            if self._ended:
                self._buffer = b""
                return line.decode(errors="replace") if line else None
            chunk = await self._read()
            self._ended = not chunk
            self._buffer += chunk

    async def _read(self) -> bytes:
        assert self._fd is not None
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        try:
            loop.add_reader(self._fd, readable.set)
        except PermissionError:
            # A regular file: there is nothing to wait for.
            return os.read(self._fd, _READ_BYTES)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._fd)
        try:
            return os.read(self._fd, _READ_BYTES)
        except OSError:
            return b""  # a terminal that was closed


class Screen:
    """Writes answers to `out` and notes to `err`. Colours and notes inside a line are for terminals only."""

    def __init__(self, out: TextIO, err: TextIO, *, colours: bool | None = None) -> None:
        self._out = out
        self._err = err
        self.is_terminal = out.isatty()
        self._colours = self.is_terminal and "NO_COLOR" not in os.environ if colours is None else colours
        self._in_line = False

    def text(self, text: str, *, dim: bool = False) -> None:
        """Write text as it comes. What a model writes does not steer the terminal."""
        if not text:
            return
        if self.is_terminal:
            text = text.translate(_CONTROLS)
        self._out.write(self._dimmed(text) if dim else text)
        self._out.flush()
        self._in_line = not text.endswith("\n")

    def line(self, text: str = "", *, dim: bool = False) -> None:
        """Write a line of its own."""
        self.end_line()
        self.text(text, dim=dim)
        self._out.write("\n")
        self._out.flush()
        self._in_line = False

    def end_line(self) -> None:
        """End the line that text was written to, if there is one."""
        if self._in_line:
            self._out.write("\n")
            self._out.flush()
            self._in_line = False

    def note(self, text: str) -> None:
        """Write about the conversation, not of it. A pipe's output stays as it is."""
        if self.is_terminal:
            self.end_line()
        self._err.write((self._dimmed(text) if self._err.isatty() else text) + "\n")
        self._err.flush()

    def prompt(self, text: str) -> None:
        """Ask for a line."""
        self.end_line()
        self._out.write(text)
        self._out.flush()

    def _dimmed(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self._colours else text
