"""Every line that the gateway logs says what was done and to whom, and none has what was sent."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import corral.gateway

ROOM = Path(corral.gateway.__file__ or "").parent
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
# Made by a function of the class: it has `action` for its first parameter.
MAKERS = {"_about"}


def calls() -> Iterator[tuple[str, ast.Call, ast.Module]]:
    for path in sorted(ROOM.glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LEVELS
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "logger"
            ):
                yield f"{path.name}:{node.lineno}", node, tree


def test_every_line_has_an_action_and_a_fixed_text() -> None:
    seen = 0
    for place, call, tree in calls():
        seen += 1
        assert isinstance(call.args[0], ast.Constant), f"{place}: the text is fixed; what varies goes into extra"
        extra = next((word.value for word in call.keywords if word.arg == "extra"), None)
        assert extra is not None, f"{place}: no extra"
        assert has_action(extra, tree), f"{place}: no action"
    assert seen > 15


def has_action(extra: ast.expr, tree: ast.Module) -> bool:
    if isinstance(extra, ast.Dict):
        keys = [key.value for key in extra.keys if isinstance(key, ast.Constant)]
        spread = [value for key, value in zip(extra.keys, extra.values, strict=True) if key is None]
        return "action" in keys or any(has_action(value, tree) for value in spread)
    if isinstance(extra, ast.Call):
        name = extra.func.attr if isinstance(extra.func, ast.Attribute) else getattr(extra.func, "id", "")
        return name in MAKERS
    if isinstance(extra, ast.Name):
        given = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == extra.id for target in node.targets)
        ]
        return any(has_action(value, tree) for value in given)
    return False
