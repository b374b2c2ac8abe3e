"""A small S3-compatible store: objects in memory, and a signature that is worked out anew for every request.

It refuses what AWS refuses: a wrong or missing signature, a body that is not what was signed, a clock that is far off,
a body without a length.
"""

import asyncio
import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Self
from urllib.parse import unquote

ACCESS_KEY = "AKIDEXAMPLE"
SECRET_KEY = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
REGION = "eu-test-1"
BUCKET = "parley"

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/s3/aws4_request, ?SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})"
)


@dataclass
class Asked:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""
    status: int = 0


@dataclass
class BucketServer:
    """The store. `refuse` may answer a request with a status of its own."""

    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    refuse: Callable[[Asked], int | None] = lambda _: None
    port: int = 0
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        self._server.close_clients()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, path, _ = head[0].split(" ")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)
            }
            asked = Asked(method, path, headers)
            if "content-length" in headers:
                asked.body = await reader.readexactly(int(headers["content-length"]))
            self.asked.append(asked)
            asked.status, answer = self._answer(asked)
            writer.write(
                f"HTTP/1.1 {asked.status} X\r\nContent-Length: {len(answer)}\r\nConnection: close\r\n\r\n".encode()
                + answer
            )
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _answer(self, asked: Asked) -> tuple[int, bytes]:
        if (status := self.refuse(asked)) is not None:
            return status, b""
        if problem := _problem(asked, self.now()):
            return 403, f"<Error><Code>{problem}</Code></Error>".encode()
        root, _, key = unquote(asked.path).removeprefix("/").partition("/")
        if root != BUCKET:
            return 404, b"<Error><Code>NoSuchBucket</Code></Error>"
        match asked.method:
            case "PUT":
                if "content-length" not in asked.headers:
                    return 411, b""
                self.objects[key] = asked.body
                return 200, b""
            case "GET" if key in self.objects:
                return 200, self.objects[key]
            case "DELETE":
                self.objects.pop(key, None)
                return 204, b""
            case _:
                return 404, b"<Error><Code>NoSuchKey</Code></Error>"


def _problem(asked: Asked, now: datetime) -> str | None:
    """Return why a request is refused: worked out from Amazon's description, step by step."""
    found = _AUTHORIZATION.fullmatch(asked.headers.get("authorization", ""))
    if found is None:
        return "AccessDenied"
    access_key, day, region, signed_names, signature = found.groups()
    if access_key != ACCESS_KEY or region != REGION:
        return "InvalidAccessKeyId"
    moment = asked.headers.get("x-amz-date", "")
    age = now - datetime.strptime(moment, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    if abs(age.total_seconds()) > 900 or not moment.startswith(day):
        return "RequestTimeTooSkewed"
    payload = asked.headers.get("x-amz-content-sha256", "")
    if payload != hashlib.sha256(asked.body).hexdigest():
        return "XAmzContentSHA256Mismatch"
    names = signed_names.split(";")
    if not {"host", "x-amz-date", "x-amz-content-sha256"} <= set(names) or names != sorted(names):
        return "SignatureDoesNotMatch"
    path, _, query = asked.path.partition("?")
    lines = [asked.method, path, query]
    lines += [f"{name}:{asked.headers[name]}" for name in names]
    lines += ["", signed_names, payload]
    request = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    to_sign = f"AWS4-HMAC-SHA256\n{moment}\n{day}/{region}/s3/aws4_request\n{request}"
    key = b"AWS4" + SECRET_KEY.encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    expected = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
    return None if hmac.compare_digest(expected, signature) else "SignatureDoesNotMatch"
