"""An exchange that is interrupted at each of its steps: the old state or the new one, never a third."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.storage import exchange
from corral.storage.exchange import PLAN, STAGING, Plan, settle

OLD = {"corral.db": "old", "corral.db-wal": "old", "audit.key": "old", "audit.head": "old", "workspaces/a/b": "old"}
NEW = {"corral.db": "new", "audit.key": "new", "workspaces/a/c": "new"}
STAYS = {"corral.toml": "mine", "token": "mine"}


class Killed(BaseException):
    """In the place of SIGKILL: nothing after it is carried out but what Python itself does."""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def prepared(folder: Path) -> Plan:
    write(folder, {**OLD, **STAYS})
    write(folder / STAGING, NEW)
    return Plan(
        backup="then",
        kept="replaced-1",
        names=["audit.key", "corral.db", "workspaces"],
        aside=["corral.db-wal", "corral.db-shm", "audit.head"],
    )


def kill_at(patch: pytest.MonkeyPatch, number: int) -> list[str]:
    """From here on the process dies at its `number`-th change of the file system, or just after it."""
    done: list[str] = []

    def deadly(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def carried_out(*args: Any, **kwargs: Any) -> Any:
            if len(done) == number:
                raise Killed
            done.append(name)
            return change(*args, **kwargs)

        return carried_out

    for name in ("rename", "unlink", "mkdir"):
        patch.setattr(Path, name, deadly(name, getattr(Path, name)))
    patch.setattr(os, "link", deadly("link", os.link))
    patch.setattr(shutil, "rmtree", deadly("rmtree", shutil.rmtree))
    return done


def test_killed_at_any_step_the_next_start_finds_the_old_state_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {f"replaced-1/{name}": text for name, text in OLD.items()}
    ends, number = [], 0
    while True:
        folder = tmp_path / str(number)
        plan = prepared(folder)
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                exchange.exchange(folder, plan)
                break
            except Killed:
                pass
        # The next start may be killed in the same way.
        for again in range(2):
            with monkeypatch.context() as patch:
                kill_at(patch, again)
                try:
                    told = settle(folder)
                except Killed:
                    continue
                break
        else:
            told = settle(folder)
        found = {name: text for name, text in read(folder).items() if not name.startswith(".restore.json")}
        new = found == {**NEW, **STAYS, **kept}
        assert new or found == {**OLD, **STAYS}, (number, found)
        assert not (folder / PLAN).exists()
        assert not (folder / STAGING).exists()
        assert told is None or ("completed" if new else "as it was") in told
        ends.append(new)
        number += 1
    assert read(folder) == {**NEW, **STAYS, **kept}
    assert ends == sorted(ends), "once it has become the new state it stays that"
    assert set(ends) == {False, True}
    assert number > 8


def test_a_settled_directory_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    assert settle(tmp_path) is None
    assert read(tmp_path) == OLD


def test_a_plan_that_cannot_be_read_changes_nothing_and_is_told(tmp_path: Path) -> None:
    prepared(tmp_path)
    (tmp_path / PLAN).write_text("{")
    before = read(tmp_path)
    with pytest.raises(OSError, match="not what a restore writes"):
        settle(tmp_path)
    assert read(tmp_path) == before
