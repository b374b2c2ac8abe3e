"""What a file is, read from its first bytes and from nothing else; nothing is decoded.

Dimensions are read from the headers of PNG, JPEG, GIF and WebP files (their specifications: W3C PNG, ITU-T T.81,
GIF89a, Google's WebP container).
"""

import re
from dataclasses import dataclass
from typing import Final

from parley.chat.attachments.errors import AttachmentTooLarge, ImageDamaged, TypeMismatch, UnsupportedType

HEAD_BYTES: Final = 256 * 1024
"""How much of a file is looked at: a JPEG's dimensions stand behind its colour profile and its thumbnail."""

_SIDE: Final = 16_384
_PIXELS: Final = 64_000_000

# What is text by its name. Anything else that is text is plain.
_TEXT_TYPES: Final = {
    "txt": "text/plain", "log": "text/plain",
    "md": "text/markdown", "markdown": "text/markdown", "csv": "text/csv", "tsv": "text/tab-separated-values",
    "json": "application/json", "jsonl": "application/jsonl", "ndjson": "application/jsonl",
    "xml": "application/xml", "yaml": "application/yaml", "yml": "application/yaml", "toml": "application/toml",
    "html": "text/html", "css": "text/css", "py": "text/x-python", "js": "text/javascript", "mjs": "text/javascript",
    "ts": "text/x-typescript", "tsx": "text/x-typescript", "jsx": "text/javascript", "go": "text/x-go",
    "rs": "text/x-rust", "java": "text/x-java", "kt": "text/x-kotlin", "c": "text/x-c", "h": "text/x-c",
    "cpp": "text/x-c++", "hpp": "text/x-c++", "cs": "text/x-csharp", "rb": "text/x-ruby", "php": "text/x-php",
    "sh": "text/x-shellscript", "sql": "text/x-sql", "swift": "text/x-swift", "tex": "text/x-tex",
}  # fmt: skip
_IMAGE_ENDINGS: Final = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "gif": "image/gif",
                         "webp": "image/webp"}  # fmt: skip
_BINARY_ENDINGS: Final = frozenset(
    {"pdf", "zip", "gz", "tgz", "7z", "rar", "doc", "docx", "xls", "xlsx", "ppt", "pptx", "odt", "ods", "mp3", "mp4",
     "mov", "wav", "exe", "dll", "so", "bin", "bmp", "tif", "tiff", "ico", "heic", "heif", "avif"}
)  # fmt: skip
# What tells nothing: senders put it where they know nothing themselves.
_SILENT: Final = frozenset({"", "application/octet-stream", "application/x-www-form-urlencoded", "binary/octet-stream"})
_TEXT_LIKE: Final = re.compile(
    r"text/.+|application/(json|jsonl|x-ndjson|xml|yaml|x-yaml|toml|javascript|typescript|x-sh|sql|csv)|.+\+(json|xml|yaml)"
)
# Possessive: what has been passed over is not tried again in another way, however hostile the text.
_SVG: Final = re.compile(
    rb"\s*+(?><\?xml[^>]*>)?+\s*+(?:(?><!--.*?-->|<!DOCTYPE[^>]*>)\s*+)*+<(?:\w{1,20}:)?svg[\s>]",
    re.DOTALL | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Sniffed:
    """What a file is. Text has no dimensions."""

    kind: str
    media_type: str
    width: int | None = None
    height: int | None = None


def sniff(head: bytes, *, name: str, declared: str) -> Sniffed:
    """Return what a file is that begins with `head`.

    `declared` is the sender's Content-Type. Whether text is UTF-8 to its end is seen as it is read. Raises
    `UnsupportedType`, `TypeMismatch` where name or header say something else, `ImageDamaged`, `AttachmentTooLarge`.
    """
    declared = declared.partition(";")[0].strip().lower()
    ending = name.rpartition(".")[2].lower() if "." in name else ""
    if declared == "image/svg+xml" or ending in {"svg", "svgz"} or _SVG.match(head[:4096]):
        raise UnsupportedType("SVG files are not taken: they can hold scripts.")
    found = _image(head)
    if found is None:
        if head.startswith((b"%PDF-", b"PK\x03\x04")) or b"\x00" in head:
            raise UnsupportedType
        if ending in _BINARY_ENDINGS or ending in _IMAGE_ENDINGS:
            raise TypeMismatch
        if declared not in _SILENT and not _TEXT_LIKE.fullmatch(declared):
            raise TypeMismatch if declared.startswith("image/") else UnsupportedType
        return Sniffed("file", _TEXT_TYPES.get(ending, "text/plain"))
    media_type, width, height = found
    if declared.replace("image/jpg", "image/jpeg") not in _SILENT | {media_type}:
        raise TypeMismatch
    if ending in _TEXT_TYPES or ending in _BINARY_ENDINGS or _IMAGE_ENDINGS.get(ending, media_type) != media_type:
        raise TypeMismatch
    if width < 1 or height < 1:
        raise ImageDamaged
    if max(width, height) > _SIDE or width * height > _PIXELS:
        raise AttachmentTooLarge(f"An image has at most {_SIDE} pixels a side, {_PIXELS // 1_000_000} million in all.")
    return Sniffed("image", media_type, width, height)


def _image(head: bytes) -> tuple[str, int, int] | None:
    """Return an image's type, width and height. None: it is none of those that are taken."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        if head[12:16] != b"IHDR" or len(head) < 33:
            raise ImageDamaged
        return "image/png", int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
    if head.startswith((b"GIF87a", b"GIF89a")):
        if len(head) < 13:
            raise ImageDamaged
        return "image/gif", int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg", *_jpeg(head)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp", *_webp(head)
    return None


# The start of a frame, which has the dimensions: all but the three that define tables.
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD8)})


def _jpeg(head: bytes) -> tuple[int, int]:
    at = 2
    while at + 4 <= len(head):
        if head[at] != 0xFF:
            raise ImageDamaged
        marker = head[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in _WITHOUT_LENGTH:
            at += 2
            continue
        length = int.from_bytes(head[at + 2 : at + 4])
        if marker in _FRAMES and length >= 8 and at + 9 <= len(head):
            return int.from_bytes(head[at + 7 : at + 9]), int.from_bytes(head[at + 5 : at + 7])
        if length < 2 or marker in {0xD8, 0xD9, 0xDA}:
            break
        at += 2 + length
    raise ImageDamaged


def _webp(head: bytes) -> tuple[int, int]:
    if len(head) < 30:
        raise ImageDamaged
    match head[12:16]:
        case b"VP8X":
            return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
        case b"VP8L" if head[20] == 0x2F:
            bits = int.from_bytes(head[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 " if head[23:26] == b"\x9d\x01\x2a":
            return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
        case _:
            raise ImageDamaged
