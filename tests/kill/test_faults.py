"""The switch that ends a gateway at a named point: what arms it, and what does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral import faults
from corral.config import ConfigError, load_settings
from tests.support.house import house
from tests.support.model_server import Say


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    yield
    faults.arm({})


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals that this process would have sent itself."""
    signals: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _pid, number: signals.append(number))
    return signals


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("tool.end", 0),
        ("tool.end@s2", 1),
        ("tool.end@file.read", 0),
        ("tool.end:3", 2),
        ("tool.end@s2:2", 3),
        ("tool.end@s", None),
        ("tool.end:5", None),
        ("tool.recorded", None),
    ],
)
def test_it_goes_off_once_where_the_text_says(sent: list[int], text: str, at: int | None) -> None:
    assert faults.arm({faults.VARIABLE: text}) == text
    for number, session in enumerate(["s1", "s2", "s1", "s2"]):
        faults.reached("tool.end", "file.read", session)
        assert len(sent) == (at is not None and number >= at)
    assert set(sent) <= {signal.SIGKILL}


def test_freezing_stops_it_instead(sent: list[int]) -> None:
    faults.arm({faults.VARIABLE: "model.end:freeze"})
    faults.reached("model.end", "s1")
    faults.reached("model.end", "s1")
    assert sent == [signal.SIGSTOP]


@pytest.mark.parametrize("text", ["tool", "tool.end:0", "tool.end@", "tool.end:1:thaw", "tool.end;", "Tool.end"])
def test_a_text_that_names_no_point_is_refused(text: str) -> None:
    with pytest.raises(faults.FaultRefused, match=r"commit\.before"):
        faults.arm({faults.VARIABLE: text})


def test_the_command_that_serves_refuses_it_too_and_does_not_start(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "corral", "serve", "--port", "0", "--data-dir", str(tmp_path / "data")],
        env={**os.environ, faults.VARIABLE: "tool.ended"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert faults.VARIABLE in done.stderr
    assert done.stdout == ""


def test_no_file_of_settings_arms_it(tmp_path: Path) -> None:
    (tmp_path / "corral.toml").write_text('fault = "model.end"\n')
    with pytest.raises(ConfigError, match="fault"):
        load_settings({"data_dir": str(tmp_path)}, env={})


async def test_a_server_that_somebody_embeds_does_not_look_at_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: list[int]
) -> None:
    monkeypatch.setenv(faults.VARIABLE, "model.end")
    async with house(tmp_path / "data", script=[Say("alive")]) as home, await home.wire() as wire:
        assert not faults.armed()
        await wire.effect("agent.run", input="go")
        await wire.event("agent.completed")
    assert sent == []
