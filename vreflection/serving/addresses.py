"""Which network addresses are public: from tables of our own, so that the answer is the same on every Python version.

The tables follow IANA's registries of special-purpose addresses (RFC 6890 and its updates). Addresses that carry an
IPv4 address inside are judged by what they carry.
"""

from __future__ import annotations

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

NOT_PUBLIC_V4 = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "shared by carriers",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link-local",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "protocol assignments",
    "192.0.2.0/24": "documentation",
    "192.88.99.0/24": "relay anycast",
    "192.168.0.0/16": "private",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
}
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
NOT_PUBLIC_V6 = {
    "2001::/23": "protocol assignments",
    "2001:db8::/32": "documentation",
    "3fff::/20": "documentation",
}
# What a name says that lies outside the global unicast range.
OUTSIDE_V6 = {
    "::1/128": "loopback",
    "::/128": "unspecified",
    "64:ff9b:1::/48": "local translation",
    "100::/64": "discard-only",
    "fc00::/7": "private",
    "fe80::/10": "link-local",
    "fec0::/10": "site-local",
    "ff00::/8": "multicast",
}
_V4 = {ipaddress.IPv4Network(network): why for network, why in NOT_PUBLIC_V4.items()}
_V6 = {ipaddress.IPv6Network(network): why for network, why in {**NOT_PUBLIC_V6, **OUTSIDE_V6}.items()}
# Networks whose last 32 bits are an IPv4 address: mapped, translated, compatible, NAT64.
_CARRY_LAST = [ipaddress.IPv6Network(n) for n in ("::ffff:0:0/96", "::ffff:0:0:0/96", "::/96", "64:ff9b::/96")]
_6TO4, _TEREDO = ipaddress.IPv6Network("2002::/16"), ipaddress.IPv6Network("2001::/32")
_ISATAP = (0x00005EFE, 0x02005EFE)  # the upper half of an interface identifier that ends with an IPv4 address


def why_not_public(text: str) -> str | None:
    """What keeps an address from being a public one, or None.

    Args:
        text: an IPv4 or IPv6 address, with or without a zone.
    """
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return "not an address"
    if isinstance(address, ipaddress.IPv4Address):
        return _why_not_v4(address)
    for carried in carried_addresses(address):
        reason = _why_not_v4(carried)
        if reason is not None:
            return f"carries {carried}, {reason}"
    if address not in _TEREDO:
        for network, reason in _V6.items():
            if address in network:
                return reason
    if address not in GLOBAL_UNICAST and not any(address in network for network in _CARRY_LAST):
        return "outside the public range"
    return None


def carried_addresses(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses inside an IPv6 address: mapped, compatible, translated, NAT64, 6to4, Teredo, ISATAP."""
    number = int(address)
    bits = []
    special = address in (ipaddress.IPv6Address("::"), ipaddress.IPv6Address("::1"))
    if any(address in network for network in _CARRY_LAST) and not special:
        bits.append(number)
    elif address in _6TO4:
        bits.append(number >> 80)
    elif address in _TEREDO:
        bits += [number >> 64, ~number]  # the server, and the client with its bits turned over
    if number >> 32 & 0xFFFFFFFF in _ISATAP:
        bits.append(number)
    return [ipaddress.IPv4Address(value & 0xFFFFFFFF) for value in bits]


def is_loopback(text: str) -> bool:
    """Whether an address literal is of this machine's loopback: all of 127/8, `::1`, or those carried in IPv6."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def _why_not_v4(address: ipaddress.IPv4Address) -> str | None:
    for network, reason in _V4.items():
        if address in network:
            return reason
    return None
