"""Who the client is behind proxies: only those that are configured are believed."""

from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from parley.core.proxies import ProxyMiddleware, parse_networks
from parley.core.settings import SettingsInvalid, load_settings
from parley.main import create_app

TRUSTED = ("10.0.0.0/8", "192.168.1.7", "fd00::/8")


async def seen(peer: str, *, trusted: tuple[str, ...] = TRUSTED, kind: str = "http", **headers: str) -> dict[str, Any]:
    """Return the scope that the application gets."""
    got: dict[str, Any] = {}

    async def app(scope: AsgiScope, receive: Receive, send: Send) -> None:
        got.update(scope)

    async def nothing(*_: object) -> Any:
        return None

    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": kind, "client": (peer, 1234), "scheme": "ws" if kind == "websocket" else "http", "headers": raw}
    await ProxyMiddleware(app, trusted=parse_networks(trusted))(scope, nothing, nothing)
    return got


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("203.0.113.5", "1.2.3.4", "203.0.113.5"),  # nobody that we know
        ("10.1.1.1", "", "10.1.1.1"),
        ("10.1.1.1", "203.0.113.5", "203.0.113.5"),
        ("10.1.1.1", "1.2.3.4, 203.0.113.5", "203.0.113.5"),  # what stands left, the client made up
        ("10.1.1.1", "1.2.3.4, 203.0.113.5, 192.168.1.7", "203.0.113.5"),
        ("10.1.1.1", "10.9.9.9, 10.8.8.8", "10.9.9.9"),  # none but proxies: the furthest
        ("10.1.1.1", "nonsense", "10.1.1.1"),
        ("10.1.1.1", "203.0.113.5, nonsense, 10.2.2.2", "10.2.2.2"),
        ("10.1.1.1", ",, ,", "10.1.1.1"),
        ("10.1.1.1", "2001:db8::1", "2001:db8::1"),
        ("10.1.1.1", "[2001:db8::1]:443", "2001:db8::1"),
        ("fd00::1", "203.0.113.5", "203.0.113.5"),
        ("192.168.1.8", "1.2.3.4", "192.168.1.8"),
        ("10.1.1.1", "203.0.113.5\xff", "10.1.1.1"),
    ],
)
async def test_the_client_is_the_first_that_no_proxy_of_ours_is(peer: str, forwarded: str, client: str) -> None:
    for kind in ("http", "websocket"):
        assert (await seen(peer, kind=kind, x_forwarded_for=forwarded))["client"][0] == client


async def test_without_proxies_nothing_is_believed() -> None:
    got = await seen("10.1.1.1", trusted=(), x_forwarded_for="1.2.3.4", x_forwarded_proto="https")
    assert (got["client"], got["scheme"]) == (("10.1.1.1", 1234), "http")


@pytest.mark.parametrize(
    ("kind", "said", "scheme"), [("http", "https", "https"), ("websocket", "https", "wss"), ("http", "ftp", "http")]
)
async def test_the_scheme_is_the_proxys_word(kind: str, said: str, scheme: str) -> None:
    assert (await seen("10.1.1.1", kind=kind, x_forwarded_proto=said))["scheme"] == scheme
    assert (await seen("203.0.113.5", kind=kind, x_forwarded_proto=said))["scheme"] in {"http", "ws"}


@pytest.mark.parametrize("bad", ["x", "10.0.0.1/33", "10.0.0.0/8, nonsense", "10.0.0.1/8"])
def test_what_is_no_network_stops_the_start(tmp_path: Path, bad: str) -> None:
    settings = load_settings(tmp_path, env="testing", trusted_proxies=bad)
    with pytest.raises(SettingsInvalid, match="PARLEY_TRUSTED_PROXIES"):
        create_app(settings)
