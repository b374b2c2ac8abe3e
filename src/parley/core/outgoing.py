"""Where a request may go whose URL somebody other than the operator has chosen.

Two questions: may this URL be asked at all, which its text answers, and may this very address be dialled for it, which
is asked again at the moment of dialling. A name proves nothing: whoever owns it says where it leads, another place
each time if they like. What an operator runs inside is named on an allow list.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Literal, Self, cast

Scheme = Literal["https", "http"]
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL_CHARS: Final = 2048
DEFAULT_PORTS: Final[dict[Scheme, int]] = {"https": 443, "http": 80}

NOT_PUBLIC: Final = "the host leads to no public address"
"""The one answer for a name that is not known, one that leads inside, and an address that is: which of them it was
would tell what there is inside."""

_URL = re.compile(
    r"(?P<scheme>[a-z]+)://(?P<authority>[^/?#\\\s]*)(?P<path>/[!-~]*)?(?P<query>\?[!-~]*)?", re.ASCII | re.IGNORECASE
)
_AUTHORITY = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?", re.ASCII | re.IGNORECASE)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
# Ends of names that are never public: loopback, the local link, networks of a house or a company.
_INNER_NAMES = ("localhost", "localdomain", "local", "internal", "intranet", "lan", "home", "corp", "private", "arpa")

# https://www.iana.org/assignments/iana-ipv4-special-registry: all that is not an ordinary address of the internet.
_NOT_PUBLIC_V4: Final = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's own, though it looks public
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# https://www.iana.org/assignments/iana-ipv6-special-registry: public is what lies in 2000::/3 and not in these. Among
# them are the ways of writing an IPv4 address as an IPv6 one: Teredo in 2001::/23, and 6to4.
_UNICAST_V6: Final = IPv6Network("2000::/3")
_NOT_PUBLIC_V6: Final = tuple(
    IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)
# What a host without IPv4 of its own is given for an IPv4 address (RFC 6052).
_NAT64: Final = IPv6Network("64:ff9b::/96")
_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_COMPATIBLE: Final = IPv6Network("::/96")
_6TO4: Final = IPv6Network("2002::/16")
# Where clouds hand a machine its credentials. No allow list opens these, however wide its networks are.
_METADATA: Final[tuple[Network, ...]] = (
    IPv4Network("169.254.0.0/16"),
    IPv4Network("100.100.100.200/32"),
    IPv4Network("168.63.129.16/32"),
    IPv4Network("192.0.0.192/32"),
    IPv6Network("fe80::/10"),
    IPv6Network("fd00:ec2::/32"),
    IPv6Network("fd20:ce::254/128"),
)


class DestinationRefused(ValueError):
    """A URL must not be asked. The text says why, can be shown, and tells nothing of what there is inside."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a URL leads. `host` is in lower case, without a trailing dot and without brackets."""

    scheme: Scheme
    host: str
    port: int
    path: str = ""

    @property
    def address(self) -> Address | None:
        """The host where it is an address itself."""
        try:
            return ip_address(self.host)
        except ValueError:
            return None

    @property
    def url(self) -> str:
        """The URL, written in the one way that every parser reads alike; without a trailing slash."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path.rstrip('/')}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of the allow list: a host by its name or a network, over one scheme and one port (None: any)."""

    scheme: Scheme
    host: str | Network
    port: int | None

    def meets(self, destination: Destination, address: Address | None) -> bool:
        """Whether the rule opens an address for a destination; None asks whether it may for any address."""
        if self.scheme != destination.scheme or self.port not in {None, destination.port}:
            return False
        if isinstance(self.host, str):
            return self.host == destination.host
        return address is None or (address.version == self.host.version and address in self.host)


@dataclass(frozen=True, slots=True)
class Guard:
    """Says where requests may go: to public addresses by https and `ports`, and where the allow list says."""

    ports: frozenset[int] = frozenset({443})
    allowed: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, *, allow: str, ports: str) -> Self:
        """Make the guard from the settings' texts."""
        return cls(ports=parse_ports(ports), allowed=parse_rules(allow))

    def check(self, url: str) -> Destination:
        """Take a URL apart. Raises `DestinationRefused` for one that must not be asked, wherever its name leads."""
        destination = parse(url)
        address = destination.address
        if any(rule.meets(destination, address) for rule in self.allowed) and not (address and _is_metadata(address)):
            return destination
        if destination.scheme != "https":
            raise DestinationRefused("the URL must begin with https://")
        if destination.port not in self.ports:
            raise DestinationRefused(f"the port {destination.port} is not allowed")
        if (address is not None and not is_public(address)) or (address is None and _is_inner_name(destination.host)):
            raise DestinationRefused(NOT_PUBLIC)
        return destination

    def check_base(self, url: str) -> Destination:
        """Check a URL that paths are added to: it has no query. Raises `DestinationRefused`."""
        if "?" in url or "#" in url:
            raise DestinationRefused("it must end before the ? or #")
        return self.check(url)

    def permits(self, destination: Destination, address: str) -> bool:
        """Whether this very address may be dialled for a destination."""
        try:
            found = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if _is_metadata(found):
            return False
        if any(rule.meets(destination, _unmapped(found)) for rule in self.allowed):
            return True
        return destination.scheme == "https" and destination.port in self.ports and is_public(found)

    def names(self, destination: Destination) -> bool:
        """Whether the allow list names this host: then it may be a name of the inside."""
        return any(isinstance(rule.host, str) and rule.meets(destination, None) for rule in self.allowed)


def parse(url: str) -> Destination:
    """Take a URL apart, strictly: what two parsers could read differently is refused. Raises `DestinationRefused`."""
    match = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARS else None
    if match is None:
        raise DestinationRefused("this is not a URL that can be used: write it as https://host/path")
    scheme = match["scheme"].lower()
    if scheme not in DEFAULT_PORTS:
        raise DestinationRefused("the URL must begin with https://")
    if "@" in match["authority"]:
        raise DestinationRefused("the URL must not hold a user name or password")
    authority = _AUTHORITY.fullmatch(match["authority"])
    if authority is None:
        raise DestinationRefused("the URL names no host that can be used: write it with letters, digits, . and -")
    known = cast("Scheme", scheme)
    port = int(authority["port"]) if authority["port"] else DEFAULT_PORTS[known]
    if not 0 < port < 65536:
        raise DestinationRefused("the port is not one")
    return Destination(known, _host(authority["host"].lower()), port, match["path"] or "")


def _host(text: str) -> str:
    if text.startswith("["):
        try:
            return str(IPv6Address(text[1:-1]))
        except ValueError:
            raise DestinationRefused("the IPv6 address is not one") from None
    host = text.removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise DestinationRefused("the URL names no host that can be used: write it with letters, digits, . and -")
    # 2130706433, 0x7f.1 and 0177.0.0.1 are addresses to some parsers and names to others (WHATWG URL, "ends in a
    # number"). Only the plain form is one to all.
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(host))
        except ValueError:
            raise DestinationRefused("an address is written as four decimal numbers, like 203.0.113.7") from None
    return host


def _is_inner_name(host: str) -> bool:
    labels = host.split(".")
    return len(labels) == 1 or labels[-1] in _INNER_NAMES


def is_public(address: Address) -> bool:
    """Whether an address is an ordinary one of the internet."""
    if isinstance(address, IPv4Address):
        return address.is_global and not any(address in network for network in _NOT_PUBLIC_V4)
    if address in _NAT64:
        return is_public(_last_32_bits(address))
    return address in _UNICAST_V6 and address.is_global and not any(address in network for network in _NOT_PUBLIC_V6)


def _is_metadata(address: Address) -> bool:
    candidates: list[Address] = [address]
    if isinstance(address, IPv6Address):
        if address in _NAT64 or address in _MAPPED or address in _COMPATIBLE:
            candidates.append(_last_32_bits(address))
        elif address in _6TO4:
            candidates.append(IPv4Address(int(address) >> 80 & 0xFFFFFFFF))
    return any(one.version == network.version and one in network for one in candidates for network in _METADATA)


def _unmapped(address: Address) -> Address:
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _last_32_bits(address: IPv6Address) -> IPv4Address:
    return IPv4Address(int(address) & 0xFFFFFFFF)


_RULE = re.compile(
    r"(?:(?P<scheme>https?)://)?(?P<host>\[[0-9a-f:./]+\]|[a-z0-9._/-]+)(?::(?P<port>[0-9]{1,5}|\*))?",
    re.ASCII | re.IGNORECASE,
)


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Read an allow list: entries with commas between, each a host or a network, with a scheme and a port if need be.

    `models.example.internal`, `http://10.0.0.7:11434`, `http://10.1.0.0/16:*`, `https://[fd12::/64]:8443`. Without a
    scheme it is https, without a port the scheme's own, `*` is any. Raises `ValueError`, which names the entry.
    """
    return tuple(_rule(entry.strip()) for entry in text.split(",") if entry.strip())


def _rule(entry: str) -> Rule:
    match = _RULE.fullmatch(entry)
    if match is None:
        raise ValueError(f"{entry} is not host, host:port, network or scheme://host:port")
    scheme = cast("Scheme", (match["scheme"] or "https").lower())
    port = None if match["port"] == "*" else int(match["port"] or DEFAULT_PORTS[scheme])
    text = match["host"].lower().strip("[]")
    try:
        host: str | Network = ip_network(text)
    except ValueError as error:
        if "/" in text or ":" in text:
            raise ValueError(f"{entry} holds no network: {error}") from None
        try:
            host = _host(text)
        except DestinationRefused as refused:
            raise ValueError(f"{entry}: {refused}") from None
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"{entry} holds no port")
    return Rule(scheme, host, port)


def parse_ports(text: str) -> frozenset[int]:
    """Read a list of ports with commas between. Raises `ValueError`."""
    try:
        ports = frozenset(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError("ports are numbers with commas between") from None
    if not ports or not all(0 < port < 65536 for port in ports):
        raise ValueError("ports are numbers between 1 and 65535")
    return ports
