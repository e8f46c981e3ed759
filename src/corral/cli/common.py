"""What several commands share: an option, and the settings with their errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from corral.cli import USAGE, CliError
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
    help="The folder that a new session works in, inside one of the gateway's `roots`. [default: the workspace's own]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")


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
