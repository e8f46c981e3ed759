"""What breaks the gateway, and what it stands on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from tests.chaos.expected import Brain
from tests.chaos.gateway import step
from tests.chaos.people import Listener, Person, Place
from tests.support.gateway import Gateway
from tests.support.model_server import ModelServer

LEASE_MS = 30_000
RUN_TIMEOUT_MS = 3_600_000
_FARTHEST_MS = 4 * 3_600_000
"""The clock never strays further: two of these together stay well inside the day that keys are remembered."""


class Monkey:
    """Breaks one thing after the other, each kind once before any comes again, and mends it."""

    def __init__(
        self,
        place: Place,
        gateway: Gateway,
        model: ModelServer,
        brain: Brain,
        clock: Path,
        *,
        disk: Path | None,
        say: Callable[[str], None],
    ) -> None:
        self._place = place
        self._gateway = gateway
        self._model = model
        self._brain = brain
        self._clock = clock
        self._ahead_ms = 0
        self._disk = disk
        self._say = say
        self._rng = place.rng("monkey")
        self.victims: Sequence[Person | Listener] = ()
        self.done: Counter[str] = Counter()
        self.most_memory_kib = 0

    def tricks(self) -> dict[str, Callable[[], Awaitable[None]]]:
        tricks: dict[str, Callable[[], Awaitable[None]]] = {
            "kill": self.kill,
            "kill while starting": self.kill_while_starting,
            "stop": self.stop,
            "freeze": self.freeze,
            "freeze past the lease": self.freeze_past_the_lease,
            "cut the model off": self.cut_the_model_off,
            "step the clock": self.step_the_clock,
            "cut connections": self.cut_connections,
        }
        if self._disk is not None:
            tricks["fill the disk"] = self.fill_the_disk
            tricks["kill on a full disk"] = self.kill_on_a_full_disk
        return tricks

    async def play(self, *, pause: tuple[float, float]) -> None:
        """Until it is over."""
        tricks = self.tricks()
        deck: list[str] = []
        while not await self._place.pause(self._rng.uniform(*pause)):
            if not deck:
                deck = [*tricks, "kill", "cut connections"]
                self._rng.shuffle(deck)
            name = deck.pop()
            self._say(name)
            await self.look_after()
            await tricks[name]()
            self.done[name] += 1

    # ---- the gateway

    async def start(self) -> None:
        await self._gateway.start()
        self._place.opened(self._gateway.url)

    async def kill(self) -> None:
        self._down()
        await self._gateway.kill()
        await self.start()

    async def kill_while_starting(self) -> None:
        self._down()
        await self._gateway.kill()
        for _ in range(self._rng.choice((1, 2))):
            process = await self._gateway.spawn()
            await asyncio.sleep(self._rng.uniform(0.2, 1.2))
            process.kill()
            # Reads what it had to say, so that the pipe is closed with it.
            await process.communicate()
            self._place.expected.kills.append(time.monotonic())
        await self.start()

    async def stop(self) -> None:
        self._place.up.clear()
        begun = time.monotonic()
        code = await self._gateway.stop()
        if code != 0:
            self._place.problems.append(f"SIGTERM ended the gateway with {code}")
        self._say(f"stopped in {time.monotonic() - begun:.1f} s")
        await self.start()

    async def freeze(self) -> None:
        self._gateway.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(self._rng.uniform(0.2, 1.5))
        self._gateway.process.send_signal(signal.SIGCONT)

    async def freeze_past_the_lease(self) -> None:
        """While it is frozen its leases run out by the clock, and another one comes: who must not have the store."""
        self._gateway.process.send_signal(signal.SIGSTOP)
        try:
            self._step(LEASE_MS + self._rng.randrange(60_000))
            other = await self._gateway.spawn()
            said, _ = await other.communicate()
            if (other.returncode, said) != (3, b""):
                self._place.problems.append(
                    f"a second gateway on the data of a frozen one: {other.returncode} {said!r}"
                )
        finally:
            self._gateway.process.send_signal(signal.SIGCONT)

    def _down(self) -> None:
        self._place.up.clear()
        self._place.expected.kills.append(time.monotonic())

    async def look_after(self) -> None:
        """Nobody but the monkey ends the gateway."""
        self._look_at_memory()
        code = self._gateway.process.returncode
        if code is not None:
            self._place.problems.append(f"the gateway ended by itself, with {code}")
            self._down()
            await self.start()

    def _look_at_memory(self) -> None:
        # A process that has just been killed has no memory to look at.
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{self._gateway.process.pid}/status").read_text()
            self.most_memory_kib = max(self.most_memory_kib, int(status.split("VmHWM:")[1].split()[0]))

    # ---- what it stands on

    async def cut_the_model_off(self) -> None:
        port, begun = self._model.port, time.monotonic()
        await self._model.close()
        await asyncio.sleep(self._rng.uniform(0.2, 3))
        self._model = ModelServer(self._brain, port=port)
        await self._model.start()
        self._place.expected.outages.append((begun, time.monotonic()))

    def _step(self, by_ms: int) -> None:
        before, self._ahead_ms = self._ahead_ms, self._ahead_ms + by_ms
        if abs(self._ahead_ms) > _FARTHEST_MS:
            self._ahead_ms = 0
        if self._ahead_ms - before > RUN_TIMEOUT_MS // 2:
            self._place.expected.leaps.append(time.monotonic())
        step(self._clock, self._ahead_ms)

    async def step_the_clock(self) -> None:
        sizes = (500, 5_000, 60_000, 3_600_000, 3 * 3_600_000)
        self._step(self._rng.choice((-1, 1)) * self._rng.choice(sizes))

    async def cut_connections(self) -> None:
        for victim in self.victims:
            if self._rng.random() < 0.5:
                victim.cut()

    async def fill_the_disk(self) -> None:
        self._fill()
        await asyncio.sleep(self._rng.uniform(0.3, 2))
        self._free()

    async def kill_on_a_full_disk(self) -> None:
        """It may not be able to start like that; it must when there is room again."""
        self._fill()
        await asyncio.sleep(self._rng.uniform(0.1, 0.5))
        self._down()
        await self._gateway.kill()
        process = await self._gateway.spawn()
        await asyncio.sleep(self._rng.uniform(0.5, 1.5))
        if process.returncode is None:
            process.kill()
        await process.communicate()
        self._place.expected.kills.append(time.monotonic())
        self._free()
        await self.start()

    def _fill(self) -> None:
        assert self._disk is not None
        with (self._disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(65536))

    def _free(self) -> None:
        assert self._disk is not None
        (self._disk / "filler").unlink()

    async def close(self) -> None:
        await self._model.close()


@contextlib.contextmanager
def small_disk(path: Path, mib: int):  # type: ignore[no-untyped-def]
    """A file system of so many MiB at `path`."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "corral-chaos", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def owner_may_mount() -> bool:
    return os.geteuid() == 0
