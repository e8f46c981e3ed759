"""`corral run` against a real gateway, with the demo model and with a scripted model server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.cli.command import call, corral, on_a_terminal
from tests.support import needs
from tests.support.gateway import Gateway
from tests.support.model_server import CallTools, Hang, ModelServer, Say, Status, conversation

# ---- how it ends


async def test_the_answer_goes_to_standard_output_and_the_rest_to_standard_error(demo: Gateway) -> None:
    code, out, err = await call("run", "list", data_dir=demo.data_dir)
    assert code == 0
    assert out == "I call file.list.\nfile.list gave back:\n(empty directory)\n"
    assert "● file.list" in err
    assert "completed: 2 steps" in err
    assert "\x1b" not in out + err


async def test_text_comes_from_standard_input_for_a_dash(demo: Gateway) -> None:
    code, out, _ = await call("run", "-", data_dir=demo.data_dir, stdin="list\n")
    assert code == 0
    assert "file.list gave back" in out


async def test_a_failed_run_exits_1_with_code_and_message(scripted: Gateway, model: ModelServer) -> None:
    model.set_script([Status(400, message="no such model")])
    code, _, err = await call("run", "x", data_dir=scripted.data_dir)
    assert code == 1
    assert "failed: " in err


async def test_a_run_past_its_timeout_exits_1(scripted: Gateway, model: ModelServer) -> None:
    model.set_script([Hang()])
    code, _, err = await call("run", "--timeout", "0.5", "x", data_dir=scripted.data_dir)
    assert code == 1
    assert "LIMIT_REACHED" in err


async def test_a_model_that_policy_does_not_let_run_exits_5(demo: Gateway) -> None:
    from corral.client import Corral

    async with Corral(*demo.address()) as client:
        await client.request("policy.update", patch={"models": {"allowed": ["openai-chat:*"]}})
    code, _, err = await call("run", "list", data_dir=demo.data_dir)
    assert code == 5
    assert "POLICY_DENIED" in err


async def test_no_gateway_is_code_4_with_the_command_that_starts_one(tmp_path: Path) -> None:
    code, out, err = await call("run", "list", "--data-dir", str(tmp_path / "none"))
    assert (code, out) == (4, "")
    assert f"corral serve --data-dir {tmp_path / 'none'}" in err
    assert len(err.splitlines()) == 2


async def test_a_gateway_that_died_without_a_word_is_no_gateway(demo: Gateway) -> None:
    await demo.kill()
    assert (demo.data_dir / "gateway.json").exists()
    code, _, err = await call("run", "list", data_dir=demo.data_dir)
    assert code == 4
    assert "no gateway is running" in err


async def test_a_url_where_nothing_listens_is_code_4(demo: Gateway) -> None:
    port = demo.url.rsplit(":", 1)[1]
    await demo.kill()
    code, _, err = await call("run", "list", "--url", f"http://127.0.0.1:{port}", data_dir=demo.data_dir)
    assert code == 4
    assert err.splitlines() == [
        f"corral: no gateway answers at http://127.0.0.1:{port} (Connection refused)",
        "  check --url, or leave it out for the gateway of the data directory",
    ]


async def test_a_wrong_token_is_code_4_and_says_where_the_right_one_is(demo: Gateway) -> None:
    env = {"CORRAL_URL": demo.url, "CORRAL_TOKEN": "wrong-wrong-wrong-wrong"}
    code, _, err = await call("run", "list", data_dir=demo.data_dir, env=env)
    assert code == 4
    assert "corral token" in err


@pytest.mark.parametrize("host", ["127.evil.invalid", "localhost", "192.0.2.1"])
async def test_the_data_directorys_token_goes_to_no_other_machine(demo: Gateway, host: str) -> None:
    code, _, err = await call("run", "list", "--url", f"http://{host}:1", data_dir=demo.data_dir)
    assert code == 2
    assert "CORRAL_TOKEN" in err


# ---- sessions, agents, models


async def test_a_session_goes_on_where_it_was(demo: Gateway) -> None:
    for text in ("list", "list: ."):
        code, _, err = await call("run", "--session", "mine", text, data_dir=demo.data_dir)
        assert code == 0
        assert "session mine" in err


async def test_the_model_and_the_mode_can_be_named(demo: Gateway) -> None:
    code, _, err = await call("run", "--model", "nope:x", "list", data_dir=demo.data_dir)
    assert code == 2
    assert "nope" in err
    code, _, err = await call("run", "--mode", "cloud", "run: id", "--allow", "bash.exec", data_dir=demo.data_dir)
    assert "SANDBOX_UNAVAILABLE" in err


async def test_a_busy_session_is_told_with_what_can_be_done(scripted: Gateway, model: ModelServer) -> None:
    model.set_script([Hang()])
    async with corral("run", "--session", "one", "x", data_dir=scripted.data_dir) as first:
        await model.wait(lambda: len(model.requests) == 1)
        code, _, err = await call("run", "--session", "one", "y", data_dir=scripted.data_dir)
        assert code == 1
        assert "SESSION_BUSY" in err
        assert "--session" in err
        first.process.send_signal(signal.SIGINT)
        assert await first.ended() == 130


# ---- tools


async def test_a_call_that_is_not_allowed_shows_the_command_that_allows_it(demo: Gateway) -> None:
    from corral.client import Corral

    async with Corral(*demo.address()) as client:
        await client.request("policy.update", patch={"tools": {"file.write": "deny"}})
    text = "write: a.txt :: hello"
    code, _, err = await call("run", text, data_dir=demo.data_dir)
    assert code == 0
    assert "✗ file.write" in err
    assert "corral run --allow file.write" in err
    code, _, err = await call("run", "--allow", "file.write", text, data_dir=demo.data_dir)
    assert code == 0
    assert "● file.write" in err
    assert "from now on allowed in workspace w_default: file.write" in err
    code, _, err = await call("run", text, data_dir=demo.data_dir)
    assert "● file.write" in err


async def test_long_arguments_are_cut_and_long_results_folded(demo: Gateway) -> None:
    content = "\n".join(f"line {number} " + "x" * 300 for number in range(40))
    code, _, err = await call("run", "--allow", "file.write", f"write: a.txt\n{content}", data_dir=demo.data_dir)
    assert code == 0
    code, _, err = await call("run", "read: a.txt", data_dir=demo.data_dir, env={"COLUMNS": "60"})
    assert code == 0
    lines = err.splitlines()
    assert [line for line in lines[:-1] if len(line) > 60] == []
    assert any("35 more lines: `corral sessions export` has them" in line for line in lines)
    assert sum("line " in line for line in lines) == 5


async def test_what_a_tool_or_a_model_writes_cannot_drive_the_terminal(scripted: Gateway, model: ModelServer) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe"
    model.set_script(conversation([CallTools([("file_search", {"pattern": evil})]), Say(f"done {evil}")]))
    code, shown = await on_a_terminal("run", "x", data_dir=scripted.data_dir, env={"NO_COLOR": "1"})
    assert code == 0
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\u202e" not in shown
    assert "done \\x1b]0;owned" in shown


async def test_colours_are_for_terminals_that_want_them(demo: Gateway) -> None:
    _, shown = await on_a_terminal("run", "list", data_dir=demo.data_dir)
    assert "\x1b[32mcompleted\x1b[0m" in shown
    _, shown = await on_a_terminal("run", "list", data_dir=demo.data_dir, env={"NO_COLOR": "1"})
    assert "\x1b" not in shown


async def test_json_is_the_events_frame_by_frame_and_nothing_else(demo: Gateway) -> None:
    code, out, err = await call("run", "--json", "list", data_dir=demo.data_dir)
    assert (code, err) == (0, "")
    frames = [json.loads(line) for line in out.splitlines()]
    assert frames[0]["event"] == "agent.accepted"
    assert frames[-1]["event"] == "agent.completed"
    assert all(frame["type"] == "event" for frame in frames)
    versions = [frame["stateVersion"] for frame in frames if frame["event"] != "agent.delta"]
    assert versions == list(range(versions[0], versions[0] + len(versions)))


# ---- Ctrl-C


async def test_ctrl_c_aborts_the_run_and_exits_130(scripted: Gateway, model: ModelServer) -> None:
    model.set_script([Hang()])
    async with corral("run", "--session", "one", "x", data_dir=scripted.data_dir) as command:
        await model.wait(lambda: len(model.requests) == 1)
        command.process.send_signal(signal.SIGINT)
        assert await command.ended() == 130
        assert "aborting the run" in command.err
        assert "aborted after" in command.err
    model.set_script([Say("free again")])
    code, out, _ = await call("run", "--session", "one", "y", data_dir=scripted.data_dir)
    assert (code, out) == (0, "free again\n")


async def test_ctrl_c_kills_the_command_that_a_tool_runs(demo: Gateway) -> None:
    needs.bubblewrap()
    text = f"run: sleep 1{os.getpid()}"
    async with corral("run", "--allow", "bash.exec", text, data_dir=demo.data_dir) as command:
        await command.until(lambda: "● bash.exec" in command.err)
        async with asyncio.timeout(60):
            while not _sleepers():  # noqa: ASYNC110 - another process starts it
                await asyncio.sleep(0.02)
        command.process.send_signal(signal.SIGINT)
        assert await command.ended() == 130
    assert not _sleepers()


def _sleepers() -> list[str]:
    """Processes that sleep as long as nobody but the test above asks for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            argv = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if argv[:2] == [b"sleep", f"1{os.getpid()}".encode()]:
            found.append(str(path))
    return found


async def test_a_second_ctrl_c_leaves_at_once(scripted: Gateway, model: ModelServer) -> None:
    model.set_script([Hang()])
    async with corral("run", "x", data_dir=scripted.data_dir) as command:
        await model.wait(lambda: len(model.requests) == 1)
        scripted.process.send_signal(signal.SIGSTOP)  # so that the abort is not answered
        try:
            command.process.send_signal(signal.SIGINT)
            await command.until(lambda: "aborting the run" in command.err)
            command.process.send_signal(signal.SIGINT)
            assert await command.ended() == 130
        finally:
            scripted.process.send_signal(signal.SIGCONT)
        assert "left; the run may still be going on" in command.err


# ---- a gateway that goes and comes back


async def test_a_run_goes_on_on_the_screen_when_its_gateway_is_killed_and_started_again(
    scripted: Gateway, model: ModelServer
) -> None:
    script = conversation([CallTools([("file_list", {})]), [Hang(), Say("after the restart")]])
    model.set_script(script)
    async with corral("run", "--session", "one", "x", data_dir=scripted.data_dir) as command:
        await model.wait(lambda: len(model.requests) == 2)
        await scripted.kill()
        await command.until(lambda: "connection lost" in command.err)
        await scripted.start()
        assert await command.ended() == 0
    assert command.out == "after the restart\n"
    assert command.err.count("● file.list") == 1
    assert "connected again" in command.err
    assert "has taken the run up (attempt 2)" in command.err


async def test_a_compaction_is_told_between_the_steps(tmp_path: Path, model: ModelServer) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o700)
    (data_dir / "corral.toml").write_text('[models."openai-chat:scripted"]\ncontext_window = 6000\n')
    env = {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "k", "CORRAL_MODEL": "openai-chat:scripted"}
    model.set_script([Say("First."), Say("In short."), Say("Second.")])
    async with Gateway(data_dir, env):
        text = "filler " * 2000
        await call("run", "--session", "one", "-", data_dir=data_dir, stdin=text)
        code, out, err = await call("run", "--session", "one", "-", data_dir=data_dir, stdin=text)
        _, shown, _ = await call("sessions", "show", "one", data_dir=data_dir)
        _, written, _ = await call("sessions", "export", "one", "--format", "markdown", data_dir=data_dir)
    assert (code, out) == (0, "Second.\n")
    (told,) = [line for line in err.splitlines() if "summarised" in line]
    assert re.match(r"– the older part of the conversation was summarised: \d,\d{3} tokens became \d,\d{3}", told)
    assert "summarised   once; notes before that: skipped" in shown
    assert re.search(r"summarised \(\d,\d{3} tokens became \d,\d{3}\):\*\n\n```\nIn short.\n```", written)
