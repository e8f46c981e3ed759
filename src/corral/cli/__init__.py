"""The `corral` command.

Each command lives in a module of its own that is imported when it is called, so that a
command pays for what it uses: `corral --help` imports click and nothing else.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("corral.cli.serve", "Start the gateway."),
    "run": ("corral.cli.run", "Have an agent do something, and watch it."),
    "audit": ("corral.cli.audit", "Look at the audit log, and check that it is whole."),
    "stats": ("corral.cli.stats", "What came of the runs of a period: counts, latencies, costs."),
    "chat": ("corral.cli.chat", "Talk with an agent."),
    "sessions": ("corral.cli.sessions", "List, show, export, rename and delete sessions."),
    "agents": ("corral.cli.agents", "List, show and change agents."),
    "doctor": ("corral.cli.doctor", "What works here, what does not, and the remedy."),
    "config": ("corral.cli.configuration", "The settings, and where each came from."),
    "completion": ("corral.cli.completion", "Print the completion script for a shell."),
    "approvals": ("corral.cli.approvals", "See the calls that wait for a person, and approve or reject them."),
    "grants": ("corral.cli.grants", "See what approvals were told to remember, and take it back."),
    "policy": ("corral.cli.policy", "See and change what tools may do, and ask what policy says of a call."),
    "token": ("corral.cli.token", "Print the access token, or make and revoke others."),
    "backup": ("corral.cli.backup", "Write all that a restore needs to one file, while the gateway runs."),
    "restore": ("corral.cli.restore", "Put a backup into the data directory."),
    "demo": ("corral.cli.demo", "A tour: a run that survives the death of its gateway."),
    "version": ("corral.cli.version", "Print the version."),
}
"""Name -> (module that has it as `command`, what it does in one line)."""

OK, FAILED, USAGE, LOCKED, NO_GATEWAY, REFUSED, ABORTED = 0, 1, 2, 3, 4, 5, 130
"""Exit codes. docs/reference/cli.md and each command's help say which of them it uses."""


class CliError(click.ClickException):
    """An error for the person at the terminal: one line, and the remedy on a second one."""

    def __init__(self, message: str, remedy: str = "", *, code: int = FAILED) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.code = code


class Commands(click.Group):
    """The commands of COMMANDS, imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.exceptions.NoSuchCommand(args[0], possibilities=COMMANDS, ctx=ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        from click.shell_completion import CompletionItem

        # Without importing them all for what they say of themselves.
        found = [(name, summary) for name, (_, summary) in COMMANDS.items() if name.startswith(incomplete)]
        return [CompletionItem(name, help=summary) for name, summary in found]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


class Command(click.Command):
    """A command of a group. What it does is said whole where it is listed, not cut to a line."""

    def get_short_help_str(self, limit: int = 0) -> str:  # noqa: ARG002
        return super().get_short_help_str(1000)


class Group(click.Group):
    """Commands of a command."""

    command_class = Command


def load_command(name: str) -> click.Command:
    """The click command of that name. Raises KeyError if there is none."""
    command: click.Command = import_module(COMMANDS[name][0]).command
    return command


@click.command(
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="`corral COMMAND --help` tells more of a command. Begin with `corral demo`, or with `corral serve` and, in "
    'a second terminal, `corral run "list"`.',
)
@click.version_option(package_name="corral", prog_name="corral", message="%(prog)s %(version)s")
def corral() -> None:
    """A self-hosted control plane for AI agents."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(_main(arguments))


def _main(arguments: list[str] | None) -> int:
    try:
        result = corral.main(args=arguments, prog_name="corral", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return USAGE
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "corral"
        _complain(error.format_message(), f"`{where} --help` shows how it is used")
        return USAGE
    except CliError as error:
        _complain(error.format_message(), error.remedy)
        return error.code
    except click.ClickException as error:
        _complain(error.format_message(), "")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return ABORTED
    except BrokenPipeError:
        _drop_output()
        return FAILED
    return result if isinstance(result, int) else OK


def _drop_output() -> None:
    """Whoever read our output has gone: what is still buffered goes nowhere, without a complaint."""
    import os

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _complain(message: str, remedy: str) -> None:
    """The error in one line and the remedy in another; a narrow terminal gets them folded between words."""
    for line in (f"corral: {message}", f"  {remedy}" if remedy else ""):
        # click lists choices one a line.
        words = " ".join(line.split())
        if words:
            print(_folded(words, "" if line[0] != " " else "  "), file=sys.stderr)


def _folded(text: str, indent: str) -> str:
    if not sys.stderr.isatty():
        return indent + text
    from corral.cli.columns import fold, width

    return "\n".join(fold(indent + text, max(20, width() - 1)))
