"""The chain of audit records: what its hashes cover, and how a stranger checks it.

The hash of a record is the SHA-256, in hexadecimal, of the UTF-8 text of one JSON object: the
record as `audit.query` gives it without `hash`, and with `tenantId`. The object is written with
its names sorted by code point, without spaces, with no escapes but those that JSON demands and
with every integral number as an integer; in Python

    json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

`prevHash` is the hash of the tenant's record before, 64 zeros for the first. Ids are 1, 2, 3, …

A chain alone proves that nothing in its middle was changed, not that its end is there: that is
what signed anchors are for (`corral.governance.anchors`).

An export has a record on each line, `tenantId` included, in just that form, and a last line
`{"auditHead": ANCHOR, "records": N}`. Nothing here needs a server or a store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from corral.protocol.canonical import canonical_hash, canonical_json
from corral.protocol.methods import AuditVerifyResult
from corral.protocol.types import AuditAnchor

GENESIS = "0" * 64
"""The `prevHash` of a chain's first record."""

_TEXTS = (
    "action",
    "actor",
    "actorType",
    "resourceType",
    "resourceId",
    "outcome",
    "traceId",
    "createdAt",
    "prevHash",
    "hash",
)
_FIELDS = frozenset({"tenantId", "id", "metadata", *_TEXTS})


def record_hash(record: Mapping[str, Any]) -> str:
    """The hash of a record given by its names on the wire, with `tenantId`; its `hash` does not count."""
    return canonical_hash({name: value for name, value in record.items() if name != "hash"})


class Finding(Struct, kw_only=True, frozen=True):
    """Where a chain is not what it was: the first record that is missing or not to be trusted, and why.

    `witness` names what shows it, where that stays the same though more records move `at`.
    """

    at: int
    reason: str
    witness: str | None = None


class ChainCheck:
    """Follows one tenant's chain from its beginning, record by record.

    `anchors` are what was signed of it, in any order, their signatures checked by the caller.
    """

    def __init__(self, tenant_id: str, anchors: Iterable[AuditAnchor] = ()) -> None:
        self.tenant_id = tenant_id
        self.checked = 0
        self.finding: Finding | None = None
        self.head_id, self.head_hash = 0, GENESIS
        self._pins: dict[int, str] = {}
        anchors = list(anchors)
        for anchor in anchors:
            if anchor.base_id > self.head_id:
                self.head_id, self.head_hash = anchor.base_id, anchor.base_hash
        self.base_id = self.head_id
        for anchor in anchors:
            self._pin(anchor.base_id, anchor.base_hash)
            self._pin(anchor.id, anchor.hash)

    def _pin(self, record_id: int, record_hash: str) -> None:
        standing = self._pins.setdefault(record_id, record_hash)
        if standing != record_hash:
            self.broken(record_id, "two signed heads contradict each other")
        if record_id == self.head_id and record_hash != self.head_hash:
            self.broken(record_id, "the chain does not begin where it was signed to begin")

    def broken(self, at: int, reason: str, witness: str | None = None) -> None:
        """Note a finding; the first one stands."""
        if self.finding is None:
            self.finding = Finding(at=at, reason=reason, witness=witness)

    def feed(self, record: Mapping[str, Any]) -> bool:
        """Check the next record, by its names on the wire with `tenantId`. Whether to go on."""
        if self.finding is not None:
            return False
        if self.checked == 0:
            self._begin(record)
        expected = self.head_id + 1
        if reason := self._wrong(record, expected):
            # What was given a number far beyond the others stays last, and they grow towards it.
            self.broken(expected, reason, witness=f"record {record.get('id')}"[:100])
            return False
        if self._pins.get(expected, record["hash"]) != record["hash"]:
            self.broken(expected, "a record is not the one that was signed", witness=f"signed {expected}")
            return False
        self.checked += 1
        self.head_id, self.head_hash = expected, record["hash"]
        return True

    def _begin(self, record: Mapping[str, Any]) -> None:
        """Records up to the base are still there while retention deletes them, or if it died in doing so.
        They must lead to the signed base."""
        first, before = record.get("id"), record.get("prevHash")
        if type(first) is int and 1 <= first <= self.base_id and isinstance(before, str):
            self.head_id, self.head_hash = first - 1, before

    def _wrong(self, record: Mapping[str, Any], expected: int) -> str | None:
        if record.keys() != _FIELDS or not all(isinstance(record[name], str) for name in _TEXTS):
            return "a record does not have the fields of a record"
        record_id = record["id"]
        if type(record_id) is not int or record_id != expected:
            return "a record is missing, or out of its order"
        if record["tenantId"] != self.tenant_id:
            return "a record is another tenant's"
        if record["prevHash"] != self.head_hash:
            return "a record does not follow the one before it"
        try:
            whole = isinstance(record["metadata"], dict) and record_hash(record) == record["hash"]
        except (TypeError, ValueError):
            whole = False
        if not whole:
            return "a record was changed"
        return None

    def end(self) -> None:
        """There are no more records."""
        last = max(self._pins, default=0)
        if last > self.head_id:
            self.broken(
                self.head_id + 1, "the end of the chain is cut off: a later record was signed", witness=f"signed {last}"
            )

    def result(self, anchor: AuditAnchor | None = None) -> AuditVerifyResult:
        """What was found; `checked` and `headHash` are of the records up to the first finding."""
        finding = self.finding
        return AuditVerifyResult(
            ok=finding is None,
            checked=self.checked,
            head_hash=self.head_hash,
            broken_at=finding.at if finding is not None else UNSET,
            reason=finding.reason if finding is not None else UNSET,
            anchor=anchor if anchor is not None and finding is None else UNSET,
        )


# ---- exports


class _LastLine(Struct, kw_only=True, rename="camel"):
    audit_head: AuditAnchor
    records: int


def export_line(tenant_id: str, record: Mapping[str, Any]) -> str:
    """One line of an export, without its end, for a record as `audit.query` gives it."""
    return canonical_json({**record, "tenantId": tenant_id}).decode()


def export_end(anchor: AuditAnchor, records: int) -> str:
    """The last line of an export of `records` records that ends where `anchor` says."""
    return canonical_json(_LastLine(audit_head=anchor, records=records)).decode()


def verify_export(lines: Iterable[str], *, public_key: str | None = None) -> AuditVerifyResult:
    """Check an export; nothing but the file is needed.

    `public_key` is the key that must have signed it, in hexadecimal. Without it the file's own
    key is taken at its word: then whoever can sign with any key can have made the file, so look
    at `anchor.publicKey` of the result. Never raises for what is in the file.
    """
    check: ChainCheck | None = None
    pending: list[Mapping[str, Any]] = []
    last: _LastLine | None = None
    # The last line says where the chain begins, so the first record waits for it, alone: that the
    # others follow it is checked as they come.
    for line in lines:
        text = line.rstrip("\r\n")
        record, end = _parsed(text)
        if last is not None or (record is None and end is None):
            check = check or ChainCheck("")
            check.broken(check.head_id + 1, "a line is not one of an export")
            break
        if end is not None:
            last = end
            continue
        assert record is not None
        if check is None:
            check = _begun(record)
            pending.append(record)
        if not check.feed(record):
            break
    return _concluded(check, pending, last, public_key)


def _parsed(text: str) -> tuple[Mapping[str, Any] | None, _LastLine | None]:
    try:
        value = msgspec.json.decode(text)
        # Just this form and no other: one that readers could take in different ways is refused.
        if not isinstance(value, dict) or canonical_json(value) != text.encode():
            return None, None
        if "auditHead" in value:
            end = msgspec.convert(value, _LastLine)
            return None, end if canonical_json(end) == text.encode() else None
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError):
        return None, None
    return value, None


def _begun(record: Mapping[str, Any]) -> ChainCheck:
    """A check that takes the first record's word for what comes before it."""
    tenant_id, first, before = record.get("tenantId"), record.get("id"), record.get("prevHash")
    check = ChainCheck(tenant_id if isinstance(tenant_id, str) else "")
    if type(first) is int and first >= 1 and isinstance(before, str):
        check.head_id, check.head_hash = first - 1, before
        check.base_id = first - 1
    return check


def _concluded(
    check: ChainCheck | None, first: list[Mapping[str, Any]], last: _LastLine | None, public_key: str | None
) -> AuditVerifyResult:
    if last is None:
        check = check or ChainCheck("")
        check.broken(check.head_id + 1, "the last line is missing: the export is cut off")
        return check.result()
    anchor = last.audit_head
    if check is None:
        check = ChainCheck(anchor.tenant_id)
        check.head_id = check.base_id = anchor.base_id
        check.head_hash = anchor.base_hash
    if reason := _contradiction(check, first, last, public_key):
        at = check.head_id + 1 if check.head_id < anchor.id else check.base_id + 1
        check.broken(at, reason)
    return check.result(anchor)


def _contradiction(
    check: ChainCheck, first: list[Mapping[str, Any]], last: _LastLine, public_key: str | None
) -> str | None:
    from corral.governance.anchors import signed_well  # here, as it imports what few need

    anchor = last.audit_head
    if public_key is not None and anchor.public_key != public_key.lower():
        return "the export is signed with another key"
    if not signed_well(anchor):
        return "the signature of the last line is wrong"
    before = first[0].get("prevHash") if first else anchor.base_hash
    if (check.tenant_id, check.base_id, before) != (anchor.tenant_id, anchor.base_id, anchor.base_hash):
        return "the export does not begin where the chain was signed to begin"
    if (check.head_id, check.head_hash, check.checked) != (anchor.id, anchor.hash, last.records):
        return "the export does not end where the chain was signed to end"
    return None
