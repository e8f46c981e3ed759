"""`corral version`."""

from __future__ import annotations

import platform

import click

from corral import __version__
from corral.protocol import PROTOCOL_VERSION


@click.command()
def command() -> None:
    """Print the version."""
    print(f"corral {__version__} (protocol {PROTOCOL_VERSION}, Python {platform.python_version()})")
