"""The storm in its short form."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.storm import Storm, rage
from tests.support import needs


async def test_nothing_is_lost_and_nothing_done_twice_while_everything_breaks(tmp_path: Path) -> None:
    needs.bubblewrap()
    needs.mount()
    await rage(Storm("the suite", 10, workers=4, pause=(0.1, 0.4), disk_mib=64), tmp_path)
