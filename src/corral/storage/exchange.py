"""Puts restored files into the place of those in a data directory, all or none, whenever it is interrupted.

The new files are made ready in DATA_DIR/restore.new. What decides is the plan, DATA_DIR/restore.json: it
appears in one step, when everything is ready and on the disk. Without it, what was made ready is thrown
away; with it, the exchange is carried to its end. Every step is a rename that may have been done
already. Whoever calls has the directory's lock.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import msgspec
from msgspec import Struct

from corral.config import create_private

STAGING, PLAN = "restore.new", "restore.json"


class Plan(Struct, kw_only=True, rename="camel"):
    """An exchange: `names` come out of the staging folder, `aside` only go; what was there goes to `kept`.

    `backup` is when the backup was made, for the words of whoever ends this.
    """

    backup: str
    kept: str
    names: list[str]
    aside: list[str]


def interrupted(data_dir: Path) -> bool:
    """Whether a restore into this directory did not come to its end."""
    return (data_dir / PLAN).exists() or (data_dir / STAGING).exists()


def settle(data_dir: Path) -> str | None:
    """Bring a restore that was interrupted to its one end or its other; which, for a person. Raises OSError.

    None if there was none.
    """
    try:
        plan = msgspec.json.decode((data_dir / PLAN).read_bytes(), type=Plan)
    except FileNotFoundError:
        if not (data_dir / STAGING).exists():
            return None
        shutil.rmtree(data_dir / STAGING)
        return "a restore was interrupted before it had changed anything: what was here is as it was"
    except msgspec.MsgspecError as error:
        raise OSError(f"{data_dir / PLAN} is not what a restore writes: {error}") from None
    _carry_out(data_dir, plan)
    return f"a restore was interrupted: it has been completed, the state is that of the backup of {plan.backup}"


def exchange(data_dir: Path, plan: Plan) -> None:
    """Put what is in the staging folder into its place. Raises OSError."""
    _sync_tree(data_dir / STAGING)
    if not create_private(data_dir / PLAN, msgspec.json.encode(plan).decode()):
        raise FileExistsError(f"{data_dir / PLAN} is there already")
    sync_folder(data_dir)
    _carry_out(data_dir, plan)


def _carry_out(data_dir: Path, plan: Plan) -> None:
    staging, kept = data_dir / STAGING, data_dir / plan.kept
    # A log beside a database that is not its own would be read into it: it goes first.
    for name in plan.aside:
        _put_aside(data_dir / name, kept)
    sync_folder(data_dir)
    for name in plan.names:
        # What has left the staging folder is in its place already.
        if (staging / name).exists():
            _put_aside(data_dir / name, kept)
            (staging / name).rename(data_dir / name)
    sync_folder(data_dir)
    # The plan goes last: a staging folder without one is taken for a restore that had not begun.
    shutil.rmtree(staging, ignore_errors=True)
    (data_dir / PLAN).unlink()
    sync_folder(data_dir)


def _put_aside(path: Path, kept: Path) -> None:
    if not os.path.lexists(path):
        return
    kept.mkdir(mode=0o700, exist_ok=True)
    target, number = kept / path.name, 1
    while os.path.lexists(target):
        number += 1
        target = kept / f"{path.name}.{number}"
    path.rename(target)
    sync_folder(kept)


def _sync_tree(folder: Path) -> None:
    """The files' contents are on the disk already."""
    for name, _, _ in os.walk(folder):
        sync_folder(Path(name))


def sync_folder(folder: Path) -> None:
    """Have a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Some file systems have no such thing for folders.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
