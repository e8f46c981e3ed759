"""Starts processes through the fork server (`launcher.py`), collects what they print, ends them.

Measured on a 2-core machine, gateway of 400 MiB, medians of 60 calls of `true`: through the fork server 4 ms
(in bubblewrap 11 ms), the loop held up for 1 to 2 ms at most; `subprocess` in a thread 1 ms (6 to 9 ms); uvloop's
own subprocess 16 ms, all of which the loop stands still. The 3 ms buy what launcher.py's head lists.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from msgspec import Struct

from corral import cores, faults
from corral.executor.leftovers import end_leftovers
from corral.executor.output import Budget, Capture

log = logging.getLogger(__name__)

HELD_BYTES = 4096
"""Bytes of a command that a prepared program takes: what a pipe holds, and what a shell's `read`, which asks
for one byte at a time, has read within two milliseconds."""

_READ_SIZE = 64 * 1024
_DRAIN_S = 1.0
"""How long output is still awaited after the tree is dead; only an unkillable process can hold it."""
_FLOOD_PAUSE_S = 0.002
"""Pause between reads once a program has printed more than is kept: it goes on, and costs little."""
_ANSWER_S = 10.0
"""How long a supervisor may take to kill a tree (it gives up after half of that)."""


class Program(Struct, kw_only=True, frozen=True):
    """What to run. `argv[0]` is looked up in `env["PATH"]`; `limits` are RLIMIT names to values.

    `sandbox` says that it is bubblewrap and takes part in its start-up handshake. `descriptor`, if
    there is one, is the program's descriptor 3; the caller keeps its own and closes it. `held` is a
    sandbox that is set up and then waits to be told its command: for `Processes.prepare`. `system_calls` is a
    sandbox's filter (`syscalls.py`).
    """

    argv: list[str]
    env: dict[str, str]
    cwd: str
    limits: dict[str, int] = {}
    sandbox: bool = False
    descriptor: int | None = None
    held: bool = False
    system_calls: bytes = b""


class Ended(Struct, kw_only=True):
    """How a program ended. When this exists, everything it started is dead, save `leftover`.

    `exit_status` as a shell gives it (128 + signal), None if it did not start; `errno` then says
    why. `started` is false if the sandbox gave up before it started the command; `given` is false if
    a held one never got its command, so that nothing of it can have run.
    """

    exit_status: int | None
    stdout: Capture
    stderr: Capture
    timed_out: bool
    started: bool
    errno: int | None
    leftover: list[str]
    given: bool = True


class LauncherLost(Exception):
    """The fork server or the call's supervisor is gone without an answer."""


class _Supervised:
    """The gateway's ends of one supervisor: its control socket and the program's two streams."""

    def __init__(self, control: socket.socket, stdout: int, stderr: int) -> None:
        self.control = control
        self.stdout = stdout
        self.stderr = stderr

    def forget_output(self) -> None:
        """Read what the program has printed so far, and throw it away."""
        for descriptor in (self.stdout, self.stderr):
            os.set_blocking(descriptor, False)
            with contextlib.suppress(BlockingIOError):
                while os.read(descriptor, _READ_SIZE):
                    continue

    def close(self) -> None:
        """Whatever the supervisor still holds dies of this."""
        self.control.close()
        os.close(self.stdout)
        os.close(self.stderr)


class Prepared:
    """A held program: it has everything but its command."""

    def __init__(self, program: Program, supervised: _Supervised) -> None:
        self.program = program
        self.supervised = supervised

    @property
    def waiting(self) -> bool:
        """False once its supervisor has said or shown that it has ended."""
        try:
            self.supervised.control.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False


class Processes:
    """Runs programs. One fork server, started with the first program, started again if it dies."""

    def __init__(self, mark: str | None = None) -> None:
        """`mark` is what these processes have in common with those of a gateway that died (`leftovers.py`).

        Without one they have a mark that nobody looks for.
        """
        self.mark = mark or f"corral-{secrets.token_hex(16)}"
        self._looked = mark is None
        self._server: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._starting = asyncio.Lock()
        self._running: dict[asyncio.Task[Ended], asyncio.Event] = {}
        self._prepared: set[Prepared] = set()
        self._closed = False

    async def run(self, program: Program, timeout_s: float) -> Ended:
        """Run a program to its end or for `timeout_s` seconds.

        When this returns or raises CancelledError, all that the program started is dead.
        Raises LauncherLost, and OSError if descriptors run out.
        """

        async def work(stop: asyncio.Event) -> Ended:
            return await self._collect(await self._start(program), timeout_s, stop, None)

        return await self._kept(work)

    async def prepare(self, program: Program) -> Prepared:
        """Start a held program, which waits for `run_prepared` or `discard`. Raises as `run` does."""
        supervised = await self._start(program)
        prepared = Prepared(program, supervised)
        self._prepared.add(prepared)
        return prepared

    async def run_prepared(self, prepared: Prepared, text: str, timeout_s: float) -> Ended:
        """Give a prepared program what it waits for, then as `run`.

        `text` has no NUL and less than `HELD_BYTES` bytes.
        """
        self._prepared.discard(prepared)
        return await self._kept(lambda stop: self._collect(prepared.supervised, timeout_s, stop, text))

    async def discard(self, prepared: Prepared) -> None:
        """End a prepared program that is not wanted any more."""
        self._prepared.discard(prepared)
        stop = asyncio.Event()
        stop.set()
        with contextlib.suppress(LauncherLost):  # gone already, which is what was wanted
            await self._collect(prepared.supervised, _ANSWER_S, stop, None)

    async def _kept(self, work: Callable[[asyncio.Event], Coroutine[Any, Any, Ended]]) -> Ended:
        """Do `work`, which ends early once its event is set; do not let go of it when cancelled."""
        stop = asyncio.Event()
        task = asyncio.create_task(work(stop), name="corral-process")
        self._running[task] = stop
        task.add_done_callback(self._running.pop)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            stop.set()
            # A second cancellation must not let go of a tree that still lives.
            while not task.done():
                try:
                    await asyncio.wait([task])
                except asyncio.CancelledError:
                    continue
            if not task.cancelled() and (error := task.exception()) is not None:
                log.warning("a cancelled call did not end well", extra={"action": "tool.kill"}, exc_info=error)
            raise

    async def end_leftovers(self) -> None:
        """End what a gateway that died left running.

        It is done once, and never later than before the first process is started here: what is started
        bears the same mark. Returns when it is done, whoever began it.
        """
        if not self._looked:
            async with self._starting:
                await self._end_leftovers()

    async def _end_leftovers(self) -> None:
        if self._looked:
            return
        ended: list[str] = []
        left: list[str] = []
        try:
            ended, left = await asyncio.to_thread(end_leftovers, self.mark)
        except OSError:
            log.exception("cannot look for what a dead gateway left", extra={"action": "leftovers.unknown"})
        self._looked = True
        if ended:
            log.warning(
                "ended what a dead gateway left running: %s",
                ", ".join(ended)[:2000],
                extra={"action": "leftovers.ended", "count": len(ended)},
            )
        if left:
            log.error(
                "a dead gateway's processes live on: %s", ", ".join(left)[:2000], extra={"action": "leftovers.left"}
            )

    async def close(self) -> None:
        """Kill what runs, end the fork server."""
        self._closed = True
        for prepared in list(self._prepared):
            await self.discard(prepared)
        for stop in self._running.values():
            stop.set()
        if self._running:
            await asyncio.wait(list(self._running))
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._server is not None:
            server, self._server = self._server, None
            await asyncio.to_thread(server.wait)

    async def _start(self, program: Program) -> _Supervised:
        """A supervisor for the program, which it has begun to start."""
        loop = asyncio.get_running_loop()
        connection = await self._connected()
        control, theirs = socket.socketpair()
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        supervised = _Supervised(control, out_read, err_read)
        passed = [theirs.fileno(), out_write, err_write]
        if program.descriptor is not None:
            passed.append(program.descriptor)
        try:
            control.setblocking(False)
            try:
                socket.send_fds(connection, [b"r"], passed)
            except OSError as error:
                await self._lost()
                raise LauncherLost("the fork server is gone") from error
            finally:
                theirs.close()
                os.close(out_write)
                os.close(err_write)
            await _send(
                loop,
                control,
                {
                    "argv": program.argv,
                    "env": program.env,
                    "cwd": program.cwd,
                    "limits": program.limits,
                    "sandbox": program.sandbox,
                    "held": program.held,
                    "filter": program.system_calls.hex(),
                },
            )
        except BaseException:
            supervised.close()
            raise
        return supervised

    async def _collect(self, supervised: _Supervised, timeout_s: float, stop: asyncio.Event, text: str | None) -> Ended:
        """What comes of a program that was started, and given `text` if there is one. Closes its descriptors."""
        loop = asyncio.get_running_loop()
        control = supervised.control
        try:
            budget = Budget()
            stdout, stderr = Capture(budget), Capture(budget)
            pipes = ((supervised.stdout, stdout), (supervised.stderr, stderr))
            pumps = [asyncio.ensure_future(_pump(loop, *pipe)) for pipe in pipes]  # begin when this next waits
            try:
                if text is not None:
                    # What is there came before the command: a shell that does not know the locale, say.
                    supervised.forget_output()
                    await _send(loop, control, {"text": text})
                answer, timed_out = await self._answer(loop, control, timeout_s, stop)
                await asyncio.wait(pumps, timeout=_DRAIN_S)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.wait(pumps)
            return Ended(
                exit_status=answer["exit"],
                stdout=stdout,
                stderr=stderr,
                timed_out=timed_out,
                started=answer["started"],
                errno=answer["error"],
                leftover=answer["leftover"],
                given=answer["given"],
            )
        finally:
            supervised.close()

    async def _answer(
        self, loop: asyncio.AbstractEventLoop, control: socket.socket, timeout_s: float, stop: asyncio.Event
    ) -> tuple[dict[str, Any], bool]:
        """The supervisor's answer, asked to kill the tree when time is up or `stop` is set."""
        reading = asyncio.ensure_future(_receive(loop, control))
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait([reading, stopping], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            in_time = reading.done()
            if not in_time:
                control.shutdown(socket.SHUT_WR)
                await asyncio.wait([reading], timeout=_ANSWER_S)
            if not reading.done():
                raise LauncherLost("the call's supervisor does not answer")
            return reading.result(), not in_time and not stop.is_set()
        finally:
            stopping.cancel()
            reading.cancel()
            await asyncio.wait([stopping, reading])

    async def _connected(self) -> socket.socket:
        async with self._starting:
            if self._closed:
                raise LauncherLost("the executor is closed")
            if self._server is not None and self._server.poll() is not None:
                await self._lost()
            connection = self._connection
            if connection is not None:
                return connection
            await self._end_leftovers()
            server, started = await asyncio.to_thread(_start_server, self.mark)
            self._server, self._connection = server, started
            return started

    async def _lost(self) -> None:
        connection, self._connection = self._connection, None
        server, self._server = self._server, None
        if connection is not None:
            connection.close()
        if server is not None:
            log.error("the fork server ended", extra={"action": "executor.launcher_lost"})
            await asyncio.to_thread(server.wait)


def _start_server(mark: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        # Its own session: Ctrl-C at the gateway's terminal is the gateway's business. Its environment
        # is empty: what the gateway was given (keys, token) is not in it, nor in what it starts.
        # -I -S: nothing from the environment, the working directory or site-packages is imported.
        program = str(Path(__file__).with_name("launcher.py"))
        argv = [sys.executable, "-I", "-S", program, str(theirs.fileno()), mark]
        # What it starts may run on all cores, which is inherited.
        with cores.roaming():
            server = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={},
                cwd="/",
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
    return server, ours


async def _send(loop: asyncio.AbstractEventLoop, control: socket.socket, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    try:
        await loop.sock_sendall(control, len(body).to_bytes(4, "big") + body)
    except OSError as error:
        raise LauncherLost("the call's supervisor did not start") from error


async def _receive(loop: asyncio.AbstractEventLoop, control: socket.socket) -> dict[str, Any]:
    body = b""
    while len(body) < 4 or len(body) < 4 + int.from_bytes(body[:4], "big"):
        try:
            part = await loop.sock_recv(control, 64 * 1024)
        except OSError as error:
            raise LauncherLost("the call's supervisor is gone") from error
        if not part:
            raise LauncherLost("the call's supervisor is gone")
        body += part
    answer: dict[str, Any] = json.loads(body[4:])
    return answer


async def _pump(loop: asyncio.AbstractEventLoop, descriptor: int, capture: Capture) -> None:
    """Read a pipe to its end. What the program prints never blocks it for long, nor the loop."""
    os.set_blocking(descriptor, False)
    while True:
        try:
            data = os.read(descriptor, _READ_SIZE)
        except BlockingIOError:
            await _readable(loop, descriptor)
            continue
        if not data:
            return
        capture.feed(data)
        faults.reached("tool.during", "command")
        await asyncio.sleep(_FLOOD_PAUSE_S if capture.overflowed else 0)


async def _readable(loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, wake)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
