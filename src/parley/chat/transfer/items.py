"""Takes an uploaded file apart, one conversation at a time, however large the file is.

JSON is not parsed as a whole: the elements of its outermost array are found by their brackets, and each is parsed
alone. So memory is bounded by one element, and an element that is broken breaks no other.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any, Final

import orjson

from parley.chat.transfer.errors import NotAnExport

ITEM_BYTES: Final = 32 * 1024 * 1024
"""The largest conversation that is taken."""
UNPACKED_BYTES: Final = 1024**3
"""How much is unpacked of a ZIP: beyond that it is meant to do harm."""
FILE_BYTES: Final = 16 * 1024 * 1024
"""The largest file beside the conversations that is read."""
ITEMS: Final = 100_000
TOKENS: Final = 1_000_000
"""How many brackets and strings a conversation may have: parsed, each takes more memory than it is long."""

_READ_BYTES: Final = 64 * 1024
_DIRECTORY_BYTES: Final = 8 * 1024 * 1024
_FILE: Final = re.compile(r"(?:^|/)(file[-_][A-Za-z0-9]+)[^/]*$")
_ENTRY: Final = re.compile(r"(?:^|/)conversations[^/]*\.json$", re.IGNORECASE)
_MARK: Final = re.compile(rb'["{}\[\]]')
# The rest of a string, as far as it has come. Possessive: what has been passed over is not looked at again.
_REST: Final = re.compile(rb'(?:[^"\\]++|\\.)*+("?)', re.DOTALL)
_SPACE: Final = b" \t\r\n"
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Item:
    """An element of the file: parsed, or why not. None stands for a moment to give way: nothing was found yet."""

    number: int
    value: Any = None
    problem: str | None = None
    beside: "Beside | None" = None


class Beside:
    """The files that stand in a ZIP beside its conversations, by the ids that ChatGPT gives them."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._room = UNPACKED_BYTES
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in archive.infolist():
            if (found := _FILE.search(entry.filename)) is not None:
                self._entries.setdefault(found[1], entry)

    def name(self, id: str) -> str | None:
        """Return the name of a file, None where it is not there."""
        entry = self._entries.get(id)
        return entry.filename.rpartition("/")[2] if entry is not None else None

    def read(self, id: str) -> bytes | None:
        """Return a file's bytes while the ZIP is being read; None where it is too large or broken."""
        entry = self._entries.get(id)
        if entry is None or entry.file_size > min(FILE_BYTES, self._room):
            return None
        try:
            with self._archive.open(entry) as inside:
                data = _Bounded(inside, FILE_BYTES).read(FILE_BYTES + 1)
        except (NotAnExport, zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
            return None
        self._room -= len(data)
        return data


def read_items(file: IO[bytes]) -> Iterator[Item | None]:
    """Yield the conversations of a file, JSON or ZIP, and None after every few milliseconds of work.

    Raises `NotAnExport` for a file that is neither, or that is meant to do harm.
    """
    head = file.read(4)
    file.seek(0)
    if head[:2] != b"PK":
        yield from _elements(file, first=0)
        return
    number = 0
    with _archive(file) as archive:
        unpacked, beside = 0, Beside(archive)
        for entry in _entries(archive):
            with archive.open(entry) as inside:
                bounded = _Bounded(inside, UNPACKED_BYTES - unpacked)
                for item in _elements(bounded, first=number):
                    yield item if item is None else replace(item, beside=beside)
                    number = number if item is None else item.number + 1
                unpacked += bounded.taken


class _Bounded(io.RawIOBase):
    """Reads what is unpacked, and stops where it becomes too much."""

    def __init__(self, inner: IO[bytes], limit: int) -> None:
        self._inner = inner
        self._limit = limit
        self.taken = 0

    def read(self, size: int = -1, /) -> bytes:
        try:
            data = self._inner.read(size)
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
            raise NotAnExport("The ZIP cannot be read.") from error
        except Exception as error:
            # zlib's own error is no public name's subclass of the above.
            raise NotAnExport("The ZIP is damaged.") from error
        self.taken += len(data)
        if self.taken > self._limit:
            raise NotAnExport("The ZIP unpacks to more than is taken.")
        return data


def _archive(file: IO[bytes]) -> zipfile.ZipFile:
    size = file.seek(0, io.SEEK_END)
    start = max(size - 66_000, 0)
    file.seek(start)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    # The directory is read as a whole: a small file can hold one of a million entries.
    directory = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    if end < 0 or directory > _DIRECTORY_BYTES or tail[max(end - 20, 0) : end].startswith(b"PK\x06\x07"):
        raise NotAnExport("The ZIP cannot be read, or has too many files.")
    file.seek(0)
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise NotAnExport("The ZIP cannot be read.") from error


def _entries(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    files = [entry for entry in archive.infolist() if not entry.is_dir() and "__MACOSX" not in entry.filename]
    found = [entry for entry in files if _ENTRY.search(entry.filename)]
    found = found or [entry for entry in files if entry.filename.lower().endswith(".json")]
    if not found:
        raise NotAnExport
    for entry in found:
        if entry.flag_bits & 0x1:
            raise NotAnExport("The ZIP is encrypted.")
        if entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise NotAnExport("The ZIP is packed in a way that is not taken.")
    return sorted(found, key=lambda entry: entry.filename)


class _Scanner:
    """Finds where the elements of the outermost array begin and end; where there is none, the outermost objects."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._in_string = False
        self._depth = 0
        self._outer: int | None = None
        self._start: int | None = None
        self._tokens = 0
        self._skipping = False
        """The element is larger than is taken: its end is looked for, its bytes are dropped."""

    @property
    def inside(self) -> bool:
        """Whether something has begun that has not ended."""
        return self._depth > 0

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """Yield the elements that end in what has come, None for one that is too large."""
        self._buffer += data
        while True:
            if self._in_string:
                rest = _REST.match(self._buffer, self._at)
                assert rest is not None
                self._at = rest.end()
                if not rest[1]:
                    break
                self._in_string = False
            found = _MARK.search(self._buffer, self._at)
            if found is None:
                self._at = len(self._buffer)
                break
            self._at = found.end()
            self._tokens += 1
            if found[0] == b'"':
                self._in_string = True
            elif found[0] in b"[{":
                self._open(found.start())
            elif self._close():
                yield self._element()
        self._forget()

    def _open(self, at: int) -> None:
        if self._outer is None:
            self._outer = 1 if self._buffer[at : at + 1] == b"[" else 0
        if self._depth == self._outer:
            self._start, self._tokens = at, 0
        self._depth += 1

    def _close(self) -> bool:
        """Return whether an element ends here."""
        self._depth -= 1
        if self._depth < 0:
            raise NotAnExport
        return self._depth == self._outer and (self._start is not None or self._skipping)

    def _element(self) -> bytes | None:
        whole = None if self._skipping or self._tokens > TOKENS else bytes(self._buffer[self._start : self._at])
        self._start, self._skipping = None, False
        return whole

    def _forget(self) -> None:
        """Drop what is done with. What is left is at most one element and a read."""
        if self._start is not None and self._at - self._start > ITEM_BYTES:
            self._start, self._skipping = None, True
        if self._start is None:
            del self._buffer[: self._at]
            self._at = 0
        elif self._start > _READ_BYTES:
            del self._buffer[: self._start]
            self._at -= self._start
            self._start = 0


def _elements(file: IO[bytes] | _Bounded, *, first: int) -> Iterator[Item | None]:
    scanner, number = _Scanner(), first
    data = file.read(_READ_BYTES).removeprefix(_BOM)
    if not data.lstrip(_SPACE)[:1] or data.lstrip(_SPACE)[:1] not in b"[{":
        raise NotAnExport
    while data:
        for found in scanner.feed(data):
            yield _parsed(number, found)
            number += 1
            if number > ITEMS:
                raise NotAnExport("The file has more conversations than are taken.")
        yield None
        data = file.read(_READ_BYTES)
    if scanner.inside:
        yield Item(number, problem="The file ends in the middle of it.")


def _parsed(number: int, data: bytes | None) -> Item:
    if data is None:
        return Item(number, problem="It is larger than is taken.")
    try:
        return Item(number, orjson.loads(data))
    except orjson.JSONDecodeError:
        pass
    try:
        # Half surrogates, which other products' exports can hold, and numbers that are none.
        value = json.loads(data, parse_constant=lambda _: None)
        return Item(number, orjson.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace")))
    except (ValueError, RecursionError):
        return Item(number, problem="It is not valid JSON.")
