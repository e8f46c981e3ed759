"""`corral config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from corral.cli import OK, Group
from corral.cli.common import data_dir_option, json_option, settings_from


@click.group(cls=Group, no_args_is_help=True)
def command() -> None:
    """The settings, and where each came from."""


@command.command()
@data_dir_option
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The configuration. [default: corral.toml in the data directory]",
)
@json_option
def show(**options: Any) -> int:
    """Show each setting with where it came from.

    It is what `corral serve` would be told if it were started here now. The access token is not shown:
    `corral token` prints it.

    Exit codes: 0 shown, 2 a setting that cannot be used.
    """
    settings = settings_from({"data_dir": options["data_dir"], "config": options["config"]})
    from corral.cli.tables import print_json, print_table
    from corral.config import SETTINGS

    values = {name: _shown(name, getattr(settings, name)) for name in SETTINGS}
    if options["as_json"]:
        print_json({name: {"value": value, "from": settings.origins[name]} for name, value in values.items()})
        return OK
    rows = [[name, _words(value), settings.origins[name]] for name, value in values.items()]
    print_table(["SETTING", "VALUE", "FROM"], rows, stretch=1)
    return OK


def _shown(name: str, value: Any) -> Any:
    import msgspec

    if name == "token":
        return None if value is None else f"(hidden, {len(value)} characters)"
    return msgspec.to_builtins(value, enc_hook=str)


def _words(value: Any) -> str:
    import json

    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
