"""The conversation of `corral chat`: messages, commands, runs."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from msgspec import UNSET

from corral import __version__
from corral.cli import OK, CliError
from corral.cli.approving import Approver
from corral.cli.calling import refusal
from corral.cli.columns import cut
from corral.cli.lines import Edited, Left, Plain, Reader, history_file
from corral.cli.naming import list_sessions, require_session, session_for
from corral.cli.run import elsewhere, run_params
from corral.cli.show import Transcript, colours, visible, width
from corral.cli.terminal import quiet
from corral.cli.turn import Turn, exit_code
from corral.cli.visible import harmless
from corral.client import Corral, Event
from corral.config import Settings
from corral.protocol.errors import CorralError, SessionBusy
from corral.protocol.events import AgentToolResult, SessionCompacted
from corral.protocol.types import Approval, Session

FOREVER = float("inf")
_RECENT = 6
_COMMAND = re.compile(r"/[a-z]*( .*)?")  # /etc/passwd begins a message
_OUTPUT_LIMIT = 262_144


async def chat(options: dict[str, Any], settings: Settings, address: Callable[[], tuple[str, str]]) -> int:
    """Talk until the person leaves; the exit code. Raises what the client raises to begin with."""
    chatting = _Chat(options, settings)
    url, token = address()
    async with Corral(
        url, token, address=address, reconnect_for=FOREVER, on_state=chatting.on_state, name="corral-chat"
    ) as corral:
        return await chatting.go(corral)


class _Chat:
    def __init__(self, options: dict[str, Any], settings: Settings) -> None:
        self._options = options
        self._json = options["as_json"]
        terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._edited = terminal and not self._json
        self._session: str | None = None
        self._lost = ""
        self._reading = False
        self._code = OK
        self._last_call: str | None = None
        self._commands: dict[str, tuple[str, str, Callable[[Corral, str], Awaitable[None]]]] = {
            "/help": ("", "this list", self._help),
            "/new": ("[TITLE]", "go on in a new session", self._new),
            "/sessions": ("", "the newest sessions", self._sessions),
            "/session": ("NAME", "go on in that session (id or title)", self._switch),
            "/model": ("[PROVIDER:NAME]", "model from now on; - the agent's", self._model),
            "/output": ("", "the last tool call's whole output", self._output),
            "/abort": ("", "abort this session's run", self._abort),
            "/quit": ("", "leave, as Ctrl-D does", self._quit),
        }
        self._show = self._make_transcript()
        self._reader: Reader = (
            Edited(history_file(settings), self._status, list(self._commands))
            if self._edited
            else Plain("> " if sys.stdin.isatty() and not self._json else "")
        )

    def _make_transcript(self) -> Transcript:
        if not self._edited:
            return Transcript()
        from corral.cli.markdown import MarkdownTranscript

        # One stream for both, as they go to one terminal and must keep their order.
        return MarkdownTranscript(sys.stdout, sys.stdout, colour=colours(sys.stdout), unfold=": /output shows them")

    # ---- the conversation

    async def go(self, corral: Corral) -> int:
        self._session = await session_for(
            corral, self._options["session"], self._options["cwd"], self._options["agent"]
        )
        if self._edited:
            model = f" · {self._options['model']}" if self._options["model"] else ""
            self._show.note(
                f"Corral {__version__}{visible(model)} · Enter sends, Alt-Enter new line, /help, Ctrl-D leaves"
            )
        await self._resume(corral)
        while True:
            try:
                text = (await self._read()).strip()
            except Left:
                break
            except KeyboardInterrupt:
                self._show.note("Ctrl-D or /quit leaves")
                continue
            if not text:
                continue
            try:
                if _COMMAND.fullmatch(text) and not self._json:
                    await self._command(corral, text)
                else:
                    await self._say(corral, text)
            except Left:
                break
            except SessionBusy as error:
                self._complain(
                    CliError(f"{error.code}: {error.message}", "/abort ends its run, /new begins another session")
                )
            except CorralError as error:
                self._complain(refusal(error))
            except CliError as error:
                self._complain(error)
        if self._edited and self._session is not None:
            self._show.note(f"to go on: corral chat --session {self._session}{elsewhere(self._options)}")
        return OK if self._edited else self._code

    async def _read(self) -> str:
        self._reading = True
        try:
            return await self._reader.read()
        finally:
            self._reading = False

    async def _say(self, corral: Corral, text: str) -> None:
        if self._session is None and self._options["cwd"] is not None:
            self._session = await session_for(corral, None, self._options["cwd"], self._options["agent"])
        if self._lost and self._edited:
            self._show.note("this is sent when the gateway is back; Ctrl-C twice gives it up")
        await self._watch(corral, corral.run(text, session_id=self._session, **run_params(self._options)), [])

    async def _watch(self, corral: Corral, events: AsyncIterator[Event], waiting: list[Approval]) -> None:
        approver = Approver(corral, self._show, asks=not self._json, silent=self._json, flags=elsewhere(self._options))
        for approval in waiting:
            approver.required(approval)
        began = time.monotonic()
        turn = Turn(corral, self._show, approver, self._on_event)
        if self._edited:
            with quiet():
                last = await turn.play(events)
        else:
            last = await turn.play(events)
        if last is not None and not self._json:
            self._show.summary(last, time.monotonic() - began, last.payload.session_id)
        self._code = exit_code(last)

    def _on_event(self, event: Event) -> None:
        self._session = event.payload.session_id
        if isinstance(event.payload, AgentToolResult):
            self._last_call = event.payload.tool_call_id
        if self._json:
            print(harmless(msgspec.json.encode(event).decode()), flush=True)
        else:
            self._show.event(event)

    async def _resume(self, corral: Corral) -> None:
        """Show where the session was left, and follow the run that is on in it."""
        if self._session is None:
            return
        found = (await corral.request("sessions.get", sessionId=self._session))["session"]
        if found is None:  # it is made by the first message
            return
        session = msgspec.convert(found, Session)
        if not self._json:
            self._show.note(f"session {session.id}: {session.title or 'nothing said yet'}")
            await self._show_recent(corral, session)
        if session.active_run_id is not UNSET:
            self._show.note("a run is on in this session")
            queue = await corral.request("approval.queue", sessionId=session.id)
            waiting = msgspec.convert(queue["items"], list[Approval])
            await self._watch(corral, _of_run(corral, session), waiting)

    async def _show_recent(self, corral: Corral, session: Session) -> None:
        history = await corral.request("sessions.history", sessionId=session.id)
        said = [item for item in history["items"] if item.get("role") and item.get("text")]
        for item in said[-_RECENT:]:
            mark = "› " if item["role"] == "user" else "  "
            line = visible(" ".join(item["text"].split()))
            self._show.say(mark + cut(line, width() - 3))

    # ---- commands

    async def _command(self, corral: Corral, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name not in self._commands:
            raise CliError(f"there is no command {visible(name)}", "/help lists them; a message begins otherwise")
        await self._commands[name][2](corral, rest.strip())

    async def _help(self, _corral: Corral, _rest: str) -> None:
        for name, (argument, summary, _) in self._commands.items():
            usage = f"{name} {argument}"
            self._show.say(f"  {usage:<23}{summary}")
        self._show.say("  Ctrl-C aborts a run; twice leaves it to itself")

    async def _new(self, corral: Corral, title: str) -> None:
        self._session = None
        if title:
            given = {"title": title, "root": self._options["cwd"], "agentId": self._options["agent"]}
            params = {name: value for name, value in given.items() if value is not None}
            made = await corral.request("sessions.create", **params)
            self._session = made["session"]["id"]
        self._show.note(f"a new session{f': {title}' if title else ', made by your next message'}")

    async def _sessions(self, corral: Corral, _rest: str) -> None:
        sessions = await list_sessions(corral, 10)
        for session in sessions:
            here = "*" if session.id == self._session else " "
            line = f"{here} {session.id}  {session.title}"
            self._show.say(cut(visible(line), width() - 1))
        self._show.say("  /session NAME goes on in one" if sessions else "  there is none yet")

    async def _switch(self, corral: Corral, name: str) -> None:
        if not name:
            raise CliError("which session?", "/session NAME takes an id or a title; /sessions lists them")
        self._session = (await require_session(corral, name)).id
        await self._resume(corral)

    async def _model(self, _corral: Corral, name: str) -> None:
        if name:
            self._options["model"] = None if name == "-" else name
        self._show.note(f"model from now on: {self._options['model'] or 'the one of the agent or the gateway'}")

    async def _output(self, corral: Corral, _rest: str) -> None:
        if self._last_call is None:
            raise CliError("no tool was called in this chat yet")
        answer = await corral.request("tools.output", toolCallId=self._last_call, limit=_OUTPUT_LIMIT)
        for line in visible(answer["text"]).splitlines():
            self._show.say(f"  {line}")
        if not answer["eof"]:
            self._show.note(f"cut after {_OUTPUT_LIMIT // 1024} KiB of {answer['totalBytes'] // 1024}")

    async def _abort(self, corral: Corral, _rest: str) -> None:
        found = self._session and (await corral.request("sessions.get", sessionId=self._session))["session"]
        if not found or "activeRunId" not in found:
            self._show.note("no run is on in this session")
            return
        self._show.note(f"the run is {await corral.abort(found['activeRunId'])}")

    async def _quit(self, _corral: Corral, _rest: str) -> None:
        raise Left

    # ---- what is told beside it

    def on_state(self, state: str, reason: str) -> None:
        self._lost = reason if state == "lost" else ""
        if self._reading and self._edited:
            self._reader.refresh()
        elif not self._json:
            self._show.note(f"{reason}; trying to go on where it was" if state == "lost" else "connected again")

    def _status(self) -> str:
        if self._lost:
            return "connection lost, trying again"
        parts = [self._session or "new session", self._options["model"], self._options["mode"]]
        return cut(visible(" · ".join(part for part in parts if part)), max(10, width() - 1))

    def _complain(self, error: CliError) -> None:
        self._code = error.code
        if self._edited:
            self._show.note(error.message)
            if error.remedy:
                self._show.say(f"  {error.remedy}")
            return
        print(f"corral: {error.message}", file=sys.stderr)
        if error.remedy:
            print(f"  {error.remedy}", file=sys.stderr)


async def _of_run(corral: Corral, session: Session) -> AsyncIterator[Event]:
    """The events of the run that was on as `session` was read, from there on."""
    async for event in corral.events(session.id, after=session.state_version):
        if getattr(event.payload, "run_id", None) == session.active_run_id or isinstance(
            event.payload, SessionCompacted
        ):
            yield event
