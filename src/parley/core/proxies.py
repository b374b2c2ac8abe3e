"""Who the client is, where proxies stand in between. Only those that are configured are believed."""

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from parley.core.settings import SettingsInvalid

Network = IPv4Network | IPv6Network


def parse_networks(values: Sequence[str]) -> tuple[Network, ...]:
    """Read addresses and networks. Raises `SettingsInvalid`."""
    try:
        return tuple(ip_network(value) for value in values)
    except ValueError:
        raise SettingsInvalid(
            "PARLEY_TRUSTED_PROXIES: each is an address or a network, such as 10.0.0.7 or 10.0.0.0/8"
        ) from None


class ProxyMiddleware:
    """Replace the client's address by the one that trusted proxies forward, for requests and sockets.

    `X-Forwarded-For` is read from the right: each trusted proxy vouches for the address that it wrote. The first one
    that is no trusted proxy is the client; what stands left of it, the client itself may have made up.
    """

    def __init__(self, app: ASGIApp, *, trusted: tuple[Network, ...]) -> None:
        self.app = app
        self._trusted = trusted

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve one request or socket."""
        client = scope.get("client")
        if self._trusted and scope["type"] in {"http", "websocket"} and client and self._is_trusted(client[0]):
            forwarded = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
            address = self._client(client[0], forwarded.decode("latin-1"))
            scheme = next((value for name, value in scope["headers"] if name == b"x-forwarded-proto"), b"")
            scope = {**scope, "client": (address, 0)}
            if scheme in {b"http", b"https"}:
                secure = scheme == b"https"
                scope["scheme"] = ("wss" if secure else "ws") if scope["type"] == "websocket" else scheme.decode()
        await self.app(scope, receive, send)

    def _client(self, peer: str, forwarded: str) -> str:
        address = peer
        for hop in reversed([part.strip() for part in forwarded.split(",") if part.strip()]):
            hop = hop.removeprefix("[").partition("]")[0] if hop.startswith("[") else hop  # noqa: PLW2901 - the same hop, bare
            if not self._is_address(hop):
                break
            address = hop
            if not self._is_trusted(hop):
                break
        return address

    @staticmethod
    def _is_address(text: str) -> bool:
        try:
            ip_address(text)
        except ValueError:
            return False
        return True

    def _is_trusted(self, text: str) -> bool:
        try:
            address = ip_address(text)
        except ValueError:
            return False
        return any(address in network for network in self._trusted)
