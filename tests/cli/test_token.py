"""`corral token`: the owner's token, and those that are made, listed and revoked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cli.command import call, on_a_terminal
from tests.cli.test_approvals import Terminal
from tests.support.house import house
from tests.support.wire import rpc


@pytest.fixture
async def terminal(tmp_path: Path) -> AsyncIterator[Terminal]:
    """An owner at a terminal."""
    async with house(tmp_path / "data") as home:
        yield Terminal(home, home.token, tmp_path / "cli")


async def test_bare_token_still_prints_the_access_token_and_speaks_to_no_gateway(tmp_path: Path) -> None:
    code, first, err = await call("token", "--data-dir", str(tmp_path / "data"))
    assert (code, err) == (0, "")
    assert len(first.strip()) >= 32
    assert await call("token", "--data-dir", str(tmp_path / "data")) == (0, first, "")
    assert await call("token", env={"CORRAL_TOKEN": "x" * 20}) == (0, "x" * 20 + "\n", "")


async def test_a_made_token_is_the_only_thing_on_standard_output_works_and_dies_when_revoked(
    terminal: Terminal,
) -> None:
    made = ("token", "create", "--role", "viewer", "--user", "u_anna", "--name", "Anna\x1b", "--expires", "30d")
    code, out, err = await terminal.call(*made)
    token = out.strip()
    assert (code, token[:4], out) == (0, "crl_", token + "\n")
    token_id = err.split()[0]
    assert "u_anna (Anna\\x1b)  viewer  w_default  until " in err
    assert (await rpc(terminal.home.url, "sessions.list", {}, token=token)).status == 200
    code, out, _ = await terminal.call("token", "list")
    assert (code, [line.split()[0] for line in out.splitlines()]) == (0, ["tok_owner", token_id])
    assert "u_anna (Anna\\x1b)" in out
    assert token not in out
    code, out, _ = await terminal.call("token", "revoke", token_id)
    assert (code, out.split()[0]) == (0, token_id)
    assert (await rpc(terminal.home.url, "sessions.list", {}, token=token)).status == 401
    assert len(await terminal.json("token", "list")) == 1
    assert [item["tokenId"] for item in await terminal.json("token", "list", "--all")][1] == token_id


async def test_json_has_the_text_and_a_member_may_not_make_any(terminal: Terminal) -> None:
    [made] = await terminal.json("token", "create", "--role", "member", "--role", "auditor", "--user", "u_anna")
    assert made["roles"] == ["auditor", "member"]
    member = Terminal(terminal.home, made["token"], Path(terminal.env["CORRAL_DATA_DIR"]))
    for arguments in (["create", "--role", "viewer"], ["list"], ["revoke", made["tokenId"]]):
        code, out, err = await member.call("token", *arguments)
        assert (code, out) == (5, "")
        assert "FORBIDDEN" in err


async def test_the_last_owners_token_stays(terminal: Terminal) -> None:
    code, out, err = await terminal.call("token", "revoke", "tok_owner")
    assert (code, out) == (1, "")
    assert "CONFLICT: this is the last owner's token" in err


async def test_a_gateway_is_found_by_the_data_directory_wherever_the_option_stands(terminal: Terminal) -> None:
    data = str(terminal.home.server.settings.data_dir)
    env = {"CORRAL_TOKEN": terminal.home.token}
    for arguments in (["token", "--data-dir", data, "list"], ["token", "list", "--data-dir", data]):
        code, out, err = await call(*arguments, "--json", env=env)
        assert (code, err) == (0, "")
        assert json.loads(out)["tokenId"] == "tok_owner"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create"], ["--role"]),
        (["create", "--role", "root"], ["operator"]),
        (["create", "--role", "viewer", "--expires", "soon"], ["30d"]),
        (["create", "--role", "viewer", "--expires", "0d"], ["30d"]),
        (["revoke"], ["ID"]),
        (["revoke", "crl_" + "A" * 43], ["corral token list"]),
        (["lst"], ["lst"]),
    ],
)
async def test_wrong_usage_says_what_is_right(arguments: list[str], words: list[str]) -> None:
    code, out, err = await call("token", *arguments)
    assert (code, out) == (2, "")
    assert [word for word in words if word not in err] == [], err
    assert "A" * 43 not in err


async def test_on_a_narrow_terminal_every_line_of_the_list_fits(terminal: Terminal) -> None:
    made = ("token", "create", "--role", "operator", "--user", "anna", "--name", "Anna", "--expires", "30d")
    assert (await terminal.call(*made))[0] == 0
    env = {**terminal.env, "COLUMNS": "60"}
    code, shown = await on_a_terminal("token", "list", data_dir=Path(env["CORRAL_DATA_DIR"]), env=env)
    assert code == 0
    assert [line for line in shown.splitlines() if len(line) > 60] == []
    assert "anna (Anna)  operator  w_default  until 20" in shown
