"""A client that does not read: it is closed with 4410, alone, and its memory is given back."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import struct
from pathlib import Path
from typing import Any

import msgspec

from corral.gateway.connection import Connection, ConnectionState
from corral.gateway.options import GatewayOptions
from tests.support.house import TOKEN, House, house
from tests.support.model_server import Say
from tests.support.wire import Wire, upgrade_request

TINY = GatewayOptions(outbox_bytes=1024 * 1024, outbox_mark_bytes=128 * 1024)


class Lazy:
    """A WebSocket made by hand over a socket whose receive buffer is small and which reads when it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, url: str) -> Lazy:
        host, port = url.removeprefix("http://").split(":")
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
        # A limit of one byte: asyncio does not read ahead either.
        reader, writer = await asyncio.open_connection(sock=sock, limit=1)
        writer.write(upgrade_request(f"Host: {host}:{port}"))
        while await reader.readexactly(1) != b"\n" or await reader.readexactly(2) != b"\r\n":
            pass
        return cls(reader, writer)

    async def send(self, method: str, params: Any) -> None:
        data = json.dumps({"type": "req", "id": method, "method": method, "params": params}).encode()
        length = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack("!H", len(data))
        self._writer.write(b"\x81" + length + b"\0\0\0\0" + data)
        await self._writer.drain()

    async def receive(self) -> tuple[int, bytes]:
        """(opcode, data) of the next frame."""
        head = await self._reader.readexactly(2)
        length = head[1] & 0x7F
        if length == 126:
            (length,) = struct.unpack("!H", await self._reader.readexactly(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", await self._reader.readexactly(8))
        return head[0] & 0x0F, await self._reader.readexactly(length)

    async def rest(self) -> tuple[list[Any], int]:
        """Read to the end: the JSON frames, and the close code (0: cut off without one)."""
        frames: list[Any] = []
        while True:
            try:
                opcode, data = await self.receive()
            except (asyncio.IncompleteReadError, ConnectionError):
                return frames, 0
            if opcode == 8:
                return frames, struct.unpack("!H", data[:2])[0]
            if opcode == 1:
                frames.append(json.loads(data))

    def close(self) -> None:
        self._writer.transport.abort()


async def follow(home: House, session: str) -> Lazy:
    lazy = await Lazy.open(home.url)
    await lazy.send("connect", {"auth": {"token": TOKEN}})
    await lazy.receive()
    await lazy.send("events.subscribe", {"sessionId": session})
    await lazy.receive()
    return lazy


def connections(home: House) -> list[Connection]:
    return [peer for peer in home.server.gateway._peers if isinstance(peer, Connection)]


RUNS = 50
EVENTS = 3 * RUNS
"""What `flood` adds to the journal: more than the kernel keeps for a socket (some MiB on loopback)."""


async def flood(actor: Wire, session: str) -> None:
    """Runs one after another, each with an event of 200 KiB and two small ones."""
    for number in range(RUNS):
        run = await actor.effect("agent.run", input=f"{number} " + "x" * 200_000, sessionId=session)
        await actor.event("agent.completed", runId=run["runId"])


async def stuck(connection: Connection) -> None:
    """Until the kernel takes no more of the connection's backlog: it has been full for some turns of the loop."""
    async with asyncio.timeout(60):
        taken, since = -1, 0
        while since < 20:
            full = connection.outbox.waiting_bytes >= TINY.outbox_mark_bytes
            since = since + 1 if full and connection.outbox.taken == taken else 0
            taken = connection.outbox.taken
            await asyncio.sleep(0.01)


async def test_a_client_too_far_behind_sees_4410_when_it_reads_again_and_has_no_gap_before_it(tmp_path: Path) -> None:
    options = msgspec.structs.replace(TINY, close_grace=30.0)
    running = house(tmp_path, script=[Say("ok")], options=options, compaction=False)
    async with running as home, await home.wire() as actor, await home.wire() as quick:
        session = (await actor.effect("sessions.create"))["session"]["id"]
        await quick.request("events.subscribe", {"sessionId": session})
        lazy = await follow(home, session)
        try:
            await flood(actor, session)
            frames, code = await lazy.rest()
        finally:
            lazy.close()
        assert code == 4410
        durable = [frame["stateVersion"] for frame in frames if frame["event"] != "agent.delta"]
        assert [frame["seq"] for frame in frames] == list(range(1, len(frames) + 1))
        assert durable == list(range(2, 2 + len(durable)))
        assert len(durable) < EVENTS
        # Nobody else noticed, and the position that was reached is good to go on from.
        await quick.until(lambda: len(quick.durable) == EVENTS)
        async with await home.wire() as again:
            await again.request("events.subscribe", {"sessionId": session, "after": durable[-1]})
            await again.until(lambda: len(again.durable) == EVENTS - len(durable))


async def test_a_client_that_never_reads_again_is_cut_off_after_the_grace(tmp_path: Path) -> None:
    options = msgspec.structs.replace(TINY, close_grace=0.3)
    async with (
        house(tmp_path, script=[Say("ok")], options=options, compaction=False) as home,
        await home.wire() as actor,
    ):
        session = (await actor.effect("sessions.create"))["session"]["id"]
        lazies = [await follow(home, session) for _ in range(5)]
        await flood(actor, session)
        await home.sockets_gone(left=1)
        gc.collect()
        assert sum(isinstance(thing, Connection) for thing in gc.get_objects()) == 1
        for lazy in lazies:
            lazy.close()


async def test_a_backlog_waits_for_its_reader_instead_of_filling_memory(tmp_path: Path) -> None:
    async with house(tmp_path, script=[Say("ok")], options=TINY, compaction=False) as home, await home.wire() as actor:
        session = (await actor.effect("sessions.create"))["session"]["id"]
        await flood(actor, session)
        lazy = await Lazy.open(home.url)
        try:
            await lazy.send("connect", {"auth": {"token": TOKEN}})
            await lazy.receive()
            await lazy.send("events.subscribe", {"sessionId": session, "after": 0})
            await lazy.receive()
            most = 0
            for _ in range(50):
                await asyncio.sleep(0.01)
                most = max(most, *(connection.outbox.waiting_bytes for connection in connections(home)))
            # One event beyond the mark and no more, however long the backlog.
            assert 0 < most < TINY.outbox_mark_bytes + 201_000
            seen: list[int] = []
            while len(seen) < EVENTS + 1:
                _, data = await lazy.receive()
                seen.append(json.loads(data)["stateVersion"])
            assert seen == list(range(1, EVENTS + 2))
        finally:
            lazy.close()


async def test_a_client_that_hangs_up_in_the_middle_of_its_backlog_takes_nothing_with_it(tmp_path: Path) -> None:
    async with house(tmp_path, script=[Say("ok")], options=TINY, compaction=False) as home, await home.wire() as actor:
        session = (await actor.effect("sessions.create"))["session"]["id"]
        await flood(actor, session)
        others = connections(home)
        lazy = await Lazy.open(home.url)
        try:
            await lazy.send("connect", {"auth": {"token": TOKEN}})
            await lazy.receive()
            await lazy.send("events.subscribe", {"sessionId": session, "after": 0})
            await lazy.receive()
            [connection] = [each for each in connections(home) if each not in others]
            await stuck(connection)
            # It says goodbye and still reads nothing: what waits for it stays for the grace.
            lazy._writer.write(b"\x88\x80\0\0\0\0")
            async with asyncio.timeout(60):
                # Closing lasts as long as the grace, or no time at all if the kernel took the rest meanwhile.
                while connection.state is ConnectionState.CONNECTED:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            lazy.close()
        await home.sockets_gone(left=1)
        assert (await actor.request("sessions.get", {"sessionId": session}))["session"]["id"] == session


async def test_a_backlog_that_nobody_reads_ends_with_4410(tmp_path: Path) -> None:
    options = msgspec.structs.replace(TINY, stall_timeout=0.4, close_grace=30.0)
    async with (
        house(tmp_path, script=[Say("ok")], options=options, compaction=False) as home,
        await home.wire() as actor,
    ):
        session = (await actor.effect("sessions.create"))["session"]["id"]
        await flood(actor, session)
        lazy = await Lazy.open(home.url)
        try:
            await lazy.send("connect", {"auth": {"token": TOKEN}})
            await lazy.receive()
            await lazy.send("events.subscribe", {"sessionId": session, "after": 0})
            async with asyncio.timeout(60):
                while all(c.state is not ConnectionState.CLOSING for c in connections(home)):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert (await lazy.rest())[1] == 4410
        finally:
            lazy.close()


async def test_deltas_that_wait_are_merged_and_the_text_stays_whole(tmp_path: Path) -> None:
    text = "".join(f"piece {number}, " for number in range(4000))
    script = [Say(text, chunks=4000)]
    async with house(tmp_path, script=script) as home, await home.wire() as actor:
        session = (await actor.effect("sessions.create"))["session"]["id"]
        lazy = await follow(home, session)
        try:
            await actor.effect("agent.run", input="x", sessionId=session)
            await actor.event("agent.completed", timeout=60)
            frames: list[Any] = []
            seqs: list[int] = []
            written = ""
            while not frames or frames[-1]["event"] != "agent.completed":
                opcode, data = await lazy.receive()
                assert opcode == 1
                frames.append(json.loads(data))
                seqs.append(frames[-1]["seq"])
                if frames[-1]["event"] == "agent.delta":
                    assert frames[-1]["payload"]["offset"] == len(written)
                    written += frames[-1]["payload"]["delta"]
            assert written == text
            assert seqs == list(range(1, len(seqs) + 1))
        finally:
            lazy.close()
