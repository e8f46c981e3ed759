"""`corral chat`."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click

from corral.cli import completing
from corral.cli.common import cwd_option, data_dir_option, settings_from
from corral.cli.find import find_gateway, load_client, no_gateway, url_option


@click.command()
@click.option(
    "--session",
    metavar="NAME",
    shell_complete=completing.sessions,
    help="Go on in the session of this id or title, or make one of this name. [default: new]",
)
@click.option("--agent", metavar="ID", shell_complete=completing.agents, help="Which agent. [default: the session's]")
@cwd_option
@click.option("--model", metavar="PROVIDER:NAME", help="Which model. [default: the agent's, else the gateway's]")
@click.option("--mode", type=click.Choice(["local", "cloud"]), help="Where the session's tools run from now on.")
@click.option("--json", "as_json", is_flag=True, help="Print the events, one JSON frame a line, and nothing else.")
@url_option
@data_dir_option
def command(**options: Any) -> int:
    """Talk with an agent.

    Enter sends, Alt-Enter or Ctrl-J begins a new line, the arrow keys go through what was typed before.
    Ctrl-C aborts the run and keeps the chat, Ctrl-D leaves; /help lists what else there is. A call that
    needs approval is asked about if you may decide it. If the connection drops or the gateway is started
    again, the chat goes on where it was.

    Without a terminal each line of standard input is a message (a backslash at its end goes on with the
    next one); answers go to standard output, all else to standard error.

    \b
    corral chat
    corral chat --session notes

    Exit codes: 0 left, 1 failed, 2 wrong usage, 4 no gateway. Without a terminal the last run's: 1 failed,
    5 refused by policy, 130 aborted; and 130 for Ctrl-C where no run was on.
    """
    settings = settings_from({"data_dir": options["data_dir"]})
    if options["as_json"] and sys.stdin.isatty():
        print("corral: each line is a message; Ctrl-D ends", file=sys.stderr)
    address = find_gateway(options["url"], settings)
    client = load_client(address()[0])
    from corral.cli.calling import refusal
    from corral.cli.chatting import chat
    from corral.protocol.errors import CorralError

    try:
        return asyncio.run(chat(options, settings, address))
    except client.GatewayUnreachable as error:
        raise no_gateway(str(error), settings, options["url"]) from None
    except CorralError as error:
        raise refusal(error) from None
