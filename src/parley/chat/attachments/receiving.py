"""Takes a file in: counted, hashed and looked at as it comes, kept in memory only while it is small."""

import codecs
import hashlib
import tempfile
from collections.abc import AsyncIterable, Iterator
from types import TracebackType
from typing import Final, Self

from parley.chat.attachments.errors import AttachmentTooLarge, UnsupportedType
from parley.chat.attachments.sniffing import HEAD_BYTES, Sniffed, sniff
from parley.core.errors import Invalid
from parley.core.settings import AttachmentSettings

PIECE_BYTES: Final = 256 * 1024
_IN_MEMORY_BYTES: Final = 512 * 1024


class Spool:
    """A received file on its way to a store. What does not fit into memory is in a file that has no name."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115 - `close` ends it
        self._hash = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def sha256(self) -> bytes:
        """The hash of what has come."""
        return self._hash.digest()

    def add(self, data: bytes) -> None:
        """Keep what came next."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def pieces(self) -> Iterator[bytes]:
        """Yield all of it, in pieces that every store takes."""
        self._file.seek(0)
        while piece := self._file.read(PIECE_BYTES):
            yield piece


class _Utf8:
    """Looks whether text is UTF-8 without NUL, as it comes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def see(self, data: bytes, *, last: bool = False) -> None:
        try:
            self._decoder.decode(data, last)
        except UnicodeDecodeError:
            raise UnsupportedType from None
        if b"\x00" in data:
            raise UnsupportedType


async def receive(
    body: AsyncIterable[bytes], spool: Spool, *, name: str, declared: str, settings: AttachmentSettings
) -> Sniffed:
    """Take an image or a text file in; return what it is.

    Raises what `sniff` raises, `AttachmentTooLarge` as soon as it is, `UnsupportedType` for text that is not UTF-8,
    `Invalid` for an empty one.
    """
    head = bytearray()
    found: Sniffed | None = None
    text: _Utf8 | None = None
    limit = max(settings.image_bytes, settings.text_bytes)
    async for data in body:
        if spool.size + len(data) > limit:
            raise _too_large(limit)
        spool.add(data)
        if text is not None:
            text.see(data)
        if found is not None:
            continue
        head += data
        if len(head) >= HEAD_BYTES:
            found, text, limit = _judge(head, name, declared, settings)
    if not spool.size:
        raise Invalid("The file is empty.", details={"field": None, "constraint": "min_length=1"})
    if found is None:
        found, text, limit = _judge(head, name, declared, settings)
    if text is not None:
        text.see(b"", last=True)
    if spool.size > limit:
        raise _too_large(limit)
    return found


def _judge(
    head: bytearray, name: str, declared: str, settings: AttachmentSettings
) -> tuple[Sniffed, _Utf8 | None, int]:
    found = sniff(bytes(head), name=name, declared=declared)
    if found.kind == "image":
        return found, None, settings.image_bytes
    text = _Utf8()
    text.see(bytes(head))
    return found, text, settings.text_bytes


async def receive_any(body: AsyncIterable[bytes], spool: Spool, *, limit: int) -> None:
    """Take a file in whatever it is. Raises `AttachmentTooLarge`, and `Invalid` for an empty one."""
    async for data in body:
        if spool.size + len(data) > limit:
            raise _too_large(limit)
        spool.add(data)
    if not spool.size:
        raise Invalid("The file is empty.", details={"field": None, "constraint": "min_length=1"})


def _too_large(limit: int) -> AttachmentTooLarge:
    return AttachmentTooLarge(f"The file is larger than {limit} bytes.", details={"limit": limit})
