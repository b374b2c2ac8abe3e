"""Small images as files, written byte by byte: what matters of them is their header."""

import struct
import zlib


def png(width: int = 3, height: int = 2) -> bytes:
    """Return a whole PNG of one colour; a large one only claims to be large."""
    rows = b"".join(b"\x00" + b"\x10\x20\x30" * width for _ in range(height)) if width * height < 10_000 else b""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def gif(width: int = 3, height: int = 2) -> bytes:
    """Return the head of a GIF."""
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"\x3b"


def jpeg(width: int = 3, height: int = 2, *, before: int = 0, marker: int = 0xC0) -> bytes:
    """Return a JPEG's segments; `before`: bytes of metadata in front of the dimensions."""
    segments = b"\xff\xe0" + struct.pack(">H", 16) + b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
    while before > 0:
        size = min(before, 65_000)
        segments += b"\xff\xe2" + struct.pack(">H", size + 2) + b"\x00" * size
        before -= size
    frame = struct.pack(">BHHB", 8, height, width, 3) + b"\x01\x22\x00\x02\x11\x01\x03\x11\x01"
    segments += bytes([0xFF, marker]) + struct.pack(">H", len(frame) + 2) + frame
    return b"\xff\xd8" + segments + b"\xff\xd9"


def webp(width: int = 3, height: int = 2, *, kind: bytes = b"VP8X") -> bytes:
    """Return the head of a WebP file of each of its three kinds."""
    match kind:
        case b"VP8X":
            data = b"\x00\x00\x00\x00" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        case b"VP8L":
            data = b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little") + b"\x00" * 8
        case _:
            data = b"\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", width, height) + b"\x00" * 4
    body = b"WEBP" + kind + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body
