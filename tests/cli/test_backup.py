"""`corral backup` and `corral restore`, of a gateway that runs and works meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from corral.storage.exchange import PLAN, STAGING, Plan, exchange
from corral.storage.lock import DataDirLock, DataDirLocked
from tests.cli.command import call, call_here, on_a_terminal
from tests.support.gateway import Gateway
from tests.support.model_server import CallTools, Hang, ModelServer, Say, conversation, script_for
from tests.support.wire import Wire


def script() -> Any:
    return script_for(
        {
            "hang": conversation([[Hang(after=2), Say("after all")]]),
            "write": conversation([CallTools([("file_write", {"path": "made", "content": "x"})]), Say("written")]),
            "": [Say("ok")],
        }
    )


def gateway(data_dir: Path, model: ModelServer) -> Gateway:
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    env = {"CORRAL_MODEL": "openai-chat:test", "OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "k"}
    return Gateway(data_dir, env)


async def connected(running: Gateway) -> Wire:
    wire = await Wire.open(running.url)
    await wire.connect(running.token())
    return wire


@asynccontextmanager
async def restored(file: Path, data_dir: Path, model: ModelServer, *options: str) -> AsyncIterator[Wire]:
    """A client of a gateway over what the backup is restored to."""
    code, out, err = await asyncio.to_thread(call_here, "restore", str(file), *options, data_dir=data_dir)
    assert code == 0, err
    assert "restored: the backup of" in out
    async with gateway(data_dir, model) as running, await connected(running) as wire:
        yield wire


async def backed_up(running: Gateway, file: Path) -> None:
    code, _, err = await asyncio.to_thread(call_here, "backup", str(file), data_dir=running.data_dir)
    assert code == 0, err


def state(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "corral.lock"
    }


async def test_what_was_acknowledged_before_a_backup_under_load_is_there_on_the_other_machine(tmp_path: Path) -> None:
    file = tmp_path / "b.tar"
    async with ModelServer(script()) as model, gateway(tmp_path / "a" / "data", model) as running:
        acknowledged: list[tuple[dict[str, Any], dict[str, Any]]] = []
        stop = asyncio.Event()

        async def work(wire: Wire, worker: int) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                asked = {"input": "hello", "sessionId": f"s-{worker}-{number}", "idempotencyKey": f"k-{number}"}
                acknowledged.append((asked, await wire.request("agent.run", asked)))

        async with await connected(running) as one, await connected(running) as two, await connected(running) as three:
            workers = [asyncio.create_task(work(wire, at)) for at, wire in enumerate((one, two, three))]
            await one.until(lambda: len(acknowledged) > 60)
            before = list(acknowledged)
            code, out, err = await call("backup", str(file), "--json", data_dir=running.data_dir)
            assert code == 0, err
            made = json.loads(out)
            assert len(acknowledged) > len(before), "nothing was written meanwhile"
            stop.set()
            await asyncio.gather(*workers)
        assert made["audit"]["t_default"] >= len(before)
        async with restored(file, tmp_path / "b" / "data", model) as wire:
            # Runs that were on are taken up again, so each of them comes to its end.
            for asked, answer in before:
                await wire.request("events.subscribe", {"sessionId": asked["sessionId"], "after": 0})
                await wire.event("agent.completed", runId=answer["runId"])
                assert await wire.request("agent.run", asked) == answer, "the same key, the same answer"
            verified = await wire.request("audit.verify")
            assert verified["ok"], verified
            actions = await wire.request("audit.query", {"action": "store.restored"})
            assert [item["metadata"]["backupCreatedAt"] for item in actions["items"]] == [made["createdAt"]]


async def test_a_backup_of_a_gateway_that_was_killed_has_what_was_still_in_its_log(tmp_path: Path) -> None:
    file = tmp_path / "b.tar"
    async with ModelServer(script()) as model, gateway(tmp_path / "a" / "data", model) as running:
        async with await connected(running) as wire:
            made = await wire.effect("sessions.create", title="kept")
        await running.kill()
        assert (running.data_dir / "corral.db-wal").stat().st_size > 0
        await backed_up(running, file)
        async with restored(file, tmp_path / "b" / "data", model) as wire:
            assert (await wire.request("sessions.get", {"sessionId": made["session"]["id"]}))["session"] is not None
            assert (await wire.request("audit.verify"))["ok"]


async def with_two_runs_that_are_on(running: Gateway) -> None:
    async with await connected(running) as wire:
        await wire.effect("agent.run", input="hang", sessionId="hangs")
        await wire.event("agent.delta")
        await wire.effect("agent.run", input="write", sessionId="waits")
        await wire.event("approval.required")


@pytest.mark.parametrize("place", ["here", "elsewhere"])
async def test_runs_that_were_on_are_taken_up_again_and_approvals_still_wait(tmp_path: Path, place: str) -> None:
    file = tmp_path / "b.tar"
    async with ModelServer(script()) as model, gateway(tmp_path / "a" / "data", model) as running:
        await with_two_runs_that_are_on(running)
        await backed_up(running, file)
        await running.stop()
        target = running.data_dir if place == "here" else tmp_path / "b" / "data"
        async with restored(file, target, model, "--force") as wire:
            for session in ("hangs", "waits"):
                await wire.request("events.subscribe", {"sessionId": session, "after": 0})
            assert (await wire.event("agent.completed", sessionId="hangs"))["payload"]["output"] == "after all"
            [approval] = (await wire.request("approval.queue"))["items"]
            await wire.effect("approval.resolve", approvalId=approval["approvalId"], decision="approve")
            result = (await wire.event("agent.tool_result", sessionId="waits"))["payload"]
            assert (await wire.event("agent.completed", sessionId="waits"))["payload"]["output"] == "written"
        written = target / "workspaces/t_default/w_default/made"
        # An approval is for one folder: in another one the model has to ask again.
        assert (result["status"], written.exists()) == (("success", True) if place == "here" else ("denied", False))


async def test_with_abort_runs_they_end_as_aborted_and_nothing_is_done_twice(tmp_path: Path) -> None:
    file = tmp_path / "b.tar"
    async with ModelServer(script()) as model, gateway(tmp_path / "a" / "data", model) as running:
        await with_two_runs_that_are_on(running)
        await backed_up(running, file)
        asked = len(model.requests)
        async with restored(file, tmp_path / "b" / "data", model, "--abort-runs") as wire:
            for session in ("hangs", "waits"):
                await wire.request("events.subscribe", {"sessionId": session, "after": 0})
                assert (await wire.event("agent.failed", sessionId=session))["payload"]["code"] == "ABORTED"
            assert (await wire.request("approval.queue"))["items"] == []
        assert len(model.requests) == asked


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data directory, which had a gateway, and `b.tar`, made while it ran."""
    folder = tmp_path_factory.mktemp("original")
    asyncio.run(_make_original(folder))
    return folder


async def _make_original(folder: Path) -> None:
    """A session titled `kept`; in its workspace a file, a link and a pipe; settings."""
    data_dir = folder / "data"
    async with Gateway(data_dir) as running:
        async with await connected(running) as wire:
            await wire.effect("sessions.create", title="kept")
        workspace = data_dir / "workspaces" / "t_default" / "w_default"
        workspace.mkdir(parents=True, exist_ok=True)
        (workspace / "notes.txt").write_text("notes")
        (workspace / "link").symlink_to("/etc/hostname")
        os.mkfifo(workspace / "pipe")
        (data_dir / "corral.toml").write_text("port = 0\n")
        code, out, err = await call("backup", str(folder / "b.tar"), data_dir=data_dir)
        assert code == 0, err
        assert "2 in the workspaces that are links" in out
    for name in ("link", "pipe"):
        (workspace / name).unlink()


@pytest.fixture
def backup(original: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(the backup, the data directory that it is of), both this test's own"""
    shutil.copytree(original / "data", tmp_path / "a" / "data")
    return Path(shutil.copy(original / "b.tar", tmp_path)), tmp_path / "a" / "data"


def test_the_file_is_its_owners_alone_and_is_not_written_over(backup: tuple[Path, Path]) -> None:
    file, data_dir = backup
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.read_bytes()
    code, _, err = call_here("backup", str(file), data_dir=data_dir)
    assert (code, file.read_bytes()) == (1, before)
    assert "--force" in err
    code, _, err = call_here("backup", str(file), "--force", data_dir=data_dir)
    assert code == 0, err
    assert file.read_bytes() != before
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".b")] == []
    code, _, err = call_here("backup", str(data_dir / "x.tar"), data_dir=data_dir)
    assert code == 2, err


def test_secrets_stay_out_unless_they_are_asked_for(backup: tuple[Path, Path], tmp_path: Path) -> None:
    _, data_dir = backup
    (data_dir / "corral.toml").write_text('token = "a-token-that-nobody-may-see"\n')
    token = (data_dir / "token").read_text().strip()
    code, out, _ = call_here("backup", str(tmp_path / "without.tar"), data_dir=data_dir)
    assert code == 0
    assert [name for name in ("token", "token.key", "corral.toml") if f"left out: {name} (" not in out] == []
    for text in (token, (data_dir / "token.key").read_text().strip(), "nobody-may-see"):
        assert text.encode() not in (tmp_path / "without.tar").read_bytes()
    code, out, _ = call_here("backup", str(tmp_path / "with.tar"), "--secrets", data_dir=data_dir)
    assert (code, "left out: token" in out) == (0, False)
    code, _, err = call_here("restore", str(tmp_path / "with.tar"), data_dir=tmp_path / "new")
    assert code == 0, err
    assert (tmp_path / "new" / "token").read_text().strip() == token


def test_a_directory_with_data_is_refused_and_with_force_kept_aside(backup: tuple[Path, Path], tmp_path: Path) -> None:
    file, data_dir = backup
    (data_dir / "corral.toml").write_text("port = 1\n")
    before = state(data_dir)
    code, out, err = call_here("restore", str(file), data_dir=data_dir)
    assert (code, out, state(data_dir)) == (1, "", before)
    assert len(err.splitlines()) == 2
    code, out, err = call_here("restore", str(file), "--force", "--json", data_dir=data_dir)
    assert code == 0, err
    kept = Path(json.loads(out)["kept"])
    assert kept.parent == data_dir
    assert (kept / "corral.db").read_bytes() == before["corral.db"]
    assert (data_dir / "corral.toml").read_text() == "port = 1\n", "this machine's settings stay"
    assert (data_dir / "token").read_bytes() == before["token"], "what the backup does not have stays"
    assert (data_dir / "workspaces/t_default/w_default/notes.txt").read_text() == "notes"
    assert not (data_dir / STAGING).exists()


async def test_a_log_of_another_database_is_not_read_into_the_restored_one(
    backup: tuple[Path, Path], tmp_path: Path
) -> None:
    file, _ = backup
    dirty = tmp_path / "dirty"
    (tmp_path / "other").mkdir()
    async with Gateway(tmp_path / "other" / "data") as running:
        async with await connected(running) as wire:
            for number in range(20):
                await wire.effect("sessions.create", title=f"another's {number}")
        await running.kill()
        dirty.mkdir(mode=0o700)
        for end in ("wal", "shm"):
            shutil.copy(running.data_dir / f"corral.db-{end}", dirty)
    code, _, err = await call("restore", str(file), data_dir=dirty)
    assert code == 0, err
    assert not (dirty / "corral.db-wal").exists()
    with closing(sqlite3.connect(dirty / "corral.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("SELECT title FROM sessions").fetchall() == [("kept",)]


async def test_a_gateway_that_runs_keeps_its_directory(backup: tuple[Path, Path]) -> None:
    file, data_dir = backup
    async with Gateway(data_dir) as running:
        code, _, err = await call("restore", str(file), "--force", data_dir=data_dir)
        assert code == 3
        assert f"process {running.process.pid}" in err
        assert not (data_dir / STAGING).exists()


def test_no_gateway_can_begin_on_a_directory_while_a_restore_works_on_it(
    backup: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, data_dir = backup
    begun = []

    def tried(*arguments: Any) -> None:
        with pytest.raises(DataDirLocked):
            DataDirLock(data_dir)
        begun.append(arguments)
        exchange(*arguments)

    monkeypatch.setattr("corral.storage.exchange.exchange", tried)
    code, _, err = call_here("restore", str(file), "--force", data_dir=data_dir)
    assert code == 0, err
    assert len(begun) == 1


@pytest.mark.parametrize("how", ["cut", "changed", "missing"])
def test_a_damaged_file_is_refused_in_a_line_and_nothing_is_changed(
    backup: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    file, data_dir = backup
    data = bytearray(file.read_bytes())
    if how == "changed":
        data[len(data) // 2] ^= 1  # in the database
    bad = tmp_path / "bad.tar"
    bad.write_bytes(data[: len(data) // 2] if how == "cut" else data)
    if how == "missing":
        bad.unlink()
    before = state(data_dir)
    code, out, err = call_here("restore", str(bad), "--force", data_dir=data_dir)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 2, err
    assert "bad.tar" in err
    assert "nothing was changed" in err
    assert state(data_dir) == before


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("UPDATE audit_log SET actor = 'somebody else' WHERE id = 2", "the chain of t_default is broken at record 2"),
        ("UPDATE sessions SET state_version = state_version + 1", "has a gap"),
    ],
)
def test_a_backup_that_contradicts_itself_is_restored_only_despite_that(
    backup: tuple[Path, Path], tmp_path: Path, sql: str, words: str
) -> None:
    _, data_dir = backup
    with closing(sqlite3.connect(data_dir / "corral.db")) as database:
        database.execute(sql)
        database.commit()
    file = tmp_path / "odd.tar"
    code, _, err = call_here("backup", str(file), data_dir=data_dir)
    assert code == 0, err
    code, _, err = call_here("restore", str(file), data_dir=tmp_path / "new")
    assert code == 1
    assert words in err
    assert not (tmp_path / "new" / "corral.db").exists()
    code, out, err = call_here("restore", str(file), "--despite-findings", data_dir=tmp_path / "new")
    assert code == 0, err
    assert words in out


def test_a_damaged_database_is_not_backed_up(backup: tuple[Path, Path], tmp_path: Path) -> None:
    _, data_dir = backup
    with (data_dir / "corral.db").open("r+b") as file:
        file.seek(4096 * 5)
        file.write(b"\xff" * 4096 * 10)
    code, _, err = call_here("backup", str(tmp_path / "new.tar"), data_dir=data_dir)
    assert code == 1
    assert "damaged" in err
    assert [path.name for path in tmp_path.iterdir() if "new.tar" in path.name] == []


async def test_the_next_start_says_how_an_interrupted_restore_ended(backup: tuple[Path, Path], tmp_path: Path) -> None:
    """As a restore leaves it that is killed: before the plan was there, and after."""
    file, data_dir = backup
    (data_dir / STAGING).mkdir()
    shutil.copy(data_dir / "corral.db", data_dir / STAGING)
    async with Gateway(data_dir) as running:
        assert "interrupted before it had changed anything" in running.log
    assert not (data_dir / STAGING).exists()
    code, _, err = await call("restore", str(file), data_dir=tmp_path / "new")
    assert code == 0, err
    shutil.move(tmp_path / "new", data_dir / STAGING)
    with closing(sqlite3.connect(data_dir / STAGING / "corral.db")) as database:
        database.execute("UPDATE sessions SET title = 'from the backup'")
        database.commit()
    (data_dir / STAGING / "corral.toml").write_text("[agents.a_came_with_it]\n")
    names = ["audit.head", "audit.key", "audit.pub", "corral.db", "corral.toml"]
    plan = Plan(backup="2026-01-01", kept="replaced-1", names=names, aside=["corral.db-wal", "corral.db-shm"])
    (data_dir / PLAN).write_text(json.dumps({name: getattr(plan, name) for name in plan.__struct_fields__}))
    async with Gateway(data_dir, unchecked="a title was written past the journal, to tell the two apart") as running:
        assert "it has been completed, the state is that of the backup of 2026-01-01" in running.log
        async with await connected(running) as wire:
            [session] = (await wire.request("sessions.list"))["items"]
            assert session["title"] == "from the backup"
            agents = [agent["id"] for agent in (await wire.request("agents.list"))["items"]]
            assert "a_came_with_it" in agents, "the settings that came with it are those of this start"
    assert (data_dir / "replaced-1" / "corral.db").exists()


async def test_progress_is_for_terminals_and_json_for_programs(backup: tuple[Path, Path], tmp_path: Path) -> None:
    file, data_dir = backup
    code, out, err = await call("restore", "--check", "--json", str(file), data_dir=data_dir)
    assert (code, err) == (0, "")
    assert json.loads(out)["audit"]["t_default"] > 0
    code, shown = await on_a_terminal("backup", str(tmp_path / "c.tar"), data_dir=data_dir)
    assert code == 0
    assert "c.tar: " in shown


def test_nothing_to_back_up_is_said_with_the_remedy(tmp_path: Path) -> None:
    code, out, err = call_here("backup", str(tmp_path / "b.tar"), data_dir=tmp_path / "none")
    assert (code, out) == (1, "")
    assert "--data-dir" in err
