"""`corral chat`, typed into a terminal and through a pipe."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from corral.client import Corral
from tests.cli.command import call, corral
from tests.cli.terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, UP, at_a_terminal
from tests.support.gateway import Gateway
from tests.support.model_server import CallTools, Hang, ModelServer, Say, Slow, conversation, script_for, user_texts

EVIL = "one\ntwo \u202e\x1b[2J three"


# ---- at a terminal


async def test_ctrl_c_aborts_the_run_and_keeps_the_chat(scripted: Gateway, model: ModelServer) -> None:
    model.set_script(script_for({"wait": [Hang()], "again": [Say("Here I am.")]}))
    async with at_a_terminal("chat", data_dir=scripted.data_dir) as chat:
        await chat.ready()
        chat.press("wait" + ENTER)
        await model.wait(lambda: len(model.requests) == 1)
        model.set_script([Say("Here I am.")])
        chat.press(CTRL_C)
        await chat.until("aborted after")
        await chat.ready(2)
        chat.press("again" + ENTER)
        await chat.until("Here I am.")
        await chat.ready(3)
        chat.press(CTRL_D)
        assert await chat.ended() == 0
    assert "corral chat --session s_" in chat.shown.replace("\r\n", " ").replace("  ", " ")
    assert user_texts(model.requests[-1].json) == ["wait", "again"]


async def test_a_second_ctrl_c_leaves_the_run_and_says_that_it_may_still_be_going_on(
    scripted: Gateway, model: ModelServer
) -> None:
    model.set_script([Hang()])
    async with at_a_terminal("chat", data_dir=scripted.data_dir) as chat:
        await chat.ready()
        chat.press("wait" + ENTER)
        await model.wait(lambda: len(model.requests) == 1)
        scripted.process.send_signal(signal.SIGSTOP)  # so that the abort is not answered
        try:
            chat.press(CTRL_C)
            await chat.until("aborting the run")
            chat.press(CTRL_C)
            await chat.until("may still be going on")
            await chat.ready(2)
        finally:
            scripted.process.send_signal(signal.SIGCONT)


async def test_enter_sends_and_alt_enter_begins_a_new_line(scripted: Gateway, model: ModelServer) -> None:
    model.set_script([Say("Two lines.")])
    async with at_a_terminal("chat", data_dir=scripted.data_dir) as chat:
        await chat.ready()
        chat.press("first" + ALT_ENTER + "second" + ENTER)
        await chat.until("Two lines.")
    assert user_texts(model.requests[0].json) == ["first\nsecond"]


async def test_what_was_typed_is_there_in_the_next_chat_and_for_nobody_else(
    scripted: Gateway, model: ModelServer
) -> None:
    model.set_script([Say("Noted.")])
    for keys in ("remember me" + ENTER, UP + ENTER):
        async with at_a_terminal("chat", data_dir=scripted.data_dir) as chat:
            await chat.ready()
            chat.press(keys)
            await chat.until("Noted.")
            await chat.ready(2)
            chat.press(CTRL_D)
            assert await chat.ended() == 0
    assert [user_texts(request.json) for request in model.requests] == [["remember me"], ["remember me"]]
    history = scripted.data_dir / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600


async def test_markdown_is_rendered_and_cannot_drive_the_terminal(scripted: Gateway, model: ModelServer) -> None:
    text = "# Head\n\nSome *soft* `code`.\n\n- item\n\n```python\nx = 1\n```\n\nend &#x202e; \x1b]0;owned\x07 [l](http://e.x/)\n"
    model.set_script([Say(text, chunks=20, delay=0.02)])
    async with at_a_terminal("chat", data_dir=scripted.data_dir) as chat:
        await chat.ready()
        chat.press("x" + ENTER)
        await chat.until("completed")
    for gone in ("\u202e", "\x1b]", "\x07", "```", "*soft*"):
        assert gone not in chat.raw
    for kept in ("Head", "soft", "• item", "x = 1", "\\u202e", "\\x1b]0;owned", "http://e.x/"):
        assert kept in chat.shown


async def test_every_line_fits_sixty_columns(scripted: Gateway, model: ModelServer) -> None:
    call_it = CallTools([("file_write", {"path": "a.txt", "content": "word " * 60})])
    model.set_script(conversation([call_it, Say("long " * 60)]))
    async with at_a_terminal("chat", data_dir=scripted.data_dir, columns=60) as chat:
        await chat.ready()
        chat.press("/help" + ENTER)
        await chat.ready(2)
        chat.press("x" + ENTER)
        await chat.until("a approve")
        chat.press("a")
        await chat.until("completed")
        await chat.ready(3)
    lines = [part for line in chat.shown.split("\n") for part in line.split("\r")]
    assert [line for line in lines if len(line) > 60] == []


# ---- approvals


@pytest.fixture
def writing(model: ModelServer) -> ModelServer:
    """A model that writes a file and then says so."""
    model.set_script(conversation([CallTools([("file_write", {"path": "a.txt", "content": EVIL})]), Say("All said.")]))
    return model


@pytest.mark.parametrize("command", [("chat",), ("run", "x")])
@pytest.mark.parametrize(("key", "word"), [("a", "approved by"), ("r", "rejected by")])
async def test_a_call_is_asked_about_exactly_and_decided_by_a_key(
    scripted: Gateway, writing: ModelServer, command: tuple[str, ...], key: str, word: str
) -> None:
    async with at_a_terminal(*command, data_dir=scripted.data_dir) as terminal:
        if command == ("chat",):
            await terminal.ready()
            terminal.press("x" + ENTER)
        await terminal.until("a approve")
        assert "\u202e" not in terminal.raw
        assert "│ two \\u202e\\x1b[2J three" in terminal.shown
        terminal.press(key)
        await terminal.until("All said.")
        await terminal.until("completed")
    assert word in terminal.shown
    assert bool(list(scripted.data_dir.rglob("a.txt"))) == (key == "a")


async def test_s_approves_and_remembers_for_the_session(scripted: Gateway, writing: ModelServer) -> None:
    async with at_a_terminal("chat", data_dir=scripted.data_dir) as chat:
        await chat.ready()
        chat.press("x" + ENTER)
        await chat.until("a approve")
        chat.press("s")
        await chat.until("completed")
        await chat.ready(2)
        chat.press("y" + ENTER)
        await chat.until("completed", 2)
    assert chat.shown.count("a approve") == 1
    async with Corral(*scripted.address()) as client:
        assert [grant["scope"] for grant in (await client.request("grants.list"))["items"]] == ["session"]


async def test_what_was_typed_before_or_pasted_approves_nothing(scripted: Gateway, model: ModelServer) -> None:
    model.set_script([Slow(2, CallTools([("file_write", {"path": "a.txt", "content": "x"})])), Say("Done.")])
    async with at_a_terminal("chat", data_dir=scripted.data_dir) as chat:
        await chat.ready()
        chat.press("x" + ENTER)
        await model.wait(lambda: len(model.requests) == 1)
        chat.press("a")
        await chat.until("a approve")
        chat.press("aaaa")
        await chat.until("a approve", 2)
        chat.press("r")
        await chat.until("completed")
    assert "approved" not in chat.shown
    assert not list(scripted.data_dir.rglob("a.txt"))


async def test_a_call_too_long_for_one_look_is_shown_whole_before_it_can_be_approved(
    scripted: Gateway, model: ModelServer
) -> None:
    content = "\n".join(f"line {number}" for number in range(80))
    model.set_script(conversation([CallTools([("file_write", {"path": "a.txt", "content": content})]), Say("Done.")]))
    async with at_a_terminal("run", "x", data_dir=scripted.data_dir) as run:
        await run.until("v shows them")
        assert "line 79" not in run.shown
        run.press("a")
        await run.until("v shows them", 2)
        run.press("v")
        await run.until("line 79")
        await run.until("a approve")
        run.press("a")
        await run.until("completed")
        assert await run.ended() == 0


async def test_a_decision_made_elsewhere_ends_the_question(scripted: Gateway, writing: ModelServer) -> None:
    async with at_a_terminal("run", "x", data_dir=scripted.data_dir) as run:
        await run.until("a approve")
        async with Corral(*scripted.address()) as client:
            (approval,) = (await client.request("approval.queue"))["items"]
            await client.request("approval.resolve", approvalId=approval["approvalId"], decision="reject", comment="no")
        assert await run.ended() == 0
    assert "rejected by u_owner: no" in run.shown


async def test_without_a_terminal_the_run_waits_and_says_how_to_approve(
    scripted: Gateway, writing: ModelServer
) -> None:
    async with corral("run", "x", data_dir=scripted.data_dir) as run:
        await run.until(lambda: "corral approvals approve ap_" in run.err)
        approval_id = run.err.split("corral approvals approve ")[1].split()[0]
        async with Corral(*scripted.address()) as client:
            await client.request("approval.resolve", approvalId=approval_id, decision="approve")
        assert await run.ended() == 0
    assert run.out == "All said.\n"


async def test_a_chat_that_comes_back_asks_for_what_waits(scripted: Gateway, writing: ModelServer) -> None:
    async with corral("run", "--session", "mine", "do it", data_dir=scripted.data_dir) as run:
        await run.until(lambda: "corral approvals approve" in run.err)
    async with at_a_terminal("chat", "--session", "do it", data_dir=scripted.data_dir) as chat:
        await chat.until("a approve")
        chat.press("a")
        await chat.until("completed")
        await chat.ready()
    assert "session mine: do it" in chat.shown
    assert "All said." in chat.shown


# ---- through a pipe


async def test_each_line_of_a_pipe_is_a_message_and_a_backslash_goes_on(scripted: Gateway, model: ModelServer) -> None:
    model.set_script([Say("One **bold**."), Say("Two.")])
    code, out, err = await call("chat", data_dir=scripted.data_dir, stdin="a\\\nb\n\nc\n")
    assert (code, out) == (0, "One **bold**.\nTwo.\n")
    assert user_texts(model.requests[-1].json) == ["a\nb", "c"]
    assert "\x1b" not in err


async def test_json_is_frames_and_nothing_else(demo: Gateway) -> None:
    code, out, err = await call("chat", "--json", data_dir=demo.data_dir, stdin="list\n/new is no command here\n")
    frames = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [frame["event"] for frame in frames].count("agent.accepted") == 2
    assert {frame["type"] for frame in frames} == {"event"}


async def test_commands_go_through_a_pipe_too(demo: Gateway) -> None:
    lines = ["/new Plans", "list", "/sessions", "/output", "/model demo", "/model -", "/abort", "/nope", "/session"]
    lines += ["/etc/hosts is a message", "/quit", "lost", ""]
    code, _, err = await call("chat", data_dir=demo.data_dir, stdin="\n".join(lines))
    assert code == 0  # the last run's
    for words in (
        "a new session: Plans",
        "* s_",
        "(empty directory)",
        "model from now on: demo",
        "model from now on: the one of",
        "no run is on",
    ):
        assert words in err
    assert "corral: there is no command /nope\n  /help lists them" in err
    assert "corral: which session?" in err
    assert err.count("completed") == 2


async def test_a_dead_model_server_fails_the_run_and_the_chat_goes_on(tmp_path: Path) -> None:
    env = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_KEY": "k", "CORRAL_MODEL": "openai-chat:m"}
    async with Gateway(tmp_path / "data", env) as gateway:
        code, _, err = await call("chat", data_dir=gateway.data_dir, stdin="x\ny\n")
    assert code == 1
    assert err.count("failed: MODEL_UNAVAILABLE") == 2


async def test_no_gateway_is_code_4_with_the_command_that_starts_one(tmp_path: Path) -> None:
    code, out, err = await call("chat", "--data-dir", str(tmp_path / "none"), stdin="x\n")
    assert (code, out) == (4, "")
    assert f"corral serve --data-dir {tmp_path / 'none'}" in err


async def test_a_chat_outlives_its_gateway(scripted: Gateway, model: ModelServer) -> None:
    model.set_script([Hang(), Say("after the restart")])
    async with at_a_terminal("chat", data_dir=scripted.data_dir) as chat:
        await chat.ready()
        chat.press("x" + ENTER)
        await model.wait(lambda: len(model.requests) == 1)
        await scripted.kill()
        await chat.until("connection lost")
        await scripted.start()
        await chat.until("after the restart")
        await chat.ready(2)
        chat.press(CTRL_D)
        assert await chat.ended() == 0


async def test_what_is_said_while_the_gateway_is_gone_is_sent_when_it_is_back(
    scripted: Gateway, model: ModelServer
) -> None:
    model.set_script([Say("first"), Say("heard")])
    async with at_a_terminal("chat", data_dir=scripted.data_dir) as chat:
        await chat.ready()
        chat.press("hello" + ENTER)
        await chat.until("completed")
        await chat.ready(2)
        chat.press("\x1b[1;1R")  # where the cursor is, as a terminal says: without it there is no status line
        await scripted.kill()
        await chat.until("lost, trying")  # of a line that is drawn anew only what differs is drawn
        chat.press("again" + ENTER)
        await chat.until("this is sent when the gateway is back")
        await scripted.start()
        await chat.until("heard")
        await chat.ready(3)
        chat.press(CTRL_D)
        assert await chat.ended() == 0


# ---- folders and names


async def test_cwd_is_where_a_new_session_works_and_stays(tmp_path: Path) -> None:
    root = tmp_path / "projects"
    (root / "a").mkdir(parents=True)
    (root / "a" / "here.txt").write_text("x")
    async with Gateway(tmp_path / "data", {"CORRAL_ROOTS": str(root)}) as gateway:
        arguments = ("run", "--session", "My Work", "--cwd", str(root / "a"), "list")
        for _ in range(2):
            code, out, _ = await call(*arguments, data_dir=gateway.data_dir)
            assert code == 0
            assert "here.txt" in out
        code, _, err = await call("run", "--session", "my work", "--cwd", str(root), "list", data_dir=gateway.data_dir)
        assert code == 2
        assert "stays in its folder" in err
        code, _, err = await call("run", "--cwd", str(tmp_path), "list", data_dir=gateway.data_dir)
        assert code == 2
        assert "CORRAL_ROOTS" in err
        code, out, _ = await call("chat", "--cwd", str(root / "a"), data_dir=gateway.data_dir, stdin="list\n")
        assert "here.txt" in out
