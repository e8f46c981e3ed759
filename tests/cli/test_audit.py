"""`corral audit`, against a gateway in this process, and offline."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from corral.governance.audit import Audit
from corral.storage.repositories import Transaction
from tests.cli.command import call, corral, on_a_terminal
from tests.support.house import TOKEN, House, house

T = "t_default"


class Audited:
    def __init__(self, folder: Path, home: House) -> None:
        self.folder = folder
        self.home = home
        self.server = home.server
        self.audit = Audit(self.server._clock)

    async def fill(self, *numbers: int, action: str = "tool.call") -> None:
        def work(tx: Transaction) -> None:
            for number in numbers:
                self.audit.record(
                    tx,
                    tenant_id=T,
                    action=action,
                    actor="user:test",
                    actor_type="user",
                    resource_type="tool",
                    resource_id="bash.exec",
                    outcome="denied" if number % 2 else "ok",
                    metadata={"number": number, "sneaky": "\x1b[2J\u202eö"},
                    trace_id="trace",
                    session_id="s_1" if number % 2 else None,
                )

        await self.server.store.write(work)

    async def call(self, *arguments: str, **rest: Any) -> tuple[int, str, str]:
        env = {"CORRAL_TOKEN": TOKEN, **rest}
        return await call("audit", *arguments, data_dir=self.folder, env=env)


@pytest.fixture
async def audited(tmp_path: Path) -> AsyncIterator[Audited]:
    """A server, and an audit to fill its log with."""
    async with house(tmp_path) as made:
        yield Audited(tmp_path, made)


async def test_records_are_shown_from_the_newest_with_nothing_that_drives_the_terminal(audited: Audited) -> None:
    await audited.fill(1, 2, 3)
    code, out, err = await audited.call("query", "--actor", "user:test")
    lines = out.splitlines()
    assert (code, len(lines)) == (0, 3), err
    assert '"number": 3' in lines[0]
    assert "tool.call DENIED" in lines[0]
    assert "DENIED" not in lines[1]
    assert "\x1b" not in out
    assert "\u202e" not in out


async def test_on_a_terminal_a_record_is_a_line_that_fits(audited: Audited) -> None:
    await audited.fill(1, 2)
    env = {"CORRAL_TOKEN": TOKEN, "COLUMNS": "60", "NO_COLOR": "1"}
    arguments = ("audit", "query", "--actor", "user:test")
    code, shown = await on_a_terminal(*arguments, data_dir=audited.folder, env=env)
    assert code == 0
    assert [len(line) for line in shown.splitlines()] == [60, 60]
    assert "tool.call DENIED" in shown


async def test_filters_and_json(audited: Audited) -> None:
    await audited.fill(*range(7))
    await audited.fill(8, action="policy.update")
    code, out, _ = await audited.call("query", "--session", "s_1", "--json", "--from", "1h", "--limit", "2")
    assert code == 0
    assert [json.loads(line)["metadata"]["number"] for line in out.splitlines()] == [5, 3]
    code, out, _ = await audited.call("query", "--action", "policy.update", "--json")
    assert [json.loads(line)["metadata"]["number"] for line in out.splitlines()] == [8]
    code, out, err = await audited.call("query", "--action", "none.such")
    assert (code, out, err) == (0, "", "no record fits\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("query", "--from", "yesterday"), "--from yesterday is no time"),
        (("query", "--to", "2026-01-31T12:00:00"), "--to 2026-01-31T12:00:00 is no time"),
        (("verify", "--file", __file__, "--key", "zz"), "--key is no public key"),
        (("verify", "--key", "00"), "--file"),
        (("verify", "--file", "/nowhere/there"), "cannot be read"),
        (("query", "--limit", "0"), "--limit"),
    ],
)
async def test_wrong_usage_names_what_is_wrong(audited: Audited, arguments: tuple[str, ...], words: str) -> None:
    code, out, err = await audited.call(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) <= 2


async def test_tail_shows_the_last_ones_then_each_new_one_once(audited: Audited) -> None:
    await audited.fill(1, 2, 3)
    arguments = ("audit", "tail", "-n", "2", "--json", "--actor", "user:test")
    async with corral(*arguments, data_dir=audited.folder, env={"CORRAL_TOKEN": TOKEN}) as command:
        await command.until(lambda: command.out.count("\n") == 2)
        await audited.fill(*range(4, 130))
        await command.until(lambda: command.out.count("\n") == 128)
        await audited.fill(130)
        await command.until(lambda: command.out.count("\n") == 129)
        numbers = [json.loads(line)["metadata"]["number"] for line in command.out.splitlines()]
    assert numbers == list(range(2, 131))


async def test_a_log_is_verified_exported_and_checked_offline_until_somebody_touches_it(
    audited: Audited, tmp_path: Path
) -> None:
    await audited.fill(*range(620))
    code, out, err = await audited.call("verify")
    assert code == 0, err
    assert out.startswith("whole: ")
    file, elsewhere = tmp_path / "export.jsonl", tmp_path / "elsewhere"
    code, _, err = await audited.call("export", str(file))
    assert code == 0, err
    assert file.stat().st_mode & 0o777 == 0o600
    assert (await audited.call("export", str(file)))[0] == 2
    assert (await audited.call("export", "--force", str(file)))[0] == 0
    code, out, _ = await call("audit", "verify", "--file", str(file), data_dir=audited.folder)
    assert code == 0
    assert "audit.pub" in out
    code, out, _ = await call("audit", "verify", "--file", str(file), data_dir=elsewhere)
    assert code == 0
    assert "compare" in out
    code, out, _ = await call("audit", "verify", "--file", str(file), "--key", "00" * 32, data_dir=elsewhere)
    assert code == 1
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:100], *lines[101:]]) + "\n")
    code, out, _ = await call("audit", "verify", "--file", str(file), data_dir=elsewhere)
    assert code == 1
    assert out.startswith("BROKEN at record 101:")

    audited.home.unchecked = "a record is changed"
    with sqlite3.connect(audited.folder / "corral.db", timeout=30) as connection:
        connection.execute("UPDATE audit_log SET actor = 'x' WHERE id = 7")
    connection.close()
    code, out, _ = await audited.call("verify")
    assert code == 1
    assert out.startswith("BROKEN at record 7: a record was changed")
    code, out, _ = await audited.call("verify", "--json")
    assert (code, json.loads(out)["brokenAt"]) == (1, 7)
    assert (await audited.call("export", str(tmp_path / "other")))[0] == 1
    assert not (tmp_path / "other").exists()
