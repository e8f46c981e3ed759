"""`corral token`."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corral.cli import OK, USAGE, CliError, Group, completing
from corral.cli.common import data_dir_option, settings_from
from corral.cli.find import url_option
from corral.config import ConfigError, ensure_token

if TYPE_CHECKING:
    from corral.client import Corral

ROLES = ("owner", "admin", "operator", "member", "viewer", "auditor")
_SPAN = re.compile(r"([1-9][0-9]{0,8})(m|h|d)")
_MS = {"m": 60_000, "h": 3_600_000, "d": 86_400_000}

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line, and nothing else.")


@click.group(cls=Group, invoke_without_command=True)
@data_dir_option
@click.pass_context
def command(ctx: click.Context, data_dir: Path | None) -> None:
    """Print the access token, or make and revoke others.

    Without a command it prints the owner's token. It is CORRAL_TOKEN if that is set, else the one kept in
    the data directory; if there is none yet, one is made.
    """
    if ctx.invoked_subcommand is not None:
        return
    settings = settings_from({"data_dir": data_dir})
    try:
        print(ensure_token(settings))
    except ConfigError as error:
        raise CliError(str(error), code=USAGE) from None


@command.command()
@click.option("--role", "roles", type=click.Choice(ROLES), multiple=True, required=True, help="May be repeated.")
@click.option(
    "--expires", metavar="TIME", help="So long from now, like 12h or 30d, or an RFC 3339 time. [default: never]"
)
@click.option("--user", metavar="ID", help="Whom it speaks for. [default: you]")
@click.option("--name", metavar="TEXT", help="The name that is shown for them.")
@click.option("--workspace", "workspaces", metavar="ID", multiple=True, help="May be repeated. [default: yours]")
@_json
@url_option
@data_dir_option
@click.pass_context
def create(ctx: click.Context, /, **options: Any) -> int:
    """Make a token and print it, this once.

    Nobody makes one that may do more than they may themselves. operator runs agents and approves calls,
    member runs, viewer looks on, auditor reads the audit log, admin manages all but owners.

    \b
    corral token create --role operator --expires 30d

    Exit codes: 0 made, 2 wrong usage, 4 no gateway, 5 refused for want of a role.
    """
    params: dict[str, Any] = {"roles": list(options["roles"])}
    given = (
        ("userId", options["user"]),
        ("displayName", options["name"]),
        ("workspaceIds", list(options["workspaces"])),
    )
    params |= {name: value for name, value in given if value}
    params |= _expiry(options["expires"])

    async def go(corral: Corral) -> int:
        made = await corral.request("tokens.create", **params)
        if options["as_json"]:
            _print_json(made)
        else:
            print(made["token"])
            print(f"{_line(made)}\nit is shown this once: keep it where CORRAL_TOKEN is set from", file=sys.stderr)
        return OK

    return _ask(ctx, options, go)


@command.command("list")
@click.option("--all", "all_", is_flag=True, help="The revoked and expired ones too.")
@_json
@url_option
@data_dir_option
@click.pass_context
def list_(ctx: click.Context, /, **options: Any) -> int:
    """List the tokens, the oldest first, without their texts.

    Exit codes: 0 done, 2 wrong usage, 4 no gateway, 5 refused for want of a role.
    """

    async def go(corral: Corral) -> int:
        items = [item for item in (await corral.request("tokens.list"))["items"] if options["all_"] or _holds(item)]
        for item in items:
            _print_json(item) if options["as_json"] else print(_lines(item) if sys.stdout.isatty() else _line(item))
        return OK

    return _ask(ctx, options, go)


@command.command()
@click.argument("token_id", metavar="ID", shell_complete=completing.tokens)
@_json
@url_option
@data_dir_option
@click.pass_context
def revoke(ctx: click.Context, /, token_id: str, **options: Any) -> int:
    """Take a token back; its connections are closed at once.

    ID is the token's id as `corral token list` shows it, not its text.

    \b
    corral token revoke tok_…

    Exit codes: 0 done, 1 there is no such token or it is the last owner's, 2 wrong usage, 4 no gateway,
    5 refused for want of a role.
    """

    if token_id.startswith("crl_"):
        raise CliError("that is a token's text: name it by its id", "`corral token list` shows the ids", code=USAGE)

    async def go(corral: Corral) -> int:
        item = (await corral.request("tokens.revoke", tokenId=token_id))["token"]
        _print_json(item) if options["as_json"] else print(_line(item))
        return OK

    return _ask(ctx, options, go)


def _ask(ctx: click.Context, options: dict[str, Any], work: Any) -> int:
    from corral.cli.calling import ask  # bare `corral token` speaks to no gateway

    above = ctx.parent.params if ctx.parent is not None else {}
    code: int = ask({**options, "data_dir": options["data_dir"] or above.get("data_dir")}, work)
    return code


def _expiry(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    if span := _SPAN.fullmatch(text):
        return {"expiresInMs": int(span[1]) * _MS[span[2]]}
    if re.match(r"\d{4}-", text):
        return {"expiresAt": text}
    raise CliError(f"--expires {text} is no time", "give 90m, 12h, 30d, or 2030-01-31T12:00:00Z", code=USAGE)


def _holds(item: dict[str, Any]) -> bool:
    expired = "expiresAt" in item and datetime.fromisoformat(item["expiresAt"]) <= datetime.now(UTC)
    return "revokedAt" not in item and not expired


def _line(item: dict[str, Any]) -> str:
    from corral.cli.visible import visible

    until = f"until {item['expiresAt']}" if "expiresAt" in item else "does not expire"
    if "revokedAt" in item:
        until = f"revoked {item['revokedAt']}"
    roles, spaces = ",".join(item["roles"]), ",".join(item["workspaceIds"])
    return f"{item['tokenId']}  {visible(_whose(item))}  {roles}  {spaces}  {until}"


def _lines(item: dict[str, Any]) -> str:
    """What a narrow terminal has room for."""
    from corral.cli.columns import fold, width

    times: dict[str, Any] = {
        name: item[name][:16].replace("T", " ") for name in ("expiresAt", "revokedAt") if name in item
    }
    token_id, rest = _line({**item, **times}).split("  ", 1)
    return "\n".join([token_id, *fold(f"  {rest}", width())])


def _whose(item: dict[str, Any]) -> str:
    name = f" ({item['displayName']})" if "displayName" in item else ""
    return f"{item['subject']}{name}"


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value))
