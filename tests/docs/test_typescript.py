"""The client in TypeScript that the documentation shows, compiled and let loose on a live gateway."""

from __future__ import annotations

import asyncio
import fcntl
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.gateway import Gateway, clean_environment
from tests.support.model_server import CallTools, Hang, ModelServer, Say, Script, conversation
from tests.support.proxy import CuttingProxy

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples" / "typescript"


@pytest.fixture(scope="module")
def client() -> Path:
    """The compiled client. Workers of one suite share the folder, so one of them builds at a time."""
    needs.node()
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        needs.npm_packages(FOLDER)
        done = subprocess.run(
            ["npm", "run", "--silent", "build"], cwd=FOLDER, capture_output=True, text=True, timeout=100
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return FOLDER / "client.js"


@asynccontextmanager
async def gateway(tmp_path: Path, script: Script, model: ModelServer | None = None) -> AsyncIterator[Gateway]:
    async with model or ModelServer() as model:
        model.set_script(script)
        env = {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "k", "CORRAL_MODEL": "openai-chat:scripted"}
        async with Gateway(tmp_path / "data", env) as running:
            yield running


@asynccontextmanager
async def started(client: Path, url: str, token: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        "node",
        str(client),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=clean_environment({"CORRAL_URL": url, "CORRAL_TOKEN": token}),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _rest(process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    return output.decode()


async def _until(process: asyncio.subprocess.Process, text: str) -> str:
    """What it prints, up to `text`."""
    assert process.stdout is not None
    async with asyncio.timeout(60):
        return (await process.stdout.readuntil(text.encode())).decode()


def test_it_is_as_short_as_the_page_says() -> None:
    assert len((FOLDER / "client.ts").read_text().splitlines()) < 150


def test_its_lock_file_names_no_host_and_has_every_hash() -> None:
    text = (FOLDER / "package-lock.json").read_text()
    assert "://" not in text
    packages = {name: entry for name, entry in json.loads(text)["packages"].items() if name}
    assert packages
    assert [name for name, entry in packages.items() if "integrity" not in entry] == []


async def test_it_completes_a_run_with_a_tool_call(client: Path, tmp_path: Path) -> None:
    script = conversation([CallTools([("file_list", {})], text="I look."), Say("Nothing there. 👍🏽", chunks=6)])
    async with gateway(tmp_path, script) as running, started(client, *running.address(), "go") as process:
        output = await _rest(process)
    assert output == "I look.\n● file.list {}\n  success: (empty directory)\nNothing there. 👍🏽\ncompleted\n"


async def test_it_aborts_a_run(client: Path, tmp_path: Path) -> None:
    script = conversation([CallTools([("file_list", {})]), Hang()])
    async with gateway(tmp_path, script) as running, started(client, *running.address(), "go", "one") as process:
        await _until(process, "  success:")
        process.send_signal(signal.SIGINT)
        output = await _rest(process)
    assert output.endswith("failed: ABORTED\n")


async def test_it_resumes_by_cursor_and_prints_everything_once(client: Path, tmp_path: Path) -> None:
    words = [f"word{number} " for number in range(60)]
    script = conversation([CallTools([("file_list", {})]), Say("".join(words), chunks=60, delay=0.05)])
    async with gateway(tmp_path, script) as running, CuttingProxy(lambda: running.url) as proxy:
        async with started(client, proxy.url, running.token(), "go") as process:
            output = await _until(process, "word5 ")
            for mark in ("word20 ", "word40 "):
                proxy.cut()
                output += await _until(process, mark)
            output += await _rest(process)
        assert proxy.connections >= 3
    assert output == f"● file.list {{}}\n  success: (empty directory)\n{''.join(words)}\ncompleted\n"


async def test_it_outlives_the_gateway(client: Path, tmp_path: Path) -> None:
    """The step that was under way is made anew by the gateway's next process, as another message."""
    script = conversation([CallTools([("file_list", {})]), [Hang(), Say("Done.")]])
    model = ModelServer()
    async with (
        gateway(tmp_path, script, model) as running,
        CuttingProxy(lambda: running.url) as proxy,
        started(client, proxy.url, running.token(), "go") as process,
    ):
        output = await _until(process, "  success:")
        async with asyncio.timeout(30):
            while len(model.requests) < 2:  # noqa: ASYNC110  (the model tells nobody)
                await asyncio.sleep(0.02)
        await running.kill()
        await running.start()
        output += await _rest(process)
    assert output == "● file.list {}\n  success: (empty directory)\nDone.\ncompleted\n"


async def test_a_wrong_token_ends_it_at_once(client: Path, tmp_path: Path) -> None:
    async with (
        gateway(tmp_path, [Say("never")]) as running,
        started(client, running.url, "wrong-wrong-wrong-wrong", "go") as process,
    ):
        output = await _rest(process)
    assert "UNAUTHORIZED" in output
    assert process.returncode == 1
