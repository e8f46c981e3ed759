"""The file that a backup is: whole or refused, whatever somebody has made of it."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from corral.storage.archive import FORMAT, MANIFEST, SEAL, Damaged, Manifest, Reader, Writer

NAMES = frozenset({"corral.db", "token"})
FILES = {"corral.db": b"the database" * 1000, "workspaces/t/w/notes.txt": b"notes", "workspaces/t/w/empty": b""}


def made(path: Path) -> Path:
    with path.open("wb") as file:
        writer = Writer(file)
        for name, data in FILES.items():
            writer.add(name, io.BytesIO(data), len(data), executable=name.endswith("notes.txt"))
        writer.add_folder("workspaces/t/w/folder")
        writer.close(
            Manifest(
                format=FORMAT,
                corral="0",
                schema="0003",
                created_at="2026-01-01T00:00:00.000Z",
                audit={},
                files=writer.files,
                folders=writer.folders,
            )
        )
    return path


def unpacked(path: Path, folder: Path) -> dict[str, bytes]:
    with Reader(path, NAMES) as reader:
        folder.mkdir()
        assert sum(reader.unpack(folder)) == sum(len(data) for data in FILES.values())
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def test_what_goes_in_comes_out_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert unpacked(made(tmp_path / "a.tar"), folder) == FILES
    assert (folder / "workspaces/t/w/folder").is_dir()
    modes = {name: (folder / name).stat().st_mode & 0o777 for name in FILES}
    assert modes == {"corral.db": 0o600, "workspaces/t/w/notes.txt": 0o700, "workspaces/t/w/empty": 0o600}


def test_any_tar_reads_it(tmp_path: Path) -> None:
    with tarfile.open(made(tmp_path / "a.tar")) as tar:
        assert [name for name in tar.getnames() if "folder" not in name] == [*FILES, MANIFEST, SEAL]


def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = made(tmp_path / "a.tar").read_bytes()
    end = whole.rstrip(b"\0")
    cuts = {0, 1, 511, 512, 513, 1024, len(end) - 1, *range(0, len(end), 1536)}
    for cut in sorted(cuts):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(Damaged):
            Reader(tmp_path / "cut.tar", NAMES)


def test_a_file_in_which_one_bit_was_changed_is_refused_or_the_bit_means_nothing(tmp_path: Path) -> None:
    whole = made(tmp_path / "a.tar").read_bytes()
    randomly = random.Random(1)
    path = tmp_path / "changed.tar"
    refused = 0
    for number in range(300):
        changed = bytearray(whole)
        changed[randomly.randrange(len(whole))] ^= 1 << randomly.randrange(8)
        path.write_bytes(changed)
        try:
            assert unpacked(path, tmp_path / f"out{number}") == FILES
        except Damaged:
            refused += 1
    assert refused > 200


def test_a_file_of_another_kind_or_a_later_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"SQLite format 3\0" + bytes(4096))
    with pytest.raises(Damaged, match="no whole archive"):
        Reader(path, NAMES)
    text = json.dumps({"format": FORMAT + 1}).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in ((MANIFEST, text), (SEAL, hashlib.sha256(text).hexdigest().encode())):
            add(tar, name, data)
    with pytest.raises(Damaged, match="use the Corral that made it"):
        Reader(path, NAMES)


def add(tar: tarfile.TarFile, name: str, data: bytes = b"x", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data) if info.isreg() else None)


def manifest(entries: dict[str, bytes], folders: tuple[str, ...] = ()) -> bytes:
    files = [{"name": n, "size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in entries.items()]
    known = {"format": FORMAT, "corral": "0", "schema": "0003", "createdAt": "", "audit": {}}
    return json.dumps({**known, "files": files, "folders": folders}).encode()


X: dict[str, object] = {"size": 0}
HOSTILE: dict[str, Callable[[tarfile.TarFile], None]] = {
    "../evil": lambda tar: add(tar, "../evil"),
    "/etc/evil": lambda tar: add(tar, "/etc/evil"),
    "workspaces/../../evil": lambda tar: add(tar, "workspaces/../../evil"),
    "workspaces//evil": lambda tar: add(tar, "workspaces//evil"),
    "workspaces": lambda tar: add(tar, "workspaces"),
    "corral.lock": lambda tar: add(tar, "corral.lock"),
    "corral.db-wal": lambda tar: add(tar, "corral.db-wal"),
    "a link": lambda tar: add(tar, "workspaces/t/link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a link in place of a file": lambda tar: add(tar, "token", b"", type=tarfile.SYMTYPE, linkname="corral.db"),
    "a hard link": lambda tar: add(tar, "workspaces/t/link", b"", type=tarfile.LNKTYPE, linkname="corral.db"),
    "a device": lambda tar: add(tar, "workspaces/t/dev", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a pipe": lambda tar: add(tar, "workspaces/t/pipe", b"", type=tarfile.FIFOTYPE),
    "a folder elsewhere": lambda tar: add(tar, "../folder", b"", type=tarfile.DIRTYPE),
    "a file that the manifest does not name": lambda tar: add(tar, "workspaces/t/more"),
    "a file twice": lambda tar: add(tar, "corral.db"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_backup_has_is_refused_though_its_manifest_agrees(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "corral.db")
        HOSTILE[name](tar)
        entries = {"corral.db": b"x"}
        if "/" in name or name.startswith("corral"):
            entries[name] = b"x"
        text = manifest(entries)
        add(tar, MANIFEST, text)
        add(tar, SEAL, hashlib.sha256(text).hexdigest().encode())
    with pytest.raises(Damaged, match=re.compile("of a backup$|names|twice")):
        Reader(path, NAMES)


@pytest.mark.parametrize("kind", ["link", "hard link", "device", "pipe"])
def test_what_is_no_file_is_refused_though_the_manifest_names_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    types = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}
    text = manifest({"token": b""})
    with tarfile.open(path, "w") as tar:
        add(tar, "token", b"", type=types[kind], linkname="corral.db")
        add(tar, MANIFEST, text)
        add(tar, SEAL, hashlib.sha256(text).hexdigest().encode())
    with pytest.raises(Damaged, match="neither a file nor a folder"):
        Reader(path, NAMES)


def test_a_file_with_holes_is_refused_whose_size_says_nothing_of_the_room_that_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    text = manifest({"token": b""})
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("token")
        info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 50)}
        tar.addfile(info)
        add(tar, MANIFEST, text)
        add(tar, SEAL, hashlib.sha256(text).hexdigest().encode())
    with pytest.raises(Damaged, match="neither a file nor a folder"):
        Reader(path, NAMES)


def test_a_manifest_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "a.tar")
    whole = path.read_bytes()
    assert whole.count(b"2026-01-01") == 1
    path.write_bytes(whole.replace(b"2026-01-01", b"2027-01-01"))
    with pytest.raises(Damaged, match=r"manifest\.json was changed"):
        Reader(path, NAMES)


def test_a_file_that_claims_to_be_larger_than_the_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    text = json.dumps(
        {
            **json.loads(manifest({})),
            "files": [{"name": "workspaces/t/big", "size": 1 << 40, "sha256": "0" * 64}],
        }
    ).encode()
    with tarfile.open(path, "w") as tar:
        add(tar, MANIFEST, text)
        add(tar, SEAL, hashlib.sha256(text).hexdigest().encode())
        info = tarfile.TarInfo("workspaces/t/big")
        info.size = 1 << 40
        tar.fileobj.write(info.tobuf())
    with pytest.raises(Damaged, match=r"it ends within workspaces/t/big|no whole archive"):
        Reader(path, NAMES)
