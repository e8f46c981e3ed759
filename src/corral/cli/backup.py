"""`corral backup`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corral.cli import OK, USAGE, CliError
from corral.cli.common import data_dir_option, json_option, settings_from

if TYPE_CHECKING:
    from corral.governance.backup import Made

_QUIET_S = 1.0
_EVERY_S = 10.0


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--secrets", is_flag=True, help="The access token and the key of made tokens too.")
@click.option("--no-workspaces", is_flag=True, help="Without the workspaces' folders, where agents work.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@json_option
@data_dir_option
def command(**options: Any) -> int:
    """Write all that a restore needs to one file, while the gateway runs.

    Or while it is stopped. The file has the database as it is at one instant, the files that prove the audit log,
    corral.toml, and the workspaces' folders. The access token stays out, and corral.toml too if a token is in
    it, unless --secrets asks for them. It is a tar of mode 0600 with what was said in every session and the key
    that signs the audit log, so keep it as you keep the data directory. The gateway is not held up.

    \b
    corral backup /backups/corral-$(date +%F).tar

    Exit codes: 0 made, 1 it cannot be made (FILE is there already, for one), 2 wrong usage.
    """
    settings = settings_from({"data_dir": options["data_dir"]})
    path: Path = options["file"].absolute()
    if path.resolve().is_relative_to(settings.data_dir.resolve()):
        raise CliError(
            f"{path} is inside the data directory, and would be lost with it", "name a file elsewhere", code=USAGE
        )
    if os.path.lexists(path) and not options["force"]:
        raise _taken(path)
    # Past the arguments, as the help needs none of it.
    from corral.governance.backup import BackupFailed, write_backup

    began, told = time.monotonic(), Told()
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        made = write_backup(
            settings.data_dir,
            draft,
            secrets=options["secrets"],
            workspaces=not options["no_workspaces"],
            told=told,
        )
        size = draft.stat().st_size
        _name(draft, path, force=options["force"])
    except BackupFailed as error:
        raise CliError(str(error), error.remedy) from None
    except OSError as error:
        raise CliError(
            f"{path} cannot be written: {error.strerror or error}", "is there room, and may the folder be written?"
        ) from None
    finally:
        told.close()
        draft.unlink(missing_ok=True)
    _tell(path, size, made, time.monotonic() - began, options["as_json"])
    return OK


def _taken(path: Path) -> CliError:
    return CliError(f"{path} is there already", "name another file, or write over it with --force")


def _name(draft: Path, path: Path, *, force: bool) -> None:
    from corral.storage.exchange import sync_folder

    if force:
        draft.replace(path)
    else:
        try:
            os.link(draft, path)  # unlike a rename, this never takes the place of a file that is there
        except FileExistsError:
            raise _taken(path) from None
        except OSError:  # a file system without links
            if os.path.lexists(path):
                raise _taken(path) from None
            draft.rename(path)
    sync_folder(path.parent)


def _tell(path: Path, size: int, made: Made, seconds: float, as_json: bool) -> None:
    from corral.cli.tables import print_json
    from corral.cli.visible import visible

    manifest = made.manifest
    if as_json:
        print_json(
            {
                "file": str(path),
                "bytes": size,
                "createdAt": manifest.created_at,
                "schema": manifest.schema,
                "audit": manifest.audit,
                "files": len(manifest.files),
                "skipped": manifest.skipped,
                "leftOut": made.left_out,
                "seconds": round(seconds, 3),
            }
        )
        return
    print(visible(f"{path}: {megabytes(size)}, {len(manifest.files)} files, in {seconds:.1f} s"))
    for name, why in made.left_out.items():
        print(f"  left out: {name} ({why})")
    if manifest.skipped:
        print(f"  left out: {manifest.skipped} in the workspaces that are links, no files, or cannot be read")


def megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


class Told:
    """What goes on, on standard error, where it takes long: a line that changes on a terminal, else now and then."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._said = 0.0
        self._what = ""
        self._terminal = sys.stderr.isatty()

    def __call__(self, what: str, done: int, whole: int) -> None:
        now = time.monotonic()
        if now - self._began < _QUIET_S:
            return
        if self._terminal:
            if what != self._what or now - self._said > 0.1:
                print(f"\r\x1b[K{_line(what, done, whole)}", end="", file=sys.stderr, flush=True)
                self._said = now
        elif what != self._what or now - self._said > _EVERY_S:
            print(_line(what, done, whole), file=sys.stderr, flush=True)
            self._said = now
        self._what = what

    def close(self) -> None:
        """Leave the line that changes."""
        if self._terminal and self._what:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _line(what: str, done: int, whole: int) -> str:
    return f"{what} …" if not whole else f"{what}: {done * 100 // whole} %"
