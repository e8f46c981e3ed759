"""http.request reaches public addresses only, and exactly the address that was judged."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from corral.executor import addresses
from corral.executor.api import OUTPUT_LIMIT
from corral.executor.catalogue import HttpRequest
from corral.executor.http import Fetcher, Names, parse_url
from corral.executor.output import Result
from corral.executor.service import Executor
from corral.protocol.errors import ToolExecFailed
from tests.executor.make import Bench, context

REFUSED = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
    "169.254.169.254", "169.254.0.1", "168.63.129.16", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1",
    "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255",
    "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:169.254.169.254", "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "100::1", "2001::1",
    "2001:0:53aa:64c:0:0:80ff:fffe", "2001:db8::1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "3fff::1", "fc00::1",
    "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "5f00::1", "not an address", "",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "172.32.0.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
LITERALS = [
    "127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "0", "0.0.0.0",
    "localhost", "LOCALHOST", "localhost.", "127.0.0.1.", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
    "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fd00:ec2::254]", "[fe80::1]", "169.254.169.254", "2852039166",
    "0xa9fea9fe", "0251.0376.0251.0376", "127.0.0.1%2e", "①②⑦.⓪.⓪.①", "１２７.０.０.１", "127。0。0。1",
]  # fmt: skip


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert addresses.refusal(address) is not None


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_let_through(address: str) -> None:
    assert addresses.refusal(address) is None


class Server:
    """A real server on loopback that counts who reached it."""

    def __init__(self) -> None:
        self.hits: list[web.Request] = []
        self.bodies: list[str] = []
        self.port = 0
        self.answers: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.hits.append(request)
        self.bodies.append(await request.text())
        answer = self.answers.get(request.path)
        return await answer(request) if answer else web.Response(text=f"hello {request.method} {request.path}")

    def redirect(self, path: str, to: str, status: int = 302) -> None:
        async def answer(request: web.Request) -> web.Response:
            return web.Response(status=status, headers={"Location": to})

        self.answers[path] = answer


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", made.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.port = runner.addresses[0][1]
    yield made
    await runner.cleanup()


async def fetch(fetcher: Fetcher, url: str, tmp_path: Path, **args: object) -> Result:
    request = HttpRequest(url=url, **args)  # type: ignore[arg-type]
    return await fetcher.request(request, context(tmp_path))


def allowing(server: Server, *names: str) -> Fetcher:
    """A fetcher whose server settings let it reach the test's server under these names."""

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    return Fetcher(allowed_private=frozenset((name, server.port) for name in names), resolve=resolve)


@pytest.mark.parametrize("host", LITERALS)
async def test_no_way_of_writing_a_local_address_reaches_a_local_server(
    server: Server, tmp_path: Path, host: str
) -> None:
    bench_executor = Executor()
    bench = Bench(bench_executor, tmp_path)
    outcome = await bench.call("http.request", url=f"http://{host}:{server.port}/")
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error.code == "TOOL_EXEC_FAILED"
    assert outcome.error.message.startswith("$.url: ")
    assert server.hits == []
    await bench_executor.close()


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://example.com/", "gopher://127.0.0.1/", "//example.com/", "example.com", "http://",
        "http:///x", "http://user@example.com/", "http://user:pass@example.com/", "http://:x@example.com/",
        "http://example.com\\@127.0.0.1/", "http://exa mple.com/", "http://example.com/\r\nHost: x", "javascript:1",
        "http://[::1", "http://example.com:99999/", "http://example.com:0/",
    ],
)  # fmt: skip
def test_urls_of_other_kinds_are_refused(url: str) -> None:
    with pytest.raises(ToolExecFailed, match=r"^\$\.url: "):
        parse_url(url)


async def test_one_private_address_among_public_ones_refuses_the_name(server: Server, tmp_path: Path) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["8.8.8.8", "127.0.0.1"]

    with pytest.raises(ToolExecFailed, match="not a public address"):
        await fetch(Fetcher(resolve=resolve), f"http://mixed.example:{server.port}/", tmp_path)
    assert server.hits == []


async def test_a_dns_answer_that_changes_between_judging_and_connecting_is_not_asked_for(
    server: Server, tmp_path: Path
) -> None:
    asked = 0

    async def resolve(host: str, port: int) -> list[str]:
        nonlocal asked
        asked += 1
        return ["8.8.8.8"] if asked == 1 else ["127.0.0.1"]

    with contextlib.suppress(ToolExecFailed, TimeoutError):
        async with asyncio.timeout(0.7):
            await fetch(Fetcher(resolve=resolve), f"http://rebind.example:{server.port}/", tmp_path)
    assert asked == 1
    assert server.hits == []


async def test_the_host_header_keeps_the_name_while_the_connection_goes_to_the_judged_address(
    server: Server, tmp_path: Path
) -> None:
    result = await fetch(allowing(server, "name.example"), f"http://name.example:{server.port}/x?y=1", tmp_path)
    assert result.text.startswith("HTTP 200 OK\n")
    assert result.text.endswith("\n\nhello GET /x")
    assert server.hits[0].headers["Host"] == f"name.example:{server.port}"


async def test_the_allowance_is_for_one_name_and_one_port(server: Server, tmp_path: Path) -> None:
    fetcher = Fetcher(allowed_private=frozenset({("127.0.0.1", server.port)}))
    assert "hello" in (await fetch(fetcher, f"http://127.0.0.1:{server.port}/", tmp_path)).text
    for url in (f"http://127.0.0.2:{server.port}/", f"http://localhost:{server.port}/", "http://127.0.0.1:1/"):
        with pytest.raises(ToolExecFailed, match="not a public address"):
            await fetch(fetcher, url, tmp_path)


@pytest.mark.parametrize(
    "to", ["http://127.0.0.1:{port}/", "http://[::1]:{port}/", "//localhost:{port}/", "http://0x7f.1:{port}/"]
)
async def test_a_redirect_to_loopback_is_refused(server: Server, tmp_path: Path, to: str) -> None:
    server.redirect("/go", to.format(port=server.port))

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    fetcher = Fetcher(allowed_private=frozenset({("name.example", server.port)}), resolve=resolve)
    with pytest.raises(ToolExecFailed, match="not a public address"):
        await fetch(fetcher, f"http://name.example:{server.port}/go", tmp_path)
    assert [hit.path for hit in server.hits] == ["/go"]


@pytest.mark.parametrize("to", ["file:///etc/passwd", "http://u:p@name.example/", "ftp://name.example/"])
async def test_a_redirect_to_another_kind_of_url_is_refused(server: Server, tmp_path: Path, to: str) -> None:
    server.redirect("/go", to)
    with pytest.raises(ToolExecFailed, match="redirects to an address that is refused"):
        await fetch(allowing(server, "name.example"), f"http://name.example:{server.port}/go", tmp_path)


async def test_a_redirect_to_another_origin_loses_the_secrets(server: Server, tmp_path: Path) -> None:
    server.redirect("/same", "/go")
    server.redirect("/go", f"http://other.example:{server.port}/there")
    await fetch(
        allowing(server, "name.example", "other.example"),
        f"http://name.example:{server.port}/same",
        tmp_path,
        headers={"Authorization": "Bearer x", "cookie": "a=b", "X-Kept": "1"},
    )
    first, second, third = (hit.headers for hit in server.hits)
    assert first["Authorization"] == second["Authorization"] == "Bearer x"
    assert "Authorization" not in third
    assert "Cookie" not in third
    assert third["X-Kept"] == "1"


@pytest.mark.parametrize(
    ("status", "sent", "then"),
    [(301, "POST", "GET"), (302, "POST", "GET"), (303, "PUT", "GET"), (307, "POST", "POST"), (308, "PUT", "PUT")],
)
async def test_the_method_after_a_redirect_is_as_the_standard_says(
    server: Server, tmp_path: Path, status: int, sent: str, then: str
) -> None:
    server.redirect("/go", "/there", status)
    url = f"http://name.example:{server.port}/go"
    headers = {"Content-Type": "text/x"}
    await fetch(allowing(server, "name.example"), url, tmp_path, method=sent, body="body", headers=headers)
    assert [hit.method for hit in server.hits] == [sent, then]
    assert server.bodies == ["body", "body" if then == sent else ""]
    assert (server.hits[1].headers.get("Content-Type") == "text/x") == (then == sent)


async def test_redirects_without_end_are_given_up(server: Server, tmp_path: Path) -> None:
    server.redirect("/go", "/go")
    with pytest.raises(ToolExecFailed, match="more than 5 redirects"):
        await fetch(allowing(server, "name.example"), f"http://name.example:{server.port}/go", tmp_path)
    assert len(server.hits) == 6


@pytest.mark.parametrize("name", ["Host", "content-length", "Transfer-Encoding", "Connection", "Proxy-Authorization"])
async def test_headers_that_frame_or_route_a_request_are_not_the_models(
    server: Server, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ToolExecFailed, match=rf"^\$\.headers\.{name}"):
        await fetch(allowing(server, "n.example"), f"http://n.example:{server.port}/", tmp_path, headers={name: "1"})
    assert server.hits == []


async def test_a_header_with_a_line_break_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ToolExecFailed, match="line breaks"):
        await fetch(
            allowing(server, "n.example"), f"http://n.example:{server.port}/", tmp_path, headers={"X": "a\r\nHost: b"}
        )
    assert server.hits == []


async def test_no_proxy_of_the_environment_is_used(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1/")
    assert "hello" in (await fetch(allowing(server, "n.example"), f"http://n.example:{server.port}/", tmp_path)).text


async def test_a_body_without_end_is_cut(server: Server, tmp_path: Path) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65536)
        except (ConnectionError, asyncio.CancelledError):
            return response

    server.answers["/"] = endless
    executor = Executor(allowed_private=frozenset({("127.0.0.1", server.port)}))
    outcome = await Bench(executor, tmp_path).call("http.request", url=f"http://127.0.0.1:{server.port}/")
    await executor.close()
    assert outcome.status == "success"
    assert "only the first" in outcome.output
    assert len(outcome.output) <= OUTPUT_LIMIT
    assert outcome.truncated


async def test_a_small_body_that_unpacks_to_a_huge_one_is_cut(server: Server, tmp_path: Path) -> None:
    async def bomb(request: web.Request) -> web.Response:
        return web.Response(body=gzip.compress(b"x" * 50_000_000), headers={"Content-Encoding": "gzip"})

    server.answers["/"] = bomb
    result = await fetch(allowing(server, "n.example"), f"http://n.example:{server.port}/", tmp_path)
    assert len(result.text) < 5_000_000
    assert "only the first" in result.text


async def test_a_server_that_does_not_answer_runs_into_the_calls_time(server: Server, tmp_path: Path) -> None:
    over = asyncio.Event()

    async def never(request: web.Request) -> web.Response:
        await over.wait()
        return web.Response()

    server.answers["/"] = never
    executor = Executor(allowed_private=frozenset({("127.0.0.1", server.port)}))
    outcome = await Bench(executor, tmp_path, timeout_ms=300).call(
        "http.request", url=f"http://127.0.0.1:{server.port}/"
    )
    over.set()
    await executor.close()
    assert outcome.error is not None
    assert outcome.error.code == "LIMIT_REACHED"
    assert "300 ms" in outcome.error.message


async def test_a_status_of_400_and_more_is_an_answer_and_binary_is_said_to_be_binary(
    server: Server, tmp_path: Path
) -> None:
    async def missing(request: web.Request) -> web.Response:
        return web.Response(status=404, body=b"\x89PNG\0\0")

    server.answers["/"] = missing
    result = await fetch(allowing(server, "n.example"), f"http://n.example:{server.port}/", tmp_path)
    assert result.failure is None
    assert result.text.startswith("HTTP 404 Not Found\n")
    assert result.text.endswith("[binary body of 6 bytes]")


async def test_a_connection_that_fails_is_told_without_addresses(tmp_path: Path) -> None:
    fetcher = Fetcher(allowed_private=frozenset({("127.0.0.1", 1)}))
    with pytest.raises(ToolExecFailed) as caught:
        await fetch(fetcher, "http://127.0.0.1:1/", tmp_path)
    assert caught.value.message == "the request failed: no connection to the server"


async def test_names_that_nobody_answers_for_keep_no_other_from_being_looked_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The models' clients look names up by the loop, which has few threads for that."""
    answered, asked = threading.Event(), threading.Semaphore(0)
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **more: Any) -> Any:
        if host == "silent.example":
            asked.release()
            answered.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(max_workers=2)
    loop.set_default_executor(pool)
    fetcher = Fetcher(resolve=Names(at_once=3))

    async def ask() -> str:
        with pytest.raises(ToolExecFailed) as refused:
            await fetch(fetcher, "http://silent.example/", tmp_path)
        return str(refused.value)

    try:
        calls = [asyncio.create_task(ask()) for _ in range(4)]
        async with asyncio.timeout(30):
            for _ in range(3):
                await asyncio.get_running_loop().run_in_executor(None, asked.acquire)
            assert await loop.getaddrinfo("127.0.0.1", 80)
            # Who gives up leaves a thread at work, in whose place no other comes.
            given_up = calls.pop(0)
            given_up.cancel()
            await asyncio.wait([given_up])
            for _ in range(5):
                await asyncio.sleep(0)
            assert sum(thread.name == "corral-name" for thread in threading.enumerate()) == 3
            answered.set()
            assert await asyncio.gather(*calls) == ["$.url: the name silent.example cannot be resolved"] * 3
    finally:
        answered.set()
        pool.shutdown()
