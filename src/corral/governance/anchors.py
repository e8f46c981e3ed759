"""What is kept of the audit chains outside the database, so that a cut-off end or a swapped file is noticed.

In the data directory:

- `audit.key`: the Ed25519 private key (32 bytes in hexadecimal), mode 0600; `audit.pub`: its
  public key, to give to those who check exports.
- `audit.head`: the signed head of every tenant's chain, replaced whole.
- `audit.checkpoints`: a signed head on each line, one for about every thousand records, only
  ever appended to.

What is signed is the text `corral audit anchor 1`, a newline, and the anchor as canonical JSON
without `publicKey` and `sig`. Whoever can read the key can forge all of this; docs/decisions has
what that does and does not prove. All functions here block on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from corral.config import create_private
from corral.protocol.canonical import canonical_json
from corral.protocol.ready import look_through
from corral.protocol.types import AuditAnchor
from corral.storage.exchange import sync_folder

if TYPE_CHECKING:
    # Imported when first used: it costs 40 ms and 10 MiB.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_FILE, PUBLIC_KEY_FILE, HEAD_FILE, CHECKPOINTS_FILE = "audit.key", "audit.pub", "audit.head", "audit.checkpoints"
CHECKPOINT_EVERY = 1_000
"""Records between two checkpoints of a tenant, at least."""

_ANCHOR_DOMAIN = b"corral audit anchor 1\n"
_HEADS_DOMAIN = b"corral audit heads 1\n"


class AnchorError(Exception):
    """What is kept outside the database is damaged or missing; the text says what, for a person."""


class Signer:
    """A private key, and anchors signed with it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw().hex()

    @classmethod
    def make(cls) -> Signer:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_text(cls, text: str) -> Signer:
        """Raises ValueError if `text` is no key."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return cls(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(text.strip())))

    def text(self) -> str:
        return self._key.private_bytes_raw().hex()

    def sign(self, message: bytes) -> str:
        return self._key.sign(message).hex()

    def anchor(
        self,
        *,
        tenant_id: str,
        id: int,
        hash: str,
        base_id: int,
        base_hash: str,
        at: str,
    ) -> AuditAnchor:
        """The anchor of a chain that ends in record `id` with `hash` and begins after record `base_id`."""
        unsigned = AuditAnchor(
            tenant_id=tenant_id,
            id=id,
            hash=hash,
            base_id=base_id,
            base_hash=base_hash,
            at=at,
            public_key=self.public_key,
            sig="",
        )
        return msgspec.structs.replace(unsigned, sig=self.sign(_statement(unsigned)))


def signed_well(anchor: AuditAnchor) -> bool:
    """Whether the signature of `anchor` is by the key that it names."""
    return _good(anchor.public_key, anchor.sig, _statement(anchor))


def _statement(anchor: AuditAnchor) -> bytes:
    fields = msgspec.to_builtins(anchor)
    return _ANCHOR_DOMAIN + canonical_json({k: v for k, v in fields.items() if k not in ("publicKey", "sig")})


def _good(public_key: str, signature: str, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True


class _Heads(Struct, kw_only=True, rename="camel"):
    """The content of `audit.head`. `sig` is over all of it, so that no tenant's line can be taken out."""

    version: int
    public_key: str
    tenants: dict[str, AuditAnchor]
    sig: str = ""

    def message(self) -> bytes:
        return _HEADS_DOMAIN + canonical_json({t: anchor.sig for t, anchor in self.tenants.items()})


look_through(AuditAnchor, _Heads)


class AnchorFiles:
    """The files of one data directory."""

    def __init__(self, data_dir: Path, signer: Signer, heads: dict[str, AuditAnchor], problem: str | None) -> None:
        self._dir = data_dir
        self.signer = signer
        self.heads = heads
        self.problem = problem
        """What is wrong with the files that were there, None if nothing is."""
        # Unchecked, as it only says when the next one is due.
        self._checkpointed = {anchor.tenant_id: anchor.id for anchor in self._parsed_checkpoints()}

    @classmethod
    def open(cls, data_dir: Path) -> AnchorFiles:
        """Read the files, or make them where there are none. What is damaged is told in `problem`.

        Raises OSError.
        """
        key_path, head_path = data_dir / KEY_FILE, data_dir / HEAD_FILE
        try:
            signer, problem = Signer.from_text(key_path.read_text(encoding="ascii")), None
        except FileNotFoundError:
            signer, problem = None, None
        except ValueError:
            raise AnchorError(f"{key_path} is no key: put the file of a backup in its place") from None
        if signer is None:
            signer = Signer.make()
            if head_path.exists() and _read_heads(head_path, None):
                problem = f"{KEY_FILE} is missing, though {HEAD_FILE} was signed with one"
            else:
                # The head before the key: whoever finds the key and no head knows that one was there.
                _replace(head_path, _encoded(signer, {}))
            create_private(key_path, signer.text() + "\n")
        try:
            heads = _read_heads(head_path, signer.public_key)
        except AnchorError as error:
            heads, problem = {}, problem or str(error)
        _replace(data_dir / PUBLIC_KEY_FILE, signer.public_key.encode() + b"\n")
        return cls(data_dir, signer, heads, problem)

    def write(self, changed: Iterable[AuditAnchor]) -> list[AuditAnchor]:
        """Take the new heads in, durably, and the checkpoints that are due, which are returned. Raises OSError."""
        changed = list(changed)
        heads = self.heads | {anchor.tenant_id: anchor for anchor in changed}
        due = [
            anchor
            for anchor in changed
            if anchor.id // CHECKPOINT_EVERY > self._checkpointed.get(anchor.tenant_id, 0) // CHECKPOINT_EVERY
        ]
        if due:
            with open(self._dir / CHECKPOINTS_FILE, "ab", opener=_private) as file:
                if file.tell() and not self._ends_with_newline():
                    file.write(b"\n")
                file.writelines(canonical_json(anchor) + b"\n" for anchor in due)
                file.flush()
                os.fsync(file.fileno())
        _replace(self._dir / HEAD_FILE, _encoded(self.signer, heads))
        self._checkpointed |= {anchor.tenant_id: anchor.id for anchor in due}
        self.heads = heads
        return due

    def checkpoints(self, tenant_id: str) -> tuple[list[AuditAnchor], str | None]:
        """A tenant's checkpoints, and what is wrong with the file, None if nothing is."""
        try:
            return [a for a in self._read_checkpoints() if a.tenant_id == tenant_id], None
        except AnchorError as error:
            return [a for a in self._sound_checkpoints() if a.tenant_id == tenant_id], str(error)

    def _parsed_checkpoints(self) -> list[AuditAnchor]:
        return [anchor for line in self._lines() if (anchor := _parsed(line)) is not None]

    def _sound_checkpoints(self) -> list[AuditAnchor]:
        return [anchor for anchor in self._parsed_checkpoints() if self._ours(anchor)]

    def _read_checkpoints(self) -> Iterator[AuditAnchor]:
        for number, line in enumerate(self._lines(), start=1):
            anchor = _parsed(line)
            if anchor is not None and self._ours(anchor):
                yield anchor
            elif line and not self._torn(line):
                raise AnchorError(f"line {number} of {CHECKPOINTS_FILE} is not one that this server signed")

    def _ours(self, anchor: AuditAnchor) -> bool:
        return anchor.public_key == self.signer.public_key and signed_well(anchor)

    @staticmethod
    def _torn(line: bytes) -> bool:
        """Whether a line was cut short, by a crash in the middle of writing it."""
        return not line.endswith(b"}")

    def _lines(self) -> list[bytes]:
        try:
            return (self._dir / CHECKPOINTS_FILE).read_bytes().split(b"\n")
        except FileNotFoundError:
            return []

    def _ends_with_newline(self) -> bool:
        with (self._dir / CHECKPOINTS_FILE).open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _parsed(line: bytes) -> AuditAnchor | None:
    try:
        return msgspec.json.decode(line, type=AuditAnchor)
    except (msgspec.MsgspecError, UnicodeError):
        return None


def _read_heads(path: Path, public_key: str | None) -> dict[str, AuditAnchor]:
    """The heads of the file, checked against the key unless that is None. Raises AnchorError, OSError."""
    try:
        heads = msgspec.json.decode(path.read_bytes(), type=_Heads)
    except FileNotFoundError:
        raise AnchorError(f"{HEAD_FILE} is missing") from None
    except (msgspec.MsgspecError, UnicodeError):
        raise AnchorError(f"{HEAD_FILE} is damaged") from None
    if public_key is not None and not (
        heads.public_key == public_key
        and _good(public_key, heads.sig, heads.message())
        and all(
            anchor.tenant_id == tenant and anchor.public_key == public_key and signed_well(anchor)
            for tenant, anchor in heads.tenants.items()
        )
    ):
        raise AnchorError(f"{HEAD_FILE} is not what this server signed")
    return heads.tenants


def _encoded(signer: Signer, tenants: dict[str, AuditAnchor]) -> bytes:
    heads = _Heads(version=1, public_key=signer.public_key, tenants=tenants)
    heads.sig = signer.sign(heads.message())
    return msgspec.json.encode(heads) + b"\n"


def _replace(path: Path, data: bytes) -> None:
    """Put `data` in the place of the file, whole or not at all, and durably."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with open(draft, "xb", opener=_private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
