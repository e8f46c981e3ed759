"""A backup of a data directory, made while its gateway runs, and looked over before it is put into place.

What travels together: the database and the files of the audit (docs/decisions/0004), which prove nothing
without each other. What does not travel with them unless asked: the access token and the key that made
tokens come from (docs/decisions/0005), as a backup is for more eyes than those. All functions block.
"""

from __future__ import annotations

import io
import os
import stat
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec
from msgspec import Struct

from corral import __version__
from corral.config import CONFIG_FILE
from corral.governance.anchors import (
    CHECKPOINTS_FILE,
    HEAD_FILE,
    KEY_FILE,
    PUBLIC_KEY_FILE,
    AnchorError,
    AnchorFiles,
)
from corral.governance.chain import ChainCheck
from corral.governance.keeper import KEY_META, as_wire
from corral.protocol.types import AuditAnchor
from corral.storage.api import Store
from corral.storage.archive import FORMAT, WORKSPACES, Manifest, Reader, Writer
from corral.storage.exchange import interrupted
from corral.storage.repositories import Transaction
from corral.storage.snapshot import (
    Unreadable,
    bring_up_to_date,
    contradictions,
    damage,
    last_records,
    note,
    reading,
    schema_of,
    snapshot,
)

if TYPE_CHECKING:
    from corral.governance.audit import Audit

DATABASE = "corral.db"
AUDIT_FILES = (KEY_FILE, PUBLIC_KEY_FILE, HEAD_FILE, CHECKPOINTS_FILE)
SECRET_FILES = ("token", "token.key")
NAMES = frozenset({DATABASE, CONFIG_FILE, *AUDIT_FILES, *SECRET_FILES})
"""The files that a backup may have at its top."""

SIDECARS = (f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal")
"""What SQLite keeps beside a database: beside another one it is poison."""

Told = Callable[[str, int, int], None]
"""Told of what goes on: what, how much of it is done, the whole (0: not known)."""

_PAGE = 1_000
_ATTEMPTS = 5
_SPOOLED = 8 << 20


class BackupFailed(Exception):
    """It could not be made or used; the text is for a person, `remedy` says what to do."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class Made(Struct, kw_only=True, rename="camel"):
    """What was made: `left_out` names the files of the data directory that stayed out, and why."""

    manifest: Manifest
    left_out: dict[str, str]


# ---- making one


def write_backup(data_dir: Path, draft: Path, *, secrets: bool, workspaces: bool, told: Told) -> Made:
    """Write a backup of `data_dir` to `draft`, a new file, whether a gateway runs there or not.

    Raises BackupFailed, OSError.
    """
    if not (data_dir / DATABASE).exists():
        raise BackupFailed(f"there is no database in {data_dir}", "name the data directory with --data-dir")
    which = _settled(data_dir)
    copy = draft.with_name(f"{draft.name}.db")
    try:
        audit = _consistent(data_dir, copy, told)
        told("checking the copy", 0, 0)
        if problems := damage(copy, thorough=False):
            raise BackupFailed(
                f"the database is damaged: {problems[0]}",
                f"stop the gateway, copy {data_dir} as it is, then put an earlier backup back",
            )
        with _private(draft) as file:
            made = _pack(Writer(file), data_dir, copy, audit, secrets, workspaces, told)
            file.flush()
            os.fsync(file.fileno())
        if _settled(data_dir) != which:
            raise BackupFailed(f"{data_dir} was restored meanwhile", "back it up again")
        return made
    except Unreadable as error:
        raise BackupFailed(
            f"the database in {data_dir} cannot be copied: {error}", "`corral doctor` tells more"
        ) from None
    finally:
        for path in (copy, *(copy.with_name(f"{copy.name}-{end}") for end in ("wal", "shm", "journal"))):
            path.unlink(missing_ok=True)


def _settled(data_dir: Path) -> int:
    """Which file the database is. Raises BackupFailed while a restore puts one state into the place of another."""
    if interrupted(data_dir):
        raise BackupFailed(
            f"a restore into {data_dir} goes on, or was interrupted", "wait for it, or start the gateway: that ends it"
        )
    return (data_dir / DATABASE).stat().st_ino


def _private(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w+b")


def _consistent(data_dir: Path, copy: Path, told: Told) -> dict[str, bytes]:
    """Copy the database to `copy`; gives the audit's files that fit it.

    They are read first: what they vouch for was committed before, so it is in a copy that is made after, and
    records that come in between are merely not vouched for yet. Two things can pass in between that no order
    is right for: a gateway that makes its key, and retention that moves a chain's beginning before it
    deletes. Then both are done again.
    """
    for _ in range(_ATTEMPTS):
        before = _read_audit(data_dir)
        copy.unlink(missing_ok=True)
        snapshot(data_dir / DATABASE, copy, lambda done, whole: told("copying the database", done, whole))
        if _beginnings(before) == _beginnings(_read_audit(data_dir)):
            return before
    raise BackupFailed("the audit log's beginning moves all the time", "try again when retention is done")


def _read_audit(data_dir: Path) -> dict[str, bytes]:
    found = {}
    for name in (HEAD_FILE, CHECKPOINTS_FILE, KEY_FILE, PUBLIC_KEY_FILE):
        try:
            found[name] = (data_dir / name).read_bytes()
        except FileNotFoundError:
            continue
    return found


class _Heads(Struct, rename="camel"):
    tenants: dict[str, AuditAnchor]


def _beginnings(files: dict[str, bytes]) -> tuple[bytes | None, dict[str, int]]:
    """The key and where each tenant's chain begins; nothing of a file that is damaged, which the keeper tells of."""
    try:
        heads = msgspec.json.decode(files.get(HEAD_FILE, b""), type=_Heads).tenants
    except msgspec.MsgspecError:
        heads = {}
    return files.get(KEY_FILE), {tenant: anchor.base_id for tenant, anchor in heads.items()}


def _pack(
    writer: Writer, data_dir: Path, copy: Path, audit: dict[str, bytes], secrets: bool, workspaces: bool, told: Told
) -> Made:
    with copy.open("rb") as source:
        writer.add(DATABASE, source, os.fstat(source.fileno()).st_size)
    for name, data in audit.items():
        _add_bytes(writer, name, data)
    left_out: dict[str, str] = {}
    for name in (CONFIG_FILE, *SECRET_FILES):
        path = data_dir / name
        if not path.is_file():
            continue
        if secrets or (name == CONFIG_FILE and not _has_token(path)):
            _add_bytes(writer, name, path.read_bytes())
        else:
            left_out[name] = "it holds a token" if name == CONFIG_FILE else "it is a secret"
    skipped = 0
    if workspaces:
        told("copying the workspaces", 0, 0)
        skipped = _add_workspaces(writer, data_dir / WORKSPACES)
    elif (data_dir / WORKSPACES).exists():
        left_out[WORKSPACES] = "not asked for"
    manifest = Manifest(
        format=FORMAT,
        corral=__version__,
        schema=schema_of(copy),
        created_at=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        audit=last_records(copy),
        files=writer.files,
        folders=writer.folders,
        skipped=skipped,
    )
    writer.close(manifest)
    return Made(manifest=manifest, left_out=left_out)


def _has_token(path: Path) -> bool:
    try:
        return "token" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return True  # who knows


def _add_bytes(writer: Writer, name: str, data: bytes) -> None:
    writer.add(name, io.BytesIO(data), len(data))


def _add_workspaces(writer: Writer, root: Path) -> int:
    """Add the workspaces' folders and files as they are while agents may write to them; how much was left out.

    Folders are gone through by descriptor, and no link is followed: an agent that puts one in the place of
    a folder meanwhile must not get what it points to into the backup, and by a restore into its workspace.
    """
    if not root.is_dir() or root.is_symlink():
        return 0
    skipped = 0
    for place, folders, files, at in os.fwalk(root, follow_symlinks=False):
        folder = Path(WORKSPACES) / Path(place).relative_to(root)
        if _named(folder):
            writer.add_folder(str(folder))
        else:
            folders.clear()
            skipped += 1
            continue
        linked = [name for name in folders if stat.S_ISLNK(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode)]
        skipped += len(linked)
        skipped += sum(not _add_file(writer, folder / name, name, at) for name in sorted(files))
    return skipped


def _named(path: Path) -> bool:
    """Whether it has a name that every machine can take: text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _add_file(writer: Writer, path: Path, name: str, folder: int) -> bool:
    try:
        # Not blocking: a pipe that nobody writes to would be waited for.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return False
    with os.fdopen(descriptor, "rb") as source:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not _named(path):
            return False
        # It may grow or shrink while it is read, and the size stands before the content.
        with tempfile.SpooledTemporaryFile(max_size=_SPOOLED) as spool:
            left = status.st_size
            while left and (data := source.read(min(left, 1 << 20))):
                spool.write(data)
                left -= len(data)
            size = spool.tell()
            spool.seek(0)
            writer.add(str(path), spool, size, mtime=status.st_mtime, executable=bool(status.st_mode & stat.S_IXUSR))
    return True


# ---- looking one over


def unpack(reader: Reader, folder: Path, told: Told) -> None:
    """Write what is in the backup into `folder`. Raises Damaged, OSError."""
    done, whole = 0, sum(entry.size for entry in reader.manifest.files)
    for count in reader.unpack(folder):
        done += count
        told("unpacking", done, whole)


def damage_of(folder: Path, told: Told) -> list[str]:
    """What makes an unpacked backup one that no gateway should be given. A database of an older schema is brought
    up to date first, so that what looks it over knows its columns, and the next start has no migration to fail in.
    """
    database = folder / DATABASE
    told("checking the database", 0, 0)
    try:
        schema_of(database)
        bring_up_to_date(database)
    except Unreadable as error:
        return [str(error)]
    return damage(database, thorough=True)


def findings_of(folder: Path, told: Told) -> list[str]:
    """Where an unpacked backup whose database is sound contradicts itself: the audit chains, the invariants.

    Raises Unreadable.
    """
    database = folder / DATABASE
    told("checking the rows", 0, 0)
    found = contradictions(database)
    with reading(database) as tx:
        found += _chain_findings(tx, folder, told)
    return found


def _chain_findings(tx: Transaction, folder: Path, told: Told) -> Iterator[str]:
    files: AnchorFiles | None = None
    known = tx.meta.get(KEY_META)
    if (folder / KEY_FILE).exists():
        try:
            files = AnchorFiles.open(folder)
        except AnchorError as error:
            yield f"the audit's {error}"
            return
        if files.problem is not None:
            yield f"audit: {files.problem}"
        elif known is not None and known != files.signer.public_key:
            yield "audit: the key is not the one that the database knows"
    elif known is not None:
        yield f"audit: {KEY_FILE} is missing"
    signed = set(files.heads) if files is not None else set()
    for tenant in sorted({*tx.audit.tenants(), *signed}):
        anchors: list[AuditAnchor] = []
        if files is not None:
            anchors, problem = files.checkpoints(tenant)
            if tenant in files.heads:
                anchors.append(files.heads[tenant])
            if problem is not None:
                yield f"audit: {problem}"
        check = ChainCheck(tenant, anchors)
        _walk(tx, check, told)
        if check.finding is not None:
            yield f"audit: the chain of {tenant} is broken at record {check.finding.at}: {check.finding.reason}"


def _walk(tx: Transaction, check: ChainCheck, told: Told) -> None:
    head = tx.audit.head(check.tenant_id)
    whole = head.id if head is not None else 0
    after: object = -(2**63)
    while rows := tx.audit.scan(check.tenant_id, after, _PAGE):
        for row in rows:
            if not check.feed(as_wire(row)):
                return
        after = rows[-1].id
        told("checking the audit log", check.head_id, whole)
    check.end()


# ---- after a restore

_RESTORED_META = "restored"


def note_restored(folder: Path, created_at: str) -> None:
    """Leave a note in an unpacked backup, for `record_restored`."""
    note(folder / DATABASE, _RESTORED_META, created_at)


async def record_restored(store: Store, audit: Audit, tenant_id: str) -> None:
    """Audit that this store was put back to an earlier state, once. Raises StoreUnavailable."""
    if not await store.read(lambda tx: tx.meta.get(_RESTORED_META)):
        return

    def work(tx: Transaction) -> None:
        audit.record(
            tx,
            tenant_id=tenant_id,
            action="store.restored",
            actor="system:restore",
            actor_type="system",
            resource_type="store",
            resource_id=DATABASE,
            metadata={"backupCreatedAt": tx.meta.get(_RESTORED_META)},
            trace_id="restore",
        )
        tx.meta.set(_RESTORED_META, "")

    await store.write(work)
