"""The threads of a gateway are kept on one core; what holds no lock of the interpreter's runs anywhere."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from corral import cores
from corral.executor.service import Executor
from corral.storage._sqlite_connections import LONG_STATEMENT, driver
from corral.storage.repositories import Transaction
from corral.storage.sqlite import SqliteStore
from tests.executor.make import Bench, until
from tests.storage.make import FixedClock
from tests.support import needs
from tests.support.gateway import Gateway

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not let us choose")

NUMBERS = LONG_STATEMENT // 5
"""Each takes about ten steps."""

LONG_QUERY = f"""
    WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {NUMBERS})
    SELECT count(*) FROM numbers
"""


def places(pid: int | str = "self") -> list[set[int]]:
    """For each thread of a process the cores that it may use."""
    found = []
    for name in os.listdir(f"/proc/{pid}/task"):
        with suppress(ProcessLookupError):
            found.append(os.sched_getaffinity(int(name)))
    return found


def together(pid: int | str = "self") -> bool:
    """Whether all threads are on the same core and on no other."""
    found = places(pid)
    return len(found[0]) == 1 and all(place == found[0] for place in found)


@pytest.fixture
def everywhere() -> Iterator[set[int]]:
    """The cores that this process may use, two at least. Afterwards all its threads may use them again."""
    needs.cores()
    before = os.sched_getaffinity(0)
    yield before
    for name in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(name), before)


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core is chosen at the beginning, and not again while a test looks."""
    monkeypatch.setattr(cores, "FIRST_S", 0.02)
    monkeypatch.setattr(cores, "EVERY_S", 3600)


@pytest.fixture
def chosen(once: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All cores that were chosen; it is done anew all the time, and never the one before."""
    taken: list[int] = []

    def another(allowed: frozenset[int], home: int | None, *_: Any) -> int:
        taken.append(min(allowed - {home}))
        return taken[-1]

    monkeypatch.setattr(cores, "EVERY_S", 0.02)
    monkeypatch.setattr(cores, "choose", another)
    return taken


@asynccontextmanager
async def kept() -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(cores.keep_together())
    await until(together, "the threads are together")
    yield task
    task.cancel()
    await asyncio.wait([task])


async def test_all_threads_of_a_gateway_are_kept_on_one_core(everywhere: set[int], tmp_path: Path) -> None:
    async with Gateway(tmp_path / "data") as gateway:
        await until(lambda: together(gateway.process.pid), "its threads are together", seconds=60)
        assert len(places(gateway.process.pid)) > 2  # the loop's, the writer's, a reader's


async def test_a_gateway_that_is_told_not_to_leaves_its_threads_alone(everywhere: set[int], tmp_path: Path) -> None:
    async with Gateway(tmp_path / "data", {"CORRAL_ONE_CORE": "false"}) as gateway:
        one = Gateway(tmp_path / "other")
        async with one:
            # By then the other one, which started before, would have done it too.
            await until(lambda: together(one.process.pid), "the threads of another are together", seconds=60)
            assert all(place == everywhere for place in places(gateway.process.pid))


async def test_threads_that_are_not_kept_any_more_may_go_anywhere(everywhere: set[int]) -> None:
    async with kept():
        pass
    assert all(place == everywhere for place in places())


async def test_what_a_tool_starts_may_use_every_core(everywhere: set[int], tmp_path: Path) -> None:
    ask = f"{sys.executable} -c 'import os; print(sorted(os.sched_getaffinity(0)))'"
    executor = Executor()
    try:
        async with kept():
            outcome = await Bench(executor, tmp_path, bash_mode="host").bash(ask)
            await until(together, "the threads are together")
    finally:
        await executor.close()
    assert outcome.output is not None
    assert str(sorted(everywhere)) in outcome.output


async def test_a_query_that_takes_long_leaves_the_core_and_comes_back(everywhere: set[int], tmp_path: Path) -> None:
    def long(tx: Transaction) -> set[int]:
        connection = tx.sessions._connection._connection
        assert connection.execute(text(LONG_QUERY)).scalar_one() == NUMBERS
        return os.sched_getaffinity(0)

    store = await SqliteStore.open(tmp_path / "corral.db", FixedClock())
    try:
        async with kept():
            for ask in (store.read, store.write):
                assert await ask(long) == everywhere
                await until(together, "it has come back")
    finally:
        await store.close()


async def test_the_look_for_damage_is_done_anywhere(everywhere: set[int], tmp_path: Path) -> None:
    seen: list[set[int]] = []
    store = await SqliteStore.open(tmp_path / "corral.db", FixedClock())
    try:

        def watch(tx: Transaction) -> None:
            raw = driver(tx.sessions._connection._connection)
            raw.set_trace_callback(lambda sql: seen.append(os.sched_getaffinity(0)) if "quick_check" in sql else None)

        await store.read(watch)
        async with kept():
            assert await store.quick_check() == []
            await until(together, "it has come back")
    finally:
        await store.close()
    assert seen == [everywhere]


async def test_a_thread_that_roams_while_another_core_is_chosen_goes_on_roaming(
    everywhere: set[int], chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, said = threading.Event(), threading.Event()
    found: list[set[int]] = []

    def work() -> None:
        cores.roam()
        inside.set()
        said.wait()
        cores.roam()
        found.append(os.sched_getaffinity(0))
        cores.come_back()

    async with kept():
        thread = threading.Thread(target=work)
        thread.start()
        await asyncio.to_thread(inside.wait)
        count = len(chosen)
        await until(lambda: len(chosen) > count, "it was taken away")
        monkeypatch.setattr(cores, "EVERY_S", 3600)
        count = len(chosen)
        await until(lambda: len(chosen) > count, "it was taken away for the last time")
        said.set()
        await asyncio.to_thread(thread.join)
        await until(together, "it has come back")
    assert found == [everywhere]


async def test_the_threads_follow_to_another_core(everywhere: set[int], chosen: list[int]) -> None:
    async with kept():
        homes: set[frozenset[int]] = set()

        def been_everywhere() -> bool:
            homes.add(frozenset(os.sched_getaffinity(0)))
            return len(homes) > 1

        await until(been_everywhere, "another core")
        assert {len(home) for home in homes} == {1}
        await until(together, "all are there")


def usage(own: float, *busy: float) -> cores.Usage:
    return cores.Usage(dict(enumerate(busy)), own)


@pytest.mark.parametrize(
    ("home", "before", "now", "core"),
    [
        (None, usage(0, 5, 1, 5), usage(0, 6, 4, 5.5), 2),  # used least since then, not from the beginning
        (0, usage(1, 0, 0, 0), usage(9, 8, 2, 4), 0),  # what it did itself on its core is no reason to leave
        (0, usage(1, 0, 0, 0), usage(5, 8, 1, 4), 1),  # somebody else is there as well
        (0, usage(0, 0, 0, 0), usage(8, 9.9, 1, 4), 0),  # for nine tenths of a second in ten nobody moves
        (1, usage(0, 0, 0, 0), usage(0, 0, 0, 0), 1),  # nor for nothing
        (7, usage(0, 0, 0, 0), usage(0, 3, 2, 1), 2),  # may not stay
        (None, usage(0), usage(0), 0),  # nothing is known
    ],
)
def test_the_core_is_the_one_that_others_use_least(
    home: int | None, before: cores.Usage, now: cores.Usage, core: int
) -> None:
    assert cores.choose(frozenset({0, 1, 2}), home, before, now, 10) == core


def test_what_a_core_and_this_process_have_done_is_known(everywhere: set[int]) -> None:
    before = cores.Usage.now()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    now = cores.Usage.now()
    assert now.own - before.own >= 0.05
    assert everywhere <= set(now.cores)
    assert all(now.cores[core] >= before.cores[core] for core in everywhere)
    assert sum(now.cores[core] - before.cores[core] for core in everywhere) > 0


async def test_a_thread_that_ends_meanwhile_is_no_hindrance(
    everywhere: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir = os.listdir

    def with_one_that_has_ended(path: Any = ".") -> list[str]:
        return [*(["999999999"] if path == "/proc/self/task" else []), *listdir(path)]

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", with_one_that_has_ended)
        task = asyncio.create_task(cores.keep_together())
        await until(lambda: len(os.sched_getaffinity(0)) == 1, "the threads are together")
        task.cancel()
        await asyncio.wait([task])
    assert os.sched_getaffinity(0) == everywhere


async def test_a_process_that_was_given_one_core_is_left_on_it(everywhere: set[int]) -> None:
    os.sched_setaffinity(0, {max(everywhere)})
    await cores.keep_together()
    assert os.sched_getaffinity(0) == {max(everywhere)}


async def test_a_core_that_somebody_else_chooses_is_kept_to(everywhere: set[int], chosen: list[int]) -> None:
    async with kept() as task:
        theirs = {min(everywhere - os.sched_getaffinity(0))}
        for name in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(name), theirs)
        await until(task.done, "nothing is left to choose")
        assert places() == [theirs] * len(places())


@pytest.mark.parametrize("lack", ["sched_setaffinity", "listdir"])
async def test_a_system_that_forbids_it_is_left_alone(
    everywhere: set[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lack: str
) -> None:
    caplog.set_level(logging.INFO, "corral.cores")
    real: Callable[..., Any] = getattr(os, lack)

    def forbidden(*arguments: Any) -> Any:
        if lack == "listdir" and not str(arguments[0]).startswith("/proc"):
            return real(*arguments)
        raise PermissionError(1, "not here")

    with monkeypatch.context() as patch:
        patch.setattr(os, lack, forbidden)
        await cores.keep_together()
        cores.roam()
        cores.come_back()
    assert [record.__dict__["action"] for record in caplog.records] == ["cores.not_kept"]
    assert os.sched_getaffinity(0) == everywhere
