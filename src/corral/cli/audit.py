"""`corral audit`: what was decided and done, and the proof that the log of it is whole."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TextIO

import click

from corral.cli import FAILED, NO_GATEWAY, OK, REFUSED, USAGE, CliError, Group, completing
from corral.cli.calling import unauthorized
from corral.cli.columns import cut
from corral.cli.common import data_dir_option, settings_from
from corral.cli.find import find_gateway, no_gateway, url_option
from corral.cli.show import width
from corral.cli.times import given_time
from corral.cli.visible import harmless, visible
from corral.client import Corral, GatewayUnreachable
from corral.protocol.errors import CorralError, ErrorCode

_PAGE = 500
_KEY = re.compile(r"[0-9a-fA-F]{64}")
_POLL_S = 1.0

_filters = (
    ("from_", "--from", "TIME", "From this time on: RFC 3339, or so long ago, like 30m, 2h or 7d."),
    ("to", "--to", "TIME", "Before this time."),
    ("action", "--action", "NAME", "Only this action, like tool.call or policy.update."),
    ("actor", "--actor", "SUBJECT", "Only what this subject did."),
    ("session", "--session", "ID", "Only about this session."),
    ("run", "--run", "ID", "Only about this run."),
)


def _filtered(function: Callable[..., Any]) -> Callable[..., Any]:
    for name, option, metavar, text in reversed(_filters):
        complete = completing.sessions if name == "session" else None
        function = click.option(option, name, metavar=metavar, shell_complete=complete, help=text)(function)
    return function


def _reached(function: Callable[..., Any]) -> Callable[..., Any]:
    return url_option(data_dir_option(function))


@click.group(cls=Group, no_args_is_help=True)
def command() -> None:
    """Look at the audit log, and check that it is whole."""


@command.command()
@_filtered
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="How many, at most.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON, one a line.")
@_reached
def query(**options: Any) -> int:
    """Show records, the newest first.

    \b
    corral audit query --from 2h --action tool.call

    Exit codes: 0 done, 2 wrong usage, 4 no gateway, 5 refused for want of a role.
    """
    filters = _params(options)

    async def go(corral: Corral) -> int:
        left = options["limit"]
        async for page in _pages(corral, filters, min(_PAGE, left)):
            for record in page[:left]:
                _show(record, options["as_json"])
            left -= len(page)
            if left <= 0:
                break
        if left == options["limit"] and not options["as_json"]:
            print("no record fits", file=sys.stderr)
        return OK

    return _connected(options, go)


@command.command()
@_filtered
@click.option(
    "-n", "--lines", type=click.IntRange(0, _PAGE), default=10, show_default=True, help="Records to begin with."
)
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON, one a line.")
@_reached
def tail(**options: Any) -> int:
    """Show the last records, then each new one as it comes. Ctrl-C ends it.

    \b
    corral audit tail --session notes

    Exit codes: 2 wrong usage, 4 no gateway, 5 refused for want of a role, 130 ended.
    """
    filters = _params(options)

    async def go(corral: Corral) -> int:
        # What there is now is the beginning, whatever the filters let through of it.
        newest = await corral.request("audit.query", limit=1)
        last = newest["items"][0]["id"] if newest["items"] else 0
        if options["lines"]:
            page = await corral.request("audit.query", limit=options["lines"], cursor=last + 1, **filters)
            for record in reversed(page["items"]):
                _show(record, options["as_json"])
        while True:
            await asyncio.sleep(_POLL_S)
            for record in await _after(corral, filters, last):
                _show(record, options["as_json"])
                last = record["id"]

    return _connected(options, go)


@command.command()
@click.option("--file", "file", type=click.Path(path_type=Path), help="Check this export instead, without a gateway.")
@click.option("--key", metavar="HEX", help="With --file: the public key that must have signed it (DATA_DIR/audit.pub).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_reached
def verify(**options: Any) -> int:
    """Check that no record was changed, dropped, put in, put elsewhere or cut off.

    \b
    corral audit verify
    corral audit verify --file audit.jsonl

    Exit codes: 0 the log is whole, 1 it is not, 2 wrong usage, 4 no gateway,
    5 refused for want of a role.
    """
    if options["file"] is not None:
        return _verify_file(options)
    if options["key"] is not None:
        raise CliError("--key is for an export", "name it with --file; the gateway checks with its own key", code=USAGE)

    async def go(corral: Corral) -> int:
        return _tell(await corral.request("audit.verify"), options["as_json"], "")

    return _connected(options, go)


@command.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@_reached
def export(**options: Any) -> int:
    """Write the whole log to FILE (`-`: standard output) in a form that proves itself.

    One record a line as JSON, and a last line with the signed head. `corral audit verify --file FILE`
    checks it anywhere, without this server.

    \b
    corral audit export audit.jsonl

    Exit codes: 0 done, 1 the log is broken or the file cannot be written, 2 wrong usage,
    4 no gateway, 5 refused for want of a role.
    """
    path: Path = options["file"]
    if str(path) != "-" and path.exists() and not options["force"]:
        raise CliError(f"{path} is there already", "name another file, or write over it with --force", code=USAGE)

    async def go(corral: Corral) -> int:
        result = await corral.request("audit.verify")
        if not result["ok"] or "anchor" not in result:
            _tell(result, False, "")
            raise CliError("a log that is broken is not exported as one that is whole")
        if str(path) == "-":
            await _write_export(corral, result, lambda line: print(line))
            return OK
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with _private(draft) as file:
                await _write_export(corral, result, lambda line: file.write(line + "\n"))
            draft.replace(path)
        except OSError as error:
            raise CliError(f"{path} cannot be written: {error.strerror}") from None
        finally:
            draft.unlink(missing_ok=True)
        print(f"{result['checked']} records written to {path}", file=sys.stderr)
        print(f"signed with the key {result['anchor']['publicKey']}", file=sys.stderr)
        return OK

    return _connected(options, go)


# ---- reading


async def _pages(corral: Corral, filters: dict[str, Any], limit: int) -> AsyncIterator[list[dict[str, Any]]]:
    params = dict(filters)
    while True:
        page = await corral.request("audit.query", limit=limit, **params)
        yield page["items"]
        if "nextCursor" not in page:
            return
        params["cursor"] = page["nextCursor"]


async def _after(corral: Corral, filters: dict[str, Any], last: int) -> list[dict[str, Any]]:
    """The records after `last`, the oldest first."""
    found: list[dict[str, Any]] = []
    async for page in _pages(corral, filters, 100):
        new = [record for record in page if record["id"] > last]
        found += new
        if len(new) < len(page):
            break
    return found[::-1]


def _private(path: Path) -> TextIO:
    return open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600))


async def _write_export(corral: Corral, result: dict[str, Any], write: Callable[[str], object]) -> None:
    """The records up to the anchor, the oldest first, and the last line. Raises CliError if one has gone meanwhile."""
    import msgspec

    from corral.governance.chain import export_end, export_line
    from corral.protocol.types import AuditAnchor

    anchor = msgspec.convert(result["anchor"], AuditAnchor)
    written = 0
    for first in range(anchor.base_id + 1, anchor.id + 1, _PAGE):
        end = min(first + _PAGE, anchor.id + 1)
        page = await corral.request("audit.query", limit=end - first, cursor=end)
        records = [record for record in reversed(page["items"]) if record["id"] >= first]
        for record in records:
            write(export_line(anchor.tenant_id, record))
        written += len(records)
    if written != anchor.id - anchor.base_id:
        raise CliError("records went away while the log was exported", "try again, and run: corral audit verify")
    write(export_end(anchor, written))


def _verify_file(options: dict[str, Any]) -> int:
    import msgspec

    from corral.governance.anchors import PUBLIC_KEY_FILE
    from corral.governance.chain import verify_export

    key, whose = options["key"], "the key that you gave"
    if key is not None and not _KEY.fullmatch(key):
        raise CliError("--key is no public key", "it is the 64 hexadecimal digits in DATA_DIR/audit.pub", code=USAGE)
    if key is None:
        known = settings_from({"data_dir": options["data_dir"]}).data_dir / PUBLIC_KEY_FILE
        if known.is_file():
            key, whose = known.read_text(encoding="ascii", errors="replace").strip(), f"the key in {known}"
    try:
        with open(options["file"], encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            result = verify_export(file, public_key=key)
    except OSError as error:
        raise CliError(f"{options['file']} cannot be read: {error.strerror}", code=USAGE) from None
    if key is None:
        whose = "a key that only the file itself vouches for: compare it with DATA_DIR/audit.pub, or give it with --key"
    return _tell(msgspec.to_builtins(result), options["as_json"], whose)


def _tell(result: dict[str, Any], as_json: bool, whose: str) -> int:
    if as_json:
        print(harmless(json.dumps(result, ensure_ascii=False)))
    elif result["ok"]:
        print(f"whole: {result['checked']} records, head {result['headHash']}")
        if "anchor" in result:
            print(f"signed with {result['anchor']['publicKey']}" + (f" ({whose})" if whose else ""))
    else:
        at, reason = result.get("brokenAt"), result.get("reason", "the chain does not hold")
        if at is not None and at > result["checked"]:
            print(f"BROKEN at record {at}: {reason}")
            print(f"the {result['checked']} records before it hold together")
        else:
            print(f"BROKEN: {reason}")
            print(f"its {result['checked']} records hold together, but nothing vouches for them")
    return OK if result["ok"] else FAILED


def _show(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(harmless(json.dumps(record, ensure_ascii=False)), flush=True)
        return
    outcome = "" if record["outcome"] == "ok" else f" {record['outcome'].upper()}"
    about = json.dumps(record["metadata"], ensure_ascii=False) if record["metadata"] else ""
    terminal = sys.stdout.isatty()
    when = record["createdAt"][:19].replace("T", " ") if terminal else record["createdAt"]
    line = visible(
        f"{record['id']:>6}  {when}  {record['action']}{outcome}  {record['actor']}  "
        f"{record['resourceType']} {record['resourceId']}  {about}"
    ).replace("\n", "\\n")
    # On a terminal one record is one line; `--json` has the whole.
    shown = cut(line.rstrip(), width()) if terminal else line.rstrip()
    print(shown, flush=True)


# ---- what the gateway is asked, and how


def _params(options: dict[str, Any]) -> dict[str, Any]:
    names = {"from_": "from", "to": "to", "action": "action", "actor": "actor", "session": "sessionId", "run": "runId"}
    given = {names[name]: options[name] for name in names if options[name] is not None}
    for name in ("from", "to"):
        if name in given:
            given[name] = given_time(given[name], f"--{name}")
    return given


def _connected(options: dict[str, Any], work: Callable[[Corral], Awaitable[int]]) -> int:
    settings = settings_from({"data_dir": options["data_dir"]})
    url, token = find_gateway(options["url"], settings)()

    async def go() -> int:
        async with Corral(url, token, name="corral-cli") as corral:
            return await work(corral)

    try:
        return asyncio.run(go())
    except GatewayUnreachable as error:
        raise no_gateway(str(error), settings, options["url"]) from None
    except CorralError as error:
        raise _refused(error) from None


def _refused(error: CorralError) -> CliError:
    if error.code is ErrorCode.UNAUTHORIZED:
        return CliError(*unauthorized(error), code=NO_GATEWAY)
    if error.code is ErrorCode.FORBIDDEN:
        return CliError(f"{error.code}: {error.message}", "it needs the role auditor, admin or owner", code=REFUSED)
    code = USAGE if error.code is ErrorCode.INVALID_REQUEST else FAILED
    return CliError(f"{error.code}: {error.message}", code=code)
