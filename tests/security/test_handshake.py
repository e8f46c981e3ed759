"""The handshake against hostile pages, names and addresses (SECURITY-CASES.md, parts 1 and 2).

Upgrades are written by hand: no library adds a header that the attacker would not send.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from corral.gateway.origin import OriginPolicy
from tests.support.house import TOKEN, House, house
from tests.support.wire import Wire, raw_http, rpc, upgrade_request

ALLOWED_ORIGIN = "https://app.corral.example"
ALLOWED_HOST = "box.corral.example"


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path, allowed_origins=[ALLOWED_ORIGIN], allowed_hosts=[ALLOWED_HOST]) as running:
        yield running


def port_of(home: House) -> str:
    return home.url.rpartition(":")[2]


async def upgrade(home: House, *headers: str) -> int:
    status, _ = await raw_http(
        home.url, upgrade_request(*(header.replace("PORT", port_of(home)) for header in headers))
    )
    return status


# ---- T-origin-matrix


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost:PORT",
        "http://127.0.0.1:PORT",
        "https://127.0.0.1:PORT",
        "http://[::1]:PORT",
        "http://LOCALHOST:PORT",
        f"http://{ALLOWED_HOST}:PORT",
        ALLOWED_ORIGIN,
        ALLOWED_ORIGIN.upper(),
    ],
)
async def test_a_page_of_our_own_or_on_the_list_is_let_through(home: House, origin: str) -> None:
    assert await upgrade(home, "Host: localhost:PORT", f"Origin: {origin}") == 101


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "http://evil.example",
        "http://evil.example:PORT",
        "http://localhost",
        "http://localhost:1",
        "http://localhost:PORT.evil.example",
        "http://localhost:PORT/",
        "http://localhost:PORT@evil.example",
        "http://localhost.evil.example:PORT",
        "http://127.0.0.1.evil.example:PORT",
        "http://127.evil.com:PORT",
        "http://2130706433:PORT",
        "http://0x7f.1:PORT",
        "file://localhost:PORT",
        "chrome-extension://localhost:PORT",
        "ftp://127.0.0.1:PORT",
        "https://app.corral.example.evil.example",
        "https://app.corral.example:444",
        "http://app.corral.example",
        "https://xapp.corral.example",
        "http://10.0.0.1:PORT",
        "http://[::2]:PORT",
    ],
)
@pytest.mark.parametrize("client", ["cli", "browser"])
async def test_a_foreign_page_is_refused_before_the_upgrade_whatever_the_client_calls_itself(
    home: House, origin: str, client: str
) -> None:
    extra = (
        [] if client == "browser" else ["User-Agent: corral-cli/1.0", "X-Corral-Client: cli", "Sec-Fetch-Site: none"]
    )
    assert await upgrade(home, "Host: localhost:PORT", f"Origin: {origin}", *extra) == 403
    assert await upgrade(home, "Host: localhost:PORT", f"Origin: {origin}", f"Authorization: Bearer {TOKEN}") == 403


async def test_two_origins_are_none_of_ours(home: House) -> None:
    ours = "Origin: http://localhost:PORT"
    assert await upgrade(home, "Host: localhost:PORT", ours, "Origin: http://evil.example") in (400, 403)


async def test_without_an_origin_a_client_gets_to_authentication_and_no_further(home: House) -> None:
    async with await Wire.open(home.url) as wire:
        assert (await wire.call("sessions.list"))["error"]["code"] == "UNAUTHORIZED"
        assert (await wire.call("connect", {}))["error"]["code"] == "UNAUTHORIZED"
        assert await wire.closed() == 4401


async def test_null_is_foreign_even_if_somebody_lists_it() -> None:
    policy = OriginPolicy("127.0.0.1", [], ["null"])
    assert not policy.origin_allowed(["null"], "127.0.0.1", 7077)


# ---- T-rebind

PATHS = ["/ws", "/rpc", "/healthz", "/readyz", "/metrics", "/v1/sessions/s_1/events", "/", "/no/such/path"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "host",
    [
        "evil.example:PORT",
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:PORT",
        "127.evil.com",
        None,
    ],
)
async def test_a_name_that_is_not_ours_is_refused_on_every_path(home: House, path: str, host: str | None) -> None:
    headers = [f"Host: {host}"] if host is not None else []
    assert await upgrade_at(home, path, *headers) in ((403,) if host is not None else (400, 403))
    plain = [f"GET {path} HTTP/1.1", *headers, f"Authorization: Bearer {TOKEN}", "Connection: close"]
    status, text = await raw_http(home.url, ("\r\n".join(plain).replace("PORT", port_of(home)) + "\r\n\r\n").encode())
    assert status in (400, 403)
    assert "listening" not in text


async def upgrade_at(home: House, path: str, *headers: str) -> int:
    given = (header.replace("PORT", port_of(home)) for header in headers)
    return (await raw_http(home.url, upgrade_request(*given, path=path)))[0]


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:1",
        "localhost:PORT",
        "127.0.0.1",
        "127.0.0.1:9",
        "127.255.0.3",
        "[::1]",
        "[::1]:PORT",
        "[::ffff:127.0.0.1]:PORT",
        ALLOWED_HOST,
        f"{ALLOWED_HOST}:443",
    ],
)
async def test_our_names_are_answered_whatever_the_port(home: House, host: str) -> None:
    assert await upgrade(home, f"Host: {host}") == 101


@pytest.mark.parametrize(
    "host",
    [
        "127.1",
        "0x7f.0.0.1",
        "2130706433",
        "0177.0.0.1",
        "0.0.0.0",
        "[::]",
        "10.0.0.1",
        "localhost:PORT@evil.example",
        "evil.example#localhost",
        "localhost localhost",
        "localhost,evil.example",
        "[::1",
        "::1",
        "localhost:notaport",
        "",
    ],
)
async def test_what_only_looks_like_one_of_our_names_is_refused(home: House, host: str) -> None:
    assert await upgrade(home, f"Host: {host}") in (400, 403)


async def test_two_hosts_or_a_target_with_its_own_host_are_refused(home: House) -> None:
    assert await upgrade(home, "Host: localhost", "Host: evil.example") in (400, 403)
    absolute = upgrade_request("Host: localhost").replace(b"GET /ws", b"GET http://evil.example/ws")
    assert (await raw_http(home.url, absolute))[0] in (400, 403)


def test_the_address_that_the_socket_was_accepted_on_is_ours_and_a_wildcard_is_no_name() -> None:
    policy = OriginPolicy("0.0.0.0", [], [])
    assert policy.host_allowed(["192.168.7.4:7077"], "192.168.7.4")
    assert policy.host_allowed(["192.168.7.4"], "::ffff:192.168.7.4")
    assert not policy.host_allowed(["192.168.7.5"], "192.168.7.4")
    assert not policy.host_allowed(["0.0.0.0:7077"], "192.168.7.4")
    assert not policy.host_allowed(["localhost", "localhost"], "192.168.7.4")
    assert not policy.host_allowed([], "192.168.7.4")
    assert OriginPolicy("box.lan", [], []).host_allowed(["BOX.lan:1"], "192.168.7.4")


# ---- T-routes


async def test_every_route_without_a_token_is_401_health_apart(home: House) -> None:
    routes: set[tuple[str, str]] = set()
    for resource in home.server.gateway._runner.app.router.resources():
        for route in resource:
            path = resource.canonical.replace("{rest}", "x").replace("{session_id}", "s_1")
            routes.add(("POST" if route.method == "*" else route.method, path))
    published = {"/metrics", "/schema/protocol.json", "/openapi.json", "/v1/sessions/s_1/events"}
    assert {("GET", "/ws"), ("POST", "/rpc"), ("POST", "/rpc/x"), ("POST", "/x")} <= routes
    assert {("POST", path) for path in published} <= routes
    health = {"/healthz", "/readyz"}
    routes |= {("GET", path) for path in published | health}
    for method, path in sorted(routes):
        for authorization in ("", "Authorization: Bearer wrong\r\n", "Authorization: Bearer \r\n"):
            request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{authorization}Content-Length: 0\r\n\r\n"
            status, _ = await raw_http(home.url, request.encode())
            expected = 404 if path == "/x" else 401
            if path in health:
                expected = 200 if method == "GET" else 405
            assert (method, path, status) == (method, path, expected)


# ---- T-scopes, T-identity


async def test_what_a_client_says_of_itself_widens_nothing(home: House) -> None:
    viewer = await home.add_token("viewer", roles=["viewer"])
    claims: dict[str, Any] = {
        "roles": ["owner"],
        "scopes": ["operator.admin"],
        "principal": {"roles": ["owner"], "tenantId": "t_other"},
        "client": {"name": "cli", "version": "1", "roles": ["owner"]},
    }
    headers = {"X-Corral-Roles": "owner", "X-Forwarded-User": "u_owner", "X-OpenClaw-Scopes": "operator.admin"}
    async with await Wire.open(home.url, headers=headers) as wire:
        hello = await wire.connect(viewer, **claims)
        assert hello["principal"]["roles"] == ["viewer"]
        assert hello["principal"]["tenantId"] == "t_default"
        for params in ({}, {"actor": "u_owner", "roles": ["owner"]}):
            response = await wire.call("sessions.create", {"idempotencyKey": "k", **params})
            assert response["error"]["code"] == "FORBIDDEN"
    answer = await rpc(home.url, "sessions.create", {"idempotencyKey": "k"}, token=viewer, headers=headers)
    assert answer.code == "FORBIDDEN"


async def test_actor_and_owner_in_params_change_nothing_and_a_foreign_tenant_is_forbidden(home: House) -> None:
    ann = await home.add_token("ann")
    async with await home.wire(ann) as wire:
        made = await wire.effect("sessions.create", actor="u_owner", ownerUserId="u_owner", visibility="workspace")
        assert made["session"]["ownerUserId"] == "ann"
        assert made["session"]["tenantId"] == "t_default"
        assert (await wire.call("sessions.list", {"tenantId": "t_other"}))["error"]["code"] == "FORBIDDEN"
        assert (await wire.call("sessions.list", {"workspaceId": "w_other"}))["error"]["code"] == "FORBIDDEN"
        assert (await wire.call("sessions.list", {"tenantId": "t_default", "workspaceId": "w_default"}))["ok"] is True


async def test_a_token_that_names_no_tenant_is_no_token(home: House) -> None:
    token = await home.add_token("lost", tenant_id="", workspaces=[])
    assert (await rpc(home.url, "sessions.list", {}, token=token)).status == 401


SPOILT = [
    b"\0\1\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET http://[ HTTP/1.1\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nAuthorization : Bearer %b\r\n\r\n" % TOKEN.encode(),
    b"GET /healthz HTTP/1.1\r\nAuthorization: Bearer %b\0\r\n\r\n" % TOKEN.encode(),
    b"GET /healthz HTTP/1.1\r\nAuthorization: Bearer %b%b\r\n\r\n" % (TOKEN.encode(), b"x" * 9000),
]


@pytest.mark.parametrize(
    "request_", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"POST /rpc HTTP/1.1\r\nHost: evil\r\n\r\n", *SPOILT]
)
async def test_errors_and_headers_tell_nothing_of_the_inside(
    home: House, request_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does a log line repeat what came, with the token in it; and no stranger can fill the log with tracebacks."""
    caplog.set_level(logging.DEBUG)
    status, text = await raw_http(home.url, request_)
    assert status == (400 if request_ in SPOILT else 404 if b"localhost" in request_ else 403)
    assert "content-type: application/json" in text.lower()
    assert "server: corral" in text.lower()
    for word in ("aiohttp", "python", "traceback", TOKEN):
        assert word not in text.lower()
    assert TOKEN not in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING or record.exc_info] == []
