"""The tools: their arguments as types, from which their JSON Schemas and the checks both come.

Checked by msgspec, which the gateway has loaded anyway: importing jsonschema costs 60 to 230 ms, which
the first call of a run would have waited for.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from corral.executor.api import Effect, ToolSpec
from corral.protocol.ready import look_through
from corral.protocol.types import Risk

Timeout = Annotated[
    int,
    Meta(
        ge=1,
        le=86_400_000,
        description="Milliseconds after which the program and everything it started is killed.",
    ),
]
PathText = Annotated[str, Meta(min_length=1, max_length=4096)]


class Arguments(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Base of every tool's arguments. None stands for "left out"; the wire has no null."""


class BashExec(Arguments, kw_only=True, frozen=True):
    command: Annotated[str, Meta(min_length=1, max_length=120_000, description="The text given to the shell.")]
    timeout_ms: Timeout | None = None


class ProcessExec(Arguments, kw_only=True, frozen=True):
    argv: Annotated[
        list[Annotated[str, Meta(max_length=120_000)]],
        Meta(
            min_length=1,
            max_length=4096,
            description="The program and its arguments, each exactly as the program shall get it.",
        ),
    ]
    timeout_ms: Timeout | None = None


class FileRead(Arguments, kw_only=True, frozen=True):
    path: Annotated[PathText, Meta(description="The file, relative to the working directory.")]
    offset: Annotated[int, Meta(ge=1, le=2**53, description="First line to read; lines count from 1.")] | None = None
    limit: Annotated[int, Meta(ge=1, le=100_000, description="How many lines to read at most.")] | None = None


class FileList(Arguments, kw_only=True, frozen=True):
    path: Annotated[PathText, Meta(description="The directory; by default the working directory.")] | None = None


class FileSearch(Arguments, kw_only=True, frozen=True):
    pattern: Annotated[
        str, Meta(min_length=1, max_length=1000, description="A regular expression (Python's syntax), for one line.")
    ]
    path: (
        Annotated[PathText, Meta(description="A file or directory to search; by default the working directory.")] | None
    ) = None


class FileWrite(Arguments, kw_only=True, frozen=True):
    path: Annotated[PathText, Meta(description="The file, relative to the working directory.")]
    content: Annotated[str, Meta(max_length=8_000_000, description="The file's whole new content.")]


class FileEdit(Arguments, kw_only=True, frozen=True):
    path: Annotated[PathText, Meta(description="The file, relative to the working directory.")]
    old: Annotated[
        str, Meta(min_length=1, max_length=4_000_000, description="The text to replace, exactly as it is in the file.")
    ]
    new: Annotated[str, Meta(max_length=4_000_000, description="The text to put in its place; may be empty.")]


class HttpRequest(Arguments, kw_only=True, frozen=True):
    url: Annotated[str, Meta(min_length=1, max_length=8192, description="An http or https address.")]
    method: (
        Annotated[
            str,
            Meta(
                pattern="^(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS)(?![\\s\\S])",
                description="GET (the default), HEAD, POST, PUT, PATCH, DELETE or OPTIONS.",
            ),
        ]
        | None
    ) = None
    headers: (
        Annotated[
            dict[
                Annotated[str, Meta(pattern="^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}(?![\\s\\S])")],
                Annotated[str, Meta(max_length=8192)],
            ],
            Meta(max_length=100, description="Request headers."),
        ]
        | None
    ) = None
    body: Annotated[str, Meta(max_length=1_000_000, description="The request's body.")] | None = None


class MemoryRead(Arguments, kw_only=True, frozen=True):
    day: (
        Annotated[
            str,
            Meta(
                pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}(?![\\s\\S])",
                description="A day (UTC), as YYYY-MM-DD; by default MEMORY.md and the last two days.",
            ),
        ]
        | None
    ) = None


class MemoryAppend(Arguments, kw_only=True, frozen=True):
    text: Annotated[str, Meta(min_length=1, max_length=16_000, description="The note: lines of Markdown.")]
    to: (
        Annotated[
            Literal["day", "memory"],
            Meta(description="`day`, today's notes (the default), or `memory`, what holds for good: MEMORY.md."),
        ]
        | None
    ) = None


class MemorySearch(Arguments, kw_only=True, frozen=True):
    pattern: Annotated[
        str, Meta(min_length=1, max_length=1000, description="A regular expression (Python's syntax), for one line.")
    ]


def _spec(name: str, arguments: type[Arguments], risk: Risk, effect: Effect, description: str) -> ToolSpec:
    return ToolSpec(
        name=name,
        description=" ".join(description.split()),
        parameters=_schema(arguments),
        risk=risk,
        effect=effect,
    )


def _schema(arguments: type[Arguments]) -> dict[str, Any]:
    schema: dict[str, Any] = msgspec.json.schema(arguments)["$defs"][arguments.__name__]
    schema.pop("title", None)
    schema.pop("description", None)
    schema["additionalProperties"] = False
    for name, about in schema["properties"].items():
        about.pop("default", None)
        if "anyOf" in about:
            # An argument that may be left out; null is not part of what the model is offered.
            (schema["properties"][name],) = [kind for kind in about["anyOf"] if kind.get("type") != "null"]
    return schema


ARGUMENTS: dict[str, type[Arguments]] = {
    "bash.exec": BashExec,
    "process.exec": ProcessExec,
    "file.read": FileRead,
    "file.list": FileList,
    "file.search": FileSearch,
    "file.write": FileWrite,
    "file.edit": FileEdit,
    "http.request": HttpRequest,
    "memory.read": MemoryRead,
    "memory.append": MemoryAppend,
    "memory.search": MemorySearch,
}
look_through(*ARGUMENTS.values())

SPECS: tuple[ToolSpec, ...] = (
    _spec(
        "bash.exec",
        BashExec,
        "high",
        "at_most_once",
        """Run a shell command in the working directory and return its standard output, then its standard
        error, then its exit status if that is not 0. Nothing is kept between calls but files: no variables, no
        current directory, no background processes. There is no standard input. Usually there is no network
        and only the working directory can be written.""",
    ),
    _spec(
        "process.exec",
        ProcessExec,
        "high",
        "at_most_once",
        """Run one program with exactly these arguments, without a shell: no expansion, no pipes, no
        redirection. Otherwise like bash.exec.""",
    ),
    _spec(
        "file.read",
        FileRead,
        "low",
        "repeatable",
        """Read a text file. Long files come in parts: the result says with which offset to go on.""",
    ),
    _spec(
        "file.list",
        FileList,
        "low",
        "repeatable",
        """List a directory, sorted by name. Directories end with /, links with @.""",
    ),
    _spec(
        "file.search",
        FileSearch,
        "low",
        "repeatable",
        """Search text files below a directory, or one file, for a regular expression. Results are lines of the
        form path:line: text. Binary files and .git directories are left out.""",
    ),
    _spec(
        "file.write",
        FileWrite,
        "medium",
        "at_most_once",
        """Write a file: make it, or replace all that is in it. Missing directories are made.""",
    ),
    _spec(
        "file.edit",
        FileEdit,
        "medium",
        "at_most_once",
        """Replace one piece of text in a file. `old` must occur exactly once, with the same spaces and line
        ends; give enough of its surroundings to make it unique.""",
    ),
    _spec(
        "http.request",
        HttpRequest,
        "high",
        "at_most_once",
        """Make an HTTP request to a public address and return status, headers and body as text. Private and
        local addresses are refused.""",
    ),
    _spec(
        "memory.read",
        MemoryRead,
        "low",
        "repeatable",
        """Read the notes that are kept in the working directory for later sessions: MEMORY.md and the notes of the
        last two days, or those of one day.""",
    ),
    _spec(
        "memory.append",
        MemoryAppend,
        "medium",
        "at_most_once",
        """Add a note for later sessions to today's notes or to MEMORY.md. Write down what will be needed and cannot
        be seen from the files: decisions and their reasons, what the person wants, what is still to do. No
        secrets.""",
    ),
    _spec(
        "memory.search",
        MemorySearch,
        "low",
        "repeatable",
        """Search all notes (MEMORY.md and those of every day) for a regular expression. Results are lines of the
        form path:line: text.""",
    ),
)

_BY_NAME = {spec.name: spec for spec in SPECS}
_AT = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`?key`? in )?`(?P<where>\$[^`]*)`)?$", re.DOTALL)
_EXPECTED = re.compile(r"^Expected `(?P<wanted>[^`]+)`(?P<bounds>.*?)(?:, got `(?P<got>[^`]+)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$", re.DOTALL)
_WORDS = {"int": "integer", "str": "string", "bool": "boolean", "float": "number", "NoneType": "null", "dict": "object"}
_WORDS["list"] = "array"


def spec(tool_name: str) -> ToolSpec | None:
    """The tool of that name, None if there is none."""
    return _BY_NAME.get(tool_name)


def parse(tool_name: str, args: dict[str, Any]) -> Arguments:
    """The arguments as their type. Raises KeyError for an unknown tool, ValueError in words for the model."""
    arguments = ARGUMENTS[tool_name]
    for name, value in args.items():
        if value is None:
            raise ValueError(f"$.{name}: null is not a value here; leave it out")
    # JSON has one kind of number: 5.0 is an integer, also to JSON Schema.
    whole = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in args.items()
    }
    try:
        parsed = msgspec.convert(whole, arguments)
    except msgspec.ValidationError as error:
        raise ValueError(_words(str(error), arguments)) from error
    _check_texts("$", whole)
    return parsed


def problem(tool_name: str, args: dict[str, Any]) -> str | None:
    """See `ToolExecutor.check`."""
    if tool_name not in ARGUMENTS:
        return f"there is no tool {tool_name[:128]!r}; the tools are {', '.join(ARGUMENTS)}"
    try:
        parse(tool_name, args)
    except ValueError as error:
        return str(error)
    return None


def _check_texts(where: str, value: Any) -> None:
    """No system call takes a NUL, and half of a surrogate pair has no UTF-8."""
    if isinstance(value, str):
        if "\0" in value and where not in ("$.content", "$.old", "$.new", "$.body"):
            raise ValueError(f"{where}: a NUL character is not possible here")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: not valid Unicode (a lone surrogate)") from error
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_texts(f"{where}.{name}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_texts(f"{where}[{index}]", inner)


def _words(message: str, arguments: type[Arguments]) -> str:
    """msgspec's message as `$.timeoutMs: expected integer, got string`."""
    found = _AT.match(message)
    if found is None:
        return message
    what, where = found["what"], found["where"] or "$"
    names = ", ".join(field.encode_name for field in msgspec.structs.fields(arguments))
    if unknown := _UNKNOWN.match(what):
        return f"{where}.{unknown['name'][:128]}: there is no such argument; the arguments are {names}"
    if missing := _MISSING.match(what):
        return f"{where}.{missing['name']}: required"
    if found["key"]:
        return f"{where}: a name in it is not possible"
    if expected := _EXPECTED.match(what):
        wanted = " or ".join(_WORDS.get(word, word) for word in expected["wanted"].split(" | ") if word != "null")
        got = f", got {_WORDS.get(expected['got'], expected['got'])}" if expected["got"] else ""
        bounds = (
            " of another form; see its description" if "matching regex" in expected["bounds"] else expected["bounds"]
        )
        return f"{where}: expected {wanted}{bounds}{got}"
    return f"{where}: {what[:1].lower()}{what[1:].replace('`', '')}"
