"""`corral approvals`: calls that wait for a person, and the person's answer."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TextIO

import click

from corral.cli import FAILED, OK, USAGE, CliError, Group, completing
from corral.cli.calling import ask
from corral.cli.columns import cut, fold, width
from corral.cli.common import data_dir_option
from corral.cli.find import url_option
from corral.cli.visible import exact, unusual, visible

if TYPE_CHECKING:
    from corral.client import Corral

Json = dict[str, Any]

STATUSES = ("pending", "approved", "rejected", "expired", "cancelled")
_POLL_S = 0.5


def reached(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which gateway, and `--json`."""
    function = url_option(data_dir_option(function))
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line, and nothing else.")(
        function
    )


@click.group(cls=Group, no_args_is_help=True)
def command() -> None:
    """See the calls that wait for a person, and approve or reject them."""


@command.command("list")
@click.option("--status", type=click.Choice(STATUSES), default="pending", show_default=True, help="Which ones.")
@click.option("--session", metavar="ID", shell_complete=completing.sessions, help="Only of this session.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="How many, at most.")
@reached
def list_(**options: Any) -> int:
    """List approvals, the newest first.

    Exit codes: 0 done, 2 wrong usage, 4 no gateway, 5 refused for want of a role.
    """

    async def go(corral: Corral) -> int:
        count = 0
        async for item in _approvals(corral, options["status"], options["session"], options["limit"]):
            count += 1
            if options["as_json"]:
                print_json(item)
            else:
                print(_lines(item))
        if not count and not options["as_json"]:
            print(f"no approval is {options['status']}", file=sys.stderr)
        return OK

    return ask(options, go)


@command.command()
@click.argument("approval_id", metavar="ID", shell_complete=completing.approvals)
@reached
def show(approval_id: str, **options: Any) -> int:
    """Show one call exactly as it will run.

    Arguments are printed as JSON in which everything that cannot be seen is written out.

    \b
    corral approvals show ap_…

    Exit codes: 0 done, 1 there is no such approval, 4 no gateway, 5 refused for want of a role.
    """

    async def go(corral: Corral) -> int:
        item = await find(corral, approval_id)
        print_json(item) if options["as_json"] else print(described(item, _columns(sys.stdout)))
        return OK

    return ask(options, go)


@command.command()
@click.argument("approval_id", metavar="ID", shell_complete=completing.approvals)
@click.option("--args", "args", metavar="JSON", help="Approve the call with these arguments instead of its own.")
@click.option(
    "--remember",
    type=click.Choice(["session", "workspace"]),
    help="Let this very call run without asking from now on; `corral grants` lists what is remembered.",
)
@click.option("--comment", metavar="TEXT", help="Kept with the decision.")
@reached
def approve(approval_id: str, **options: Any) -> int:
    """Let a call run, once.

    What is approved is printed first, exactly as it will run.

    \b
    corral approvals approve ap_…
    corral approvals approve ap_… --args '{"command": "ls"}'
    corral approvals approve ap_… --remember session

    Exit codes: 0 approved, 1 there is no such approval or it was decided already, 2 wrong usage,
    4 no gateway, 5 refused by policy or for want of a role.
    """
    args = arguments_from(options["args"]) if options["args"] is not None else None
    return _resolve(approval_id, "approve", args, options)


@command.command()
@click.argument("approval_id", metavar="ID", shell_complete=completing.approvals)
@click.option("--comment", metavar="TEXT", help="Why; the model is told.")
@reached
def reject(approval_id: str, **options: Any) -> int:
    """Refuse a call. The run goes on without it.

    \b
    corral approvals reject ap_… --comment "not there"

    Exit codes: 0 rejected, 1 there is no such approval or it was decided already, 4 no gateway,
    5 refused for want of a role.
    """
    return _resolve(approval_id, "reject", None, {**options, "remember": None})


@command.command()
@click.option("--session", metavar="ID", shell_complete=completing.sessions, help="Only of this session.")
@reached
def watch(**options: Any) -> int:
    """Show what waits, then each call that comes to wait and each decision. Ctrl-C ends it.

    Exit codes: 4 no gateway, 5 refused for want of a role, 130 ended.
    """

    async def go(corral: Corral) -> int:
        waiting: dict[str, Json] | None = None
        while True:
            now = {item["approvalId"]: item async for item in _approvals(corral, "pending", options["session"], 10_000)}
            if waiting is None and not now and not options["as_json"]:
                print("nothing waits; Ctrl-C ends this", file=sys.stderr)
            before = waiting or {}
            for approval_id in [each for each in before if each not in now]:
                _tell(await find(corral, approval_id, before[approval_id]), options["as_json"])
            for approval_id in [each for each in reversed(now) if each not in before]:
                _tell(now[approval_id], options["as_json"])
            waiting = now
            await asyncio.sleep(_POLL_S)

    return ask(options, go)


# ---- asking


async def _approvals(corral: Corral, status: str, session: str | None, limit: int) -> AsyncIterator[Json]:
    """Up to `limit` approvals of a status, the newest first."""
    params: Json = {"status": status, **({"sessionId": session} if session is not None else {})}
    while limit > 0:
        page = await corral.request("approval.queue", limit=min(limit, 200), **params)
        for item in page["items"]:
            yield item
        limit -= len(page["items"])
        if "nextCursor" not in page:
            return
        params["cursor"] = page["nextCursor"]


async def find(corral: Corral, approval_id: str, before: Json | None = None) -> Json:
    """The approval of that id, whatever its status. Raises CliError if there is none.

    `before` is how it was when it was last seen: it stands in for one whose session is gone.
    """
    for status in STATUSES:
        async for item in _approvals(corral, status, None, 10_000):
            if item["approvalId"] == approval_id:
                return item
    if before is not None:
        return {**before, "status": "gone with its session"}
    raise CliError(f"there is no approval {approval_id} that you may see", "`corral approvals list` shows what waits")


def _resolve(approval_id: str, decision: str, args: Json | None, options: Json) -> int:
    async def go(corral: Corral) -> int:
        item = await find(corral, approval_id)
        if item["status"] != "pending":
            by = f" by {visible(item['resolvedBy'])}" if "resolvedBy" in item else ""
            raise CliError(
                f"this approval is {item['status']} already{by}", f"`corral approvals show {approval_id}` shows it"
            )
        if not options["as_json"]:
            print(described(item if args is None else {**item, "args": args}, _columns(sys.stderr)), file=sys.stderr)
        params = {
            name: value
            for name, value in [("comment", options["comment"]), ("remember", options["remember"]), ("args", args)]
            if value is not None
        }
        answer = await corral.request("approval.resolve", approvalId=approval_id, decision=decision, **params)
        if options["as_json"]:
            print_json(answer)
        else:
            print(f"{answer['status']}: {answer['approvalId']}")
            if options["remember"]:
                print(f"remembered for the {options['remember']}: `corral grants list` shows it", file=sys.stderr)
        return OK if answer["status"] == ("approved" if decision == "approve" else "rejected") else FAILED

    return ask(options, go)


# ---- showing


def described(item: Json, columns: int = 0) -> str:
    """An approval on several lines, its call exactly as it will run; all else folded to so many columns, if any."""
    lines = [
        f"{item['approvalId']}  {item['status']}",
        f"tool      {visible(item['toolName'])} ({item['risk']} risk)",
        f"why       {visible(item['reason'])}" + (f" (rule {visible(item['ruleId'])})" if "ruleId" in item else ""),
        f"session   {item['sessionId']}",
        f"run       {item['runId']}",
        f"asked     {item['createdAt']}",
        f"expires   {item['expiresAt']}",
    ]
    if "retryOf" in item:
        lines.insert(3, f"again     of {item['retryOf']}, which was interrupted and may have taken effect already")
    if "resolvedAt" in item:
        by = f" by {visible(item['resolvedBy'])}" if "resolvedBy" in item else ""
        lines.append(f"decided   {item['resolvedAt']}{by}")
    if "comment" in item:
        lines.append(f"comment   {visible(item['comment'])}")
    if columns:
        lines = [piece for line in lines for piece in fold(line, columns, " " * 10)]
    lines += ["arguments", *(f"  {line}" for line in exact(item["args"]).split("\n"))]
    if names := unusual(item["args"]):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        note = f"  not plain ASCII: {', '.join(names[:5])}{more}"
        lines += fold(note, columns) if columns else [note]
    return "\n".join(lines)


def _columns(stream: TextIO) -> int:
    return width() if stream.isatty() else 0


def arguments_from(text: str) -> Json:
    """The JSON object that a person gave. Raises CliError for anything else."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CliError(
            f"these arguments are no JSON: {error}", 'quote them: \'{"path": "a.txt"}\'', code=USAGE
        ) from None
    if not isinstance(value, dict):
        raise CliError("arguments are a JSON object", 'for example \'{"path": "a.txt"}\'', code=USAGE)
    return value


def print_json(value: Any) -> None:
    """One line of JSON, as it came."""
    print(json.dumps(value, ensure_ascii=True), flush=True)


def _lines(item: Json) -> str:
    """One line in a pipe; on a terminal what is needed to decide, in lines that fit it."""
    if not sys.stdout.isatty():
        return _line(item)
    head = f"{item['approvalId']}  {item['createdAt'][:19].replace('T', ' ')}"
    call = f"{visible(item['toolName'])}  {exact(item['args'], None)}"
    return f"{head}\n  {cut(call, width() - 2)}"


def _line(item: Json) -> str:
    args = exact(item["args"], None)
    shown = args if len(args) <= 100 else f"{args[:99]}… (`corral approvals show {item['approvalId']}` has the rest)"
    return f"{item['approvalId']}  {item['createdAt']}  {visible(item['toolName'])}  {shown}"


def _tell(item: Json, as_json: bool) -> None:
    if as_json:
        print_json(item)
    elif item["status"] == "pending":
        print(described(item, _columns(sys.stdout)))
        print(f"  corral approvals approve {item['approvalId']}   or   reject", flush=True)
    else:
        by = f" by {visible(item['resolvedBy'])}" if "resolvedBy" in item else ""
        print(f"{item['approvalId']}  {item['status']}{by}", flush=True)
