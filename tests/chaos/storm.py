"""One storm from its beginning to the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tests.chaos.expected import POLICY, Brain, Expected, ExpectedSession, marks_in
from tests.chaos.gateway import step
from tests.chaos.monkey import Monkey, small_disk
from tests.chaos.people import PATIENCE_S, TOKEN, Approver, Follower, Governor, Listener, Person, Place, Worker
from tests.support.gateway import Gateway
from tests.support.invariants import Inspection, Seen
from tests.support.model_server import ModelServer

GAUGES = ("corral_connections_open", "corral_streams_open", "corral_runs_active", "corral_store_waiting")
MOST_MEMORY_MIB = 400


@dataclass
class Storm:
    """How long, how many, how often. `disk_mib`: on a file system of that size, which gets filled; None: on none."""

    seed: str
    seconds: float
    workers: int
    pause: tuple[float, float]
    disk_mib: int | None
    say: Callable[[str], None] = lambda _: None


async def rage(storm: Storm, folder: Path) -> str:
    """Let it rage in `folder`; the figures, in words. Raises AssertionError with all that was found wrong."""
    data, work = folder / "data", folder / "work"
    data.mkdir(mode=0o700)
    work.mkdir()
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_disk(data, storm.disk_mib)) if storm.disk_mib is not None else None
        return await _rage(storm, folder, data, work, disk)


async def _rage(storm: Storm, folder: Path, data: Path, work: Path, disk: Path | None) -> str:
    clock, brain, place = folder / "clock", Brain(storm.seed), Place(storm.seed, work)
    clock.write_bytes(bytes(8))
    step(clock, 0)
    model = ModelServer(brain)
    await model.start()
    env = {
        "CORRAL_TOKEN": TOKEN,
        "CORRAL_MODEL": "openai-chat:test",
        "OPENAI_BASE_URL": model.base_url,
        "OPENAI_API_KEY": "sk-chaos-0123456789",
        "CORRAL_ROOTS": str(work),
        "CORRAL_APPROVAL_TTL_MS": "7200000",
        "CHAOS_CLOCK": str(clock),
    }
    gateway = Gateway(data, env, program=("-m", "tests.chaos.gateway"))
    monkey = Monkey(place, gateway, model, brain, clock, disk=disk, say=storm.say)
    people: list[Person] = []
    try:
        await monkey.start()
        listeners = await _act(storm, place, monkey, people)
        for person in people:
            await person.close()
        await monkey.look_after()
        gauges = await _gauges(place.url)
        await gateway.stop()
        return _verdict(place, monkey, people, listeners, gauges, data / "corral.db")
    finally:
        for person in people:
            await person.close()
        if gateway._process is not None:
            await gateway.kill()
        await monkey.close()


async def _act(storm: Storm, place: Place, monkey: Monkey, people: list[Person]) -> Sequence[Listener]:
    """The storm itself, and the calm after it; returns when all has come to its end and every follower has seen it."""
    governor, approver = Governor(place, "governor"), Approver(place, "approver")
    follower = Follower(place, "follower")
    people += [governor, approver, follower]
    await follower.begin()
    shared = await _found(place, governor)
    workers = [Worker(place, f"w{number}", shared) for number in range(storm.workers)]
    people += workers
    listeners = [Listener(place, f"listener {name}", name, slow=name == shared[0]) for name in shared]
    monkey.victims = [*people, *listeners]
    async with asyncio.TaskGroup() as tasks:
        followers = [tasks.create_task(follower.follow())]
        followers += [tasks.create_task(listener.follow()) for listener in listeners]
        approving = tasks.create_task(approver.decide())
        acting = [tasks.create_task(worker.work()) for worker in workers]
        acting += [tasks.create_task(governor.govern()), tasks.create_task(monkey.play(pause=storm.pause))]
        await asyncio.sleep(storm.seconds)
        storm.say("the calm")
        place.over.set()
        await asyncio.gather(*acting)
        approver.done.set()
        await approving
        # What comes last shows that all before it has come.
        for session in shared:
            await governor.must("sessions.update", sessionId=session, title="the end")
        await _seen_to_the_end(governor, follower, listeners, shared)
        for task in followers:
            task.cancel()
    return listeners


async def _found(place: Place, governor: Governor) -> list[str]:
    """What is there before anything happens: the policy and the sessions that all share."""
    told = await governor.must("policy.update", patch=POLICY)
    place.expected.policy_version, place.expected.policy_tools = told["version"], dict(told["policy"]["tools"])
    shared = []
    for number in range(2):
        root = place.work / f"shared-{number}"
        root.mkdir()
        made = await governor.must("sessions.create", title="ours", root=str(root))
        shared.append(str(made["session"]["id"]))
        place.expected.sessions[shared[-1]] = ExpectedSession("the end")
    return shared


async def _seen_to_the_end(
    governor: Governor, follower: Follower, listeners: Sequence[Listener], shared: Sequence[str]
) -> None:
    ends = {}
    for session in shared:
        ends[session] = (await governor.ask("sessions.get", {"sessionId": session}))["payload"]["session"][
            "stateVersion"
        ]
    async with asyncio.timeout(PATIENCE_S):
        while follower.last() != (shared[-1], ends[shared[-1]]):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        for listener in listeners:
            while listener.version != ends[listener.session]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def _gauges(url: str) -> dict[str, float]:
    """The gateway's gauges when all of them are zero, or after a long wait for that."""
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session:
        begun = time.monotonic()
        while True:
            async with session.get(f"{url}/metrics") as response:
                page = await response.text()
            families = [family for family in text_string_to_metric_families(page) if family.name in GAUGES]
            gauges = {family.name: family.samples[0].value for family in families}
            assert set(gauges) == set(GAUGES), page
            # A socket that was closed a moment ago is still being let go.
            if not any(gauges.values()) or time.monotonic() - begun > PATIENCE_S / 4:
                return gauges
            await asyncio.sleep(0.05)


def _verdict(
    place: Place,
    monkey: Monkey,
    people: Sequence[Person],
    listeners: Sequence[Listener],
    gauges: dict[str, float],
    database: Path,
) -> str:
    look = Inspection(database, settled=True)
    look.store()
    for person in people:
        look.client(person.name, Seen(person.connections, feed=isinstance(person, Follower)))
    for listener in listeners:
        look.client(listener.name, Seen([listener.frames], after={listener.session: 0}, numbered=False))
    look.promises(place.promises)
    look.idle(gauges)
    marks = marks_in(place.work)
    look.problems += place.problems
    look.problems += place.expected.problems(look.snapshot, marks)
    if monkey.most_memory_kib > MOST_MEMORY_MIB * 1024:
        look.problems.append(f"the gateway came to {monkey.most_memory_kib // 1024} MiB")
    look.report()
    return _figures(place.expected, place, monkey, people, look, sum(marks.values()))


def _figures(
    expected: Expected, place: Place, monkey: Monkey, people: Sequence[Person], look: Inspection, marks: int
) -> str:
    runs: dict[str, int] = {}
    for row in look.snapshot.runs.values():
        code = f" {json.loads(row['error'])['code']}" if row["status"] == "failed" else ""
        runs[row["status"] + code] = runs.get(row["status"] + code, 0) + 1
    resumed = sum(entry.event == "agent.resumed" for entry in look.snapshot.entries())
    results: dict[str, int] = {}
    for row in look.snapshot.tables["tool_runs"]:
        results[row["status"]] = results.get(row["status"], 0) + 1
    lines = [
        "broken: " + ", ".join(f"{name} {count}" for name, count in sorted(monkey.done.items())),
        f"requests {place.asked}, of them {place.lost} lost with their connection and asked again",
        f"runs {len(expected.runs)} ({_counts(runs)}), taken up again {resumed} times",
        f"tool calls {sum(results.values())} ({_counts(results)}), marks {marks}",
        f"decisions of people {len(expected.decisions)}, policy versions {expected.policy_version}",
        f"durable events {sum(len(entries) for entries in look.snapshot.journals.values())}, "
        f"sockets {sum(len(person.connections) for person in people)}",
        f"most memory {monkey.most_memory_kib // 1024} MiB; no invariant broken at {time.strftime('%H:%M:%S')}",
    ]
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
