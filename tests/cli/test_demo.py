"""The tour keeps its promises, with a sandbox and without one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.cli.command import call
from tests.support import needs


async def test_the_tour_kills_a_gateway_and_shows_the_run_going_on() -> None:
    needs.bubblewrap()
    code, out, err = await call("demo", "--fast")
    assert (code, err) == (0, "")
    assert "kill -9" in out
    assert "has taken the run up (attempt 2)" in out
    assert "its file has one line" in out
    assert out.rstrip().splitlines()[-2] == "Everything happened as told."


async def test_without_a_sandbox_the_tour_says_what_it_skips(tmp_path: Path) -> None:
    # A PATH on which there is Python and no bubblewrap.
    (tmp_path / "python3").symlink_to(sys.executable)
    code, out, err = await call("demo", "--fast", env={"PATH": str(tmp_path)})
    assert (code, err) == (0, "")
    assert "never run outside it" in out
    assert "Skipped below" in out
    assert "has taken the run up (attempt 2)" in out
    assert "What could be shown here happened as told." in out


async def test_the_tour_leaves_nothing_behind_and_heeds_no_settings_of_a_real_gateway(tmp_path: Path) -> None:
    temporary, data_dir = tmp_path / "tmp", tmp_path / "data"
    temporary.mkdir()
    env = {"TMPDIR": str(temporary), "CORRAL_MODEL": "nope:x", "CORRAL_PORT": "1", "CORRAL_TOKEN": "t" * 20}
    code, _, err = await call("demo", "--fast", data_dir=data_dir, env=env)
    assert (code, err) == (0, "")
    assert os.listdir(temporary) == []
    assert not data_dir.exists()
