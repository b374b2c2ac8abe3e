"""Logs: one JSON object per line, with the ids of what they are about, and without secrets.

Files below `<data>/logs`, rotated at 100 MB with ten kept, one per area; a person's console in development.
Message content is never logged.
"""

import json
import logging
import logging.handlers
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parley.core.settings import Settings

# Area of the file by the first part of the logger's name below `parley`.
AREAS = {"chat": "chat", "realtime": "chat", "llm": "llm", "usage": "llm", "markets": "trading"}

_context: ContextVar[dict[str, str] | None] = ContextVar("log_context", default=None)

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_SECRET_KEYS = re.compile(
    r"pass(word|wd)|secret|token(?!s)|authorization|cookie|api[_-]?key|ticket|credential", re.IGNORECASE
)
# Every run is bounded and begins behind something else: a text made for it must not hold the event loop.
_SECRET_VALUES = re.compile(
    r"(?<![\w-])eyJ[\w-]{8,2000}(?:\.[\w-]{0,4000}){1,2}"  # a JWT
    r"|\b(?:sk|pk|rk)-[\w-]{8,400}"  # a provider's key
    r"|\bparley_\w{2,4}_[\w-]{8,400}"  # our refresh tokens and keys
    r"|\btk_[\w=-]{8,400}"  # our tickets
    r"|\$argon2\w{1,2}\$[^\s'\"]{8,400}|\$2[aby]\$[^\s'\"]{8,400}"  # hashes of passwords
)
_SCHEMES = re.compile(r"(?i)\b(basic|bearer)\s{1,4}[\w.~+/=-]{8,8192}")
_NAMED = re.compile(
    r"(?i)(?<![\w-])([\w-]{0,32}(?:passw(?:or)?d|secret|token(?!s)|api[_-]?key|ticket|authorization|cookie)[\"']?"
    r"\s{0,3}[:=]\s{0,3}[\"']?)(?!\*\*\*)[^\s\"',;&}]{1,4096}"
)
_USERINFO = re.compile(r"://[^\s/:@]{0,256}:[^\s/@]{1,256}@")
_EMAIL = re.compile(r"(?<![\w.+-])([\w.+-])[\w.+-]{0,63}@([\w-]{1,63}(?:\.[\w-]{1,63}){1,8})")
# PostgreSQL repeats the values of a row that it refuses.
_DETAIL = re.compile(r"(?m)^(\s*)DETAIL:.*$")
_LONGEST = 64 * 1024
MASK = "***"


def mask(text: str) -> str:
    """Remove what looks like a secret from a text, and most of an e-mail address; a very long text is cut."""
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "…"
    text = _USERINFO.sub(f"://{MASK}@", _SECRET_VALUES.sub(MASK, text))
    text = _NAMED.sub(rf"\1{MASK}", _SCHEMES.sub(rf"\1 {MASK}", text))
    return _DETAIL.sub(rf"\1DETAIL: {MASK}", _EMAIL.sub(rf"\1{MASK}@\2", text))


def _printable(text: str) -> str:
    """Show control characters instead of obeying them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _masked(key: str, value: Any) -> Any:
    if _SECRET_KEYS.search(key):
        return MASK
    if isinstance(value, dict):
        return {str(k): _masked(str(k), v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_masked("", item) for item in value]
    return value if isinstance(value, bool | int | float | type(None)) else mask(str(value))


def bind_log_context(**ids: str) -> None:
    """Add ids to every line that this task logs from now on."""
    _context.set({**(_context.get() or {}), **ids})


@contextmanager
def log_context(**ids: str) -> Iterator[None]:
    """Add ids to every line logged inside the block."""
    mark = _context.set({**(_context.get() or {}), **ids})
    try:
        yield
    finally:
        _context.reset(mark)


def current_request_id() -> str:
    """Return the id of the request being served, or an empty text."""
    return (_context.get() or {}).get("request_id", "")


class JsonFormatter(logging.Formatter):
    """One JSON object per line; line breaks and control characters in any field stay escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": mask(record.getMessage()),
            **(_context.get() or {}),
        }
        line |= {k: _masked(k, v) for k, v in vars(record).items() if k not in _STANDARD and k not in line}
        if record.exc_info and record.exc_info[0]:
            line["exception"] = mask("".join(traceback.format_exception(*record.exc_info)))
        return json.dumps(line, ensure_ascii=True, default=str)


class ConsoleFormatter(logging.Formatter):
    """A short line for a person; control characters are shown, not obeyed."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        extra = " ".join(f"{k}={_masked(k, v)}" for k, v in vars(record).items() if k not in _STANDARD)
        text = f"{record.levelname.lower():8}{record.name.removeprefix('parley.')}: {mask(record.getMessage())} {extra}"
        text = _printable(text).rstrip()
        if record.exc_info and record.exc_info[0]:
            trace = mask("".join(traceback.format_exception(*record.exc_info))).rstrip()
            # The trace's own line breaks are the only ones.
            text += "\n" + "\n".join(_printable(line) for line in trace.split("\n"))
        return text


class _Area(logging.Filter):
    def __init__(self, area: str) -> None:
        super().__init__()
        self.area = area

    def filter(self, record: logging.LogRecord) -> bool:
        parts = record.name.split(".")
        module = parts[1] if len(parts) > 1 and parts[0] == "parley" else ""
        return AREAS.get(module, "app") == self.area


def _file(directory: Path, name: str) -> logging.Handler:
    handler = logging.handlers.RotatingFileHandler(
        directory / f"{name}.log", maxBytes=100 * 1024 * 1024, backupCount=10, encoding="utf-8", delay=True
    )
    handler.setFormatter(JsonFormatter())
    return handler


def configure_logging(settings: Settings, *, worker: int = 1) -> None:
    """Send the process's logs where the settings say. Called by commands that own the process, never on import.

    Each worker but the first has files of its own, with its number: two processes cannot rotate one file.
    """
    suffix = "" if worker == 1 else f"-{worker}"
    as_json = settings.log.console == "json" or (settings.log.console == "auto" and settings.is_production)
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(JsonFormatter() if as_json else ConsoleFormatter())
    handlers: list[logging.Handler] = [console]
    if settings.log.files:
        directory = settings.data_dir / "logs"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for area in sorted({"app", *AREAS.values()}):
            handler = _file(directory, area + suffix)
            handler.addFilter(_Area(area))
            handlers.append(handler)
        errors = _file(directory, "errors" + suffix)
        errors.setLevel(logging.ERROR)
        handlers.append(errors)
    logging.basicConfig(level=settings.log.level, handlers=handlers, force=True)
    # Their lines would hold addresses with queries, or say each request twice.
    for noisy in ("uvicorn.access", "httpx", "httpcore", "alembic.runtime.plugins"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for owned in ("uvicorn", "uvicorn.error"):
        logging.getLogger(owned).handlers.clear()
        logging.getLogger(owned).propagate = True
