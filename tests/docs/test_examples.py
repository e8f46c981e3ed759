"""Every example in docs/examples is run as a reader would run it, against a real gateway."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from corral.client import Corral
from tests.support.gateway import Gateway, clean_environment

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "examples"
POLICIES = sorted((FOLDER / "policies").glob("*.json"))


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with Gateway(tmp_path / "data") as running:
        yield running


@pytest.fixture
async def corral(gateway: Gateway) -> AsyncIterator[Corral]:
    async with Corral(*gateway.address()) as client:
        yield client


async def _example(gateway: Gateway, name: str, *arguments: str, code: int = 0) -> list[str]:
    """The lines that an example prints; it must end with `code`."""
    url, token = gateway.address()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(FOLDER / name),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=clean_environment({"CORRAL_URL": url, "CORRAL_TOKEN": token, "PYTHONDONTWRITEBYTECODE": "1"}),
    )
    try:
        async with asyncio.timeout(60):
            output = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == code, output
    return output.splitlines()


async def _waiting(corral: Corral, *texts: str) -> None:
    """Runs of these texts, each of which waits for a person."""
    for text in texts:
        async for event in corral.run(text):
            if event.event == "approval.required":
                break


async def test_events(gateway: Gateway) -> None:
    lines = await _example(gateway, "events.py", "list")
    assert lines[:3] == ["I call file.list.", "call: file.list {}", "result: success"]
    assert lines[-1] == "completed after 2 steps"


async def test_script(gateway: Gateway, corral: Corral) -> None:
    await corral.request("policy.update", layer="workspace", patch={"tools": {"file.write": "allow"}})
    assert "Written by a script." in await _example(gateway, "script.py")


async def test_abort_ends_a_run_that_takes_too_long(gateway: Gateway) -> None:
    assert await _example(gateway, "abort.py", "run: sleep 60", "3") == ["ended as aborted"]


async def test_abort_leaves_a_quick_run_alone(gateway: Gateway) -> None:
    assert "(empty directory)" in await _example(gateway, "abort.py", "list", "60")


async def test_approve(gateway: Gateway, corral: Corral) -> None:
    await _waiting(corral, "run: git status", "run: git push")
    assert await _example(gateway, "approve.py") == [
        "bash.exec {'command': 'git push'} rejected",
        "bash.exec {'command': 'git status'} approved",
    ]


async def test_policy(gateway: Gateway) -> None:
    lines = await _example(gateway, "policy.py", str(FOLDER / "policies" / "developer.json"), "git status", "git push")
    assert lines[0].startswith("version ")
    assert lines[1].startswith("allow: git status (")
    assert lines[2].startswith("approval-required: git push (")


async def test_audit(gateway: Gateway, corral: Corral) -> None:
    await _waiting(corral, "run: git push")
    await _example(gateway, "approve.py")
    lines = await _example(gateway, "audit.py")
    assert lines[0].endswith(" u_owner bash.exec rejected")
    assert lines[1].startswith("whole ")


def test_every_example_has_a_test() -> None:
    tested = {name.removeprefix("test_").split("_")[0] for name in globals() if name.startswith("test_")}
    assert {path.stem for path in FOLDER.glob("*.py")} <= tested


DECISIONS: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "developer": [
        ("bash.exec", {"command": "git diff | head -3"}, "allow"),
        ("bash.exec", {"command": "git diff > log.txt"}, "approval-required"),
        ("file.write", {"path": "a.txt", "content": ""}, "allow"),
        ("file.read", {"path": ".env"}, "deny"),
        ("file.write", {"path": ".git/config", "content": ""}, "deny"),
    ],
    "web": [
        ("http.request", {"url": "https://docs.example.com/a"}, "allow"),
        ("http.request", {"url": "https://example.com/a"}, "approval-required"),
    ],
    "strict": [
        ("bash.exec", {"command": "sudo ls"}, "deny"),
        ("http.request", {"url": "https://docs.example.com/a"}, "approval-required"),
    ],
}


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
async def test_a_policy_example_is_taken_and_decides_as_the_page_says(corral: Corral, path: Path) -> None:
    document = json.loads(path.read_text())
    for rule in document["rules"]:
        assert rule["match"]
        assert rule["not_match"]
    made = await corral.request("policy.update", layer="workspace", patch=document)
    assert [rule["id"] for rule in made["policy"]["rules"]] == [rule["id"] for rule in document["rules"]]
    for tool, args, decision in DECISIONS[path.stem]:
        answer = await corral.request("policy.explain", toolName=tool, args=args)
        assert (args, answer["decision"]) == (args, decision)
