"""`corral stats`, against a gateway in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corral.cli.stats import _time
from tests.cli.command import call, on_a_terminal
from tests.support.house import TOKEN, House, house
from tests.support.model_server import Say, Status


async def stats(home: House, *arguments: str) -> tuple[int, str, str]:
    folder = home.server.settings.data_dir
    return await call("stats", *arguments, data_dir=folder, env={"CORRAL_TOKEN": TOKEN})


async def ran(home: House) -> None:
    async with await home.wire() as wire:
        await wire.effect("agent.run", input="go")
        await wire.frame(lambda frame: frame.get("event") in ("agent.completed", "agent.failed"))


async def test_the_table_says_what_came_of_the_runs(tmp_path: Path) -> None:
    async with house(tmp_path / "data", script=[Say("ok")]) as home:
        await ran(home)
        code, out, err = await stats(home)
        assert (code, err) == (0, "")
        rows = {tuple(line.split()[:-1]): line.split()[-1] for line in out.splitlines()[2:]}
        assert (rows["runs", "total"], rows["success", "rate"]) == ("1", "100.0%")
        assert (rows["models", "tokens", "in"], rows["tokens", "out"], rows["cost", "not"]) == ("100", "10", "known")


async def test_every_line_fits_sixty_columns(tmp_path: Path) -> None:
    async with house(tmp_path / "data") as home:
        env = {"CORRAL_URL": home.url, "CORRAL_TOKEN": home.token, "COLUMNS": "60"}
        code, shown = await on_a_terminal("stats", data_dir=tmp_path / "cli", env=env)
        assert code == 0
        assert [line for line in shown.splitlines() if len(line) > 60] == []


async def test_reasons_of_failures_are_listed(tmp_path: Path) -> None:
    async with house(tmp_path / "data", script=[Status(401)]) as home:
        await ran(home)
        _, out, _ = await stats(home)
        assert any(line.split() == ["MODEL_UNAVAILABLE", "1", "failed"] for line in out.splitlines())


async def test_json_is_what_the_method_answers_for_the_period_and_the_agent(tmp_path: Path) -> None:
    async with house(tmp_path / "data", script=[Say("ok")]) as home:
        await ran(home)
        answers: list[dict[str, Any]] = []
        for arguments in ((), ("--from", "2h"), ("--agent", "a_none"), ("--from", "2020-01-01", "--to", "2020-01-02")):
            code, out, _ = await stats(home, "--json", *arguments)
            assert code == 0
            answers.append(json.loads(out))
        assert [answer["runsTotal"] for answer in answers] == [1, 1, 0, 0]
        assert (answers[3]["from"], answers[3]["to"]) == ("2020-01-01T00:00:00.000Z", "2020-01-02T00:00:00.000Z")


async def test_a_time_that_is_none_is_wrong_usage_and_names_the_field(tmp_path: Path) -> None:
    async with house(tmp_path / "data") as home:
        code, out, err = await stats(home, "--from", "soon")
        assert (code, out) == (2, "")
        assert err.startswith("corral: --from soon is no time")


@pytest.mark.parametrize(
    ("millis", "text"),
    [(None, "-"), (5.0, "5 ms"), (1500.0, "1.5 s"), (150_000.0, "2.5 min"), (9e6, "2.5 h"), (3e8, "3.5 d")],
)
def test_a_length_of_time_is_told_in_the_unit_that_suits_it(millis: float | None, text: str) -> None:
    assert _time(millis) == text
