"""The scripted server itself, where other rooms' tests lean on it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import aiohttp

from corral.models.api import AssistantMessage, ToolMessage
from tests.models.helpers import request, rig, text_of, user
from tests.support.model_server import (
    CallTools,
    ModelServer,
    Say,
    Status,
    conversation,
    default_brain,
    script_for,
)


async def test_a_conversation_goes_by_its_messages_so_that_a_restart_changes_nothing() -> None:
    steps = [CallTools([("file_list", {})]), CallTools([("file_read", {"path": "a"})]), Say("done")]
    async with rig(conversation(steps)) as one, rig(conversation(steps)) as two:
        first = await one.message(request(user("go")))
        result = ToolMessage(tool_call_id=first.tool_calls[0].id, name="file.list", output="a")
        second = await two.message(request(user("go"), first, result))
        assert [call.name for call in second.tool_calls] == ["file.read"]
        third = await one.message(request(user("go"), first, result, second))
        assert third.text == "done"


async def test_a_list_in_a_conversation_gives_one_step_for_each_attempt_at_its_place() -> None:
    async with rig(conversation([[Status(500), Status(429), Say("third time")], Say("next")])) as r:
        assert text_of(await r.events()) == "third time"
        assert text_of(await r.events(request(user("hello"), AssistantMessage(text="x")))) == "next"


async def test_concurrent_sessions_get_the_script_of_their_marker() -> None:
    scripts = script_for({"[a]": [Say("1"), Say("2")], "[b]": conversation([Say("b")]), "": default_brain})
    async with rig(scripts) as r:
        answers = [await r.message(request(user(text), tools=[])) for text in ("x [a]", "y [b]", "z [a]", "other")]
        assert [answer.text for answer in answers][:3] == ["1", "b", "2"]
        assert answers[3].text.startswith("Done.")


async def test_the_default_brain_looks_and_reports() -> None:
    async with rig(default_brain) as r:
        first = await r.message()
        assert [call.name for call in first.tool_calls] == ["file.list"]
        result = ToolMessage(tool_call_id=first.tool_calls[0].id, name="file.list", output="a\nb")
        assert "a\nb" in (await r.message(request(user("hello"), first, result))).text


async def test_without_stream_it_answers_with_one_object() -> None:
    async with ModelServer([CallTools([("x", {"a": 1})], text="t")]) as server, aiohttp.ClientSession() as session:
        body = {"model": "m", "messages": [], "stream": False}
        async with session.post(f"{server.base_url}/chat/completions", json=body) as response:
            answer = await response.json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "x", "arguments": '{"a": 1}'}


async def test_as_a_process_it_prints_its_port_plays_its_file_and_tells_what_it_saw(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from tests.support.model_server import Say, Wire\nscript = [Say('hello', wire=Wire(crlf=True))]\n"
    )
    argv = [sys.executable, "-m", "tests.support.model_server", "--port", "0", "--script", str(script)]
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        assert process.stdout is not None
        port = int(await asyncio.wait_for(process.stdout.readline(), 20))
        base = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession() as session:
            body = {"model": "m", "messages": [], "stream": True}
            async with session.post(f"{base}/v1/chat/completions", json=body) as response:
                assert b'"content": "hello"' in await response.read()
            async with session.get(f"{base}/_state") as response:
                state = json.loads(await response.text())
        assert state["requests"][0]["json"] == body
        assert state["disconnects"] == 0
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()
