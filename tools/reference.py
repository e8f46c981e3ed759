#!/usr/bin/env python3
"""Writes docs/reference from the code, or says what in it is stale.

python tools/reference.py [--check]
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from corral.cli import COMMANDS, corral, load_command
from corral.config import SETTINGS, AgentSettings, ModelSettings
from corral.gateway.openapi import openapi
from corral.protocol.schema import protocol_schema

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
GENERATED = "<!-- Made by `make schema` from the code; changes by hand are lost. -->\n\n"


def pages() -> dict[str, str]:
    """File name -> text, for every generated page."""
    schema = protocol_schema()
    return {
        "protocol.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
        "openapi.json": json.dumps(openapi(), indent=2, ensure_ascii=False) + "\n",
        "methods.md": _methods(schema),
        "settings.md": _settings(),
        "cli.md": _commands(),
    }


def stale(folder: Path = FOLDER) -> list[str]:
    """The generated pages that do not say what the code says."""
    return [
        name
        for name, text in pages().items()
        if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != text
    ]


# ---- the wire


def _methods(schema: dict[str, Any]) -> str:
    defs = schema["$defs"]
    used: list[str] = []
    out = [GENERATED, f"# Methods, events and types (protocol {schema['protocolVersion']})\n\n"]
    out.append("● changes something and needs `idempotencyKey`. A field marked ? may be left out.\n\n## Methods\n")
    for name, method in schema["methods"].items():
        out.append(f"\n### `{name}`{' ●' if method['sideEffect'] else ''}\n\n{method['summary']}\n\n")
        if method["sideEffect"]:
            out.append(f"Key unique within: `{method['idempotencyScope']}` (the workspace where that is left out). ")
        out.append(f"Roles: {', '.join(method['roles'])}.\n")
        out.append(_table("params", defs[_name(method["params"])], used))
        out.append(_table("payload", defs[_name(method["result"])], used))
    out.append("\n## Events\n")
    for name, event in schema["events"].items():
        kind = _name(event["payload"])
        note = "durable" if event["durable"] else "transient"
        note += "; the last event of its run" if event["endsRun"] else ""
        text = defs[kind].get("description", "")
        out.append(f"\n### `{name}`\n\n{note.capitalize()}. {' '.join(text.split())}".rstrip() + "\n")
        if kind in ("Approval",):
            out.append(f"\nThe payload is a {_link(kind, used)}.\n")
        else:
            out.append(_table("payload", defs[kind], used))
    out.append("\n## Error codes\n\n| code | retryable |\n|---|---|\n")
    out += [f"| `{code}` | {'yes' if said['retryable'] else 'no'} |\n" for code, said in schema["errorCodes"].items()]
    out.append("\n## Types\n")
    done: set[str] = set()
    while rest := sorted(set(used) - done):
        for kind in rest:
            done.add(kind)
            out.append(_kind(kind, defs[kind], used))
    return "".join(out)


def _kind(kind: str, schema: dict[str, Any], used: list[str]) -> str:
    text = " ".join(schema.get("description", "").split())
    head = f"\n### {kind}\n" + (f"\n{text}\n" if text and "enum" not in schema else "")
    if "enum" in schema:
        return head + "\n" + ", ".join(f"`{value}`" for value in schema["enum"]) + "\n"
    return head + _table("field", schema, used)


def _table(title: str, schema: dict[str, Any], used: list[str]) -> str:
    rows = []
    for name, prop in schema.get("properties", {}).items():
        if name in ("workspaceId", "tenantId") and title == "params":
            continue
        mark = "" if name in schema.get("required", []) else "?"
        rows.append(f"| `{name}`{mark} | {_type(prop, used)}{_notes(prop)} |\n")
    if not rows:
        return f"\n{title}: none.\n"
    return f"\n| {title} | |\n|---|---|\n" + "".join(rows)


def _type(schema: dict[str, Any], used: list[str]) -> str:
    if "$ref" in schema:
        return _link(_name(schema), used)
    if "anyOf" in schema:
        return " or ".join(_type(part, used) for part in schema["anyOf"])
    if "enum" in schema:
        return " \\| ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kind = schema.get("type", "any JSON")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}), used)}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'], used)}"
    return str(kind)


def _notes(schema: dict[str, Any]) -> str:
    notes = []
    for key, words in (("minimum", "at least"), ("maximum", "at most"), ("default", "default")):
        if key in schema and schema[key] not in ({}, []):
            notes.append(f"{words} {json.dumps(schema[key])}")
    if "maxLength" in schema:
        notes.append(f"{schema.get('minLength', 0)} to {schema['maxLength']} characters")
    if "description" in schema and "$ref" not in schema:
        notes.append(schema["description"])
    return f" ({'; '.join(notes)})" if notes else ""


def _link(kind: str, used: list[str]) -> str:
    used.append(kind)
    return f"[{kind}](#{kind.lower()})"


def _name(ref: dict[str, str]) -> str:
    return ref["$ref"].rsplit("/", 1)[1]


# ---- settings and commands


def _settings() -> str:
    out = [GENERATED, "# Settings\n\n"]
    out.append(
        "`corral.toml` in the data directory, then `CORRAL_*` variables, then flags of `corral serve`; the later one\n"
        "wins. Lists in variables are separated by commas, `CORRAL_ROOTS` like `PATH`. A key that is not here, or a\n"
        "value of another type, stops the start with a line that names it. The working directory and the folders that\n"
        "agents work in are never read for settings.\n\n"
        "| corral.toml | variable | type | default |\n|---|---|---|---|\n"
    )
    for name, item in SETTINGS.items():
        if name in ("agents", "models"):
            continue
        key = "(the file lies in it)" if name == "data_dir" else f"`{name}`"
        default = "the platform's user data folder" if item.required else f"`{json.dumps(_default(item))}`"
        out.append(f"| {key} | `CORRAL_{name.upper()}` | {_setting_type(item.type)} | {default} |\n")
    tables: list[tuple[str, type[msgspec.Struct], str]] = [
        ("agents.NAME", AgentSettings, "One agent: what it is told, its model, its tools."),
        ('models."provider:name"', ModelSettings, "What is not known of a model, or wrongly; prices in US dollars."),
    ]
    for title, kind, text in tables:
        out.append(f"\n## `[{title}]`\n\n{text}\n\n| key | type |\n|---|---|\n")
        out += [f"| `{i.name}` | {_setting_type(i.type)} |\n" for i in msgspec.structs.fields(kind)]
    return "".join(out)


def _default(item: msgspec.structs.FieldInfo) -> Any:
    return item.default if item.default is not msgspec.NODEFAULT else item.default_factory()


def _setting_type(kind: Any) -> str:
    text = re.sub(
        r"typing\.|pathlib\.(_local\.)?|datetime\.", "", str(kind) if not isinstance(kind, type) else kind.__name__
    )
    if bounds := re.search(r"Annotated\[(\w+), .*?ge=([\d.]+)(?:, le=([\d.]+))?", text):
        return f"{bounds[1]}, {bounds[2]} to {bounds[3]}" if bounds[3] else f"{bounds[1]}, {bounds[2]} or more"
    text = re.sub(r"Annotated\[(\w+), .*?\)\]", r"\1", text)
    if text.startswith("Literal["):
        text = "one of " + text[len("Literal[") : -1].replace("'", "")
    return text.replace("|", "or")


def _commands() -> str:
    os.environ["COLUMNS"] = "100"
    out = [GENERATED, "# The `corral` command\n"]
    # Below the whole command, as when it is typed: what a command's own help option is called it takes from there, and
    # click keeps that once it has been asked.
    above = corral.make_context("corral", [], resilient_parsing=True)
    for name in COMMANDS:
        out += _command(f"corral {name}", load_command(name), above, "##")
    return "".join(out)


def _command(title: str, command: click.Command, above: click.Context, level: str) -> list[str]:
    """The help of a command and, each under a heading of its own, of those below it."""
    name = title.rpartition(" ")[2]
    context = click.Context(command, parent=above, info_name=name, terminal_width=100, max_content_width=100)
    out = [f"\n{level} {title}\n\n```text\n{command.get_help(context)}\n```\n"]
    if isinstance(command, click.Group):
        for each, below in command.commands.items():
            out += _command(f"{title} {each}", below, context, level + "#")
    return out


def main() -> int:
    if "--check" in sys.argv[1:]:
        found = stale()
        if found:
            print(f"docs/reference is stale ({', '.join(found)}): run `make schema` and commit what it writes")
        return 1 if found else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
