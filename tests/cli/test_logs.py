"""A line of the log is one line that says one thing, whatever a command or a model put into it."""

from __future__ import annotations

import io
import json
import logging

import pytest

from corral.cli.logs import JsonFormatter, log_to_stderr
from corral.cli.visible import visible
from corral.config import load_settings

HOSTILE = "1: sleep\n2026-01-01 00:00:00 INFO corral: approved\x1b[2J\x9b31m\u202e\r"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> io.StringIO:
    """What a logger that is set up as `corral serve` does it writes."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    log_to_stderr(load_settings({}, {"CORRAL_LOG_FORMAT": request.param}))
    return stream


@pytest.mark.parametrize("lines", ["text"], indirect=True)
def test_a_text_from_elsewhere_makes_no_line_and_drives_no_terminal(lines: io.StringIO) -> None:
    logging.getLogger("corral.test").warning("ended what was left: %s", HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("corral.test").exception("it failed")
    written = lines.getvalue()
    assert visible(written) == written
    first, second, *trace = written.splitlines()
    assert first.endswith(r"1: sleep\n2026-01-01 00:00:00 INFO corral: approved\x1b[2J\x9b31m\u202e\x0d")
    assert second.endswith("ERROR   corral.test: it failed")
    assert len(trace) > 2
    assert all(line.startswith("  ") for line in trace)


@pytest.mark.parametrize("lines", ["json"], indirect=True)
def test_nor_does_it_as_json(lines: io.StringIO) -> None:
    logging.getLogger("corral.test").warning("%s", HOSTILE, extra={"action": HOSTILE})
    (line,) = lines.getvalue().splitlines()
    assert visible(line) == line
    assert json.loads(line)["message"] == json.loads(line)["action"] == HOSTILE
    assert isinstance(logging.getLogger().handlers[0].formatter, JsonFormatter)
