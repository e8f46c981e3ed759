"""What several commands share: an option, and the settings with their errors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from corral.cli import USAGE, CliError, completing
from corral.config import ConfigError, Settings, ensure_data_dir, load_settings

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The data directory. [default: CORRAL_DATA_DIR, else the platform's user data folder]",
)

cwd_option = click.option(
    "--cwd",
    metavar="DIR",
    shell_complete=completing.folders,
    help="The folder that a new session works in, inside one of the gateway's `roots`. [default: the workspace's own]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")


TOOLS = (
    "bash.exec",
    "process.exec",
    "file.read",
    "file.list",
    "file.search",
    "file.write",
    "file.edit",
    "http.request",
    "memory.read",
    "memory.append",
    "memory.search",
)
"""The tools that Corral has of its own."""


def check_tool_name(name: str) -> None:
    """Raise CliError for what cannot be the name of a tool."""
    if "." not in name:
        near = [tool for tool in TOOLS if name.lower() in tool.split(".")]
        remedy = f"did you mean {near[0]}?" if near and name else "they look like bash.exec or file.write"
        raise CliError(f"{name} is no tool's name", remedy, code=USAGE)


def unknown_tools(names: Iterable[str]) -> str:
    """A note on those of `names` that are no tools of Corral's own and may be misspelt; "" if there are none."""
    strange = [name for name in names if name not in TOOLS]
    return f"note: no tool of Corral's own is called {' or '.join(strange)}" if strange else ""


def settings_from(flags: Mapping[str, Any]) -> Settings:
    """The settings, with what is wrong in them as a usage error."""
    try:
        return load_settings(flags, os.environ)
    except ConfigError as error:
        raise CliError(str(error), code=USAGE) from None


def prepare_data_dir(settings: Settings) -> None:
    """Make the data directory, with what is wrong with it as a usage error."""
    try:
        ensure_data_dir(settings.data_dir)
    except ConfigError as error:
        raise CliError(str(error), code=USAGE) from None
