"""Images that are named by their address: fetched only where the operator allows it, and never from the inside."""

import asyncio
import base64
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from benchmarks.fake_provider import FakeProvider
from parley.core.http import create_guarded_client
from parley.core.outgoing import Guard
from parley.dialect.errors import RequestInvalid
from parley.dialect.images import MAX_FETCHED, Images
from tests.dialect.conftest import MakeSettings, Person, error_of, sign_up_on
from tests.held import held
from tests.live import live

PNG = b"\x89PNG\r\n\x1a\n" + bytes(2000)


class Files:
    """A server of files that counts who came."""

    def __init__(self) -> None:
        self.port = 0
        self.connections = 0
        self.asked: list[str] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ")[1].decode().strip("/")
        self.asked.append(path)
        status, extra, body = b"200 OK", b"", PNG
        match path:
            case "moved":
                status, extra, body = b"302 Found", b"location: /cat.png\r\n", b""
            case "missing":
                status, body = b"404 Not Found", b"nothing"
            case "large":
                body = PNG * 100
        writer.write(b"HTTP/1.1 %b\r\n%bcontent-length: %d\r\nconnection: close\r\n\r\n" % (status, extra, len(body)))
        writer.write(body)
        writer.close()


@asynccontextmanager
async def files() -> AsyncIterator[Files]:
    made = Files()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, family=socket.AF_INET)
    made.port = server.sockets[0].getsockname()[1]
    async with server:
        yield made


@asynccontextmanager
async def fetching(served: Files) -> AsyncIterator[Images]:
    """Fetch as the service does, but from the one server of the test."""
    guard = Guard.parse(allow=f"http://127.0.0.1:{served.port}", ports="443")
    async with create_guarded_client(guard, max_bytes=100_000, total_s=10) as http:
        yield Images(http)


async def test_each_address_is_fetched_once() -> None:
    async with files() as served, fetching(served) as images:
        urls = {served.url("a.png"): "messages[0]", served.url("b.png"): "messages[1]"}

        assert await images.fetch(urls) == dict.fromkeys(urls, PNG)
        assert sorted(served.asked) == ["a.png", "b.png"]
        assert await images.fetch({}) == {}


@pytest.mark.parametrize("path", ["moved", "missing", "large"])
async def test_what_cannot_be_had_is_refused_in_the_same_words(path: str) -> None:
    async with files() as served, fetching(served) as images:
        with pytest.raises(RequestInvalid) as caught:
            await images.fetch({served.url("cat.png"): "one", served.url(path): "two"})

        assert (caught.value.detail, caught.value.param) == ("The image could not be fetched.", "two")
        assert sorted(served.asked) == sorted(["cat.png", path])


async def test_how_many_are_fetched_is_bounded() -> None:
    async with files() as served, fetching(served) as images:
        with pytest.raises(RequestInvalid):
            await images.fetch({served.url(str(number)): "x" for number in range(MAX_FETCHED + 1)})

        assert served.connections == 0


def _asking(*urls: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [{"type": "text", "text": "deltas=1"}, *parts]}]


async def _ask(person: Person, *urls: str) -> httpx.Response:
    async with person.http() as http:
        return await http.post("/v1/chat/completions", json={"model": "gpt", "messages": _asking(*urls)})


async def test_nothing_is_fetched_unless_the_operator_says_so(alice: Person, provider: FakeProvider) -> None:
    async with files() as served:
        answer = await _ask(alice, served.url("cat.png"))

        assert (answer.status_code, error_of(answer)["param"]) == (400, "messages[0].content[1].image_url.url")
        assert served.connections == 0
    assert not provider.requests


async def test_nothing_of_the_inside_is_fetched(settings_with: MakeSettings, provider: FakeProvider) -> None:
    """Neither what the operator has opened for workspaces' model servers."""
    async with files() as served:
        opened = {"allow": f"http://127.0.0.1:{served.port}", "ports": f"443,{served.port}"}
        settings = settings_with(dialect_fetch_images=True, outgoing=opened)
        async with held(live(settings)) as server:
            ada = await sign_up_on(server, "ada")
            inner = [
                served.url("cat.png"),
                served.url("cat.png").replace("http:", "https:"),
                f"https://localhost:{served.port}/",
                f"https://2130706433:{served.port}/",
                f"https://[::ffff:127.0.0.1]:{served.port}/",
                "https://169.254.169.254/latest/meta-data/",
                "file:///etc/passwd",
                "//127.0.0.1/",
                "",
            ]
            for url in inner:
                answer = await _ask(ada, url)
                assert answer.status_code == 400, url
                assert error_of(answer)["message"] == "The image could not be fetched."
        assert served.connections == 0
    assert not provider.requests


async def test_what_was_fetched_goes_to_the_provider(settings_with: MakeSettings, provider: FakeProvider) -> None:
    async with files() as served, fetching(served) as images, held(live(settings_with())) as server:
        server.app.state.dialect._images = images
        ada = await sign_up_on(server, "ada")
        answer = await _ask(ada, served.url("cat.png"), served.url("cat.png"))

        assert answer.status_code == 200, answer.text
        assert served.asked == ["cat.png"]
    sent = "data:image/png;base64," + base64.b64encode(PNG).decode()
    content = provider.requests[0].body["messages"][0]["content"]
    assert [part["image_url"]["url"] for part in content[1:]] == [sent, sent]
