"""Sandboxes that are made ready before the call that will use them, one for each session that runs commands.

Setting bubblewrap up takes several times as long as most commands; a model thinks for seconds between two. So
when a command of a session has ended, its next sandbox is set up and waits for the command's text.

Each serves one call and ends with it. It is the sandbox that the call would have been given anyway, started
earlier: nobody has run anything in it, its /tmp is empty, its limits are set, its supervisor waits. There is
nothing that one call could leave to the next, and the end of a call is the end of its whole sandbox.

What could differ is what the sandbox was shown when it was set up. It is used only if the session, its
folder, the network and the shell are the same, and if the folder and the files of the system that it shows are
the same files still; otherwise it is ended and the call starts a fresh one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Coroutine, Sequence
from typing import Any

from msgspec import Struct

from corral.executor.api import CallContext
from corral.executor.processes import HELD_BYTES, LauncherLost, Prepared, Processes
from corral.executor.sandbox import Sandbox, shown_files
from corral.protocol.errors import SandboxUnavailable

log = logging.getLogger(__name__)

LIMIT = 8
"""Sandboxes that wait at once; the one that was made ready first ends for one too many."""
IDLE_S = 60.0
"""Seconds that one waits: bounds what it costs (about 2 MiB), and how long it may keep a file system busy."""

_Key = tuple[str, str]


class _Waiting(Struct, kw_only=True):
    """`prepared` is None while it is being started; `profile` is what it was made for and what it was shown."""

    profile: tuple[Any, ...] | None = None
    prepared: Prepared | None = None
    timer: asyncio.TimerHandle | None = None


class ReadySandboxes:
    """Everything belongs to the event loop's thread."""

    def __init__(self, processes: Processes, sandbox: Sandbox, *, limit: int = LIMIT, idle_s: float = IDLE_S) -> None:
        self._processes = processes
        self._sandbox = sandbox
        self._limit = limit
        self._idle_s = idle_s
        self._waiting: OrderedDict[_Key, _Waiting] = OrderedDict()
        self._work: set[asyncio.Task[None]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, shell: Sequence[str], command: str, context: CallContext) -> Prepared | None:
        """The sandbox that waits for a call like this one, if there is one; it is the caller's then.

        A command that is too long for it leaves it waiting.
        """
        key = _key(context)
        found = self._waiting.get(key)
        if found is None or found.prepared is None or len(command.encode()) >= HELD_BYTES:
            return None
        self._forget(key)
        if found.profile != _profile(shell, context) or not found.prepared.waiting:
            self._spawn(self._processes.discard(found.prepared))
            return None
        return found.prepared

    def prepare(self, shell: Sequence[str], context: CallContext) -> None:
        """Make one ready for the session's next call, unless one waits. Does not wait and does not raise."""
        key = _key(context)
        if self._closed or key in self._waiting:
            return
        waiting = self._waiting[key] = _Waiting()
        self._spawn(self._prepare(key, waiting, shell, context))
        while len(self._waiting) > self._limit:
            self._end(next(iter(self._waiting)))

    async def close(self) -> None:
        """End those that wait."""
        self._closed = True
        for key in list(self._waiting):
            self._end(key)
        if self._work:
            await asyncio.wait(self._work)

    async def _prepare(self, key: _Key, waiting: _Waiting, shell: Sequence[str], context: CallContext) -> None:
        # Before bubblewrap looks: what is replaced meanwhile makes this one useless, and not the other way round.
        waiting.profile = _profile(shell, context)
        try:
            program = await self._sandbox.held(shell, context.root, context.bash_network)
            prepared = await self._processes.prepare(program)
        except (SandboxUnavailable, LauncherLost, OSError) as error:
            # The call that would have used it starts its own, and says so if there is none.
            log.info("no sandbox was made ready: %s", error, extra={"action": "sandbox.not_ready"})
            if self._waiting.get(key) is waiting:
                self._forget(key)
            return
        if self._waiting.get(key) is not waiting:
            await self._processes.discard(prepared)
            return
        waiting.prepared = prepared
        waiting.timer = asyncio.get_running_loop().call_later(self._idle_s, self._end, key)

    def _end(self, key: _Key) -> None:
        waiting = self._forget(key)
        if waiting.prepared is not None:
            self._spawn(self._processes.discard(waiting.prepared))

    def _forget(self, key: _Key) -> _Waiting:
        waiting = self._waiting.pop(key)
        if waiting.timer is not None:
            waiting.timer.cancel()
        return waiting

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="corral-ready-sandbox")
        self._work.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a sandbox could not be made ready", exc_info=error, extra={"action": "sandbox.not_ready"})


def _key(context: CallContext) -> _Key:
    return context.tenant_id, context.session_id


def _profile(shell: Sequence[str], context: CallContext) -> tuple[Any, ...]:
    """What the sandboxes of two calls have in common if they are interchangeable."""
    shown = shown_files(context.root, context.bash_network)
    return tuple(shell), context.root, context.bash_network, shown
