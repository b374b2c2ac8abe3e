"""Where a request may go: what the text of a URL says, and which addresses may be dialled."""

import re
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parley.core.outgoing import (
    NOT_PUBLIC,
    DestinationRefused,
    Guard,
    is_public,
    parse,
    parse_ports,
    parse_rules,
)
from parley.core.settings import SettingsInvalid, load_settings

REFUSED = (
    # Not https, or no URL at all.
    "http://models.example.com/v1",
    "ftp://models.example.com/",
    "file:///etc/passwd",
    "gopher://models.example.com:443/",
    "javascript:alert(1)",
    "//models.example.com/",
    "models.example.com",
    "https://",
    "https:///v1",
    "https:models.example.com",
    "",
    # A user name or password, also where only some parsers see one.
    "https://key@models.example.com/",
    "https://user:pass@models.example.com/",
    "https://models.example.com@127.0.0.1/",
    "https://127.0.0.1\\@models.example.com/",
    "https://models.example.com\\@127.0.0.1/",
    "https://models.example.com#@127.0.0.1/",
    "https://models.example.com%40127.0.0.1/",
    # Characters that parsers drop, fold or read as another.
    "https://models.example.com\t.evil.test/",
    "https://models.example.com\r\nHost: inner/",
    "https://models.example.com/\x00",
    " https://models.example.com/",
    "https://models.example.com /",
    "https://ⓔxample.com/",
    "https://example。com/",
    "https://１２７.0.0.1/",
    "https://models..example.com/",
    "https://.example.com/",
    "https://-x.example.com/",
    # Ports.
    "https://models.example.com:22/",
    "https://models.example.com:80/",
    "https://models.example.com:8443/",
    "https://models.example.com:0/",
    "https://models.example.com:65536/",
    "https://models.example.com:4430000/",
    "https://models.example.com:/",
    "https://models.example.com:443x/",
    # Names of the inside.
    "https://localhost/",
    "https://LOCALHOST/",
    "https://localhost./",
    "https://a.localhost/",
    "https://localhost.localdomain/",
    "https://printer.local/",
    "https://metadata.google.internal/",
    "https://metadata/",
    "https://postgres/",
    "https://router.lan/",
    "https://1.0.0.127.in-addr.arpa/",
    # 127.0.0.1 in every spelling.
    "https://127.0.0.1/",
    "https://127.0.0.1./",
    "https://127.1/",
    "https://127.0.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.1/",
    "https://0x7f.0x0.0x0.0x1/",
    "https://017700000001/",
    "https://0177.0.0.1/",
    "https://127.0.0.01/",
    "https://127.0.0.1.1/",
    "https://0/",
    "https://0.0.0.0/",
    "https://[::1]/",
    "https://[0:0:0:0:0:0:0:1]/",
    "https://[::]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[::127.0.0.1]/",
    "https://[64:ff9b::127.0.0.1]/",
    "https://[2002:7f00:1::]/",
    "https://[2001:0:7f00:1::]/",
    "https://[::1%25lo]/",
    "https://[::1%lo]/",
    "https://[fe80::1%25eth0]/",
    "https://[1::2::3]/",
    # Clouds' metadata.
    "https://169.254.169.254/latest/meta-data/",
    "https://2852039166/",
    "https://0xa9fea9fe/",
    "https://[::ffff:169.254.169.254]/",
    "https://[64:ff9b::169.254.169.254]/",
    "https://[fd00:ec2::254]/",
    "https://[fd20:ce::254]/",
    "https://100.100.100.200/",
    "https://168.63.129.16/",
    "https://192.0.0.192/",
    # Private and special networks.
    "https://10.0.0.1/",
    "https://172.16.0.1/",
    "https://192.168.1.1/",
    "https://100.64.0.1/",
    "https://198.18.0.1/",
    "https://224.0.0.1/",
    "https://240.0.0.1/",
    "https://255.255.255.255/",
    "https://[fc00::1]/",
    "https://[fe80::1]/",
    "https://[ff02::1]/",
    "https://[2001:db8::1]/",
)


@pytest.mark.parametrize("url", REFUSED)
def test_a_url_that_leads_inside_or_is_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(DestinationRefused) as refused:
        Guard().check(url)
    # What is shown tells nothing of where it would have led.
    assert not any(part in str(refused.value) for part in ("127.0.0.1", "169.254", "::1", "private", "loopback"))


@pytest.mark.parametrize(
    ("url", "plain"),
    [
        ("https://api.example.com", "https://api.example.com"),
        ("https://API.Example.COM:443/v1/", "https://api.example.com/v1"),
        ("HTTPS://api.example.com./v1", "https://api.example.com/v1"),
        ("https://xn--bcher-kva.example/v1", "https://xn--bcher-kva.example/v1"),
        ("https://8.8.8.8/v1", "https://8.8.8.8/v1"),
        ("https://[2606:4700:4700:0:0:0:0:1111]/", "https://[2606:4700:4700::1111]"),
        ("https://0x7f.example.com/", "https://0x7f.example.com"),
    ],
)
def test_a_public_url_is_taken_and_written_in_one_way(url: str, plain: str) -> None:
    destination = Guard().check(url)

    assert destination.url == plain
    assert parse(plain).url == plain


@pytest.mark.parametrize("url", ["https://api.example.com/v1?key=1", "https://api.example.com/v1#x"])
def test_paths_are_added_to_a_base_so_it_has_no_query(url: str) -> None:
    with pytest.raises(DestinationRefused):
        Guard().check_base(url)


ADDRESSES = {
    "8.8.8.8": True,
    "93.184.215.14": True,
    "2606:4700:4700::1111": True,
    "64:ff9b::808:808": True,
    # Next to each special network: outside it.
    "9.255.255.255": True,
    "11.0.0.0": True,
    "100.63.255.255": True,
    "100.128.0.0": True,
    "126.255.255.255": True,
    "128.0.0.0": True,
    "169.253.255.255": True,
    "169.255.0.0": True,
    "172.15.255.255": True,
    "172.32.0.0": True,
    "192.167.255.255": True,
    "192.169.0.0": True,
    "198.17.255.255": True,
    "198.20.0.0": True,
    "223.255.255.255": True,
    # And inside, at both ends.
    "0.0.0.0": False,
    "0.255.255.255": False,
    "10.0.0.0": False,
    "10.255.255.255": False,
    "100.64.0.0": False,
    "100.127.255.255": False,
    "127.0.0.0": False,
    "127.255.255.255": False,
    "169.254.0.0": False,
    "169.254.255.255": False,
    "172.16.0.0": False,
    "172.31.255.255": False,
    "192.0.0.0": False,
    "192.0.0.255": False,
    "192.0.2.1": False,
    "192.88.99.1": False,
    "192.168.0.0": False,
    "192.168.255.255": False,
    "198.18.0.0": False,
    "198.19.255.255": False,
    "198.51.100.1": False,
    "203.0.113.1": False,
    "224.0.0.0": False,
    "239.255.255.255": False,
    "240.0.0.0": False,
    "255.255.255.255": False,
    "::": False,
    "::1": False,
    "::8.8.8.8": False,
    "::ffff:8.8.8.8": False,
    "::ffff:10.0.0.1": False,
    "64:ff9b::a00:1": False,
    "64:ff9b:1::808:808": False,
    "100::1": False,
    "2001::1": False,
    "2001:0:a00:1::": False,
    "2001:20::1": False,
    "2001:db8::1": False,
    "2002:808:808::": False,
    "2002:a00:1::": False,
    "3fff::1": False,
    "5f00::1": False,
    "fc00::1": False,
    "fdff::1": False,
    "fe80::1": False,
    "fec0::1": False,
    "ff02::1": False,
}


@pytest.mark.parametrize(("address", "public"), ADDRESSES.items())
def test_addresses_are_public_or_not(address: str, public: bool) -> None:
    assert is_public(ip_address(address)) is public
    assert Guard().permits(parse("https://models.example.com/"), address) is public


@pytest.mark.parametrize("address", ["", "models.example.com", "127.1", "2130706433", "::1%lo", "fe80::1%eth0"])
def test_what_is_no_plain_public_address_is_never_dialled(address: str) -> None:
    assert not Guard().permits(parse("https://models.example.com/"), address)


@given(st.ip_addresses())
def test_nothing_is_dialled_that_python_knows_to_be_special(address: object) -> None:
    found = ip_address(str(address))
    if not found.is_global or found.is_multicast or (found.is_reserved and found.version == 4):
        # The one exception is how a network without IPv4 writes a public address of it.
        assert not is_public(found) or str(found).startswith("64:ff9b::")


@given(st.text(max_size=60))
def test_any_text_is_a_destination_or_refused(text: str) -> None:
    for url in (text, f"https://{text}", f"https://{text}.example.com/"):
        try:
            destination = Guard().check(url)
        except DestinationRefused:
            continue
        assert destination.scheme == "https"
        assert destination.port == 443
        assert Guard().check(destination.url) == parse(destination.url)


# -- the allow list ------------------------------------------------------------------------------------------------

ALLOW = "ollama, http://10.1.2.3:11434, https://10.9.0.0/16:*, http://models.corp:8000, https://[fd12::/64]:8443, 172.20.0.7"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://ollama/v1", "10.0.0.1"),
        ("https://ollama/v1", "127.0.0.1"),
        ("http://10.1.2.3:11434/v1", "10.1.2.3"),
        ("https://10.9.3.4:8080/v1", "10.9.3.4"),
        ("https://models.example.com/v1", "10.9.3.4"),
        ("https://models.example.com/v1", "::ffff:10.9.3.4"),
        ("http://models.corp:8000/v1", "192.168.7.7"),
        ("https://[fd12::5]:8443/v1", "fd12::5"),
        ("https://172.20.0.7/v1", "172.20.0.7"),
        ("https://models.example.com/v1", "8.8.8.8"),
    ],
)
def test_the_allow_list_opens_what_it_names(url: str, address: str) -> None:
    guard = Guard(allowed=parse_rules(ALLOW))

    assert guard.permits(guard.check(url), address)


@pytest.mark.parametrize(
    "url",
    [
        "http://ollama/v1",
        "https://ollama:8443/v1",
        "https://ollama2/v1",
        "https://x.ollama/v1",
        "http://10.1.2.3/v1",
        "https://10.1.2.3:11434/v1",
        "http://10.1.2.4:11434/v1",
        "http://10.9.3.4/v1",
        "https://10.10.0.1/v1",
        "http://models.corp/v1",
        "https://[fd12::5]/v1",
        "https://[fd13::5]:8443/v1",
        "http://models.example.com:11434/v1",
    ],
)
def test_the_allow_list_opens_nothing_else(url: str) -> None:
    guard = Guard(allowed=parse_rules(ALLOW))

    try:
        destination = guard.check(url)
    except DestinationRefused:
        return
    # A name may lead to what is open by that scheme and port, and nowhere else.
    assert destination.address is None
    inner = ("127.0.0.1", "10.0.0.1", "10.10.0.1", "192.168.7.7", "172.20.0.8", "fd13::5")
    assert [address for address in inner if guard.permits(destination, address)] == []
    assert guard.permits(destination, "8.8.8.8") is (destination.scheme == "https" and destination.port == 443)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        # A name that the list does not have leads where only a listed name may.
        ("https://models.example.com/v1", "10.1.2.3"),
        ("https://models.example.com/v1", "192.168.7.7"),
        ("https://models.example.com/v1", "127.0.0.1"),
        # Another scheme or port than the one that is open.
        ("http://models.corp:8000/v1", "169.254.169.254"),
        ("https://172.20.0.7/v1", "172.20.0.8"),
    ],
)
def test_an_address_counts_with_the_name_that_led_to_it(url: str, address: str) -> None:
    guard = Guard(allowed=parse_rules(ALLOW))

    assert not guard.permits(guard.check(url), address)


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "169.254.170.2", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "::ffff:169.254.169.254",
     "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::", "fe80::a9fe:a9fe"],
)  # fmt: skip
def test_no_allow_list_opens_the_metadata_of_a_cloud(address: str) -> None:
    guard = Guard(allowed=parse_rules("https://0.0.0.0/0:*, https://[::/0]:*, http://0.0.0.0/0:*, evil.test"))
    host = f"[{address}]" if ":" in address else address

    assert not guard.permits(guard.check("https://evil.test/"), address)
    with pytest.raises(DestinationRefused):
        guard.check(f"https://{host}/")


@pytest.mark.parametrize(
    "entry",
    ["http://", "10.0.0.0/33", "10.0.0.1/8", "a b", "ftp://x", "x:port", "x:99999", "http://x/y", "-x", "[::/0"],
)
def test_an_allow_list_that_is_not_one_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match=re.escape(entry)):
        parse_rules(f"models.example.com, {entry}")


@pytest.mark.parametrize("text", ["", "a", "0", "65536", "443;80"])
def test_ports_are_ports(text: str) -> None:
    with pytest.raises(ValueError, match="ports are numbers"):
        parse_ports(text)


def test_settings_with_a_bad_allow_list_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARLEY_OUTGOING_ALLOW", "10.0.0.0/33")

    with pytest.raises(SettingsInvalid, match="PARLEY_OUTGOING_ALLOW"):
        load_settings()


def test_the_settings_say_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARLEY_OUTGOING_ALLOW", "http://10.1.2.3:11434")
    monkeypatch.setenv("PARLEY_OUTGOING_PORTS", "443,8443")
    settings = load_settings().outgoing
    guard = Guard.parse(allow=settings.allow, ports=settings.ports)

    assert guard.check("http://10.1.2.3:11434/v1").port == 11434
    assert guard.check("https://models.example.com:8443/v1").port == 8443


def test_the_answer_is_the_same_for_every_place_inside() -> None:
    found = set()
    for url in ("https://127.0.0.1/", "https://10.0.0.1/", "https://169.254.169.254/", "https://localhost/"):
        with pytest.raises(DestinationRefused) as refused:
            Guard().check(url)
        found.add(str(refused.value))

    assert found == {NOT_PUBLIC}
