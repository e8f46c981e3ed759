"""`corral policy`: what the layers say, changing them, and asking what they would say of a call."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corral.cli import FAILED, OK, USAGE, CliError, Group, completing
from corral.cli.approvals import print_json, reached
from corral.cli.calling import ask
from corral.cli.columns import fold, width
from corral.cli.common import check_tool_name, unknown_tools
from corral.cli.visible import exact, visible

if TYPE_CHECKING:
    from corral.client import Corral

Json = dict[str, Any]

FIELDS = (
    "toolDefault",
    "highRisk",
    "bashMode",
    "bashNetwork",
    "fourEyes",
    "tools",
    "lockedTools",
    "rules",
    "models",
    "limits",
)
"""What a layer can say; the rest of a Policy is where and when."""

_OTHERS = ("tenantId", "workspaceId", "agentId", "layer", "scopeKey", "inherited", "version", "updatedAt")

_ACTIONS = ("deny", "allow", "approval-required")
_CHOICES: dict[str, tuple[str | bool, ...]] = {
    "toolDefault": _ACTIONS,
    "highRisk": _ACTIONS,
    "bashMode": ("sandbox", "host"),
    "bashNetwork": ("none", "host"),
    "fourEyes": (True, False),
}

# The arguments of the built-in tools in the order in which they are written at a terminal.
_ARGUMENTS = {
    "file.read": ("path",),
    "file.list": ("path",),
    "file.search": ("pattern", "path"),
    "file.write": ("path", "content"),
    "file.edit": ("path", "old", "new"),
    "http.request": ("url", "method"),
    "memory.read": ("day",),
    "memory.append": ("text", "to"),
    "memory.search": ("pattern",),
}


def _layered(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option("--agent", metavar="ID", shell_complete=completing.agents, help="The layer of this agent.")(
        function
    )
    return click.option(
        "--layer",
        type=click.Choice(["tenant", "workspace", "agent"]),
        help="Which layer. [default: agent with --agent, else workspace]",
    )(function)


@click.group(cls=Group, no_args_is_help=True)
def command() -> None:
    """See and change what tools may do, and ask what policy says of a call."""


@command.command()
@_layered
@click.option("--effective", is_flag=True, help="All layers merged, as they hold there.")
@reached
def show(**options: Any) -> int:
    """Show what one layer says, or all merged.

    Exit codes: 0 done, 1 there is no such agent, 2 wrong usage, 4 no gateway, 5 refused for want of a role.
    """

    async def go(corral: Corral) -> int:
        policy = await _get(corral, options, effective=options["effective"])
        if options["as_json"]:
            print_json(policy)
            return OK
        what = "all layers merged for" if options["effective"] else "what is said by"
        print(f"{what} {visible(policy['scopeKey'])}, version {policy['version']}", file=sys.stderr)
        print(exact(document_of(policy)))
        if policy["inherited"]:
            held = ", ".join(f"{name} {_word(policy[name])}" for name in policy["inherited"])
            said = f"from coarser layers: {held}"
            for line in fold(said, width()) if sys.stderr.isatty() else [said]:
                print(line, file=sys.stderr)
        return OK

    return ask(options, go)


@command.command("set")
@click.argument("key", required=False)
@click.argument("value", required=False)
@click.option(
    "--file",
    "file",
    metavar="FILE",
    shell_complete=completing.files,
    help="Let the layer say what this file says, and nothing else.",
)
@_layered
@reached
def set_(key: str | None, value: str | None, **options: Any) -> int:
    """Set one thing in a layer, or all of it from a file.

    KEY is like toolDefault, tools.bash.exec, models.primary or limits.maxStepsPerRun; VALUE is JSON or a
    plain word, and null leaves it to the other layers. A change holds from the next tool call on.

    \b
    corral policy set tools.file.write allow
    corral policy set highRisk deny --agent reviewer
    corral policy set --file policy.json

    Exit codes: 0 done, 1 changed meanwhile or no such agent, 2 wrong usage or no policy, 4 no gateway,
    5 refused for want of a role.
    """
    if (options["file"] is None) == (key is None) or (key is not None and value is None):
        raise CliError("give KEY and VALUE, or --file FILE", "for example: corral policy set highRisk deny", code=USAGE)
    wanted = _checked(read_policy(options["file"])) if options["file"] is not None else None
    patch = setting(key, value) if key is not None and value is not None else {}

    async def go(corral: Corral) -> int:
        if wanted is None:
            if note := unknown_tools(patch.get("tools") or {}):
                print(note, file=sys.stderr)
            return _changed(await corral.request("policy.update", patch=patch, **_address(options)), options)
        current = await _get(corral, options)
        return await _replace(corral, current, wanted, options)

    return ask(options, go)


@command.command()
@_layered
@reached
def edit(**options: Any) -> int:
    """Edit what one layer says in $VISUAL or $EDITOR.

    What somebody else changed meanwhile is not overwritten: the update is refused, and the edited text kept.

    Exit codes: 0 done or left as it was, 1 changed meanwhile, or the editor failed, 2 no policy, 4 no gateway,
    5 refused for want of a role.
    """

    editor = _editor()

    async def fetch(corral: Corral) -> Json:
        return await _get(corral, options)

    current = ask(options, fetch)
    before = json.dumps(document_of(current), indent=2, ensure_ascii=False) + "\n"
    folder = Path(tempfile.mkdtemp(prefix="corral-policy-"))  # mode 0700
    path = folder / "policy.json"
    path.write_text(before, encoding="utf-8")
    keep = False
    try:
        _run_editor(editor, path)
        if path.read_text(encoding="utf-8") == before:
            print("left as it was", file=sys.stderr)
            return OK
        keep = True
        wanted = _checked(read_policy(str(path)))
        code = ask(options, lambda corral: _replace(corral, current, wanted, options))
        keep = False
        return code
    except CliError as error:
        if keep:
            where = "".join(f" --{name} {options[name]}" for name in ("layer", "agent") if options[name] is not None)
            kept = f"what you wrote is in {path}: mend it, then `corral policy set --file {path}{where}`"
            error.remedy = f"{error.remedy}; {kept}" if error.remedy else kept
        raise
    finally:
        if not keep:
            path.unlink(missing_ok=True)
            folder.rmdir()


@command.command()
@click.argument("file", shell_complete=completing.files)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def test(file: str, as_json: bool) -> int:
    """Check a policy file and its own examples, without a gateway.

    Every rule must compile, match each call of its `match`, and none of its `not_match`. FILE is JSON as
    `corral policy show` prints it; `-` reads standard input.

    \b
    corral policy test policy.json

    Exit codes: 0 it is good, 1 it is not, 2 wrong usage.
    """
    from corral.cli.policy_file import check

    report = check(read_policy(file))
    if as_json:
        print_json(report)
    else:
        for problem in report["problems"]:
            print(visible(problem))
        bare = report["withoutExamples"]
        if bare:
            print(f"without examples: {', '.join(map(visible, bare))}", file=sys.stderr)
        rules, examples = report["rules"], report["examples"]
        count = f"{rules} rule{'' if rules == 1 else 's'}, {examples} example{'' if examples == 1 else 's'}"
        print(
            f"{count}: {'good' if report['ok'] else 'not good'}", file=sys.stderr if report["problems"] else sys.stdout
        )
    return OK if report["ok"] else FAILED


@command.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("tool", shell_complete=completing.tools)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--session",
    metavar="ID",
    shell_complete=completing.sessions,
    help="As a call in this session. [default: one without an id]",
)
@click.option(
    "--agent", metavar="ID", shell_complete=completing.agents, help="As a call of this agent. [default: the session's]"
)
@reached
def explain(tool: str, args: tuple[str, ...], **options: Any) -> int:
    """Say what would happen with a call, and why, without it happening.

    ARGS is what the tool takes, as one writes it, or one JSON object. Options come before TOOL.

    \b
    corral policy explain bash.exec 'git status; rm -r build'
    corral policy explain process.exec git status
    corral policy explain file.write notes.txt
    corral policy explain my.tool '{"to": "anna"}'

    Exit codes: 0 answered, 1 no such session or agent, 2 wrong usage, 4 no gateway.
    """
    call = call_arguments(tool, args)
    named = (("sessionId", options["session"]), ("agentId", options["agent"]))
    params = {name: value for name, value in named if value is not None}

    async def go(corral: Corral) -> int:
        answer = await corral.request("policy.explain", toolName=tool, args=call, **params)
        if options["as_json"]:
            print_json(answer)
            return OK
        rule = f", rule {visible(answer['ruleId'])}" if "ruleId" in answer else ""
        layer = "built-in default" if answer["layer"] == "default" else f"{answer['layer']} layer"
        print(f"{answer['decision']}: {visible(answer['reason'])} ({layer}{rule})")
        print(exact(answer["facts"]))
        return OK

    return ask(options, go)


# ---- documents


def document_of(policy: Json) -> Json:
    """What a layer itself says, of a Policy as the gateway shows it: without what is inherited or empty."""
    said = {name: policy[name] for name in FIELDS if name in policy and name not in policy.get("inherited", ())}
    bare = _without_nothing(said)
    return bare if isinstance(bare, dict) else {}


def replacing(before: Any, wanted: Any) -> Any:
    """The merge patch (RFC 7396) that makes `wanted` out of `before`, both without nulls in objects."""
    if not isinstance(before, dict) or not isinstance(wanted, dict):
        return wanted
    patch: Json = {name: None for name in before if name not in wanted}
    for name, value in wanted.items():
        if name not in before or before[name] != value:
            patch[name] = replacing(before.get(name), value)
    return patch


def read_policy(name: str) -> Json:
    """The document in a file (`-`: standard input), which may be all that `policy show --json` prints.

    Raises CliError for a file that cannot be read, is no JSON object, or has a field that no policy has.
    """
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        value = json.loads(text)
    except OSError as error:
        raise CliError(
            f"{name} cannot be read ({error.strerror})", "name a JSON file, or - for input", code=USAGE
        ) from None
    except ValueError as error:
        raise CliError(
            f"{name} is no JSON: {error}", "`corral policy show` prints a layer as JSON", code=USAGE
        ) from None
    if not isinstance(value, dict):
        raise CliError(f"{name} holds no JSON object", "`corral policy show` prints a layer as JSON", code=USAGE)
    for field in value:
        if field not in FIELDS + _OTHERS:
            raise _unknown(field)
    return document_of(value)


def _checked(document: Json) -> Json:
    """The document, if the words in it are ones that a policy takes. Raises CliError that lists them."""
    for name, said in document.items():
        if name in _CHOICES:
            _check_value(name, name, said)
    tools = document.get("tools")
    for name, said in tools.items() if isinstance(tools, dict) else ():
        _check_value(f"tools.{name}", "tools", said)
    return document


def setting(key: str, value: str) -> Json:
    """The merge patch that sets one thing. Raises CliError for a key that no policy has."""
    head, _, rest = key.partition(".")
    if head not in FIELDS:
        raise _unknown(key)
    try:
        said = json.loads(value)
    except ValueError:
        said = value
    # The names of tools have dots of their own.
    names = [head, rest] if head == "tools" else key.split(".")
    if "" in names and key != head:
        raise CliError(f"{key} ends in nothing", "for example tools.bash.exec", code=USAGE)
    _check_value(key, head, said)
    for name in reversed([name for name in names if name]):
        said = {name: said}
    return said  # type: ignore[no-any-return]


def _check_value(key: str, head: str, said: Any) -> None:
    """Raise CliError for a value that its key never takes; null leaves the key to others."""
    if head == "tools" and key != head:
        check_tool_name(key.partition(".")[2])
    allowed = _ACTIONS if head == "tools" and key != head else _CHOICES.get(key)
    # By type too: 1 equals True.
    if said is not None and allowed is not None and (type(said), said) not in [(type(each), each) for each in allowed]:
        words = ", ".join(map(_word, allowed))
        raise CliError(f"{key} cannot be {visible(_word(said))}", f"it is one of {words}", code=USAGE)
    if head == "limits" and isinstance(said, str):
        raise CliError(f"{key} cannot be {visible(said)}", "it is a number, or null for no limit", code=USAGE)


def call_arguments(tool: str, args: tuple[str, ...]) -> Json:
    """The arguments object of a call as a person writes it at a terminal. Raises CliError if it is none."""
    if len(args) == 1 and args[0].lstrip().startswith("{"):
        try:
            value = json.loads(args[0])
        except ValueError:
            value = None
        if isinstance(value, dict):
            return value
    if tool == "bash.exec":
        return {"command": " ".join(args)}
    if tool == "process.exec":
        return {"argv": list(args)}
    names = _ARGUMENTS.get(tool)
    if names is not None and len(args) <= len(names):
        return dict(zip(names, args, strict=False))
    if not args:
        return {}
    takes = f"{tool} takes {', '.join(names)}" if names is not None else f"what {tool} takes is not known here"
    raise CliError(takes, 'give its arguments as one JSON object, such as \'{"path": "a.txt"}\'', code=USAGE)


def _unknown(field: str) -> CliError:
    near = get_close_matches(field.partition(".")[0], FIELDS, 1)
    remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(FIELDS)}"
    return CliError(f"a policy has no field {visible(field)}", remedy, code=USAGE)


def _without_nothing(value: Any) -> Any:
    """`value` without nulls and what is empty in objects; rules stay as they are."""
    if not isinstance(value, dict):
        return value
    kept = {name: _without_nothing(each) for name, each in value.items()}
    return {name: each for name, each in kept.items() if each is not None and each not in ({}, [])}


# ---- asking


def _address(options: Json) -> Json:
    if options["layer"] == "agent" and options["agent"] is None:
        raise CliError("--layer agent needs --agent ID", "`corral agents list` shows the agents", code=USAGE)
    named = (("layer", options["layer"]), ("agentId", options["agent"]))
    return {name: value for name, value in named if value is not None}


async def _get(corral: Corral, options: Json, *, effective: bool = False) -> Json:
    answer = await corral.request("policy.get", effective=effective, **_address(options))
    policy: Json = answer["policy"]
    return policy


async def _replace(corral: Corral, current: Json, wanted: Json, options: Json) -> int:
    """Let a layer say `wanted`, if it is still as it was in `current`."""
    patch = replacing(document_of(current), wanted)
    if not patch:
        print(f"it says that already: version {current['version']}", file=sys.stderr)
        return OK
    answer = await corral.request("policy.update", patch=patch, expectedVersion=current["version"], **_address(options))
    return _changed(answer, options)


def _changed(answer: Json, options: Json) -> int:
    if options["as_json"]:
        print_json(answer)
    else:
        print(f"{visible(answer['policy']['scopeKey'])} is now at version {answer['version']}")
    return OK


def _editor() -> str:
    """The person's editor. Raises CliError where they named none and could not use the usual one."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise CliError(
            "editing wants a terminal, or an EDITOR that needs none", "or use: corral policy set --file FILE"
        )
    return editor or "vi"


def _run_editor(editor: str, path: Path) -> None:
    """Have the person edit a file. Raises CliError if the editor cannot be run, or fails."""
    try:
        done = subprocess.run([*shlex.split(editor), str(path)], check=False)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CliError(f"the editor {editor!r} cannot be run ({why})", "set EDITOR to one that can") from None
    if done.returncode != 0:
        raise CliError(f"the editor {editor!r} ended with {done.returncode}: nothing was changed")


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
