"""What policy rules may speak of, parsed from a call's arguments before it is judged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from corral.executor.api import Facts
from corral.executor.http import parse_url
from corral.protocol.errors import ToolExecFailed

_FILE_TOOLS = frozenset({"file.read", "file.list", "file.search", "file.write", "file.edit"})


def facts(tool_name: str, args: dict[str, Any], root: Path) -> Facts:
    """The facts of a call whose arguments have passed `ToolExecutor.check`.

    path: `{absolute, relative, inWorkspace}`, links resolved as they are now; `relative` is from the
    session's folder on (with `..` where it lies outside). url: `{scheme, host, port, path}`. argv: the list.
    `none` for what has no facts and for what cannot be parsed: the rule that asks for them then fails.
    Reads links on the disk; changes nothing. What is opened later is judged again when it is opened.
    """
    if tool_name in _FILE_TOOLS:
        # Writing replaces a name, and never follows a link in its place: it is the name that is judged.
        return _path(str(args.get("path") or "."), root, follow=tool_name != "file.write")
    if tool_name == "http.request":
        return _url(str(args.get("url", "")))
    if tool_name == "process.exec":
        # policy.explain is asked about calls that no check would let through.
        argv = args.get("argv")
        return Facts(kind="argv", value=list(argv)) if isinstance(argv, list) else Facts()
    return Facts()


def _path(path: str, root: Path, *, follow: bool) -> Facts:
    if "\0" in path:
        return Facts()
    try:
        real_root = Path(os.path.realpath(root))
        absolute = _resolved(real_root / path, follow=follow)
    except (OSError, ValueError):
        return Facts()
    if Path(path).is_absolute() and not absolute.is_relative_to(real_root):
        absolute = _resolved(Path(path), follow=follow)
    return Facts(
        kind="path",
        value={
            "absolute": str(absolute),
            "relative": os.path.relpath(absolute, real_root),
            "inWorkspace": absolute.is_relative_to(real_root),
        },
    )


def _resolved(path: Path, *, follow: bool) -> Path:
    """Where a path leads; without `follow` a link at its end stays one. A `Path` ends in no slash and no dot."""
    if follow or path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def _url(text: str) -> Facts:
    try:
        url = parse_url(text)
    except ToolExecFailed:
        return Facts()
    host = (url.host or "").rstrip(".").lower()
    return Facts(kind="url", value={"scheme": url.scheme, "host": host, "port": url.port, "path": url.path})
