"""`corral run`."""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from corral.cli import USAGE, CliError, completing
from corral.cli.common import check_tool_name, cwd_option, data_dir_option, settings_from, unknown_tools
from corral.cli.find import find_gateway, load_client, no_gateway, url_option
from corral.cli.visible import harmless

if TYPE_CHECKING:
    from corral.client import Corral, Event

RECONNECT_FOR = 300.0


@click.command()
@click.argument("text")
@click.option(
    "--session",
    metavar="NAME",
    shell_complete=completing.sessions,
    help="Go on in the session of this id or title, or make one of this id. [default: new]",
)
@click.option("--agent", metavar="ID", shell_complete=completing.agents, help="Which agent. [default: the session's]")
@cwd_option
@click.option("--model", metavar="PROVIDER:NAME", help="Which model. [default: the agent's, else the gateway's]")
@click.option("--mode", type=click.Choice(["local", "cloud"]), help="Where the session's tools run from now on.")
@click.option(
    "--allow",
    metavar="TOOL",
    multiple=True,
    shell_complete=completing.tools,
    help="First allow a tool in this workspace; may be repeated.",
)
@click.option("--timeout", metavar="SECONDS", type=click.FloatRange(min=0.001), help="How long the run may take.")
@click.option("--json", "as_json", is_flag=True, help="Print the events, one JSON frame a line, and nothing else.")
@url_option
@data_dir_option
def command(**options: Any) -> int:
    """Have an agent do something, and watch it.

    TEXT is what you want; `-` reads it from standard input. The answer goes to standard output as
    it is written, tool calls and notices to standard error. If the connection drops or the gateway
    is started again, it goes on where it was.

    A call that needs approval is asked about if you are at a terminal and may decide; otherwise the run
    waits until somebody decides: `corral approvals` in another terminal, or the console.

    Ctrl-C aborts the run; a second one leaves without waiting for that.

    \b
    corral run "what is in this folder?"
    corral run --session notes --allow file.write "write: a.txt :: hello"
    git diff | corral run -

    Exit codes: 0 completed, 1 failed, 2 wrong usage, 4 no gateway, or none any more,
    5 refused by policy or for want of a role, 130 aborted.
    """
    settings = settings_from({"data_dir": options["data_dir"]})
    text = sys.stdin.read() if options["text"] == "-" else options["text"]
    if not text.strip():
        raise CliError("there is nothing to do: TEXT is empty", 'for example: corral run "list"', code=USAGE)
    for tool in options["allow"]:
        check_tool_name(tool)
    address = find_gateway(options["url"], settings)
    # Past the arguments: what follows is most of what the command costs.
    client = load_client(address()[0])
    from corral.cli.calling import refusal
    from corral.protocol.errors import CorralError

    try:
        return asyncio.run(_run(options, text, address))
    except client.GatewayUnreachable as error:
        raise no_gateway(str(error), settings, options["url"]) from None
    except CorralError as error:
        raise refusal(error) from None


async def _run(options: dict[str, Any], text: str, address: Callable[[], tuple[str, str]]) -> int:
    from corral.cli.approving import Approver
    from corral.cli.naming import session_for
    from corral.cli.show import Transcript
    from corral.cli.turn import Turn, exit_code
    from corral.client import Corral

    show = Transcript(unfold=": `corral sessions export` has them", unfold_cut="")
    url, token = address()
    async with Corral(
        url,
        token,
        address=address,
        reconnect_for=RECONNECT_FOR,
        on_state=lambda state, reason: _tell_state(show.note, state, reason),
        name="corral-cli",
    ) as corral:
        await _allow(corral, options["allow"], show.note)
        session_id = await session_for(corral, options["session"], options["cwd"], options["agent"])
        as_json = options["as_json"]
        approver = Approver(corral, show, asks=not as_json, silent=as_json, flags=elsewhere(options))
        began = time.monotonic()
        turn = Turn(corral, show, approver, _print_json if as_json else None)
        last = await turn.play(corral.run(text, session_id=session_id, **run_params(options)))
        if last is not None and not as_json:
            show.summary(last, time.monotonic() - began, last.payload.session_id)
        return exit_code(last)


async def _allow(corral: Corral, names: tuple[str, ...], note: Callable[[str], None]) -> None:
    if names:
        tools = dict.fromkeys(names, "allow")
        await corral.request("policy.update", layer="workspace", patch={"tools": tools})
        if strange := unknown_tools(tools):
            note(strange)
        note(f"from now on allowed in workspace {corral.hello.workspace_id}: {' and '.join(tools)}")


def run_params(options: dict[str, Any]) -> dict[str, Any]:
    """The params of `agent.run` that options name."""
    names = [("agentId", "agent"), ("model", "model"), ("runtimeMode", "mode")]
    params = {wire: options[name] for wire, name in names if options.get(name) is not None}
    if options.get("timeout") is not None:
        params["limits"] = {"timeoutMs": max(1, int(options["timeout"] * 1000))}
    return params


def elsewhere(options: dict[str, Any]) -> str:
    """The options that a command in another terminal needs to reach the same gateway."""
    parts = [("--url", options["url"]), ("--data-dir", options["data_dir"])]
    return "".join(f" {name} {shlex.quote(str(value))}" for name, value in parts if value is not None)


def _print_json(event: Event) -> None:
    import msgspec

    print(harmless(msgspec.json.encode(event).decode()), flush=True)


def _tell_state(note: Callable[[str], None], state: str, reason: str) -> None:
    if state == "lost":
        note(f"{reason}; trying for {RECONNECT_FOR / 60:.0f} minutes to go on where it was")
    else:
        note("connected again")
