"""Bytes on the port: HTTP requests and WebSocket frames with something wrong in them, as no library sends them.

What must hold: what is answered is answered in the contract's shape and tells nothing of the inside; the
connection ends when the client ends it; the server goes on; and no log line has what was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.fuzz.support import nothing_unexpected
from tests.support.examples import examples
from tests.support.house import TOKEN, House
from tests.support.wire import upgrade_request

pytestmark = pytest.mark.asyncio(loop_scope="module")

INSIDE = ("traceback", "aiohttp", "python", 'file "', "site-packages", TOKEN)


@asynccontextmanager
async def socket(home: House) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = home.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def alive(home: House) -> None:
    """The server answers others. By then it has also looked at what came on other connections before."""
    async with aiohttp.ClientSession() as session, session.get(f"{home.url}/healthz") as answer:
        assert answer.status == 200


async def rest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """End our side, and all that comes until the server ends its own."""
    with contextlib.suppress(OSError):  # the server has hung up already
        writer.write_eof()
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(60):
            while chunk := await reader.read(65536):
                data += chunk
    return bytes(data)


def check_logs(caplog: pytest.LogCaptureFixture) -> None:
    formatter = logging.Formatter()
    for record in caplog.records:
        assert TOKEN not in formatter.format(record)
        assert TOKEN not in str(vars(record))
    nothing_unexpected(caplog)


# ---- HTTP

HEADERS = [
    *(f"Authorization: Bearer {TOKEN}", "Content-Type: application/json", "Host: localhost", "Content-Length: 2"),
    *("Transfer-Encoding: chunked", "Content-Encoding: gzip", "Expect: 100-continue", "Upgrade: websocket"),
    *("Connection: Upgrade", "Connection: close", "Origin: null", "Host: evil", "Host:", "Content-Length: -1"),
    *("Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Range: bytes=0-"),
    *("Last-Event-ID: 1", "X-Forwarded-For: 1", "Content-Type: text/plain; charset=\0", "Cookie: " + "a" * 9000),
]
REQUEST_LINES = [
    *("GET /healthz HTTP/1.1", "POST /rpc HTTP/1.1", "OPTIONS /rpc HTTP/1.1", "GET /ws HTTP/1.1", "HEAD / HTTP/1.1"),
    *("GET /v1/sessions/x/events HTTP/1.1", "GET /metrics HTTP/1.0", "CONNECT localhost:1 HTTP/1.1", "PRI * HTTP/2.0"),
    *(
        "GET http://[ HTTP/1.1",
        "GET /%00%ff/../.. HTTP/1.1",
        "GET //evil HTTP/1.1",
        "TRACE / HTTP/1.1",
        "GET * HTTP/1.1",
    ),
    "GET /" + "a" * 9000 + " HTTP/1.1",
]
BODIES = st.sampled_from([b"", b"{}", b"2\r\n{}\r\n0\r\n\r\n", b"zz\r\n", b"\x1f\x8b\x08\0", b"\0" * 40])


@st.composite
def spoilt(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes of it changed, left out or added."""
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 4]))):
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=2)) + data[place + draw(st.integers(0, 2)) :]
    return data


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    lines = [draw(st.sampled_from(REQUEST_LINES)), *draw(st.lists(st.sampled_from(HEADERS), max_size=6))]
    if draw(st.booleans()):
        lines[1:1] = HEADERS[:4]
    head = ("\r\n".join(lines) + "\r\n\r\n").encode()
    return draw(spoilt(head + draw(BODIES)))


def check_answers(data: bytes) -> None:
    """What came back on a plain connection: whole answers one behind another, the last may be cut off."""
    assert not any(word.encode() in data.lower() for word in INSIDE), data
    while data:
        head, found, data = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1."), head
        if not found:
            return
        status = int(head.split(b" ", 2)[1])
        assert 100 <= status < 500, head
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        if status == 101 or b"transfer-encoding" in fields:
            return
        length = int(fields.get(b"content-length", b"0"))
        body, data = data[:length], data[length:]
        if status >= 400 and len(body) == length > 0:
            said = json.loads(body)
            error = said["response"]["error"] if "response" in said else said["error"]
            assert error["code"] in ("INVALID_REQUEST", "UNAUTHORIZED", "FORBIDDEN", "NOT_FOUND", "RATE_LIMITED"), said


@examples(80)
@given(data=requests(), cut=st.integers(0, 400))
async def test_whatever_comes_as_a_request_is_answered_in_our_words_or_not_at_all(
    home: House, caplog: pytest.LogCaptureFixture, data: bytes, cut: int
) -> None:
    caplog.set_level(logging.DEBUG)
    async with socket(home) as (reader, writer):
        writer.write(data[:cut])
        await alive(home)
        writer.write(data[cut:])
        await alive(home)
        check_answers(await rest(reader, writer))
    check_logs(caplog)


TOKENS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=60),
    st.sampled_from(
        ["' OR 1=1 --", "' UNION SELECT 1", "%", "_" * 32, TOKEN[:-1], TOKEN.upper(), f"{TOKEN} x", "null"]
    ),
)


@examples(40)
@given(scheme=st.sampled_from(["Bearer ", "bearer  ", "", "Basic ", "Bearer Bearer "]), token=TOKENS)
async def test_no_text_in_the_place_of_a_token_opens_anything(home: House, scheme: str, token: str) -> None:
    assume(f"{scheme}{token}".split() != ["Bearer", TOKEN])
    async with socket(home) as (reader, writer):
        fields = f"Authorization: {scheme}{token}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        writer.write(f"POST /rpc HTTP/1.1\r\nHost: localhost\r\n{fields}".encode())
        status = await reader.readline()
        assert status.split()[1] in (b"400", b"401", b"429"), status


# ---- WebSocket

CONNECT = json.dumps({"type": "req", "id": "c", "method": "connect", "params": {"auth": {"token": TOKEN}}}).encode()
ASK = b'{"type":"req","id":"1","method":"sessions.list"}'


def frame(data: bytes, *, opcode: int = 1, first: int = 0x80, masked: bool = True, length: int | None = None) -> bytes:
    """A client's frame. `first` is the FIN and reserved bits; `length` what the head says, if not the truth."""
    said = len(data) if length is None else length
    mask = 0x80 if masked else 0
    if said < 126:
        head = struct.pack("!BB", first | opcode, mask | said)
    elif said < 65536:
        head = struct.pack("!BBH", first | opcode, mask | 126, said)
    else:
        head = struct.pack("!BBQ", first | opcode, mask | 127, said)
    return head + (b"\0\0\0\0" if masked else b"") + data


FRAMES = st.one_of(
    st.just(frame(ASK)),
    st.builds(
        frame,
        st.one_of(st.just(ASK), st.binary(max_size=140), st.sampled_from([b"{", b"\x03\xe8", b"\x03", b"\xff\xff!"])),
        opcode=st.integers(0, 15),
        first=st.sampled_from([0x80, 0x80, 0x80, 0, 0x40, 0xC0, 0xF0]),
        masked=st.sampled_from([True, True, True, False]),
        length=st.sampled_from([None, None, None, 0, 125, 126, 70_000, 2**40, 2**63]),
    ),
)
CLOSES = {1000, 1002, 1003, 1007, 1008, 1009, 1011, 4401, 4408}


def sent_frames(data: bytes) -> list[tuple[int, bytes]]:
    """(opcode, payload) of a server's frames; what was cut off is left out."""
    frames = []
    while len(data) >= 2:
        opcode, size, start = data[0] & 15, data[1], 2
        assert data[0] & 0xF0 == 0x80, data[:20]
        if size == 126:
            size, start = int.from_bytes(data[2:4]), 4
        elif size == 127:
            size, start = int.from_bytes(data[2:10]), 10
        if len(data) < start + size:
            break
        frames.append((opcode, data[start : start + size]))
        data = data[start + size :]
    return frames


@examples(80)
@given(connected=st.booleans(), parts=st.lists(FRAMES, min_size=1, max_size=5), data=st.data())
async def test_whatever_comes_on_a_websocket_is_answered_in_frames_or_ends_it_with_a_code(
    home: House, caplog: pytest.LogCaptureFixture, connected: bool, parts: list[bytes], data: st.DataObject
) -> None:
    caplog.set_level(logging.DEBUG)
    sent = data.draw(spoilt(b"".join(parts)))
    async with socket(home) as (reader, writer):
        writer.write(upgrade_request("Host: localhost"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        if connected:
            writer.write(frame(CONNECT))
        writer.write(sent)
        await alive(home)
        answered = await rest(reader, writer)
    assert not any(word.encode() in answered.lower() for word in INSIDE), answered
    for opcode, payload in sent_frames(answered):
        if opcode == 1:
            said = json.loads(payload)
            assert said["type"] == "res"
            assert said["ok"] or said["error"]["code"] in ("INVALID_REQUEST", "UNAUTHORIZED"), said
        elif opcode == 8:
            assert not payload or int.from_bytes(payload[:2]) in CLOSES, payload
        else:
            assert opcode in (9, 10)
    check_logs(caplog)
