"""`corral serve` and `corral token` as programs: outputs, exit codes, files."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
from pathlib import Path

import aiohttp

from tests.cli.command import call, corral
from tests.support.gateway import Gateway
from tests.support.wire import Wire


async def _status(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status


async def test_the_first_line_says_where_it_listens_and_it_does(tmp_path: Path) -> None:
    async with Gateway(tmp_path / "data") as gateway:
        assert gateway.first_line == f"listening on {gateway.url}\n"
        assert gateway.url.startswith("http://127.0.0.1:")
        assert await _status(gateway.url + "/healthz") == 200
        assert await _status(gateway.url + "/readyz") == 200


async def test_sigterm_and_ctrl_c_end_it_with_0_and_nothing_more_on_standard_output(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        async with corral("serve", "--port", "0", data_dir=tmp_path / "data") as command:
            await command.until(lambda command=command: "\n" in command.out)  # type: ignore[misc]
            command.process.send_signal(number)
            assert await command.ended() == 0
            assert len(command.out.splitlines()) == 1
            assert "Traceback" not in command.err


async def test_it_says_in_the_data_directory_where_it_is_while_it_runs(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with Gateway(data_dir) as gateway:
        endpoint = data_dir / "gateway.json"
        assert json.loads(endpoint.read_text()) == {"url": gateway.url, "pid": gateway.process.pid}
        assert stat.S_IMODE(endpoint.stat().st_mode) == 0o600
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((data_dir / "corral.db").stat().st_mode) & 0o077 == 0
    assert not endpoint.exists()


async def test_a_second_one_on_the_data_directory_exits_3_and_names_the_first(tmp_path: Path) -> None:
    async with Gateway(tmp_path / "data") as gateway:
        code, out, err = await call("serve", "--port", "0", data_dir=tmp_path / "data")
        assert (code, out) == (3, "")
        assert f"process {gateway.process.pid}" in err
        assert len(err.splitlines()) == 2
        # And it took nothing from the first one.
        assert json.loads((tmp_path / "data" / "gateway.json").read_text())["pid"] == gateway.process.pid
        assert await _status(gateway.url + "/readyz") == 200


async def test_a_killed_one_locks_nobody_out(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path / "data")
    async with gateway:
        await gateway.kill()
        await gateway.start()
        assert await _status(gateway.url + "/readyz") == 200


async def test_a_port_that_is_taken_is_two_lines_and_code_1(tmp_path: Path) -> None:
    async with Gateway(tmp_path / "one") as gateway:
        port = gateway.url.rsplit(":", 1)[1]
        code, out, err = await call("serve", "--port", port, data_dir=tmp_path / "two")
        assert (code, out) == (1, "")
        assert f"127.0.0.1:{port} is taken" in err
        assert "--port" in err.splitlines()[1]
        assert "Traceback" not in err


async def test_a_setting_that_cannot_be_used_is_one_line_and_code_2(tmp_path: Path) -> None:
    for env in ({"CORRAL_PORT": "http"}, {"CORRAL_TOKEN": "short"}, {"CORRAL_ALOWED_ORIGINS": "x"}):
        code, out, err = await call("serve", data_dir=tmp_path / "data", env=env)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert next(iter(env)) in err
    assert not (tmp_path / "data").exists()


async def test_other_machines_are_let_near_only_with_a_token_that_somebody_knows(tmp_path: Path) -> None:
    arguments = ("serve", "--port", "0", "--host", "0.0.0.0")
    code, out, err = await call(*arguments, data_dir=tmp_path / "data")
    assert (code, out) == (2, "")
    assert "CORRAL_TOKEN" in err
    assert not (tmp_path / "data" / "token").exists()
    async with Gateway(tmp_path / "data", {"CORRAL_TOKEN": "t" * 24}, "--host", "0.0.0.0") as gateway:
        assert gateway.url.startswith("http://0.0.0.0:")


async def test_configuration_comes_from_the_data_directory_and_not_from_where_it_is_called(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "corral.toml").write_text("this is no TOML")
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o700)
    (data_dir / "corral.toml").write_text('log_level = "debug"\nprt = 1')
    before = Path.cwd()
    os.chdir(here)
    try:
        code, _, err = await call("serve", "--port", "0", data_dir=data_dir)
    finally:
        os.chdir(before)
    assert code == 2
    assert str(data_dir / "corral.toml") in err


async def test_token_prints_the_token_that_the_gateway_takes_and_only_that(tmp_path: Path) -> None:
    code, first, err = await call("token", data_dir=tmp_path / "data")
    assert (code, err) == (0, "")
    assert stat.S_IMODE((tmp_path / "data" / "token").stat().st_mode) == 0o600
    async with Gateway(tmp_path / "data") as gateway:
        assert gateway.token() == first.strip()
    assert await call("token", data_dir=tmp_path / "data") == (0, first, "")
    named = await call("token", data_dir=tmp_path / "data", env={"CORRAL_TOKEN": "mine-mine-mine-mine"})
    assert named == (0, "mine-mine-mine-mine\n", "")


async def test_the_log_never_has_the_token(tmp_path: Path) -> None:
    async with Gateway(tmp_path / "data", {"CORRAL_LOG_LEVEL": "debug"}) as gateway:
        code, _, _ = await call("run", "list", data_dir=tmp_path / "data")
        assert code == 0
        token = gateway.token()
    assert token not in gateway.log
    assert "Traceback" not in gateway.log


async def test_a_database_of_a_newer_corral_is_refused_in_a_line_and_left_as_it_is(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    async with Gateway(data_dir):
        pass
    with sqlite3.connect(data_dir / "corral.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    code, out, err = await call("serve", "--port", "0", data_dir=data_dir)
    assert (code, out) == (1, "")
    assert "written by a newer Corral" in err
    assert len(err.splitlines()) == 1


async def test_the_log_can_be_json_with_the_action_and_the_ids_of_each_line(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path / "data", {"CORRAL_LOG_FORMAT": "json"})
    async with gateway, await Wire.open(gateway.url) as wire:
        await wire.connect(gateway.token())
    lines = [json.loads(line) for line in gateway.log.splitlines()]
    connected = next(line for line in lines if line.get("action") == "connection.connected")
    assert connected["tenant"] == "t_default"
    assert connected["connection"].startswith("conn_")
    assert {"time", "level", "logger", "message"} <= set(connected)
