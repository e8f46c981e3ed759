"""Settings: which source wins, what is refused and with which words, and the files of the data directory."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from corral.config import (
    ConfigError,
    check_listen,
    ensure_data_dir,
    ensure_token,
    is_loopback,
    is_loopback_literal,
    load_settings,
    read_endpoint,
    read_token,
    remove_endpoint,
    token_path,
    write_endpoint,
)


def _write(data_dir: Path, text: str) -> None:
    (data_dir / "corral.toml").write_text(text)


def _refusal(data_dir: Path, env: dict[str, str] | None = None, **flags: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings({"data_dir": data_dir, **flags}, env or {})
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    _write(tmp_path, 'port = 1\nhost = "::1"\nmodel = "a:b"')
    env = {"CORRAL_PORT": "2", "CORRAL_HOST": "127.0.0.2"}
    settings = load_settings({"data_dir": tmp_path, "port": 3}, env)
    assert (settings.port, settings.host, settings.model, settings.log_level) == (3, "127.0.0.2", "a:b", "info")
    came_from = {name: settings.origins[name] for name in ("port", "host", "model", "log_level")}
    assert came_from == {
        "port": "flag --port",
        "host": "CORRAL_HOST",
        "model": str(tmp_path / "corral.toml"),
        "log_level": "default",
    }


def test_the_data_directory_is_the_flags_then_the_variables_then_the_platforms(tmp_path: Path) -> None:
    env = {"CORRAL_DATA_DIR": str(tmp_path / "env"), "HOME": str(tmp_path)}
    assert load_settings({"data_dir": tmp_path / "flag"}, env).data_dir == tmp_path / "flag"
    assert load_settings({}, env).data_dir == tmp_path / "env"
    assert load_settings({}, {}).data_dir.name == "corral"


def test_a_configuration_that_other_users_may_change_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, 'roots = ["/"]')
    file = tmp_path / "corral.toml"
    file.chmod(0o664)
    assert load_settings({"data_dir": tmp_path}, {}).roots == [Path("/")]
    file.chmod(0o646)
    assert _refusal(tmp_path) == f"{file} may be changed by other users: take that from them with chmod o-w"


def test_the_working_directory_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, data_dir = tmp_path / "here", tmp_path / "data"
    for folder in (here, data_dir):
        folder.mkdir()
    _write(here, "port = 1")
    (here / ".env").write_text("CORRAL_PORT=1")
    monkeypatch.chdir(here)
    assert load_settings({"data_dir": data_dir}, {}).port == 7077


def test_lists_agents_and_models_are_read(tmp_path: Path) -> None:
    _write(tmp_path, '[agents.tester]\nsystem_prompt = "Test."\n[models."openai-chat:x"]\ncontext_window = 9\n')
    env = {"CORRAL_ALLOWED_ORIGINS": "https://A.example, http://b.example:8080", "CORRAL_ROOTS": "/one:/two"}
    settings = load_settings({"data_dir": tmp_path}, env)
    assert settings.agents["tester"].system_prompt == "Test."
    assert settings.models["openai-chat:x"].context_window == 9
    assert settings.allowed_origins == ["https://a.example", "http://b.example:8080"]
    assert settings.roots == [Path("/one"), Path("/two")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", ["prot", "did you mean port?"]),
        ('port = "1"', ["port", "Expected int, got str", "7077"]),
        ("port = 70000", ["port", "<= 65535"]),
        ('token = "short"', ["token", "16 characters"]),
        ('data_dir = "/x"', ["data_dir", "--data-dir"]),
        ('log_level = "loud"', ["log_level", "debug, info"]),
        ('allowed_origins = ["*"]', ["allowed_origins", "https://"]),
        ('roots = ["relative"]', ["roots", "absolute"]),
        ("[agents.x]\nprompt = 1", ["agents", "unknown field prompt"]),
        ('[agents."x y"]\n', ["agents.x y", "A-Z"]),
        ('[models."a:b"]\ninput_usd_per_million = 1', ["models.a:b", "output_usd_per_million"]),
        ("port = ", ["corral.toml", "TOML"]),
    ],
)
def test_what_is_wrong_in_the_file_is_told_with_key_and_remedy(tmp_path: Path, text: str, words: list[str]) -> None:
    _write(tmp_path, text)
    said = _refusal(tmp_path)
    assert [word for word in words if word not in said] == [], said


def test_a_variable_that_looks_like_a_slip_is_refused_and_a_strangers_is_not(tmp_path: Path) -> None:
    assert "CORRAL_ALLOWED_ORIGINS" in _refusal(tmp_path, {"CORRAL_ALOWED_ORIGINS": "x"})
    load_settings({"data_dir": tmp_path}, {"CORRAL_SERVICE_HOST": "10.0.0.1", "CORRAL_PORT": ""})


def test_a_token_is_in_no_message_and_in_no_repr(tmp_path: Path) -> None:
    secret = "s3cret-s3cret-s3 cret"
    assert "s3cret" not in _refusal(tmp_path, {"CORRAL_TOKEN": secret})
    assert "s3cret" not in _refusal(tmp_path, {"CORRAL_TOKEN": "s3cret"})
    settings = load_settings({"data_dir": tmp_path}, {"CORRAL_TOKEN": secret.replace(" ", "")})
    assert "s3cret" not in repr(settings)
    assert "s3cret" not in repr(settings.origins)


# ---- the token


def test_a_token_is_made_once_private_and_long(tmp_path: Path) -> None:
    settings = load_settings({"data_dir": tmp_path / "data"}, {})
    token = ensure_token(settings)
    assert len(token) >= 43
    assert ensure_token(settings) == token == read_token(settings)
    assert stat.S_IMODE(token_path(settings.data_dir).stat().st_mode) == 0o600
    assert stat.S_IMODE(settings.data_dir.stat().st_mode) == 0o700
    assert [entry.name for entry in settings.data_dir.iterdir()] == ["token"]


def test_of_many_that_make_a_token_at_once_all_get_the_same(tmp_path: Path) -> None:
    settings = load_settings({"data_dir": tmp_path}, {})
    barrier = threading.Barrier(8)
    found: list[str] = []

    def make() -> None:
        barrier.wait()
        found.append(ensure_token(settings))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_set_token_wins_and_is_written_nowhere(tmp_path: Path) -> None:
    settings = load_settings({"data_dir": tmp_path / "data"}, {"CORRAL_TOKEN": "x" * 16})
    assert ensure_token(settings) == "x" * 16
    assert not settings.data_dir.exists()


def test_a_token_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    settings = load_settings({"data_dir": tmp_path}, {})
    ensure_token(settings)
    token_path(tmp_path).chmod(0o644)
    with pytest.raises(ConfigError, match="may be read by other users: remove it"):
        ensure_token(settings)


def test_a_token_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("y" * 32)
    token_path(tmp_path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be read"):
        ensure_token(load_settings({"data_dir": tmp_path}, {}))


# ---- the data directory


def test_a_folder_with_another_use_is_not_closed_to_others(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    (shared / "letter.txt").write_text("x")
    with pytest.raises(ConfigError, match="a directory of its own"):
        ensure_data_dir(shared)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755


def test_an_empty_or_own_folder_is_closed_to_others(tmp_path: Path) -> None:
    for names in ([], ["corral.db", "workspaces"]):
        folder = tmp_path / f"data{len(names)}"
        folder.mkdir()
        folder.chmod(0o755)
        for name in names:
            (folder / name).write_text("")
        ensure_data_dir(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_data_directory_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="no directory"):
        ensure_data_dir(tmp_path / "file")


def test_the_endpoint_is_private_and_only_its_own_process_takes_it_back(tmp_path: Path) -> None:
    assert read_endpoint(tmp_path) is None
    write_endpoint(tmp_path, "http://127.0.0.1:1", pid=1)
    write_endpoint(tmp_path, "http://127.0.0.1:2")
    assert stat.S_IMODE((tmp_path / "gateway.json").stat().st_mode) == 0o600
    remove_endpoint(tmp_path, pid=1)
    endpoint = read_endpoint(tmp_path)
    assert endpoint is not None
    assert (endpoint.url, endpoint.pid) == ("http://127.0.0.1:2", os.getpid())
    remove_endpoint(tmp_path)
    assert read_endpoint(tmp_path) is None


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"url":"\xff","pid":1}'])
def test_a_broken_endpoint_file_counts_as_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "gateway.json").write_bytes(text)
    assert read_endpoint(tmp_path) is None


# ---- where it listens


@pytest.mark.parametrize(
    ("host", "literal", "loopback"),
    [
        ("127.0.0.1", True, True),
        ("127.8.9.1", True, True),
        ("::1", True, True),
        ("[::1]", True, True),
        ("::ffff:127.0.0.1", True, True),
        ("localhost", False, True),
        ("0.0.0.0", False, False),
        ("::", False, False),
        ("10.0.0.1", False, False),
        ("127.evil.invalid", False, False),
        ("", False, False),
    ],
)
def test_only_what_stays_on_this_machine_is_loopback(host: str, literal: bool, loopback: bool) -> None:
    assert is_loopback_literal(host) is literal
    assert is_loopback(host) is loopback


def test_other_machines_are_let_near_only_with_a_token_that_somebody_knows(tmp_path: Path) -> None:
    flags = {"data_dir": tmp_path, "host": "0.0.0.0"}
    with pytest.raises(ConfigError, match="CORRAL_TOKEN"):
        check_listen(load_settings(flags, {}))
    check_listen(load_settings(flags, {"CORRAL_TOKEN": "t" * 16}))
    ensure_token(load_settings(flags, {}))
    check_listen(load_settings(flags, {}))
