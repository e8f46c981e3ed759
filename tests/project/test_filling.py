"""The stores that `bench.scale` asks are such as a gateway leaves: else its figures are of something else."""

from __future__ import annotations

from pathlib import Path

from bench.filling import LONG, MEMBER, OWNER, TENANT, WORKSPACE, Size, fill
from corral.governance.chain import ChainCheck
from corral.governance.keeper import as_wire
from corral.storage.snapshot import contradictions, damage, reading


async def test_a_filled_store_is_sound_and_its_audit_chain_verifies(tmp_path: Path) -> None:
    size = Size(sessions=150, events=400, records=300)
    await fill(tmp_path / "data", size)
    database = tmp_path / "data" / "corral.db"
    assert damage(database, thorough=True) == []
    assert contradictions(database) == []
    with reading(database) as tx:
        session = tx.sessions.get(TENANT, LONG)
        assert session is not None
        assert session.state_version == size.events
        rows = tx.audit.scan(TENANT, 0, size.records + 1)
        seen = [
            len(tx.sessions.page(TENANT, WORKSPACE, user_id=user, agent_id=None, limit=200, before=None))
            for user in (MEMBER, OWNER)
        ]
    assert min(seen) > 0
    assert sum(seen) == size.sessions
    check = ChainCheck(TENANT, [])
    assert all(check.feed(as_wire(row)) for row in rows)
    assert check.head_id == len(rows) == size.records
