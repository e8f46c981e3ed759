"""The file that a backup is: a plain tar with files of known names, and a manifest as its end.

The manifest (`manifest.json`) has the size and the SHA-256 of every file; the last member,
`manifest.sha256`, has that of the manifest. So a file that was cut off or changed anywhere is noticed
before anything of it is used. What is read may come from anywhere: a member is a file or a folder with one
of the names that a backup has, and nothing else is let in.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

import msgspec
from msgspec import Struct

FORMAT = 1
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
WORKSPACES = "workspaces"
_CHUNK = 1 << 20
_MANIFEST_LIMIT = 256 << 20
_PART = re.compile(r"[^/\0]{1,255}")


class Damaged(Exception):
    """The file is no whole backup; the text says where it is not, for a person."""


class Entry(Struct, kw_only=True, frozen=True):
    """A file of the backup. `size` in bytes; `executable` by its owner."""

    name: str
    size: int
    sha256: str
    executable: bool = False


class Manifest(Struct, kw_only=True, rename="camel"):
    """What is in a backup, and of what state of the world. `audit` is the last record of each tenant's chain.

    `skipped` counts what lay in the workspaces and is no file or folder (links, sockets) or could not be read.
    """

    format: int
    corral: str
    schema: str
    created_at: str
    audit: dict[str, int]
    files: list[Entry]
    folders: list[str]
    skipped: int = 0


class Writer:
    """Puts files into a new archive."""

    def __init__(self, file: IO[bytes]) -> None:
        # PAX: names of any length, in UTF-8.
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self.files: list[Entry] = []
        self.folders: list[str] = []

    def add(self, name: str, source: IO[bytes], size: int, *, mtime: float = 0, executable: bool = False) -> None:
        """Add `size` bytes of `source`. Raises OSError."""
        hashing = _Hashing(source)
        self._tar.addfile(_info(name, size, mtime, 0o700 if executable else 0o600), hashing)
        self.files.append(Entry(name=name, size=size, sha256=hashing.hexdigest(), executable=executable))

    def add_folder(self, name: str) -> None:
        info = _info(name, 0, 0, 0o700)
        info.type = tarfile.DIRTYPE
        self._tar.addfile(info)
        self.folders.append(name)

    def close(self, manifest: Manifest) -> None:
        """Write the manifest, which has all that was added, and its seal."""
        text = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
        seal = f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()
        for name, data in ((MANIFEST, text), (SEAL, seal)):
            self._tar.addfile(_info(name, len(data), 0, 0o600), io.BytesIO(data))
        self._tar.close()


def _info(name: str, size: int, mtime: float, mode: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, int(mtime), mode
    return info


class _Hashing:
    """Reads, and hashes what was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class Reader:
    """A backup whose index and manifest are whole and agree. Opening raises Damaged, OSError."""

    def __init__(self, path: Path, names: frozenset[str]) -> None:
        """`names` are those of the files that a backup may have at its top."""
        self._names = names
        # Not by name: what is behind a name may change between two looks.
        self._file: BinaryIO = open(path, "rb")  # noqa: SIM115
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._tar = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115
            self._members = self._checked()
            self.manifest = self._read_manifest()
            self._compare()
        except (tarfile.TarError, EOFError, UnicodeError, ValueError) as error:
            self._file.close()
            raise Damaged(f"it is no whole archive ({error})") from error
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def unpack(self, folder: Path) -> Iterator[int]:
        """Write everything into `folder`, which is new and nobody else's; gives bytes as they are written.

        Every file has its size and hash when it is closed. Raises Damaged, OSError.
        """
        for name in self.manifest.folders:
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for entry in self.manifest.files:
            path = folder / entry.name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            yield from self._unpack(entry, path)

    def _unpack(self, entry: Entry, path: Path) -> Iterator[int]:
        member = self._members[entry.name]
        source = self._tar.extractfile(member)
        assert source is not None
        digest = hashlib.sha256()
        mode = 0o700 if entry.executable else 0o600
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as target:
            left = entry.size
            while left:
                try:
                    data = source.read(min(left, _CHUNK))
                except tarfile.TarError as error:
                    raise Damaged(f"it ends within {entry.name}") from error
                if not data:
                    raise Damaged(f"it ends within {entry.name}")
                digest.update(data)
                target.write(data)
                left -= len(data)
                yield len(data)
            target.flush()
            os.fsync(descriptor)
            if entry.name.startswith(f"{WORKSPACES}/"):
                os.utime(descriptor, (member.mtime, member.mtime))
        if digest.hexdigest() != entry.sha256:
            raise Damaged(f"{entry.name} is not what was backed up: its hash differs")

    # ---- what may be in it

    def _checked(self) -> dict[str, tarfile.TarInfo]:
        found: dict[str, tarfile.TarInfo] = {}
        for member in self._tar:
            self._check(member)
            if member.name in found:
                raise Damaged(f"{_shown(member.name)} is in it twice")
            found[member.name] = member
        return found

    def _check(self, member: tarfile.TarInfo) -> None:
        name = member.name
        parts = name.split("/")
        within = parts[0] == WORKSPACES and all(_PART.fullmatch(part) and part not in (".", "..") for part in parts)
        # isreg() is true of sparse files too, whose size says nothing of the room that they take here.
        plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.sparse
        if plain and not (name in self._names or name in (MANIFEST, SEAL) or (within and len(parts) > 1)):
            raise Damaged(f"{_shown(name)} is no file of a backup")
        if not plain and not (member.isdir() and within):
            raise Damaged(f"{_shown(name)} is neither a file nor a folder of a backup")
        if member.size < 0 or member.offset_data + member.size > self._size:
            raise Damaged(f"it ends within {_shown(name)}")
        # The standard library's own judgement on top, where this Python has it.
        judge = getattr(tarfile, "data_filter", None)
        if judge is not None:
            judge(member, "/nonexistent")

    def _read_manifest(self) -> Manifest:
        texts = []
        for name in (MANIFEST, SEAL):
            member = self._members.pop(name, None)
            if member is None or not member.isreg():
                raise Damaged(f"it has no {name}: it is no backup, or it was cut off")
            if member.size > _MANIFEST_LIMIT:
                raise Damaged(f"its {name} is too large")
            file = self._tar.extractfile(member)
            assert file is not None
            texts.append(file.read())
        if texts[1].split()[:1] != [hashlib.sha256(texts[0]).hexdigest().encode()]:
            raise Damaged(f"its {MANIFEST} was changed")
        made = msgspec.json.decode(texts[0], type=_Format)
        if made.format != FORMAT:
            raise Damaged(f"it has format {made.format}, this Corral reads {FORMAT}: use the Corral that made it")
        return msgspec.json.decode(texts[0], type=Manifest)

    def _compare(self) -> None:
        sizes = {entry.name: entry.size for entry in self.manifest.files}
        if len(sizes) != len(self.manifest.files) or sizes.keys() & set(self.manifest.folders):
            raise Damaged(f"its {MANIFEST} names a file twice")
        kinds = {name: member.isdir() for name, member in self._members.items()}
        if kinds != {**dict.fromkeys(sizes, False), **dict.fromkeys(self.manifest.folders, True)}:
            raise Damaged(f"its files are not those that its {MANIFEST} names")
        for name, size in sizes.items():
            if self._members[name].size != size:
                raise Damaged(f"{_shown(name)} does not have the size that its {MANIFEST} says")


class _Format(Struct):
    format: int


def _shown(name: str) -> str:
    """A name out of a file that anybody may have made, for a terminal."""
    return ascii(name[:80])[1:-1]
