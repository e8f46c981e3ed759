"""What a record holds: the chain's formula, redaction, bounds, and what a query finds."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType

from corral.governance.audit import wire_record
from corral.governance.redaction import MAX_TOTAL, REDACTED, Redactor, is_secret_name
from corral.protocol.canonical import canonical_json
from corral.protocol.errors import InvalidRequest
from corral.protocol.methods import AuditQueryParams
from corral.protocol.types import AuditRecord
from corral.storage.repositories import Transaction
from tests.governance.audit_house import SECRET, AuditHouse, T, caller


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[AuditHouse]:
    async with AuditHouse(tmp_path) as house:
        yield house


async def test_ids_count_from_one_for_each_tenant_and_hashes_make_a_chain(house: AuditHouse) -> None:
    first = await house.fill(3)
    other = await house.fill(2, "t_2")
    more = await house.fill(1)
    assert [row.id for row in [*first, *more]] == [1, 2, 3, 4]
    assert [row.id for row in other] == [1, 2]
    assert first[0].prev_hash == other[0].prev_hash == "0" * 64
    assert [row.prev_hash for row in [*first[1:], *more]] == [row.hash for row in first]
    assert len({row.hash for row in [*first, *other, *more]}) == 6


async def test_a_stranger_makes_the_hash_from_what_a_query_gives_and_the_tenant(house: AuditHouse) -> None:
    def work(tx: Transaction) -> None:
        house.record(
            tx,
            metadata={"ü": [1.0, 0.1, 1e-9, 2.5e30, 10**20, None, True, '"\\\n\x00\x7f/'], "b": {"z": 1, "a": -0.0}},
            session_id="s_1",
            run_id="run_1",
        )

    await house.store.write(work)
    result = await house.store.read(lambda tx: house.methods.query(tx, caller(), AuditQueryParams()))
    record = json.loads(msgspec.json.encode(result.items[0]))
    claimed = record.pop("hash")
    record["tenantId"] = T
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == claimed
    assert (record["metadata"]["sessionId"], record["metadata"]["runId"]) == ("s_1", "run_1")


async def test_a_record_of_a_unit_that_fails_is_not_there_and_leaves_no_gap(house: AuditHouse) -> None:
    class Oops(Exception):
        pass

    def work(tx: Transaction) -> None:
        house.record(tx)
        raise Oops

    await house.fill(1)
    with pytest.raises(Oops):
        await house.store.write(work)
    await house.fill(1)
    assert [row.id for row in await house.rows()] == [1, 2]
    assert (await house.verify()).ok


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=20), inner, max_size=5),
    max_leaves=30,
)


@given(value=json_values)
def test_whatever_is_recorded_comes_out_as_bounded_json_that_any_reader_writes_the_same_again(value: Any) -> None:
    kept = Redactor().value(value)
    text = canonical_json(kept)
    assert msgspec.json.decode(text) == kept
    assert json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() == text
    assert len(text) < 20 * MAX_TOTAL


def test_lone_surrogates_and_what_is_no_json_are_written_out() -> None:
    assert Redactor().value({"a": "x\ud800", "b": b"\x00", "c": object(), "d": {1: 2}}) == {
        "a": "x\\ud800",
        "b": "[1 bytes]",
        "c": "[object]",
        "d": {"1": 2},
    }


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000_000, ["x" * 500] * 1000, {f"k{n}": "v" * 50 for n in range(5000)}],
    ids=["text", "list", "map"],
)
def test_what_is_long_is_cut_and_says_so(value: Any) -> None:
    text = canonical_json(Redactor().value({"value": value})).decode()
    assert len(text) < 3 * MAX_TOTAL
    assert "in all" in text
    deep: Any = "bottom"
    for _ in range(500):
        deep = [deep]
    assert "bottom" not in canonical_json(Redactor().value(deep)).decode()


CANARY = "kanary1234567890kanary"
SHAPED = {
    "bearer": f"curl -H 'X: Bearer {CANARY}' x",
    "header": f"curl -H 'Authorization: Basic {CANARY}' x",
    "cookie": f"Cookie: a=1; session={CANARY}",
    "assignment": f"API_KEY={CANARY} make",
    "quoted": f'{{"client_secret": "a {CANARY} b"}}',
    "escaped": f'{{\\"password\\": \\"{CANARY}\\"}}',
    "single quotes": f"password='a {CANARY} b'",
    "flag": f"mysql --password {CANARY} db",
    "flag with =": f"mysql --db-password={CANARY} db",
    "query": f"https://example.org/x?access_token={CANARY}&y=1",
    "userinfo": f"git clone https://me:{CANARY}@example.org/x.git",
    "userinfo alone": f"https://{CANARY}@example.org",
    "sk": f"key sk-{CANARY} x",
    "sk of a project": f"sk-proj-{CANARY}_{CANARY}",
    "stripe": f"sk_live_{CANARY}",
    "aws": "AKIAKANARYKANARYKANA",
    "ghp": f"ghp_{CANARY}",
    "github": f"github_pat_{CANARY}",
    "gitlab": f"glpat-{CANARY}",
    "slack": f"xoxb-{CANARY}",
    "google": f"AIza{CANARY}",
    "jwt": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.{CANARY}",
    "pem": f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}\n-----END RSA PRIVATE KEY-----",
    "pem cut off": f"-----BEGIN OPENSSH PRIVATE KEY-----\n{CANARY}",
    "known": f"x{SECRET}y",
}


@pytest.mark.parametrize("text", SHAPED.values(), ids=SHAPED)
async def test_a_secret_is_known_by_its_shape_wherever_it_stands(house: AuditHouse, text: str) -> None:
    def work(tx: Transaction) -> None:
        house.record(
            tx,
            actor=f"user:{text}",
            resource_id=text,
            trace_id=text,
            metadata={
                "a": text,
                "b": [{"c": ["x", text]}],
                text: 1,
                "call": house.audit.about_call({"command": text}),
            },
            session_id=text,
            run_id=text,
        )

    await house.store.write(work)
    await house.restart()
    stored = b"".join(path.read_bytes() for path in house.folder.glob("corral.db*"))
    for secret in (CANARY, SECRET, "AKIAKANARYKANARYKANA"):
        assert secret.encode() not in stored
    assert REDACTED.encode() in stored
    assert (await house.verify()).ok
    params = AuditQueryParams(session_id=text, run_id=text)
    found = await house.store.read(lambda tx: house.methods.query(tx, caller(), params))
    assert len(found.items) == 1, "and records are still found by what they were recorded under"


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "dbPassword",
        "API_KEY",
        "x-api-key",
        "Authorization",
        "Set-Cookie",
        "client_secret",
        "privateKey",
        "token",
        "accessToken",
        "X-Auth-Token",
        "aws_secret_access_key",
        "credentials",
    ],
)
def test_a_secret_is_known_by_its_name(name: str) -> None:
    kept = Redactor().value({"headers": {name: ["plain", {"x": "words"}]}, "list": [{name: 123456}]})
    assert kept == {"headers": {name: REDACTED}, "list": [{name: REDACTED}]}


@pytest.mark.parametrize(
    "name", ["maxTokens", "inputTokens", "tokens", "idempotencyKey", "sessionKey", "key", "author", "passed", "spine"]
)
def test_other_names_are_left_alone(name: str) -> None:
    assert not is_secret_name(name)
    assert Redactor().value({name: 5}) == {name: 5}


@pytest.mark.parametrize(
    "text",
    [
        "ls -la | grep foo && echo done",
        "s_0198c1f2aabbccddeeff001122334455",
        "https://example.org/a/b?page=2#x",
        "workspace:w_1/agent:a_1/main",
        "write to me@example.org or you@example.org",
        "the tokens were counted: 5",
        "disk-usage-of-the-whole-folder",
        "a" * 64,
    ],
)
def test_plain_text_is_kept_as_it_is(text: str) -> None:
    assert Redactor([SECRET]).text(text) == text


@given(where=st.integers(0, 6000), total=st.integers(0, 6000))
def test_no_piece_of_a_known_secret_is_left_where_a_text_is_cut(where: int, total: int) -> None:
    text = "." * where + SECRET + "." * total
    kept = Redactor([SECRET]).text(text)
    assert not any(SECRET[:size] in kept for size in (6, len(SECRET)))


@given(before=st.integers(0, 300))
def test_nor_where_so_much_was_taken_out_that_the_cut_shows(before: int) -> None:
    secret = "".join(chr(0x4E00 + number) for number in range(200))
    kept = Redactor([secret]).text("." * before + secret * 100)
    assert not any(letter in kept for letter in secret)


@pytest.mark.parametrize(
    "text", ["password" * 4000, "a-" * 8000, "--" * 8000, "eyJ" * 5000, "-----BEGIN A" * 1000, "://" * 5000]
)
def test_no_text_takes_long_to_redact(text: str) -> None:
    began = time.process_time()
    Redactor().text(text)
    assert time.process_time() - began < 0.5


# ---- queries


async def query(house: AuditHouse, **params: Any) -> list[int]:
    result = await house.store.read(lambda tx: house.methods.query(tx, caller(), AuditQueryParams(**params)))
    return [item.id for item in result.items]


async def test_a_query_pages_by_record_ids_from_the_newest_and_sees_its_own_tenant_alone(house: AuditHouse) -> None:
    rows = await house.fill(7)
    await house.fill(3, "t_2")
    got: list[AuditRecord] = []
    cursor: int | UnsetType = UNSET
    while True:
        params = AuditQueryParams(limit=3, cursor=cursor)
        result = await house.store.read(lambda tx, params=params: house.methods.query(tx, caller(), params))  # type: ignore[misc]
        got += result.items
        if result.next_cursor is UNSET:
            break
        cursor = result.next_cursor
        assert cursor == result.items[-1].id
    assert got == [wire_record(row) for row in rows[::-1]]


async def test_a_period_begins_with_from_and_ends_before_to_in_any_zone(house: AuditHouse) -> None:
    house.clock.now = 1_768_478_400_000 - 10  # 2026-01-15T12:00:00Z is the first record
    await house.fill(5)
    assert await query(house, from_="2026-01-15T12:00:00Z") == [5, 4, 3, 2, 1]
    assert await query(house, from_="2026-01-15T13:00:00.010+01:00") == [5, 4, 3, 2]
    assert await query(house, from_="2026-01-15t12:00:00.010001z") == [5, 4, 3]
    assert await query(house, to="2026-01-15T12:00:00.020Z") == [2, 1]
    assert await query(house, from_="2026-01-15T12:00:00.010Z", to="2026-01-15T12:00:00.030Z") == [3, 2]
    assert await query(house, from_="2027-01-01T00:00:00Z") == []
    assert await query(house, to="2025-01-01T00:00:00Z") == []


@pytest.mark.parametrize("field", ["from", "to"])
@pytest.mark.parametrize(
    "value",
    [
        "",
        "yesterday",
        "2026-01-15",
        "2026-01-15T12:00:00",
        "20260115T120000Z",
        "2026-02-30T00:00:00Z",
        "1700000000",
        "20260115T120000.000Z",
    ],
)
async def test_a_time_that_is_none_is_refused_by_the_name_of_its_field(
    house: AuditHouse, field: str, value: str
) -> None:
    with pytest.raises(InvalidRequest, match=rf"\$\.params\.{field} is no RFC 3339 time"):
        await query(house, **{"from_" if field == "from" else "to": value})
