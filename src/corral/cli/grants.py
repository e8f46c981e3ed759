"""`corral grants`: what approvals were told to remember."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from corral.cli import OK, Group, completing
from corral.cli.approvals import print_json, reached
from corral.cli.calling import ask
from corral.cli.columns import fold, width
from corral.cli.visible import exact

if TYPE_CHECKING:
    from corral.client import Corral


@click.group(cls=Group, no_args_is_help=True)
def command() -> None:
    """See what approvals were told to remember, and take it back."""


@command.command("list")
@click.option("--all", "all_", is_flag=True, help="The revoked and expired ones too.")
@reached
def list_(**options: Any) -> int:
    """List grants, the newest first: what they cover, how often they were used, until when they hold.

    Exit codes: 0 done, 2 wrong usage, 4 no gateway, 5 refused for want of a role.
    """

    async def go(corral: Corral) -> int:
        items = (await corral.request("grants.list"))["items"]
        shown = [item for item in items if options["all_"] or _state(item) == "holds"]
        for item in shown:
            print_json(item) if options["as_json"] else print(_described(item))
        if not shown and not options["as_json"]:
            rest = f" ({len(items)} revoked or expired: --all)" if items else ""
            print(f"nothing is remembered{rest}", file=sys.stderr)
        return OK

    return ask(options, go)


@command.command()
@click.argument("grant_id", metavar="ID", shell_complete=completing.grants)
@reached
def revoke(grant_id: str, **options: Any) -> int:
    """Take a grant back: from the next call on a person is asked again.

    \b
    corral grants revoke gr_…

    Exit codes: 0 done, 1 there is no such grant, 4 no gateway, 5 refused for want of a role.
    """

    async def go(corral: Corral) -> int:
        grant = (await corral.request("grants.revoke", grantId=grant_id))["grant"]
        print_json(grant) if options["as_json"] else print(_described(grant))
        return OK

    return ask(options, go)


def _described(item: dict[str, Any]) -> str:
    where = f"session {item['sessionId']}" if "sessionId" in item else "the whole workspace"
    uses = {0: "not used yet", 1: "used once"}.get(item["uses"], f"used {item['uses']} times")
    # What it covers is shown like a call, with nothing in it hidden. It holds JSON already, whose quotes and
    # backslashes stay as they are.
    use = f"  in {where}; {uses}; by {item['createdBy']} {item['createdAt']}, until {item['expiresAt']}"
    lines = fold(use, width()) if sys.stdout.isatty() else [use]
    return "\n".join([f"{item['grantId']}  {_state(item)}", f"  {_whole(item['matcher'])}", *lines])


def _whole(words: str) -> str:
    return "".join(char if char in '"\\\\' else exact(char, None)[1:-1] for char in words)


def _state(item: dict[str, Any]) -> str:
    if "revokedAt" in item:
        return f"revoked {item['revokedAt']}"
    return "holds" if datetime.fromisoformat(item["expiresAt"]) > datetime.now(UTC) else "expired"
