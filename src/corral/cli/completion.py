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
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    print(found(corral, {}, "corral", VARIABLE).source())
    return OK
