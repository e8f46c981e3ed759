"""`corral agents`: list, show, set."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from corral.cli import FAILED, OK, USAGE, CliError, Group, completing
from corral.cli.common import check_tool_name, data_dir_option, json_option, unknown_tools
from corral.cli.find import url_option

if TYPE_CHECKING:
    from corral.client import Corral
    from corral.protocol.types import Agent


def _reached(function: Callable[..., Any]) -> Callable[..., Any]:
    return url_option(data_dir_option(function))


@click.group(cls=Group, no_args_is_help=True)
def command() -> None:
    """List, show and change agents.

    An agent is a name, a system prompt, a model and its tools.

    Exit codes: 0 done, 1 failed (no such agent, for one), 2 wrong usage, 4 no gateway,
    5 refused for want of a role.
    """


async def _all(corral: Corral) -> list[Agent]:
    import msgspec

    from corral.protocol.types import Agent

    return msgspec.convert((await corral.request("agents.list"))["items"], list[Agent])


@command.command("list")
@json_option
@_reached
def list_(**options: Any) -> int:
    """List the agents of the workspace."""
    from msgspec import UNSET

    from corral.cli.calling import ask
    from corral.cli.tables import print_json, print_table

    agents = ask(options, _all)
    if options["as_json"]:
        print_json(agents)
        return OK
    rows = [
        [
            agent.id,
            agent.model if agent.model is not UNSET else "the gateway's",
            "every one" if agent.tools is UNSET else str(len(agent.tools)),
            agent.system_prompt if agent.system_prompt is not UNSET else "",
        ]
        for agent in agents
    ]
    print_table(["ID", "MODEL", "TOOLS", "PROMPT"], rows)
    return OK


@command.command()
@click.argument("agent_id", metavar="ID", shell_complete=completing.agents)
@json_option
@_reached
def show(agent_id: str, **options: Any) -> int:
    """Show one agent.

    \b
    corral agents show a_default
    """
    from corral.cli.calling import ask
    from corral.cli.tables import print_json

    agent = _named(ask(options, _all), agent_id)
    if agent is None:
        raise CliError(f"there is no agent {agent_id!r}", "`corral agents list` shows them", code=FAILED)
    if options["as_json"]:
        print_json(agent)
    else:
        _print(agent)
    return OK


def _named(agents: list[Agent], agent_id: str) -> Agent | None:
    return next((agent for agent in agents if agent.id == agent_id), None)


def _print(agent: Agent) -> None:
    from msgspec import UNSET

    from corral.cli.show import visible

    facts = [
        ("id", agent.id),
        ("name", agent.name),
        ("model", agent.model if agent.model is not UNSET else "the gateway's"),
        ("tools", ", ".join(agent.tools) or "none" if agent.tools is not UNSET else "every one that policy allows"),
        ("changed", agent.updated_at),
    ]
    for key, value in facts:
        if value is not UNSET:
            print(f"{key:<10} {visible(str(value))}")
    if agent.system_prompt is not UNSET and agent.system_prompt:
        print(f"prompt\n{visible(agent.system_prompt)}")


@command.command("set")
@click.argument("agent_id", metavar="ID", shell_complete=completing.agents)
@click.option("--name", metavar="TEXT", help="What people call it.")
@click.option("--prompt", metavar="TEXT", help="Its system prompt; `-` reads it from standard input.")
@click.option("--model", metavar="PROVIDER:NAME", help="Its model. [default: the gateway's]")
@click.option(
    "--tool",
    "tools",
    metavar="TOOL",
    multiple=True,
    shell_complete=completing.tools,
    help="A tool that it has; may be repeated. [default: every one]",
)
@json_option
@_reached
def set_(agent_id: str, **options: Any) -> int:
    """Make an agent, or change what is named of one and leave the rest as it is.

    An agent of corral.toml is set back to what stands there by the gateway's next start.

    \b
    corral agents set reviewer --prompt "You review code." \\
      --tool file.read --tool file.search
    """
    from corral.cli.calling import ask
    from corral.cli.tables import print_json

    if options["model"] == "":
        raise CliError("--model is empty", "name one, like openai-chat:NAME, or leave it out", code=USAGE)
    for tool in options["tools"]:
        check_tool_name(tool)
    given = {
        "id": agent_id,
        "name": options["name"],
        "model": options["model"],
        "systemPrompt": sys.stdin.read() if options["prompt"] == "-" else options["prompt"],
        "tools": list(options["tools"]) or None,
    }
    wanted = {key: value for key, value in given.items() if value is not None}

    async def go(corral: Corral) -> Agent:
        import msgspec

        from corral.protocol.types import Agent

        return msgspec.convert((await corral.request("agents.upsert", agent=wanted))["agent"], Agent)

    agent = ask(options, go)
    if note := unknown_tools(options["tools"]):
        print(note, file=sys.stderr)
    if options["as_json"]:
        print_json(agent)
    else:
        _print(agent)
    return OK
