"""The published contract and the reference pages are what the code says."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

from corral.cli import COMMANDS, load_command
from corral.protocol.errors import ErrorCode
from corral.protocol.events import EVENTS
from corral.protocol.frames import Event, Request, Response
from corral.protocol.methods import METHODS
from corral.protocol.schema import protocol_schema

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_reference_is_what_the_code_says() -> None:
    stale = runpy.run_path(str(ROOT / "tools" / "reference.py"))["stale"]()
    assert stale == [], "run `make schema` and commit docs/reference"


def test_the_schema_is_a_valid_schema_that_names_every_method_event_and_code() -> None:
    schema = protocol_schema()
    Draft202012Validator.check_schema(schema)
    assert set(schema["methods"]) == set(METHODS)
    assert set(schema["events"]) == set(EVENTS)
    assert set(schema["errorCodes"]) == {code.value for code in ErrorCode}


def test_every_reference_in_the_schema_leads_somewhere() -> None:
    schema = protocol_schema()
    names = set(schema["$defs"])
    text = json.dumps(schema)
    found = {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert found
    assert found <= names


@pytest.mark.parametrize(
    ("frame", "accepted"),
    [
        (Request(type="req", id="r1", method="runs.get", params={"runId": "run_1"}), True),
        (Response(id="r1", ok=True, payload={}), True),
        (Event(event="agent.delta", payload={}, seq=1, state_version=2), True),
        ({"type": "req", "id": "", "method": "runs.get"}, False),
        ({"type": "req", "id": "r1"}, False),
        ({"type": "event", "event": "agent.delta"}, False),
        ({"type": "other"}, False),
    ],
)
def test_the_schema_takes_the_frames_that_the_code_makes_and_no_others(frame: Any, accepted: bool) -> None:
    validator = Draft202012Validator(protocol_schema())
    assert validator.is_valid(msgspec.to_builtins(frame)) is accepted


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_schema_wants_an_idempotency_key_where_the_registry_says_side_effect(name: str) -> None:
    schema = protocol_schema()
    params = schema["$defs"][schema["methods"][name]["params"]["$ref"].rsplit("/", 1)[1]]
    assert ("idempotencyKey" in params.get("required", [])) is METHODS[name].side_effect


def test_what_the_server_always_sends_is_required_of_it() -> None:
    schema = protocol_schema()["$defs"]
    assert "type" in schema["Event"]["required"]
    assert "seq" not in schema["Event"]["required"]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_commands_help_begins_with_its_line_in_the_list(name: str) -> None:
    assert (load_command(name).help or "").startswith(COMMANDS[name][1])
