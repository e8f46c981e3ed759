"""`corral sessions`: list, show, export, rename, delete."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

import click

from corral.cli import OK, USAGE, CliError, Group, completing
from corral.cli.common import data_dir_option, json_option
from corral.cli.find import url_option

if TYPE_CHECKING:
    from corral.client import Corral
    from corral.protocol.types import Session

_PAGE = 500


def _reached(function: Callable[..., Any]) -> Callable[..., Any]:
    return url_option(data_dir_option(function))


@click.group(cls=Group, no_args_is_help=True)
def command() -> None:
    """List, show, export, rename and delete sessions.

    NAME is a session's id or its title.

    Exit codes: 0 done, 1 failed (no such session, for one), 2 wrong usage, 4 no gateway,
    5 refused for want of a role.
    """


@command.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="How many, at most.")
@click.option("--agent", metavar="ID", shell_complete=completing.agents, help="Only this agent's.")
@json_option
@_reached
def list_(**options: Any) -> int:
    """List sessions, the newest first."""
    from corral.cli.calling import ask
    from corral.cli.naming import list_sessions
    from corral.cli.tables import ago, print_json, print_table

    params = {} if options["agent"] is None else {"agentId": options["agent"]}
    sessions = ask(options, lambda corral: list_sessions(corral, options["limit"], **params))
    if options["as_json"]:
        print_json(sessions)
    elif not sessions:
        print('no session yet: corral run "list" makes one', file=sys.stderr)
    else:
        rows = [[session.id, session.status, ago(session.updated_at), session.title] for session in sessions]
        print_table(["ID", "STATUS", "AGE", "TITLE"], rows)
    return OK


@command.command()
@click.argument("name", shell_complete=completing.sessions)
@json_option
@_reached
def show(name: str, **options: Any) -> int:
    """Show one session: what it is, and what was said last.

    \b
    corral sessions show notes
    """
    from corral.cli.calling import ask
    from corral.cli.columns import cut, fold
    from corral.cli.show import visible, width
    from corral.cli.tables import print_json

    async def go(corral: Corral) -> tuple[Session, list[dict[str, Any]]]:
        from corral.cli.naming import require_session

        session = await require_session(corral, name)
        return session, (await corral.request("sessions.history", sessionId=session.id, limit=50))["items"]

    session, items = ask(options, go)
    if options["as_json"]:
        print_json(session)
        return OK
    room = width() - 13 if sys.stdout.isatty() else None
    for key, value in _facts(session):
        lines = [visible(value)] if room is None else fold(visible(value), room, "")
        print(f"{key:<12} " + f"\n{'':<13}".join(lines))
    for item in [item for item in items if item.get("text")][-6:]:
        who = "you" if item["role"] == "user" else "agent"
        line = visible(" ".join(item["text"].split()))
        print(f"{who:<12} {line if room is None else cut(line, room)}")
    return OK


def _facts(session: Session) -> list[tuple[str, str]]:
    from msgspec import UNSET

    facts = [
        ("id", session.id),
        ("title", session.title),
        ("status", str(session.status)),
        ("run", session.active_run_id),
        ("agent", session.agent_id),
        ("workspace", session.workspace_id),
        ("owner", session.owner_user_id),
        ("visibility", session.visibility),
        ("mode", session.runtime_mode),
        ("folder", session.root if session.root is not UNSET else "the workspace's own"),
        ("events", str(session.state_version)),
        ("context", f"{session.context_usage:.0%} used"),
        ("summarised", _compactions(session)),
        ("made", session.created_at),
        ("changed", session.updated_at),
    ]
    return [(key, str(value)) for key, value in facts if value is not UNSET and value != ""]


def _compactions(session: Session) -> str:
    if not session.compaction_count:
        return ""
    times = "once" if session.compaction_count == 1 else f"{session.compaction_count} times"
    return f"{times}; notes before that: {session.memory_flush_state}"


@command.command()
@click.argument("name", shell_complete=completing.sessions)
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "markdown"]),
    default="jsonl",
    show_default=True,
    help="Every event, one JSON object a line; or the conversation as Markdown.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format jsonl.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    default="-",
    shell_complete=completing.files,
    help="Where to; the file must not be there yet. [default: standard output]",
)
@_reached
def export(name: str, **options: Any) -> int:
    """Write a whole session out.

    \b
    corral sessions export notes --format markdown -o notes.md
    """
    from corral.cli.calling import ask

    markdown = options["form"] == "markdown" and not options["as_json"]

    async def go(corral: Corral) -> None:
        from corral.cli.naming import require_session

        session = await require_session(corral, name)
        with _opened(options["output"]) as file:
            try:
                await _write(corral, session, file, markdown)
            finally:
                file.flush()

    ask(options, go)
    return OK


async def _write(corral: Corral, session: Session, file: TextIO, markdown: bool) -> None:
    import msgspec

    if markdown:
        file.write(
            f"# {' '.join(session.title.split()) or session.id}\n\nSession `{session.id}`, {session.created_at}\n"
        )
    after = 0
    while True:
        page = await corral.request("sessions.history", sessionId=session.id, afterId=after, limit=_PAGE)
        for item in page["items"]:
            file.write(_markdown(item) if markdown else msgspec.json.encode(item).decode() + "\n")
            after = item["id"]
        if "nextCursor" not in page:
            return


def _markdown(item: dict[str, Any]) -> str:
    import json

    payload = item["payload"]
    if item.get("role"):
        who = "User" if item["role"] == "user" else "Agent"
        return f"\n## {who}\n\n{item['text'].rstrip()}\n" if item.get("text") else ""
    if item["event"] == "agent.tool_call":
        verdict = "" if payload["decision"] == "allow" else f" ({payload['decision']})"
        args = json.dumps(payload["args"], ensure_ascii=False, indent=2)
        return f"\n**{payload['toolName']}**{verdict}\n{_fenced(args, 'json')}"
    if item["event"] == "agent.tool_result":
        status = "" if payload["status"] == "success" else f"\n*{payload['status']}*\n"
        return status + (_fenced(payload["output"], "") if payload["output"] else "")
    if item["event"] == "session.compacted":
        sizes = f"{payload['before']:,} tokens became {payload['after']:,}"
        return f"\n*What came before was summarised ({sizes}):*\n{_fenced(payload['summary'], '')}"
    if item["event"] == "agent.failed":
        return f"\n*{payload['code']}: {payload['message']}*\n"
    return ""


def _fenced(text: str, kind: str) -> str:
    """A code block whose fence is longer than any in the text, so that the text cannot end it."""
    import re

    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"\n{fence}{kind}\n{text.rstrip()}\n{fence}\n"


def _opened(path: str) -> TextIO:
    """The file, made for its owner alone: it holds what was said."""
    import os

    if path == "-":
        return open(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8")
    except FileExistsError:
        raise CliError(f"{path} is there already", "give another name with -o", code=USAGE) from None
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error.strerror}", code=USAGE) from None


@command.command()
@click.argument("name", shell_complete=completing.sessions)
@click.argument("title")
@json_option
@_reached
def rename(name: str, title: str, **options: Any) -> int:
    """Give a session another title.

    \b
    corral sessions rename s_… "Tidy the notes"
    """
    from corral.cli.calling import ask
    from corral.cli.tables import print_json

    if not title.strip():
        raise CliError("TITLE is empty", 'for example: corral sessions rename ID "A title"', code=USAGE)

    async def go(corral: Corral) -> Any:
        from corral.cli.naming import require_session

        session = await require_session(corral, name)
        return (await corral.request("sessions.update", sessionId=session.id, title=title))["session"]

    session = ask(options, go)
    if options["as_json"]:
        print_json(session)
    else:
        print(f"{session['id']} is called {session['title']!r} now")
    return OK


@command.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=completing.sessions)
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@_reached
def delete(names: tuple[str, ...], **options: Any) -> int:
    """Delete sessions with their journals and outputs. The audit log keeps that they were there.

    \b
    corral sessions delete notes s_…
    """
    from corral.cli.calling import ask
    from corral.cli.naming import require_session
    from corral.cli.show import visible
    from corral.cli.tables import print_json

    async def look(corral: Corral) -> list[Session]:
        return [await require_session(corral, name) for name in names]

    found = list({session.id: session for session in ask(options, look)}.values())
    if not options["yes"]:
        if not sys.stdin.isatty():
            raise CliError("deleting cannot be undone", "say that you mean it with --yes", code=USAGE)
        for session in found:
            print(visible(f"{session.id}  {session.title}"), file=sys.stderr)
        try:
            sure = click.confirm(f"delete {'it' if len(found) == 1 else f'these {len(found)}'} for good?", err=True)
        except click.Abort:
            print(file=sys.stderr)  # Ctrl-C has left the question's line open
            raise
        if not sure:
            print("nothing is deleted", file=sys.stderr)
            return OK

    async def go(corral: Corral) -> list[Any]:
        return [await corral.request("sessions.delete", sessionId=session.id) for session in found]

    deleted = ask(options, go)
    if options["as_json"]:
        print_json(deleted)
    else:
        for item in deleted:
            print(f"deleted {item['sessionId']}")
    return OK
