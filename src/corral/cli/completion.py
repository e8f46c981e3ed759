"""`corral completion`."""

from __future__ import annotations

import click

from corral.cli import OK, corral

VARIABLE = "_CORRAL_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> int:
    """Print the completion script for a shell.

    \b
    bash:  echo 'eval "$(corral completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(corral completion zsh)"' >> ~/.zshrc
    fish:  corral completion fish > ~/.config/fish/completions/corral.fish

    Ids of sessions, agents, approvals, grants and tokens are asked of the gateway, if one runs.
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    source = found(corral, {}, "corral", VARIABLE).source()
    # click's script for fish takes a comma in what is said of a word for the end of it.
    print(source.replace('string split ","', 'string split --max 1 ","'))
    return OK
