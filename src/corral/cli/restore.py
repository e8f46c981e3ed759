"""`corral restore`."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corral.cli import LOCKED, OK, CliError
from corral.cli.common import data_dir_option, json_option, prepare_data_dir, settings_from

if TYPE_CHECKING:
    from corral.config import Settings
    from corral.storage.archive import Reader

_ROOM = 64 << 20
"""Bytes that are to stay free on the disk."""


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--force", is_flag=True, help="Though there is data: what is there is kept in a folder beside.")
@click.option("--abort-runs", is_flag=True, help="Runs that were on end as aborted instead of being taken up again.")
@click.option("--despite-findings", is_flag=True, help="Though the audit log or the rows contradict themselves.")
@click.option("--check", is_flag=True, help="Only look the backup over, all of it; nothing is restored.")
@json_option
@data_dir_option
def command(**options: Any) -> int:
    """Put a backup into the data directory.

    FILE is what `corral backup` wrote; the gateway must be stopped. The backup is unpacked and looked over first:
    every hash, the database, the audit log, the invariants. Then it takes its place in one step: a restore that
    is killed leaves the old state or the new one, and the next `corral serve` says which. What was in the
    place is kept in a folder `replaced-…` of the data directory. A corral.toml that is there stays.

    Runs that were on at the time of the backup are taken up again by the next start. Where the gateway that
    was backed up still runs, or came further before it died, that does things twice: --abort-runs ends them.

    \b
    corral restore --check /backups/corral-2026-01-31.tar
    corral restore /backups/corral-2026-01-31.tar

    Exit codes: 0 restored, 1 it cannot be (the file is damaged, there is data), 2 wrong usage,
    3 the data directory is in use by another process.
    """
    settings = settings_from({"data_dir": options["data_dir"]})
    # Past the arguments, as the help needs none of it.
    from corral.governance.backup import NAMES
    from corral.storage.archive import Damaged, Reader

    path: Path = options["file"]
    try:
        with Reader(path, NAMES) as reader:
            done = _check(reader, path, options) if options["check"] else _restore(reader, path, settings, options)
    except Damaged as error:
        raise CliError(f"{path} cannot be restored: {error}", "nothing was changed; use another backup") from None
    except OSError as error:
        what = error.filename or path
        raise CliError(f"{what}: {error.strerror or error}", "nothing was changed") from None
    _tell(done, options["as_json"])
    return OK


def _check(reader: Reader, path: Path, options: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="corral-check-") as name:
        findings = _unpacked(reader, path, Path(name), {**options, "despite_findings": False})
    return {"checked": str(path), **_of(reader), "findings": findings}


def _restore(reader: Reader, path: Path, settings: Settings, options: dict[str, Any]) -> dict[str, Any]:
    from corral.governance.backup import DATABASE, note_restored
    from corral.storage.exchange import PLAN, STAGING, exchange, settle
    from corral.storage.snapshot import abort_unfinished, unfinished

    data_dir = settings.data_dir
    prepare_data_dir(settings)
    with _locked(data_dir):
        earlier = settle(data_dir)
        if earlier is not None:
            click.echo(f"corral: {earlier}", err=True)
        _refuse_data(data_dir, force=options["force"])
        staging = data_dir / STAGING
        staging.mkdir(mode=0o700)
        try:
            findings = _unpacked(reader, path, staging, options)
            database = staging / DATABASE
            runs = unfinished(database)
            if options["abort_runs"] and runs:
                abort_unfinished(database, time.time_ns() // 1_000_000)
            note_restored(staging, reader.manifest.created_at)
            plan = _plan(data_dir, staging, reader.manifest.created_at)
            exchange(data_dir, plan)
        except BaseException:
            # Once there is a plan, the next start carries it to its end.
            if not (data_dir / PLAN).exists():
                shutil.rmtree(staging, ignore_errors=True)
            raise
    kept = data_dir / plan.kept
    return {
        "restored": str(data_dir),
        **_of(reader),
        "findings": findings,
        "kept": str(kept) if kept.exists() else None,
        "runs": runs,
        "runsAborted": bool(options["abort_runs"]),
    }


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    from corral.storage.lock import DataDirLock, DataDirLocked

    try:
        lock = DataDirLock(data_dir)
    except DataDirLocked as error:
        who = "another process" if error.pid is None else f"process {error.pid}"
        raise CliError(
            f"{data_dir} is in use by {who}", "stop that gateway, or name another --data-dir", code=LOCKED
        ) from None
    with lock:
        yield


def _refuse_data(data_dir: Path, *, force: bool) -> None:
    from corral.governance.backup import AUDIT_FILES, DATABASE

    there = [name for name in (DATABASE, *AUDIT_FILES, "workspaces") if (data_dir / name).exists()]
    if there and not force:
        raise CliError(
            f"there is data in {data_dir} ({', '.join(there)})",
            "name another --data-dir, or use --force: what is there is then kept in a folder beside it",
        )


def _unpacked(reader: Reader, path: Path, folder: Path, options: dict[str, Any]) -> list[str]:
    """Unpack and look over; the findings that are put up with."""
    from corral.cli.backup import Told, megabytes
    from corral.governance.backup import damage_of, findings_of, unpack
    from corral.storage.archive import Damaged

    told = Told()
    size = sum(entry.size for entry in reader.manifest.files)
    free = shutil.disk_usage(folder).free
    if free < size + _ROOM:
        raise CliError(
            f"it takes {megabytes(size)} and {folder} has {megabytes(free)} free", "make room; nothing was changed"
        )
    try:
        unpack(reader, folder, told)
        if problems := damage_of(folder, told):
            raise Damaged(f"its database is damaged: {problems[0]}")
        findings = findings_of(folder, told)
    finally:
        told.close()
    if findings and not options["despite_findings"]:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise CliError(
            f"{path} contradicts itself: {findings[0]}{more}",
            "nothing was changed; use another backup, or this one all the same with --despite-findings",
        )
    return findings


def _plan(data_dir: Path, staging: Path, backup: str) -> Any:
    from corral.config import CONFIG_FILE
    from corral.governance.backup import AUDIT_FILES, DATABASE, SIDECARS
    from corral.storage.exchange import Plan

    if (data_dir / CONFIG_FILE).exists():
        (staging / CONFIG_FILE).unlink(missing_ok=True)
    names = sorted(entry.name for entry in staging.iterdir())
    # The files of the audit belong to the database that they were signed for, here or not.
    aside = [name for name in (*SIDECARS, *AUDIT_FILES) if name not in names]
    device = data_dir.stat().st_dev
    for name in names:
        if (data_dir / name).exists() and (data_dir / name).lstat().st_dev != device:
            raise CliError(
                f"{data_dir / name} is on another file system and cannot be exchanged in one step",
                "restore into an empty --data-dir, and move it by hand; nothing was changed",
            )
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    assert DATABASE in names
    return Plan(backup=backup, kept=f"replaced-{stamp}", names=names, aside=aside)


# ---- what is told


def _of(reader: Reader) -> dict[str, Any]:
    manifest = reader.manifest
    return {
        "createdAt": manifest.created_at,
        "corral": manifest.corral,
        "schema": manifest.schema,
        "audit": manifest.audit,
        "files": len(manifest.files),
    }


def _tell(done: dict[str, Any], as_json: bool) -> None:
    from corral.cli.tables import print_json
    from corral.cli.visible import visible

    if as_json:
        print_json(done)
        return
    records = sum(done["audit"].values())
    what = f"the backup of {done['createdAt']} (Corral {done['corral']}, schema {done['schema']})"
    if "checked" in done:
        print(visible(f"whole: {what}, {done['files']} files, {records} audit records"))
        return
    print(visible(f"restored: {what} into {done['restored']}"))
    print(f"  checked: hashes, integrity, references, invariants, {records} audit records")
    for finding in done["findings"]:
        print(visible(f"  put up with: {finding}"))
    if done["kept"] is not None:
        print(visible(f"  what was here is kept in {done['kept']}: remove it when you are content"))
    if done["runs"]:
        how = "end as aborted" if done["runsAborted"] else "are taken up again"
        print(f"  runs that were on: {done['runs']}; they {how} at the next start")
