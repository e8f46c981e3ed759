"""`corral doctor`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from corral.cli import FAILED, OK
from corral.cli.common import data_dir_option, json_option, settings_from


@click.command()
@data_dir_option
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The configuration. [default: corral.toml in the data directory]",
)
@click.option(
    "--model", metavar="PROVIDER:NAME", help="The model to ask. [default: the one that `corral serve` would use]"
)
@click.option("--offline", is_flag=True, help="Do not ask the model: that costs a few tokens.")
@json_option
def command(**options: Any) -> int:
    """What works here, what does not, and the remedy.

    It looks at the program, the data directory, the gateway, the sandbox, the model and the container
    runtimes, and changes nothing. The model is asked from here, with this shell's keys; a gateway that
    runs already may have been started with others.

    Exit codes: 0 all that is needed is there, 1 something needed is missing, 2 a setting that cannot be used.
    """
    settings = settings_from({name: options[name] for name in ("data_dir", "config", "model")})
    # Past the arguments: to look at everything, everything is imported.
    import asyncio

    from corral.cli.checks import check_all
    from corral.cli.show import colours, visible, width
    from corral.cli.tables import print_json

    with _patience(f"looking, and asking {settings.model}" if not options["offline"] else "looking"):
        checks = asyncio.run(check_all(settings, offline=options["offline"]))
    missing = [check for check in checks if check.state == "missing"]
    if options["as_json"]:
        print_json({"ok": not missing, "checks": checks})
        return FAILED if missing else OK
    from corral.cli.columns import fold

    colour = colours(sys.stdout)
    marks = {"ok": ("ok", "32"), "note": ("note", "33"), "missing": ("MISSING", "31")}
    for check in checks:
        word, code = marks[check.state]
        mark = f"\x1b[{code}m{word:<8}\x1b[0m" if colour else f"{word:<8}"
        room = max(30, width() - 10)
        lines = fold(visible(f"{check.name}: {check.found}"), room, "")
        print(f"{mark} {lines[0]}")
        if check.remedy:
            lines += fold(visible(f"→ {check.remedy}"), room, "")
        for line in lines[1:]:
            print(f"{'':<9}{line}")
    print()
    if missing:
        print(
            "one thing that is needed is missing" if len(missing) == 1 else f"{len(missing)} needed things are missing"
        )
    else:
        print("all that is needed is there")
    return FAILED if missing else OK


@contextmanager
def _patience(what: str) -> Iterator[None]:
    """Say on a terminal what it is that takes long; a model's server that hangs is given twenty seconds."""
    shown = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if shown:
        print(f"{what} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
