"""An export proves itself: whatever is done to the file is found without a server, a store or the data directory."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from corral.governance.anchors import Signer
from corral.governance.audit import wire_record
from corral.governance.chain import GENESIS, export_end, export_line, record_hash, verify_export
from corral.protocol.types import AuditAnchor
from tests.governance.audit_house import AuditHouse, T
from tests.support.examples import examples

COUNT = 9


async def exported(house: AuditHouse) -> list[str]:
    """The lines of an export as the command makes them from the wire."""
    result = await house.verify()
    assert result.anchor is not UNSET
    rows = [row for row in await house.rows() if row.id <= result.anchor.id]
    lines = [export_line(T, json.loads(msgspec.json.encode(wire_record(row)))) for row in rows]
    return [*lines, export_end(result.anchor, len(rows))]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    async def make() -> list[str]:
        async with AuditHouse(tmp_path_factory.mktemp("export")) as house:
            await house.fill(COUNT, session_id="s_1")
            return await exported(house)

    return asyncio.run(make())


def test_an_export_as_it_was_made_verifies(export: list[str]) -> None:
    for lines in (export, [f"{line}\n" for line in export], [f"{line}\r\n" for line in export]):
        result = verify_export(lines)
        assert (result.ok, result.checked, result.broken_at) == (True, COUNT, UNSET)
        assert result.head_hash == json.loads(export[-2])["hash"]


def test_an_export_is_checked_against_the_key_that_one_knows(export: list[str]) -> None:
    key = json.loads(export[-1])["auditHead"]["publicKey"]
    assert verify_export(export, public_key=key).ok
    assert verify_export(export, public_key=key.upper()).ok
    assert not verify_export(export, public_key=Signer.make().public_key).ok


@st.composite
def tampering(draw: st.DrawFn, size: int = COUNT + 1) -> Any:
    """A function from the lines to others that are not the same."""
    at, other = draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2, unique=True))
    kind = draw(st.sampled_from(["flip", "drop", "swap", "repeat", "cut", "shorten", "insert", "behead"]))
    letter, place = draw(st.sampled_from('0a} "')), draw(st.integers(0, 10_000))

    def change(lines: list[str]) -> list[str]:
        lines = list(lines)
        if kind == "flip":
            where = place % len(lines[at])
            lines[at] = lines[at][:where] + letter + lines[at][where + 1 :]
        elif kind == "drop":
            del lines[at]
        elif kind == "swap":
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == "repeat":
            lines.insert(other, lines[at])
        elif kind == "cut":
            del lines[at:]
        elif kind == "behead":
            del lines[: at + 1]
        elif kind == "shorten":
            lines[at] = lines[at][: place % len(lines[at])]
        else:
            lines.insert(at, draw_line)
        return lines

    draw_line = draw(st.sampled_from(["", "{}", "[]", "null", "nonsense", "[" * 5000, '{"id":1,"id":1}', '"\ud800"']))
    return change


@examples(400)
@given(change=tampering())
def test_any_one_thing_done_to_the_file_is_found(export: list[str], change: Any) -> None:
    lines = change(export)
    if lines != export:
        result = verify_export(lines)
        assert not result.ok, lines
        assert result.broken_at is not UNSET
        assert result.anchor is UNSET


@pytest.mark.parametrize("lines", [[], [""], ["{}"], ["\x00"], ["[" * 100_000]])
def test_what_is_no_export_is_said_to_be_none(lines: list[str]) -> None:
    assert not verify_export(lines).ok


@pytest.mark.parametrize("at", [0, 3, COUNT])
def test_a_line_that_readers_could_take_in_two_ways_is_refused(export: list[str], at: int) -> None:
    other = json.loads(export[at])
    for line in ('{"actor":"user:else",' + export[at][1:], json.dumps(other), export[at].replace('"id":', '"id": ', 1)):
        assert not verify_export([*export[:at], line, *export[at + 1 :]]).ok


def test_the_end_cut_off_with_the_last_line_kept_is_found(export: list[str]) -> None:
    result = verify_export([*export[:4], export[-1]])
    assert (result.ok, result.broken_at) == (False, 5)


def test_records_forged_with_good_hashes_are_found_by_the_signature(export: list[str]) -> None:
    records = [json.loads(line) for line in export[:-1]]
    before = GENESIS
    for record in records:
        record["actor"], record["prevHash"] = "user:forged", before
        record["hash"] = before = record_hash(record)
    forged = [export_line(T, record) for record in records]
    assert not verify_export([*forged, export[-1]]).ok
    last = json.loads(export[-1])
    last["auditHead"]["hash"] = before
    assert not verify_export([*forged, json.dumps(last, sort_keys=True, separators=(",", ":"))]).ok
    mine = Signer.make()
    anchor = mine.anchor(tenant_id=T, id=COUNT, hash=before, base_id=0, base_hash=GENESIS, at=last["auditHead"]["at"])
    resigned = [*forged, export_end(anchor, COUNT)]
    assert verify_export(resigned).ok, "by its own key, which is why the key is shown"
    assert not verify_export(resigned, public_key=json.loads(export[-1])["auditHead"]["publicKey"]).ok


def test_the_last_line_of_another_tenant_or_another_time_is_found(export: list[str]) -> None:
    signer = Signer.make()

    def end(**fields: Any) -> str:
        values = {"tenant_id": T, "id": COUNT, "hash": json.loads(export[-2])["hash"], "base_id": 0}
        values |= {"base_hash": GENESIS, "at": "2026-01-01T00:00:00.000Z"}
        anchor: AuditAnchor = signer.anchor(**(values | fields))
        return export_end(anchor, COUNT)

    assert verify_export([*export[:-1], end()]).ok
    for fields in ({"tenant_id": "t_2"}, {"id": COUNT + 1}, {"hash": GENESIS}, {"base_id": 1}, {"base_hash": "1" * 64}):
        assert not verify_export([*export[:-1], end(**fields)]).ok, fields


async def test_an_export_of_what_retention_has_left_begins_where_it_was_signed_to(tmp_path: Path) -> None:
    async with AuditHouse(tmp_path) as house:
        await house.fill(COUNT)
        house.clock.now += 1_000_000
        await house.fill(3)
        await house.keeper.purge(500_000)
        lines = await exported(house)
    assert verify_export(lines).ok
    assert not verify_export(lines[1:]).ok


async def test_an_export_of_nothing_verifies(tmp_path: Path) -> None:
    async with AuditHouse(tmp_path) as house:
        lines = await exported(house)
    assert len(lines) == 1
    assert verify_export(lines).ok


def test_the_check_needs_no_store_and_no_server() -> None:
    code = (
        "import sys; import corral.governance.chain as c; c.verify_export(['x']);"
        "print([m for m in ('sqlalchemy', 'aiohttp', 'corral.storage', 'corral.gateway', 'cel') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
