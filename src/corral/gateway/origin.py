"""Who may speak to this server at all: the Host and Origin checks, before anything else is looked at.

A web page that was loaded from elsewhere can make a browser send requests here, under a
foreign `Origin`, or under a foreign `Host` after rebinding its own name to this address. Both
are refused, whatever the client says it is.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from aiohttp import web

from corral.protocol.errors import Forbidden

_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[^\s:/?#@\[\]\\]+)(?::(?P<port>[0-9]{0,5}))?")
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<name>\[[0-9A-Fa-f:.]+\]|[^\s:/?#@\[\]\\]+)(?::(?P<port>[0-9]{1,5}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class OriginPolicy:
    """Which names this server answers to, and which pages may call it."""

    def __init__(self, host: str, allowed_hosts: Iterable[str], allowed_origins: Iterable[str]) -> None:
        self._names = {_canonical(name) for name in allowed_hosts}
        self._names.add("localhost")
        configured = _literal(host)
        # `0.0.0.0` and `::` are where to listen, not names of anything.
        if configured is None or not configured.is_unspecified:
            self._names.add(_canonical(host))
        self._origins = {origin.strip().rstrip("/").lower() for origin in allowed_origins}

    def check(self, request: web.BaseRequest) -> None:
        """Raises Forbidden unless the request's Host and, if there is one, its Origin are ours.

        An absent Origin is no proof of anything: the request goes on to authentication.
        """
        transport = request.transport
        local = transport.get_extra_info("sockname") if transport is not None else None
        address, port = (str(local[0]), int(local[1])) if isinstance(local, tuple) else ("", 0)
        if not self.host_allowed(request.headers.getall("Host", []), address):
            raise Forbidden("the Host header names another server")
        if not request.raw_path.startswith("/") and request.raw_path != "*":
            # An absolute request target names a host of its own, past the Host header.
            raise Forbidden("the request target must be a path")
        origins = request.headers.getall("Origin", [])
        if origins and not self.origin_allowed(origins, address, port):
            raise Forbidden("the Origin header names a foreign page")

    def host_allowed(self, values: list[str], local_address: str) -> bool:
        """Whether there is exactly one Host and its name, whatever its port, is one of this server's."""
        if len(values) != 1:
            return False
        found = _HOST.fullmatch(values[0].strip())
        return found is not None and self._ours(found["name"], local_address)

    def origin_allowed(self, values: list[str], local_address: str, port: int) -> bool:
        """Whether the one Origin is on the allow-list, or is this very server, name and port."""
        if len(values) != 1:
            return False
        origin = values[0].strip().lower()
        if origin in self._origins and origin != "null":
            return True
        found = _ORIGIN.fullmatch(origin)
        if found is None:
            return False
        given = int(found["port"]) if found["port"] else _DEFAULT_PORTS[found["scheme"]]
        return given == port and self._ours(found["name"], local_address)

    def _ours(self, name: str, local_address: str) -> bool:
        literal = _literal(name)
        if literal is not None and (literal.is_loopback or literal == _literal(local_address)):
            return True
        return _canonical(name) in self._names


def _literal(name: str) -> _Address | None:
    """The name as an IP address if it is the literal of one, IPv4 mapped into IPv6 as IPv4."""
    try:
        address = ipaddress.ip_address(name.strip("[]").partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _canonical(name: str) -> str:
    literal = _literal(name)
    return str(literal) if literal is not None else name.strip().lower()
