"""A run on the screen from its first event to its last: shown, asked about, aborted by Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable

from corral.cli import ABORTED, FAILED, OK, REFUSED
from corral.cli.approving import Approver
from corral.cli.calling import POLICY_CODES
from corral.cli.show import Transcript
from corral.client import Corral, Event, GatewayUnreachable
from corral.protocol.errors import CorralError, ErrorCode
from corral.protocol.events import TERMINAL_EVENTS, AgentFailed
from corral.protocol.types import Approval


class Turn:
    """One run that is watched. Ctrl-C aborts it; a second one leaves it to itself."""

    def __init__(
        self, corral: Corral, show: Transcript, approver: Approver, on_event: Callable[[Event], None] | None = None
    ) -> None:
        """`on_event` takes the place of showing the events."""
        self._corral = corral
        self._show = show
        self._approver = approver
        self._on_event = on_event or show.event
        self.run_id: str | None = None
        self._interrupted = False
        self._left = asyncio.Event()
        self._aborting: asyncio.Task[None] | None = None

    async def play(self, events: AsyncIterator[Event]) -> Event | None:
        """Watch until the terminal event, which it returns; None if it was left before.

        Raises what the stream of events raises.
        """
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        follow = loop.create_task(self._follow(events))
        left = loop.create_task(self._left.wait())
        try:
            await asyncio.wait([follow, left], return_when=asyncio.FIRST_COMPLETED)
            if follow.done():
                return follow.result()
            self._show.note("left; the run may still be going on")
            return None
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            tasks = [task for task in (follow, left, self._aborting) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._approver.close()

    async def _follow(self, events: AsyncIterator[Event]) -> Event | None:
        async for event in events:
            if self.run_id is None:
                self.run_id = event.payload.run_id
                if self._interrupted:
                    self._abort()
            self._on_event(event)
            if isinstance(event.payload, Approval):
                if event.event == "approval.required":
                    self._approver.required(event.payload)
                else:
                    self._approver.resolved(event.payload)
            if event.event in TERMINAL_EVENTS:
                return event
        return None

    def _on_interrupt(self) -> None:
        if self._interrupted:
            self._left.set()
            return
        self._interrupted = True
        self._show.note("aborting the run (Ctrl-C again leaves without waiting)")
        if self.run_id is not None:
            self._abort()

    def _abort(self) -> None:
        assert self.run_id is not None
        self._aborting = asyncio.get_running_loop().create_task(self._do_abort(self.run_id))

    async def _do_abort(self, run_id: str) -> None:
        try:
            answer = await self._corral.request("agent.abort", runId=run_id)
        except (CorralError, GatewayUnreachable) as error:
            self._show.note(f"the gateway did not abort it: {error}")
            return
        for process in answer.get("leftover", []):
            self._show.note(f"could not be ended: {process}")


def exit_code(last: Event | None) -> int:
    """The exit code for how a run ended."""
    if last is None:
        return ABORTED
    payload = last.payload
    if not isinstance(payload, AgentFailed):
        return OK
    if payload.code == ErrorCode.ABORTED:
        return ABORTED
    return REFUSED if payload.code in POLICY_CODES else FAILED
