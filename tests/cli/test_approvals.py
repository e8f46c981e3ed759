"""`corral approvals` and `corral grants` against a real gateway: what is shown is what will run."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from corral.cli.tables import print_json, print_lines
from corral.cli.visible import exact, unusual, visible
from tests.cli.command import call, corral
from tests.support.house import House, house
from tests.support.model_server import CallTools, Say, conversation
from tests.support.wire import Wire

# A call whose text tries to look like another one.
SLY = {"path": "a.txt", "content": "harmless\x1b[2K\r\u202egpj.exe\u200b \\u202e \x00 \u0430\nend"}


def writing(args: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    return conversation([CallTools([("file_write", args)]), Say("done")])


class Terminal:
    """A person at a terminal, with a token of theirs."""

    def __init__(self, home: House, token: str, data_dir: Path) -> None:
        self.home = home
        self.env = {"CORRAL_URL": home.url, "CORRAL_TOKEN": token, "CORRAL_DATA_DIR": str(data_dir)}

    async def call(self, *arguments: str) -> tuple[int, str, str]:
        return await call(*arguments, env=self.env)

    async def json(self, *arguments: str) -> list[Any]:
        code, out, err = await self.call(*arguments, "--json")
        assert (code, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]


@asynccontextmanager
async def waiting(tmp_path: Path, args: dict[str, Any]) -> AsyncIterator[tuple[Terminal, Wire, dict[str, Any]]]:
    """A run that waits for a person: the person, a connection that follows it, and the approval."""
    async with house(tmp_path / "data", script=writing(args)) as home, await home.wire() as wire:
        await wire.effect("agent.run", input="go", sessionId="s1")
        approval = (await wire.event("approval.required"))["payload"]
        yield Terminal(home, home.token, tmp_path / "cli"), wire, approval


def written(home: House) -> str | None:
    found = list(home.server.settings.data_dir.rglob("*.txt"))
    return found[0].read_text() if found else None


# ---- what cannot be seen


@pytest.mark.parametrize(
    "char", ["\x00", "\x1b", "\r", "\x7f", "\x9b", "\u202e", "\u2066", "\u200b", "\u200d", "\ufeff", "\u00a0", "\u2028",
             "\u0301", "\u3164", "\U000e0041", "\ue000", "\ud800"],
)  # fmt: skip
def test_exact_writes_out_what_cannot_be_seen_and_reads_back_as_the_very_same(char: str) -> None:
    value = {"command": f"ls{char} -l", f"k{char}": [char]}
    shown = exact(value)
    assert char not in shown
    assert json.loads(shown) == value


def test_two_texts_that_differ_never_look_alike() -> None:
    texts = ["\u202e", "\\u202e", "\\\\u202e", "u202e", "\n", "\\n", '"', '\\"', "\u00e9", "e\u0301"]
    assert len({exact(text) for text in texts}) == len(texts)
    assert all(exact(text, None).isprintable() for text in texts)


def test_letters_that_look_like_others_are_named() -> None:
    assert unusual({"command": "c\u0430t \u0430"}) == ["U+0430 CYRILLIC SMALL LETTER A"]
    assert unusual({"command": "cat"}) == []


def test_visible_keeps_text_readable_and_lets_nothing_drive_the_terminal() -> None:
    assert visible("naïve \t\n👩\u200d💻") == "naïve \t\n👩\u200d💻"
    assert visible("\x1b]0;x\x07\u202eab\ufeff\U000e0041") == "\\x1b]0;x\\x07\\u202eab\\ufeff\\U000e0041"


# ---- deciding


def test_json_has_nothing_that_a_terminal_acts_on_and_reads_back_as_the_very_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    value = {"a\x9b2J": "\x1b[2J\x7f\u202egnp.exe\u2066", "plain": "größe 日本 🙂\n\t"}
    print_json(value)
    print_lines([value])
    out = capsys.readouterr().out
    first, second = out.rsplit("\n{", 1)
    assert json.loads(first) == json.loads("{" + second) == value
    assert visible(out) == out
    assert "größe 日本 🙂" in out


async def test_list_and_show_print_the_call_so_that_nothing_of_it_is_hidden(tmp_path: Path) -> None:
    async with waiting(tmp_path, SLY) as (terminal, _, approval):
        code, listed, _ = await terminal.call("approvals", "list")
        assert (code, listed.split()[0]) == (0, approval["approvalId"])
        code, shown, _ = await terminal.call("approvals", "show", approval["approvalId"])
        assert code == 0
        for text in (listed, shown):
            assert all(char.isprintable() or char == "\n" for char in text)
        assert "CYRILLIC SMALL LETTER A" in shown
        lines = shown.split("arguments\n")[1].split("\n  not plain")[0]
        assert json.loads(lines) == SLY
        assert await terminal.json("approvals", "show", approval["approvalId"]) == [approval]
        assert await terminal.json("approvals", "list") == [approval]


async def test_approve_runs_the_call_and_a_second_decision_is_told_the_first(tmp_path: Path) -> None:
    async with waiting(tmp_path, {"path": "a.txt", "content": "one"}) as (terminal, wire, approval):
        code, out, err = await terminal.call("approvals", "approve", approval["approvalId"], "--comment", "fine")
        assert (code, out) == (0, f"approved: {approval['approvalId']}\n")
        assert '"content": "one"' in err
        await wire.event("agent.completed")
        assert written(terminal.home) == "one"
        code, out, err = await terminal.call("approvals", "reject", approval["approvalId"])
        assert (code, out) == (1, "")
        assert err.splitlines()[0] == "corral: this approval is approved already by u_owner"
        assert f"corral approvals show {approval['approvalId']}" in err
        assert len(err.splitlines()) == 2
        assert (await terminal.json("approvals", "list", "--status", "approved"))[0]["comment"] == "fine"


async def test_reject_lets_the_run_go_on_without_the_call(tmp_path: Path) -> None:
    async with waiting(tmp_path, {"path": "a.txt", "content": "one"}) as (terminal, wire, approval):
        code, out, _ = await terminal.call("approvals", "reject", approval["approvalId"], "--comment", "not here")
        assert (code, out) == (0, f"rejected: {approval['approvalId']}\n")
        await wire.event("agent.completed")
        assert written(terminal.home) is None


async def test_edited_arguments_are_shown_and_are_what_runs(tmp_path: Path) -> None:
    async with waiting(tmp_path, {"path": "a.txt", "content": "one"}) as (terminal, wire, approval):
        edited = '{"path": "b.txt", "content": "two"}'
        code, _, err = await terminal.call("approvals", "approve", approval["approvalId"], "--args", edited)
        assert code == 0
        assert '"content": "two"' in err
        assert '"content": "one"' not in err
        await wire.event("agent.completed")
        assert written(terminal.home) == "two"


async def test_what_is_remembered_is_listed_used_and_revoked(tmp_path: Path) -> None:
    async with waiting(tmp_path, {"path": "a.txt", "content": "one"}) as (terminal, wire, approval):
        await terminal.call("approvals", "approve", approval["approvalId"], "--remember", "workspace")
        await wire.event("agent.completed")
        run = await wire.effect("agent.run", input="again", sessionId="s2")
        await wire.event("agent.completed", runId=run["runId"])
        code, out, _ = await terminal.call("grants", "list")
        assert code == 0
        assert 'exactly file.write {"content":"one","path":"a.txt"}' in out
        assert "in the whole workspace; used once; by u_owner" in out
        grant_id = out.split()[0]
        code, out, _ = await terminal.call("grants", "revoke", grant_id)
        assert (code, out.split()[:2]) == (0, [grant_id, "revoked"])
        code, _, err = await terminal.call("grants", "revoke", "gr_none")
        assert (code, err.splitlines()[1:]) == (1, ["  `corral grants list` shows them"])
        assert "$" not in err
        assert await terminal.json("grants", "list") == []
        assert [grant["grantId"] for grant in await terminal.json("grants", "list", "--all")] == [grant_id]
        run = await wire.effect("agent.run", input="again", sessionId="s3")
        await wire.event("approval.required", runId=run["runId"])


async def test_watch_tells_what_waits_what_comes_and_what_is_decided(tmp_path: Path) -> None:
    async with waiting(tmp_path, {"path": "a.txt", "content": "one"}) as (terminal, wire, first):
        async with corral("approvals", "watch", env=terminal.env) as watching:
            await watching.until(lambda: f"corral approvals approve {first['approvalId']}" in watching.out)
            run = await wire.effect("agent.run", input="go", sessionId="s2")
            second = (await wire.event("approval.required", runId=run["runId"]))["payload"]["approvalId"]
            await watching.until(lambda: f"corral approvals approve {second}" in watching.out)
            await terminal.call("approvals", "reject", first["approvalId"])
            await watching.until(lambda: f"{first['approvalId']}  rejected by u_owner" in watching.out)
            assert watching.out.count(f"{second}  pending") == 1
        async with corral("approvals", "watch", "--json", env=terminal.env) as watching:
            await watching.until(lambda: "\n" in watching.out)
            assert json.loads(watching.out)["approvalId"] == second


async def test_who_may_not_decide_exits_5_and_nothing_is_decided(tmp_path: Path) -> None:
    async with waiting(tmp_path, {"path": "a.txt", "content": "one"}) as (terminal, wire, approval):
        await wire.effect("sessions.update", sessionId="s1", visibility="workspace")
        token = await terminal.home.add_token("u_member", roles=["member"])
        member = Terminal(terminal.home, token, tmp_path / "cli")
        code, out, err = await member.call("approvals", "approve", approval["approvalId"])
        assert (code, out) == (5, "")
        assert "FORBIDDEN" in err
        assert await terminal.json("approvals", "list") == [approval]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["approve"], 2, ["ID"]),
        (["approve", "ap_none"], 1, ["ap_none", "corral approvals list"]),
        (["approve", "ap_none", "--args", "{"], 2, ["no JSON"]),
        (["approve", "ap_none", "--args", "[]"], 2, ["JSON object"]),
        (["approve", "ap_none", "--remember", "always"], 2, ["session", "workspace"]),
        (["aprove", "ap_none"], 2, ["aprove"]),
        (["list", "--status", "open"], 2, ["pending"]),
    ],
)
async def test_wrong_usage_says_what_is_right(
    tmp_path: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    async with house(tmp_path / "data") as home:
        terminal = Terminal(home, home.token, tmp_path / "cli")
        got, out, err = await terminal.call("approvals", *arguments)
        assert (got, out) == (code, "")
        assert [word for word in words if word not in err] == [], err
        assert len(err.splitlines()) == 2
