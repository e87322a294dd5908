"""Which addresses count as public: a table, nothing is sent anywhere."""

import ipaddress

import pytest

from vreflection.serving.addresses import GLOBAL_UNICAST, carried_addresses, is_loopback, why_not_public

# Private, loopback, link-local (with the metadata service of clouds), carriers', documentation, multicast, reserved.
INNER = ["10.1.2.3", "127.0.0.1", "127.255.0.9", "169.254.169.254", "172.31.0.1", "192.168.0.1", "100.64.0.1"]
INNER += ["0.0.0.0", "0.1.2.3", "192.0.0.8", "192.0.2.1", "192.88.99.1", "198.19.0.1", "198.51.100.1", "203.0.113.1"]
INNER += ["224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"]
OUTER = ["8.8.8.8", "93.184.216.34", "1.1.1.1", "172.32.0.1", "100.128.0.1", "192.0.1.1", "198.20.0.1", "223.255.255.1"]


def groups(v4):
    number = int(ipaddress.IPv4Address(v4))
    return f"{number >> 16:x}:{number & 0xFFFF:x}"


def turned_over(v4):
    return groups(str(ipaddress.IPv4Address(~int(ipaddress.IPv4Address(v4)) & 0xFFFFFFFF)))


CARRIERS = {
    "mapped": lambda v4: f"::ffff:{v4}",
    "compatible": lambda v4: f"::{groups(v4)}",
    "translated": lambda v4: f"::ffff:0:{groups(v4)}",
    "nat64": lambda v4: f"64:ff9b::{groups(v4)}",
    "6to4": lambda v4: f"2002:{groups(v4)}::1",
    "teredo client": lambda v4: f"2001:0:{groups('8.8.8.8')}:8000:0:{turned_over(v4)}",
    "teredo server": lambda v4: f"2001:0:{groups(v4)}:8000:0:{turned_over('8.8.8.8')}",
    "isatap": lambda v4: f"2606:4700::5efe:{groups(v4)}",
    "isatap global": lambda v4: f"2606:4700::200:5efe:{groups(v4)}",
}


@pytest.mark.parametrize("v4", INNER)
def test_what_is_not_public_is_refused_bare_and_carried(v4):
    assert why_not_public(v4)
    for name, carry in CARRIERS.items():
        text = carry(v4)
        if name == "compatible" and v4 == "0.0.0.0":
            assert why_not_public(text) == "unspecified"
            continue
        assert why_not_public(text), (name, text)
        assert ipaddress.IPv4Address(v4) in carried_addresses(ipaddress.IPv6Address(text)), (name, text)


@pytest.mark.parametrize("v4", OUTER)
def test_what_is_public_is_taken_bare_and_carried(v4):
    assert why_not_public(v4) is None
    for name, carry in CARRIERS.items():
        assert why_not_public(carry(v4)) is None, (name, carry(v4))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("::1", "loopback"), ("::", "unspecified"), ("fe80::1", "link-local"), ("fe80::1%eth0", "link-local"),
        ("febf::1", "link-local"), ("fec0::1", "site-local"), ("feff:ffff::1", "site-local"), ("fc00::1", "private"),
        ("fd12:3456::1", "private"), ("ff02::1", "multicast"), ("2001:db8::1", "documentation"),
        ("3fff:fff::1", "documentation"), ("100::1", "discard-only"), ("64:ff9b:1::808:808", "local translation"),
        ("2001:20::1", "protocol assignments"), ("2001:2::1", "protocol assignments"),
        ("5f00::1", "outside the public range"), ("4000::1", "outside the public range"),
        ("200::1", "outside the public range"), ("64:ff9b::a9fe:a9fe", "carries 169.254.169.254, link-local"),
        ("::7f00:1", "carries 127.0.0.1, loopback"), ("127.1", "not an address"), ("localhost", "not an address"),
        ("0x7f000001", "not an address"), ("", "not an address"),
    ],
)  # fmt: skip
def test_reasons(text, reason):
    assert why_not_public(text) == reason


@pytest.mark.parametrize("text", ["2606:2800:220:1::1", "2a00:1450::1", "2400:cb00::1", "2620:fe::fe", "2003::1"])
def test_ordinary_public_addresses(text):
    assert why_not_public(text) is None and ipaddress.ip_address(text) in GLOBAL_UNICAST


def test_loopback_addresses():
    assert all(is_loopback(text) for text in ("127.0.0.1", "127.0.0.2", "127.9.9.9", "::1", "::ffff:127.0.0.3"))
    assert not any(is_loopback(text) for text in ("128.0.0.1", "0.0.0.0", "::", "localhost", "10.0.0.1", ""))
