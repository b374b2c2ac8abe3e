"""The guarded client, with servers on this machine that must see nothing of what it refuses."""

import asyncio
import gzip
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from socket import AF_INET, AF_INET6, AddressFamily, socket
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from yarl import URL

from parley.core import http as outgoing_http
from parley.core.http import Addresses, OutgoingRefused, chunk_reader, create_guarded_client
from parley.core.outgoing import NOT_PUBLIC, Guard, parse_rules

NAME = "models.example.com"
PUBLIC = "8.8.8.8"

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Canary:
    """A server that counts who comes, and answers with what it is told to."""

    port: int = 0
    connections: int = 0
    heads: list[str] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    """What TLS clients asked for (SNI)."""


@dataclass(frozen=True)
class Authority:
    """A certificate for `NAME`, and the context of a client that believes it."""

    server: ssl.SSLContext
    client: ssl.SSLContext


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder: Path = tmp_path_factory.mktemp("tls")
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "cert.pem").write_bytes(pem)
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return Authority(server, ssl.create_default_context(cadata=pem.decode()))


def text(body: bytes = b"ok", *headers: str) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        lines = ["HTTP/1.1 200 OK", f"content-length: {len(body)}", *headers]
        writer.write("\r\n".join((*lines, "", "")).encode() + body)

    return answer


def raw(data: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


@asynccontextmanager
async def canary(answer: Answer | None = None, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Canary]:
    """Serve on the loopback addresses of both families."""
    seen = Canary()
    answer = answer or text()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.connections += 1
        try:
            while True:
                seen.heads.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
                await answer(writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()

    if tls is not None:
        tls.sni_callback = lambda _, name, __: seen.names.append(name)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    seen.port = server.sockets[0].getsockname()[1]
    also = await asyncio.start_server(serve, "::1", seen.port, ssl=tls)
    try:
        yield seen
    finally:
        for one in (server, also):
            one.close()
            one.close_clients()


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every address that this process connects to."""
    seen: list[str] = []
    original = socket.connect

    def connect(self: socket, address: Any) -> None:
        if self.family in {AF_INET, AF_INET6}:
            seen.append(address[0])
        original(self, address)

    monkeypatch.setattr(socket, "connect", connect)
    return seen


def leading_to(*addresses: str) -> Callable[[str], Addresses]:
    """Return a look-up that has the same answer for every name."""

    def look_up(_: str) -> Addresses:
        return [(AF_INET6 if ":" in address else AF_INET, address) for address in addresses]

    return look_up


def allowing(seen: Canary, scheme: str = "https") -> Guard:
    return Guard(allowed=parse_rules(f"{scheme}://{NAME}:{seen.port}"))


async def refused(http: httpx.AsyncClient, url: str) -> str:
    with pytest.raises(OutgoingRefused) as found:
        await http.get(url)
    return str(found.value)


# -- what must not be reached ------------------------------------------------------------------------------------------

HOSTS = (
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "017700000001", "0177.0.0.1", "127.0.0.1.", "0",
    "0.0.0.0", "localhost", "localhost.", "LOCALHOST", "a.localhost", "[::1]", "[::]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]",
    f"{NAME}@127.0.0.1", f"127.0.0.1\\@{NAME}", "169.254.169.254", "[fd00:ec2::254]", "[::ffff:169.254.169.254]",
)  # fmt: skip


@pytest.mark.parametrize("scheme", ["https", "http"])
@pytest.mark.parametrize("host", HOSTS)
async def test_no_spelling_of_an_inner_address_is_dialled(host: str, scheme: str, dialled: list[str]) -> None:
    async with canary() as seen:
        guard = Guard(ports=frozenset({seen.port, 443, 80}))
        async with create_guarded_client(guard) as http:
            with pytest.raises((OutgoingRefused, httpx.InvalidURL)):
                await http.get(f"{scheme}://{host}:{seen.port}/latest/meta-data/")
        assert (seen.connections, dialled) == (0, [])


@pytest.mark.parametrize(
    "addresses",
    [
        ("127.0.0.1",), ("::1",), ("169.254.169.254",), ("fd00:ec2::254",), ("10.0.0.1",), ("::ffff:127.0.0.1",),
        ("0.0.0.0",), ("::",), (PUBLIC, "127.0.0.1"), ("127.0.0.1", PUBLIC), (PUBLIC, "::1"), (),
    ],
)  # fmt: skip
async def test_no_name_leads_inside(addresses: tuple[str, ...], dialled: list[str]) -> None:
    async with canary() as seen:
        guard = Guard(ports=frozenset({seen.port}))
        async with create_guarded_client(guard, lookup=leading_to(*addresses)) as http:
            assert await refused(http, f"https://{NAME}:{seen.port}/") == NOT_PUBLIC
        assert (seen.connections, dialled) == (0, [])


async def test_a_name_that_nobody_knows_looks_like_one_that_leads_inside() -> None:
    def unknown(_: str) -> Addresses:
        raise OSError("Name or service not known")

    async with create_guarded_client(Guard(), lookup=unknown) as http:
        assert await refused(http, f"https://{NAME}/") == NOT_PUBLIC


async def test_a_name_that_leads_inside_at_its_second_look_up_is_not_followed(
    dialled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing_http, "_RESOLVED_S", 0)
    answers = [(PUBLIC,), ("127.0.0.1",)]

    def look_up(name: str) -> Addresses:
        return leading_to(*answers.pop(0))(name)

    async with canary() as seen:
        guard = Guard(ports=frozenset({seen.port}))
        async with create_guarded_client(guard, lookup=look_up) as http:
            # Tests stay on this machine: that it was tried is all that can be seen.
            with pytest.raises(httpx.ConnectError):
                await http.get(f"https://{NAME}:{seen.port}/")
            assert await refused(http, f"https://{NAME}:{seen.port}/") == NOT_PUBLIC
        assert (seen.connections, set(dialled)) == (0, {PUBLIC})


async def test_the_address_is_checked_once_more_when_it_is_dialled(
    dialled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the look-up has let pass, as if it had changed its answer afterwards."""

    async def resolve(_: object, host: str, port: int = 0, family: AddressFamily = AF_INET) -> list[dict[str, Any]]:
        return [
            {"hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": 0}
            for address in ("127.0.0.1", "::1")
        ]

    monkeypatch.setattr(outgoing_http._GuardedResolver, "resolve", resolve)
    async with canary() as seen:
        async with create_guarded_client(Guard(ports=frozenset({seen.port}))) as http:
            assert await refused(http, f"https://{NAME}:{seen.port}/") == NOT_PUBLIC
        assert (seen.connections, dialled) == (0, [])


async def test_a_url_that_two_parsers_read_differently_is_refused(
    dialled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with canary() as seen:
        monkeypatch.setattr(outgoing_http, "URL", lambda text: URL(text.replace(NAME, "127.0.0.1")))
        guard = Guard(ports=frozenset({seen.port}))
        async with create_guarded_client(guard, lookup=leading_to(PUBLIC)) as http:
            await refused(http, f"https://{NAME}:{seen.port}/")
        assert (seen.connections, dialled) == (0, [])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("follow", [False, True])
async def test_a_redirect_is_not_followed(status: int, follow: bool, authority: Authority) -> None:
    async with canary() as inner:
        location = f"http://127.0.0.1:{inner.port}/latest/meta-data/"
        answer = raw(f"HTTP/1.1 {status} X\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n".encode())
        async with (
            canary(answer, tls=authority.server) as seen,
            create_guarded_client(allowing(seen), lookup=leading_to("127.0.0.1"), ssl_context=authority.client) as http,
        ):
            with pytest.raises(OutgoingRefused, match="redirect"):
                await http.get(f"https://{NAME}:{seen.port}/v1", follow_redirects=follow)
            assert len(seen.heads) == 1
        assert inner.connections == 0


async def test_proxies_of_the_environment_are_not_used(
    dialled: list[str], monkeypatch: pytest.MonkeyPatch, authority: Authority
) -> None:
    async with canary() as proxy, canary(tls=authority.server) as seen:
        for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        async with create_guarded_client(
            allowing(seen), lookup=leading_to("127.0.0.1"), ssl_context=authority.client
        ) as http:
            assert (await http.get(f"https://{NAME}:{seen.port}/")).text == "ok"
        async with create_guarded_client(Guard(), lookup=leading_to("10.0.0.1")) as http:
            await refused(http, f"https://{NAME}/")
        assert proxy.connections == 0
        assert dialled == ["127.0.0.1"]


# -- what may be reached -----------------------------------------------------------------------------------------------


async def test_the_name_stays_in_tls_and_in_the_request(dialled: list[str], authority: Authority) -> None:
    async with (
        canary(tls=authority.server) as seen,
        create_guarded_client(allowing(seen), lookup=leading_to("127.0.0.1"), ssl_context=authority.client) as http,
    ):
        for _ in range(3):
            assert (await http.get(f"https://{NAME}:{seen.port}/v1")).text == "ok"
    assert seen.names == [NAME]
    assert f"host: {NAME}:{seen.port}" in seen.heads[0]
    # One connection, which was checked, for all of them.
    assert dialled == ["127.0.0.1"]


async def test_a_certificate_of_another_name_is_refused(authority: Authority) -> None:
    async with canary(tls=authority.server) as seen:
        guard = Guard(allowed=parse_rules(f"https://other.example.com:{seen.port}"))
        async with create_guarded_client(guard, lookup=leading_to("127.0.0.1"), ssl_context=authority.client) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get(f"https://other.example.com:{seen.port}/")
        assert seen.heads == []


async def test_a_private_server_that_is_allowed_is_asked(dialled: list[str]) -> None:
    async with canary() as seen:
        guard = Guard(allowed=parse_rules(f"http://127.0.0.1:{seen.port}"))
        async with create_guarded_client(guard) as http:
            assert (await http.get(f"http://127.0.0.1:{seen.port}/v1")).text == "ok"
            for other in (f"http://127.0.0.2:{seen.port}/", f"https://127.0.0.1:{seen.port}/", "http://127.0.0.1/"):
                await refused(http, other)
    assert dialled == ["127.0.0.1"]


async def test_both_families_are_tried(authority: Authority) -> None:
    async with (
        canary(tls=authority.server) as seen,
        create_guarded_client(allowing(seen), lookup=leading_to("::1"), ssl_context=authority.client) as http,
    ):
        assert (await http.get(f"https://{NAME}:{seen.port}/v1")).text == "ok"


async def test_a_server_that_is_away_is_not_called_refused() -> None:
    async with canary() as seen:
        port = seen.port
    guard = Guard(allowed=parse_rules(f"http://127.0.0.1:{port}"))
    async with create_guarded_client(guard) as http:
        with pytest.raises(httpx.ConnectError):
            await http.get(f"http://127.0.0.1:{port}/")


# -- answers that do not end -------------------------------------------------------------------------------------------


@asynccontextmanager
async def asking(answer: Answer, **bounds: Any) -> AsyncIterator[tuple[httpx.AsyncClient, str, Canary]]:
    async with canary(answer) as seen:
        guard = Guard(allowed=parse_rules(f"http://127.0.0.1:{seen.port}"))
        async with create_guarded_client(guard, **bounds) as http:
            yield http, f"http://127.0.0.1:{seen.port}/", seen


async def test_an_answer_that_says_it_is_too_large_is_not_read() -> None:
    async with asking(raw(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n"), max_bytes=4999) as (http, url, _):
        with pytest.raises(OutgoingRefused, match="too large"):
            await http.get(url)


@pytest.mark.parametrize("head", ["transfer-encoding: chunked", "connection: close"])
async def test_an_answer_is_cut_where_it_becomes_too_large(head: str) -> None:
    async def pour(writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode())
        while not writer.is_closing():
            writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
            await writer.drain()

    async with asking(pour, max_bytes=100_000) as (http, url, _), http.stream("GET", url) as response:
        # Not even by the way that goes past httpx.
        read, size = chunk_reader(response), 0
        with pytest.raises(OutgoingRefused, match="too large"):
            while True:
                size += len(await read())
        assert size <= 100_000


async def test_a_large_answer_within_bounds_is_whole() -> None:
    async with asking(text(b"x" * 300_000), max_bytes=300_000) as (http, url, _):
        assert len((await http.get(url)).content) == 300_000


async def test_a_slow_drip_ends_in_time() -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with asking(drip, total_s=0.5) as (http, url, _), asyncio.timeout(30):
        with pytest.raises(httpx.ReadTimeout):
            await http.get(url)


async def test_a_slow_drip_of_headers_ends_in_time() -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nx-")
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with asking(drip, total_s=0.5) as (http, url, _), asyncio.timeout(30):
        with pytest.raises(httpx.ReadTimeout):
            await http.get(url)


async def test_headers_without_end_are_refused() -> None:
    async def pour(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while not writer.is_closing():
            writer.write(b"x-more: " + b"x" * 1000 + b"\r\n")
            await writer.drain()

    async with asking(pour) as (http, url, _), asyncio.timeout(30):
        with pytest.raises(httpx.HTTPError):
            await http.get(url)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "zstd", "gzip, identity"])
async def test_a_compressed_answer_is_not_unpacked(encoding: str) -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)

    async with asking(text(bomb, f"content-encoding: {encoding}")) as (http, url, seen):
        with pytest.raises(OutgoingRefused, match="compressed"):
            await http.get(url, headers={"accept-encoding": "gzip, br"})
        assert "accept-encoding: identity" in seen.heads[0]


async def test_a_body_that_nobody_reads_is_let_go() -> None:
    """The timer of the whole call ends the connection, also while no read is under way."""

    async def hold(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n12345")

    async with asking(hold, total_s=0.3) as (http, url, _), asyncio.timeout(30):
        response = await http.send(http.build_request("GET", url), stream=True)
        read = chunk_reader(response)
        with pytest.raises(httpx.ReadTimeout):
            while await read():
                pass
        await response.aclose()


# -- look-ups ----------------------------------------------------------------------------------------------------------


async def test_a_name_server_that_never_answers_holds_up_nobody_else(
    monkeypatch: pytest.MonkeyPatch, authority: Authority
) -> None:
    monkeypatch.setattr(outgoing_http, "_RESOLVE_TIMEOUT_S", 0.2)
    release = threading.Event()

    def look_up(name: str) -> Addresses:
        if name.startswith("tarpit"):
            release.wait(60)
        return leading_to("127.0.0.1")(name)

    try:
        async with (
            asyncio.timeout(30),
            canary(tls=authority.server) as seen,
            create_guarded_client(allowing(seen), lookup=look_up, ssl_context=authority.client) as http,
        ):
            waiting = [asyncio.create_task(refused(http, "https://tarpit.example.com/")) for _ in range(50)]
            assert (await http.get(f"https://{NAME}:{seen.port}/")).text == "ok"
            # Asked once for all fifty.
            assert set(await asyncio.gather(*waiting)) == {NOT_PUBLIC}
    finally:
        release.set()


async def test_a_name_is_looked_up_as_it_stands_and_seldom(authority: Authority) -> None:
    asked: list[str] = []

    def look_up(name: str) -> Addresses:
        asked.append(name)
        return leading_to("10.0.0.1")(name)

    async with create_guarded_client(Guard(allowed=parse_rules("ollama")), lookup=look_up) as http:
        for _ in range(3):
            await refused(http, f"https://{NAME}/")
        with pytest.raises(httpx.HTTPError):
            await http.get("https://ollama/")
    # With a dot, or this machine's own domains would be tried; without one where the operator has named the host.
    assert asked == [f"{NAME}.", "ollama"]
