"""What a file is, is read from its bytes: each kind, each lie about it, and what is refused."""

import time
from collections.abc import AsyncIterator

import pytest

from parley.chat.attachments.errors import AttachmentTooLarge, ImageDamaged, TypeMismatch, UnsupportedType
from parley.chat.attachments.receiving import Spool, receive
from parley.chat.attachments.schemas import plain_name
from parley.chat.attachments.sniffing import HEAD_BYTES, Sniffed, sniff
from parley.core.errors import Invalid
from parley.core.settings import AttachmentSettings
from tests.chat.pictures import gif, jpeg, png, webp

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (png(640, 480), "image/png"),
        (gif(640, 480), "image/gif"),
        (jpeg(640, 480), "image/jpeg"),
        (jpeg(640, 480, before=200_000), "image/jpeg"),
        (jpeg(640, 480, marker=0xC2), "image/jpeg"),
        (webp(640, 480), "image/webp"),
        (webp(640, 480, kind=b"VP8L"), "image/webp"),
        (webp(640, 480, kind=b"VP8 "), "image/webp"),
    ],
)
def test_images_are_known_by_their_bytes(data: bytes, media_type: str) -> None:
    for declared in ("", "application/octet-stream", media_type, f"{media_type}; q=1"):
        assert sniff(data, name="", declared=declared) == Sniffed("image", media_type, 640, 480)


@pytest.mark.parametrize(
    ("name", "media_type"),
    [("", "text/plain"), ("a.md", "text/markdown"), ("a.CSV", "text/csv"), ("data.json", "application/json"),
     ("a.py", "text/x-python"), ("Makefile", "text/plain"), ("a.unknown", "text/plain")],
)  # fmt: skip
def test_text_is_known_by_its_bytes_and_called_by_its_name(name: str, media_type: str) -> None:
    assert sniff("héllo".encode(), name=name, declared="text/plain") == Sniffed("file", media_type)


@pytest.mark.parametrize(
    ("data", "name", "declared"),
    [
        (png(), "", "image/jpeg"),
        (png(), "", "text/plain"),
        (png(), "a.jpg", ""),
        (png(), "a.txt.md", ""),
        (png(), "a.txt", ""),
        (png(), "a.pdf", "image/png"),
        (b"hello", "", "image/png"),
        (b"hello", "a.png", ""),
        (b"hello", "a.pdf", "text/plain"),
        (b"<html><script>", "a.gif", "text/html"),
    ],
)
def test_what_the_header_or_the_name_says_has_to_be_so(data: bytes, name: str, declared: str) -> None:
    with pytest.raises(TypeMismatch):
        sniff(data, name=name, declared=declared)


@pytest.mark.parametrize(
    ("data", "name", "declared"),
    [
        (SVG, "", ""),
        (SVG, "a.txt", "text/plain"),
        (b"<?xml version='1.0'?>\n<!-- a --> <!-- b -->\n<!DOCTYPE svg>\n" + SVG, "a.xml", ""),
        (b"<s:svg xmlns:s='http://www.w3.org/2000/svg'>", "", ""),
        (b"hello", "a.svg", ""),
        (b"hello", "", "image/svg+xml"),
        (b"%PDF-1.7 all ascii", "", ""),
        (b"PK\x03\x04", "", ""),
        (b"\x7fELF\x00\x00", "", ""),
        (b"RIFF\x00\x00\x00\x00WAVE", "", ""),
        (b"hello", "", "audio/mpeg"),
    ],
)
def test_other_kinds_are_not_taken(data: bytes, name: str, declared: str) -> None:
    with pytest.raises(UnsupportedType):
        sniff(data, name=name, declared=declared)


@pytest.mark.parametrize(
    "data",
    [
        png()[:20],
        b"\x89PNG\r\n\x1a\n" + b"\x00" * 40,
        gif()[:8],
        gif(0, 5),
        jpeg()[:12],
        jpeg(5, 0),
        b"\xff\xd8\xff\xe0\x00\x00" + b"x" * 40,
        b"\xff\xd8\xff\xe0\x00\x02\x00\x00",
        jpeg(before=HEAD_BYTES + 70_000)[:HEAD_BYTES],
        webp()[:24],
        webp(kind=b"VP8L").replace(b"\x2f", b"\x2e", 1),
        webp(kind=b"ABCD"),
    ],
)
def test_an_image_whose_header_cannot_be_read_is_damaged(data: bytes) -> None:
    with pytest.raises(ImageDamaged):
        sniff(data, name="", declared="")


@pytest.mark.parametrize("data", [png(16_385, 1), png(10_000, 10_000), webp(16_384, 16_384), jpeg(60_000, 60_000)])
def test_an_image_that_would_be_huge_when_decoded_is_refused(data: bytes) -> None:
    with pytest.raises(AttachmentTooLarge):
        sniff(data, name="", declared="")


@pytest.mark.parametrize(
    "data", [b"<!---->" * 580, b"<!--" * 1000, b"<?xml" * 800, b" \n" * 2000, b"<!DOCTYPE" * 450, b"<!-- -->\n" * 450]
)
def test_hostile_text_is_looked_at_in_no_time(data: bytes) -> None:
    started = time.perf_counter()
    sniff(data, name="a.txt", declared="")
    assert time.perf_counter() - started < 0.5


async def _body(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


SETTINGS = AttachmentSettings(image_bytes=600_000, text_bytes=300_000)


async def test_a_file_is_whole_however_it_comes() -> None:
    data = png() + b"\x00" * 500_000
    with Spool() as spool:
        pieces = [data[at : at + 777] for at in range(0, len(data), 777)]
        found = await receive(_body(*pieces), spool, name="a.png", declared="", settings=SETTINGS)
        assert found.media_type == "image/png"
        assert b"".join(spool.pieces()) == data
        # A second attempt to store it reads it again.
        assert b"".join(spool.pieces()) == data
        assert max(len(piece) for piece in spool.pieces()) <= 256 * 1024


async def test_letters_that_are_torn_apart_are_text() -> None:
    data = "漢字😀" * 40_000
    encoded = data.encode()[:299_000]
    encoded = encoded[: len(encoded) - len(encoded) % 10]
    with Spool() as spool:
        pieces = [encoded[at : at + 7] for at in range(0, len(encoded), 7)]
        found = await receive(_body(*pieces), spool, name="a.txt", declared="", settings=SETTINGS)
    assert found == Sniffed("file", "text/plain")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfeh\x00i\x00",
        b"caf\xe9",
        b"a" * 290_000 + b"\x00",
        b"a" * 290_000 + b"\xe6\xbc",
        b"\xed\xa0\x80",
        b"a\x00b",
    ],
)
async def test_text_is_utf_8_without_nul_to_its_end(data: bytes) -> None:
    with Spool() as spool, pytest.raises(UnsupportedType):
        await receive(_body(data[:5], data[5:]), spool, name="", declared="text/plain", settings=SETTINGS)


@pytest.mark.parametrize("data", [b"a" * 300_001, png() + b"\x00" * 600_000])
async def test_what_is_too_large_is_not_kept(data: bytes) -> None:
    with Spool() as spool, pytest.raises(AttachmentTooLarge):
        await receive(_body(data[:1000], data[1000:]), spool, name="", declared="", settings=SETTINGS)


async def test_an_endless_body_is_given_up() -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"a" * 50_000

    with Spool() as spool, pytest.raises(AttachmentTooLarge):
        await receive(endless(), spool, name="", declared="", settings=SETTINGS)
    assert taken <= 13


async def test_an_empty_file_is_refused() -> None:
    with Spool() as spool, pytest.raises(Invalid):
        await receive(_body(b"", b""), spool, name="", declared="", settings=SETTINGS)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("sky.png", "sky.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\a\\b.txt", "b.txt"),
        ("a\r\nSet-Cookie: x.txt", "aSet-Cookie: x.txt"),
        ("\u202egnp.exe", "gnp.exe"),
        ("漢 字.md", "漢 字.md"),
        ("  ..  ", ""),
        ("x" * 300 + ".png", "x" * 196 + ".png"),
    ],
)
def test_names_are_only_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain
