"""Which IP addresses a tool may connect to: public ones, whatever form they are written in."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

# IANA IPv4 Special-Purpose Address Registry, multicast, reserved.
_REFUSED_4 = [
    (IPv4Network(network), why)
    for network, why in (
        ("0.0.0.0/8", "unspecified"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared (carrier-grade NAT)"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local or metadata"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved"),
        ("192.0.2.0/24", "documentation"),
        ("192.88.99.0/24", "6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved or broadcast"),
        ("168.63.129.16/32", "metadata"),
    )
]
_MAPPED = IPv6Network("::ffff:0:0/96")
_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_6 = IPv6Network("2000::/3")
"""All unicast addresses that IANA has given out are in here; all else is private, local or reserved."""
_REFUSED_6 = [
    (IPv6Network(network), why)
    for network, why in (
        ("2001::/32", "Teredo"),
        ("2001::/23", "reserved"),
        ("2001:db8::/32", "documentation"),
        ("2002::/16", "6to4"),
        ("3fff::/20", "documentation"),
    )
]


def refusal(text: str) -> str | None:
    """Why no connection to this address may be made, None if it is public. What is no address is refused."""
    try:
        address = ip_address(text)
    except ValueError:
        return "not an IP address"
    return _refusal_4(address) if isinstance(address, IPv4Address) else _refusal_6(address)


def _refusal_4(address: IPv4Address) -> str | None:
    return next((why for network, why in _REFUSED_4 if address in network), None)


def _refusal_6(address: IPv6Address) -> str | None:
    # The two forms by which IPv4 hosts are reached in earnest are judged by the address inside.
    if address in _MAPPED or address in _NAT64:
        return _refusal_4(IPv4Address(int(address) & 0xFFFF_FFFF))
    if address not in _GLOBAL_6:
        return "private, local, multicast or reserved"
    return next((why for network, why in _REFUSED_6 if address in network), None)
