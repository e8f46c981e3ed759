from __future__ import annotations

import subprocess
import sys
from typing import Any

import jsonschema
import pytest

from corral.executor import catalogue

GOOD: dict[str, dict[str, Any]] = {
    "bash.exec": {"command": "ls", "timeoutMs": 100},
    "process.exec": {"argv": ["ls", "-l", ""]},
    "file.read": {"path": "a", "offset": 1, "limit": 5},
    "file.list": {},
    "file.search": {"pattern": "x"},
    "file.write": {"path": "a", "content": ""},
    "file.edit": {"path": "a", "old": "x", "new": ""},
    "http.request": {"url": "https://example.com", "method": "POST", "headers": {"X-A": "b"}, "body": "{}"},
    "memory.read": {"day": "2026-01-31"},
    "memory.append": {"text": "a note", "to": "memory"},
    "memory.search": {"pattern": "x"},
}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("bash.exec", {"command": "ls", "timeoutMs": "5"}, "$.timeoutMs: expected integer, got string"),
    ("bash.exec", {"command": "ls", "timeoutMs": 0}, "$.timeoutMs: expected integer >= 1"),
    ("bash.exec", {"command": "ls", "timeoutMs": True}, "$.timeoutMs: expected integer, got boolean"),
    ("bash.exec", {"command": "ls", "timeoutMs": None}, "$.timeoutMs: null is not a value here; leave it out"),
    ("bash.exec", {"command": "ls", "timeoutMs": 1.5}, "$.timeoutMs: expected integer, got number"),
    ("bash.exec", {}, "$.command: required"),
    ("bash.exec", {"command": ""}, "$.command: expected string of length >= 1"),
    (
        "bash.exec",
        {"command": "ls", "cwd": "/"},
        "$.cwd: there is no such argument; the arguments are command, timeoutMs",
    ),
    ("bash.exec", {"command": ["ls"]}, "$.command: expected string, got array"),
    ("bash.exec", {"command": "a\0b"}, "$.command: a NUL character is not possible here"),
    ("bash.exec", {"command": "a\ud800"}, "$.command: not valid Unicode (a lone surrogate)"),
    ("process.exec", {"argv": "ls"}, "$.argv: expected array, got string"),
    ("process.exec", {"argv": []}, "$.argv: expected array of length >= 1"),
    ("process.exec", {"argv": ["ls", 5]}, "$.argv[1]: expected string, got integer"),
    ("process.exec", {"argv": ["ls", "\0"]}, "$.argv[1]: a NUL character is not possible here"),
    ("file.read", {"path": "a", "offset": 0}, "$.offset: expected integer >= 1"),
    ("http.request", {"url": "x", "headers": {"a b": "c"}}, "$.headers: "),
    ("memory.read", {"day": "../../etc/x"}, "$.day: expected string of another form"),
    ("memory.read", {"day": "2026-01-31\n"}, "$.day: expected string of another form"),
    ("memory.append", {"text": "a", "to": "../x"}, "$.to: "),
    ("memory.append", {"text": ""}, "$.text: expected string of length >= 1"),
]


@pytest.mark.parametrize("name", GOOD)
def test_good_arguments_pass_the_check_and_the_schema_alike(name: str) -> None:
    assert catalogue.problem(name, GOOD[name]) is None
    spec = catalogue.spec(name)
    assert spec is not None
    jsonschema.Draft202012Validator.check_schema(spec.parameters)
    jsonschema.validate(GOOD[name], spec.parameters)


@pytest.mark.parametrize(("name", "args", "words"), BAD)
def test_wrong_arguments_get_words_that_name_the_place(name: str, args: dict[str, Any], words: str) -> None:
    problem = catalogue.problem(name, args)
    assert problem is not None
    assert problem.startswith(words)


# JSON Schema has no words for the others.
IN_SCHEMA = [(name, args) for name, args, words in BAD if "NUL" not in words and "surrogate" not in words]


@pytest.mark.parametrize(("name", "args"), IN_SCHEMA)
def test_what_the_check_refuses_the_published_schema_refuses_too(name: str, args: dict[str, Any]) -> None:
    spec = catalogue.spec(name)
    assert spec is not None
    assert not jsonschema.Draft202012Validator(spec.parameters).is_valid(args)


def test_a_whole_number_written_with_a_point_is_an_integer_as_in_json_schema() -> None:
    assert catalogue.parse("bash.exec", {"command": "ls", "timeoutMs": 5.0}) == catalogue.BashExec(
        command="ls", timeout_ms=5
    )


def test_an_unknown_tool_is_answered_with_the_tools_there_are() -> None:
    problem = catalogue.problem("bash", {})
    assert problem is not None
    assert all(name in problem for name in GOOD)


def test_the_tools_have_the_risks_of_the_protocol_and_only_reads_are_repeatable() -> None:
    risks = {spec.name: spec.risk for spec in catalogue.SPECS}
    assert risks == {
        "bash.exec": "high",
        "process.exec": "high",
        "file.read": "low",
        "file.list": "low",
        "file.search": "low",
        "file.write": "medium",
        "file.edit": "medium",
        "http.request": "high",
        "memory.read": "low",
        "memory.append": "medium",
        "memory.search": "low",
    }
    repeatable = {spec.name for spec in catalogue.SPECS if spec.repeatable}
    assert repeatable == {"file.read", "file.list", "file.search", "memory.read", "memory.search"}


def test_schemas_stand_alone_and_allow_no_unknown_argument() -> None:
    for spec in catalogue.SPECS:
        assert "$ref" not in repr(spec.parameters)
        assert spec.parameters["type"] == "object"
        assert spec.parameters["additionalProperties"] is False
        assert len(spec.description) > 30


def test_importing_the_catalogue_does_not_import_jsonschema() -> None:
    code = "import sys, corral.executor.service; sys.exit('jsonschema' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
