"""`corral sessions`, `agents`, `doctor`, `config` and `completion`."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from corral.cli import checks
from corral.cli.columns import cells
from corral.models.library import MISSING
from tests.cli.command import call, on_a_terminal
from tests.cli.terminal import ENTER, at_a_terminal
from tests.support import needs
from tests.support.gateway import Gateway
from tests.support.model_server import CallTools, ModelServer, Say, conversation

# ---- sessions


async def test_sessions_are_listed_shown_renamed_and_deleted_by_id_or_title(demo: Gateway) -> None:
    for name in ("one", "two"):
        assert (await call("run", "--session", name, "list", data_dir=demo.data_dir))[0] == 0
    code, out, _ = await call("sessions", "rename", "one", "First \u202eplan", data_dir=demo.data_dir)
    assert code == 0
    code, out, _ = await call("sessions", "list", data_dir=demo.data_dir)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["ID", "two", "one"]
    assert "\u202e" not in out
    code, out, _ = await call("sessions", "show", "first \u202ePLAN", data_dir=demo.data_dir)
    assert code == 0
    assert "id           one" in out
    assert "you          list" in out
    code, out, err = await call("sessions", "delete", "one", "two", data_dir=demo.data_dir)
    assert (code, out) == (2, "")
    assert "--yes" in err
    code, out, _ = await call("sessions", "delete", "one", "two", "one", "--yes", data_dir=demo.data_dir)
    assert (code, out) == (0, "deleted one\ndeleted two\n")
    code, out, err = await call("sessions", "list", data_dir=demo.data_dir)
    assert (code, out) == (0, "")
    assert "no session yet" in err


async def test_a_title_of_several_sessions_names_none_and_tells_their_ids(demo: Gateway) -> None:
    for name in ("one", "two"):
        assert (await call("run", "--session", name, "list", data_dir=demo.data_dir))[0] == 0
    code, _, err = await call("sessions", "show", "list", data_dir=demo.data_dir)
    assert code == 2
    assert "two, one" in err
    assert len(err.splitlines()) == 2


async def test_an_export_has_every_event_and_never_takes_a_files_place(
    scripted: Gateway, model: ModelServer, tmp_path: Path
) -> None:
    fence = "```\nout\n```"
    model.set_script(conversation([CallTools([("file_search", {"pattern": fence})]), Say("Done.")]))
    assert (await call("run", "--session", "s1", "look", data_dir=scripted.data_dir))[0] == 0
    code, out, _ = await call("sessions", "export", "s1", data_dir=scripted.data_dir)
    assert code == 0
    items = [json.loads(line) for line in out.splitlines()]
    assert [item["id"] for item in items] == list(range(1, len(items) + 1))
    assert items[-1]["event"] == "agent.completed"
    target = tmp_path / "s1.md"
    arguments = ("sessions", "export", "s1", "--format", "markdown", "-o", str(target))
    assert (await call(*arguments, data_dir=scripted.data_dir))[0] == 0
    text = target.read_text()
    assert target.stat().st_mode & 0o777 == 0o600
    for words in ("# look", "## User\n\nlook", "**file.search**", "````json", "## Agent\n\nDone."):
        assert words in text
    code, _, err = await call(*arguments, data_dir=scripted.data_dir)
    assert code == 2
    assert "is there already" in err


async def test_json_of_every_listing_is_json_and_nothing_else(demo: Gateway) -> None:
    assert (await call("run", "--session", "one", "list", data_dir=demo.data_dir))[0] == 0
    for arguments in (
        ("sessions", "list"),
        ("sessions", "show", "one"),
        ("sessions", "rename", "one", "uno"),
        ("agents", "list"),
        ("agents", "show", "a_default"),
        ("agents", "set", "helper", "--model", "demo"),
        ("config", "show"),
        ("sessions", "delete", "one", "--yes"),
    ):
        code, out, err = await call(*arguments, "--json", data_dir=demo.data_dir)
        assert (code, err) == (0, ""), arguments
        json.loads(out)


async def test_a_table_fits_a_narrow_terminal_and_cuts_no_id(demo: Gateway) -> None:
    assert (await call("run", "--session", "one", "list: " + "x" * 200, data_dir=demo.data_dir))[0] == 0
    assert (await call("run", "--session", "标题" * 30, "list", data_dir=demo.data_dir))[0] == 0
    whole = json.loads((await call("sessions", "list", "--json", data_dir=demo.data_dir))[1])[0]["id"]
    assert len(whole) > 30
    env = {"COLUMNS": "60", "NO_COLOR": "1"}
    code, shown = await on_a_terminal("sessions", "list", data_dir=demo.data_dir, env=env)
    assert code == 0
    assert "\x1b" not in shown
    assert [line for line in shown.splitlines() if cells(line) > 60] == []
    assert [line for line in shown.splitlines() if not line.startswith(" ")] == ["ID", whole, "one"]
    code, shown = await on_a_terminal("sessions", "show", whole, data_dir=demo.data_dir, env=env)
    assert [line for line in shown.splitlines() if cells(line) > 60] == []


async def test_who_answers_no_keeps_the_session(demo: Gateway) -> None:
    assert (await call("run", "--session", "one", "list", data_dir=demo.data_dir))[0] == 0
    async with at_a_terminal("sessions", "delete", "one", data_dir=demo.data_dir) as terminal:
        await terminal.until("[y/N]:")
        terminal.press("n" + ENTER)
        assert await terminal.ended() == 0
        assert "nothing is deleted" in terminal.shown
    async with at_a_terminal("sessions", "delete", "one", data_dir=demo.data_dir) as terminal:
        await terminal.until("[y/N]:")
        assert await terminal.interrupted() == 130
        assert terminal.shown.endswith("\r\n")
    assert "one" in (await call("sessions", "list", data_dir=demo.data_dir))[1]


# ---- agents


async def test_an_agent_is_made_and_changed_in_what_is_named(demo: Gateway) -> None:
    arguments = ("agents", "set", "helper", "--prompt", "-", "--model", "demo", "--tool", "file.list")
    code, out, _ = await call(*arguments, data_dir=demo.data_dir, stdin="Be brief.")
    assert code == 0
    code, out, _ = await call("agents", "set", "helper", "--name", "Helper", data_dir=demo.data_dir)
    assert code == 0
    for words in ("Helper", "demo", "file.list", "Be brief."):
        assert words in out
    code, out, err = await call("agents", "set", "helper", "--tool", "file.raed", data_dir=demo.data_dir)
    assert (code, err) == (0, "note: no tool of Corral's own is called file.raed\n")
    for wrong, words in (("bad name!", "id must match ^[A-Za-z0-9_.-]{1,64}$"), ("helper", "--model: there is no")):
        code, out, err = await call("agents", "set", wrong, "--model", "gpt", data_dir=demo.data_dir)
        assert (code, out) == (2, "")
        assert words in err
        assert "$." not in err
    code, _, err = await call("run", "--agent", "nobody", "list", data_dir=demo.data_dir)
    assert (code, err.splitlines()[1:]) == (1, ["  `corral agents list` shows them"])
    assert "$" not in err
    code, _, err = await call("agents", "show", "nobody", data_dir=demo.data_dir)
    assert code == 1
    assert "corral agents list" in err


# ---- config


async def test_config_tells_where_each_value_came_from_and_hides_the_token(tmp_path: Path) -> None:
    (tmp_path / "corral.toml").write_text('model = "demo"\n')
    env = {"CORRAL_TOKEN": "a-very-secret-token-value", "CORRAL_PORT": "7099"}
    code, out, err = await call("config", "show", data_dir=tmp_path, env=env)
    assert (code, err) == (0, "")
    assert "secret" not in out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["port"].split() == ["port", "7099", "CORRAL_PORT"]
    assert lines["model"].split()[-1] == str(tmp_path / "corral.toml")
    assert lines["host"].split()[-1] == "default"
    assert lines["token"].endswith("CORRAL_TOKEN")
    code, _, err = await call("config", "show", data_dir=tmp_path, env={"CORRAL_PORT": "many"})
    assert code == 2
    assert "CORRAL_PORT" in err


# ---- doctor


async def _doctor(*arguments: str, **rest: object) -> tuple[int, dict[str, dict[str, str]]]:
    code, out, _ = await call("doctor", "--json", *arguments, **rest)  # type: ignore[arg-type]
    return code, {check["name"]: check for check in json.loads(out)["checks"]}


async def test_the_doctor_finds_a_running_gateway_sound_and_touches_nothing(demo: Gateway) -> None:
    needs.bubblewrap()
    code, checks = await _doctor(data_dir=demo.data_dir)
    assert code == 0
    assert checks["lock"]["found"] == f"held by process {demo.process.pid}"
    for name in ("database", "schema", "gateway", "sandbox", "access token", "disk"):
        assert checks[name]["state"] == "ok", checks[name]
    assert await demo.stop() == 0
    before = {path.name: path.read_bytes() for path in demo.data_dir.iterdir() if path.is_file()}
    code, checks = await _doctor(data_dir=demo.data_dir)
    assert code == 0
    assert checks["lock"]["found"] == "free"
    assert checks["gateway"]["state"] == "note"
    assert {path.name: path.read_bytes() for path in demo.data_dir.iterdir() if path.is_file()} == before


async def test_the_doctor_makes_no_data_directory(tmp_path: Path) -> None:
    _, checks = await _doctor(data_dir=tmp_path / "none")
    assert checks["data directory"]["state"] == "note"
    assert not (tmp_path / "none").exists()


async def test_the_doctor_names_damage_openness_and_a_foreign_schema(demo: Gateway) -> None:
    await demo.stop()
    demo.unchecked = "the database is made into another and then into none"
    database = demo.data_dir / "corral.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    demo.data_dir.chmod(0o755)
    code, checks = await _doctor(data_dir=demo.data_dir)
    assert code == 1
    assert checks["schema"]["state"] == "missing"
    assert "chmod 700" in checks["data directory"]["remedy"]
    database.write_bytes(b"SQLite format 3\0" + os.urandom(8192))
    code, checks = await _doctor(data_dir=demo.data_dir)
    assert code == 1
    assert checks["database"]["state"] == "missing"


async def test_the_doctor_times_the_model_and_tells_a_dead_one(tmp_path: Path, model: ModelServer) -> None:
    model.set_script([Say("OK")])
    env = {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "sk-not-to-be-shown"}
    arguments = ("--model", "openai-chat:scripted")
    _, checks = await _doctor(*arguments, data_dir=tmp_path, env=env)
    assert checks["model"]["state"] == "ok"
    assert "first word" in checks["model"]["found"]
    env["OPENAI_BASE_URL"] = "http://127.0.0.1:9/v1"
    code, out, err = await call("doctor", *arguments, data_dir=tmp_path, env={**env, "COLUMNS": "60"})
    assert code == 1
    assert "MISSING  model" in out
    assert "sk-not-to-be-shown" not in out + err
    assert [line for line in out.splitlines() if len(line) > 60 and " " in line[9:].strip()] == []
    asked = len(model.requests)
    _, checks = await _doctor(*arguments, "--offline", data_dir=tmp_path, env={"OPENAI_BASE_URL": model.base_url})
    assert checks["model"]["state"] == "note"
    assert len(model.requests) == asked


def test_the_doctor_sends_nobody_to_a_server_for_a_library_that_is_not_installed() -> None:
    said = MISSING.format(name="google")
    assert checks._remedy("google:m", said).startswith("install it")
    assert "GOOGLE_API_KEY" in checks._remedy("google:m", "403")


async def test_the_doctor_tells_how_to_get_a_sandbox(tmp_path: Path) -> None:
    code, checks = await _doctor("--offline", data_dir=tmp_path, env={"PATH": "/nonexistent"})
    assert code == 1
    assert "bubblewrap" in checks["sandbox"]["remedy"]


# ---- completion, and wrong usage


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_there_is_a_completion_script(shell: str) -> None:
    code, out, err = await call("completion", shell)
    assert (code, err) == (0, "")
    assert "_CORRAL_COMPLETE" in out


async def test_completion_completes_commands_and_options() -> None:
    for words, wanted in (
        ("corral ses", "sessions"),
        ("corral sessions re", "rename"),
        ("corral chat --ses", "--session"),
        ("corral doc", "doctor"),
        ("corral run --allow file.w", "file.write"),
    ):
        env = {"_CORRAL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        _, out, _ = await call(env=env)
        assert f"plain,{wanted}" in out.splitlines()


async def test_completion_asks_a_running_gateway_for_ids(demo: Gateway) -> None:
    assert (await call("run", "--session", "one", "li\u202est, what is there", data_dir=demo.data_dir))[0] == 0

    async def completed(*words: str) -> tuple[int, str, str]:
        env = {"_CORRAL_COMPLETE": "zsh_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
        return await call(data_dir=demo.data_dir, env=env)

    _, out, _ = await completed("corral", "sessions", "show", "o")
    assert out == "plain\none\nli\\u202est, what is there\n"
    _, out, _ = await completed("corral", "agents", "show", "a")
    assert out.startswith("plain\na_default\n")
    _, out, _ = await completed("corral", "policy", "test", "po")
    assert out == "file\npo\n_\n"


async def test_completion_says_nothing_where_no_gateway_runs(tmp_path: Path) -> None:
    env = {"_CORRAL_COMPLETE": "bash_complete", "COMP_WORDS": "corral sessions show o", "COMP_CWORD": "3"}
    _, out, err = await call(data_dir=tmp_path, env=env)
    assert (out.strip(), err) == ("", "")


@pytest.mark.parametrize("arguments", [("sessions", "list"), ("audit", "verify")])
async def test_a_token_that_is_not_good_is_told_with_one_remedy(arguments: tuple[str, ...], demo: Gateway) -> None:
    code, out, err = await call(*arguments, data_dir=demo.data_dir, env={"CORRAL_TOKEN": "x" * 40})
    assert (code, out) == (4, "")
    assert err.count("corral token") == 1, err
    assert "set CORRAL_TOKEN" in err


async def test_what_fish_is_told_of_a_word_may_have_a_comma() -> None:
    _, out, _ = await call("completion", "fish")
    assert 'string split --max 1 ","' in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("sessions", "rename", "one"),
        ("sessions", "lsit"),
        ("sessions", "list", "--limit", "0"),
        ("agents", "set"),
        ("agents", "set", "x", "--model", ""),
        ("agents", "set", "x", "--tool", "bash"),
        ("sessions", "rename", "one", " "),
        ("completion",),
        ("chat", "--sesion", "x"),
        ("completion", "csh"),
        ("doctor", "--model", ""),
        ("config", "show", "--config", "/nonexistent.toml"),
    ],
)
async def test_wrong_usage_is_at_most_two_lines_and_code_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    code, out, err = await call(*arguments, data_dir=tmp_path)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) <= 2, err


@pytest.mark.parametrize("arguments", [("sessions", "list"), ("agents", "list"), ("sessions", "delete", "x", "--yes")])
async def test_without_a_gateway_the_remedy_is_told(arguments: tuple[str, ...], tmp_path: Path) -> None:
    code, out, err = await call(*arguments, data_dir=tmp_path)
    assert (code, out) == (4, "")
    assert "start one in another terminal: corral serve" in err
