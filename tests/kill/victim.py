"""A gateway that ends itself at a named point while a client has it do something; and what came of that.

The client is one that repeats what it has no answer to, as the contract says it may: every request
has a key of its own, and after the restart all of them are sent again.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.core.test_recovery import check_journal, whole_journal
from tests.support.gateway import Gateway
from tests.support.model_server import ModelServer, conversation, script_for
from tests.support.wire import Json, Wire, is_event

ENDS = ("agent.completed", "agent.failed")
PATIENCE = 60.0

Acts = Callable[["Client"], Awaitable[None]]
"""What a client does, up to the last thing before its run's end."""


class Client:
    """Works in one session, and sends each request under a key that stays the same over all lives of the gateway."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.answers: dict[str, Any] = {}
        self.seen: set[tuple[int, str]] = set()
        """The version and the name of every durable event that it was sent, over all lives."""
        self.wire: Wire

    @property
    def input(self) -> str:
        """What its run is asked; the model server knows the session by it."""
        return f"work in {self.session}."

    async def ask(self, key: str, method: str, **params: Any) -> Any:
        """The answer. One that was given in an earlier life must be given again, whole."""
        answer = await self.wire.request(method, {**params, "idempotencyKey": f"{self.session} {key}"})
        assert self.answers.setdefault(key, answer) == answer, f"{key}: {self.answers[key]}, then {answer}"
        return answer

    async def run(self, **params: Any) -> str:
        answer = await self.ask("run", "agent.run", input=self.input, sessionId=self.session, **params)
        return str(answer["runId"])

    async def event(self, name: str, **payload: Any) -> Json:
        """The event, or the run's end if that comes first."""
        payload["sessionId"] = self.session
        return await self.wire.frame(lambda frame: is_event(frame, name, **payload) or self._is_end(frame), PATIENCE)

    async def end(self) -> Json:
        return await self.wire.frame(self._is_end, PATIENCE)

    def _is_end(self, frame: Json) -> bool:
        return frame.get("event") in ENDS and frame["payload"]["sessionId"] == self.session


class Victim:
    """One data directory and the gateways on it, one after the other."""

    def __init__(self, folder: Path, model: ModelServer, **env: str) -> None:
        settings = {
            "CORRAL_MODEL": "openai-chat:test",
            "OPENAI_BASE_URL": model.base_url,
            "OPENAI_API_KEY": "k",
            "ANTHROPIC_BASE_URL": model.root_url,
            "ANTHROPIC_API_KEY": "k",
            **env,
        }
        self.gateway = Gateway(folder / "data", settings)
        self.folder = self.gateway.data_dir / "workspaces" / "t_default" / "w_default"

    async def die(self, client: Client, acts: Acts) -> None:
        """Have the gateway, which was started with a fault, do it all until it has died of that."""
        process = self.gateway.process
        acting = asyncio.create_task(self.act(client, acts))
        try:
            async with asyncio.timeout(PATIENCE):
                assert await process.wait() == -signal.SIGKILL, self.gateway.log
        except TimeoutError:
            problem = acting.exception() if acting.done() and not acting.cancelled() else None
            raise AssertionError(f"it did not die (the client: {problem!r})\n{self.gateway.log}") from problem
        finally:
            acting.cancel()
            await asyncio.wait({acting})

    async def act(self, client: Client, acts: Acts) -> None:
        """Do everything to its end."""
        wire = client.wire = await Wire.open(self.gateway.url)
        try:
            await wire.connect(self.gateway.token())
            await acts(client)
            await client.end()
        finally:
            client.seen |= {(frame["stateVersion"], frame["event"]) for frame in wire.durable}
            await wire.close()

    async def examine(self, client: Client) -> list[Json]:
        """What holds of every session whose run has ended, by the wire; its journal."""
        session = client.session
        async with await Wire.open(self.gateway.url) as wire:
            await wire.connect(self.gateway.token())
            items = await whole_journal(wire, session)
            check_journal(items)
            await wire.request("events.subscribe", {"sessionId": session, "after": 0})
            await wire.until(lambda: len(wire.versions(session)) >= len(items), PATIENCE)
            told = [(frame["stateVersion"], frame["event"]) for frame in wire.durable]
            assert told == [(item["id"], item["event"]) for item in items], told
            # Also in a life that ended before the commit.
            assert client.seen <= set(told), f"told and not in the journal: {client.seen - set(told)}"
            row = (await wire.request("sessions.get", {"sessionId": session}))["session"]
            assert (row["status"], "activeRunId" in row) == ("idle", False)
            assert (await wire.request("approval.queue", {"sessionId": session}))["items"] == []
            audit = await wire.request("audit.verify", {})
            assert audit["ok"], audit
        self.gateway.inspect()
        return items

    def marks(self, session: str) -> str:
        """What the session's tools left behind."""
        path = self.folder / f"marks-{session}"
        return path.read_text() if path.exists() else ""


@dataclass(frozen=True)
class Taken:
    """A session whose gateway was killed at `fault` and whose run the next one took to its end."""

    fault: str
    items: list[Json]
    marks: str
    requests: list[Json]
    victim: Victim

    @property
    def names(self) -> list[str]:
        return [item["event"] for item in self.items]

    @property
    def results(self) -> list[Json]:
        return [item["payload"] for item in self.items if item["event"] == "agent.tool_result"]

    @property
    def statuses(self) -> list[str]:
        return [result["status"] for result in self.results]


async def walk(
    folder: Path,
    faults: Sequence[str],
    acts: Acts,
    steps: Callable[[str], list[Any]],
    check: Callable[[Taken], None],
    **env: str,
) -> None:
    """Have one gateway after the other die, each at another point; the next one finishes what it had begun.

    Each works in a session of its own, whose name stands in `faults` as `{s}`, so that what the last one left
    does not come to the next one's point. `steps` is the model's part in a session.
    """
    clients = [Client(f"s{number}") for number in range(len(faults))]
    script = script_for({client.input: conversation(steps(client.session)) for client in clients})
    async with ModelServer(script) as model:
        victim = Victim(folder, model, **env)
        try:
            for number, fault in enumerate(faults):
                await victim.gateway.start(fault=fault.format(s=clients[number].session))
                if number:
                    await _take(victim, model, faults[number - 1], clients[number - 1], acts, check)
                try:
                    await victim.die(clients[number], acts)
                except AssertionError as error:
                    error.add_note(f"to be killed at {fault}")
                    raise
            await victim.gateway.start()
            await _take(victim, model, faults[-1], clients[-1], acts, check)
        finally:
            await victim.gateway.kill()


async def _take(
    victim: Victim, model: ModelServer, fault: str, client: Client, acts: Acts, check: Callable[[Taken], None]
) -> None:
    try:
        await victim.act(client, acts)
        items = await victim.examine(client)
        requests = [each.json for each in model.requests if client.input in str(each.json)]
        check(Taken(fault, items, victim.marks(client.session), requests, victim))
    except (AssertionError, TimeoutError) as error:
        error.add_note(f"killed at {fault}, and started again")
        raise
