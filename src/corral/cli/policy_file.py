"""Checking a policy file by itself, with the server's own rules for what it keeps."""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from corral.governance.policy_examples import check_rules
from corral.protocol.errors import InvalidRequest
from corral.protocol.types import BashMode, BashNetwork, Decision, PolicyDocument

_PLACE = "$.params.patch."
_WORDS = {"bashMode": BashMode, "bashNetwork": BashNetwork}
"""The fields that take other words than a decision."""


def check(document: dict[str, Any]) -> dict[str, Any]:
    """`{ok, rules, examples, withoutExamples, problems}`: each rule's first problem, and what is wrong besides."""
    raw = document.get("rules", [])
    result: dict[str, Any] = {"ok": False, "rules": 0, "examples": 0, "withoutExamples": [], "problems": []}
    try:
        checked = msgspec.convert(document, PolicyDocument)
    except msgspec.ValidationError as error:
        said = str(error).replace("`", "").replace("$.", "")
        if said.startswith("Invalid enum value"):
            words = get_args(_WORDS.get(said.rpartition(" at ")[2], Decision))
            said += f": it is one of {', '.join(words)}"
        result["problems"].append(said)
        return result
    rules, problems = checked.rules, result["problems"]
    for index, rule in enumerate(rules):
        count = sum(len(examples) for examples in (rule.match, rule.not_match) if isinstance(examples, list))
        result["examples"] += count
        if not count:
            result["withoutExamples"].append(rule.id)
        try:
            check_rules([rule], [raw[index]])
        except InvalidRequest as error:
            said = error.message.removeprefix(f"{_PLACE}rules[0]")
            problems.append(f"rules[{index}] ({rule.id}){said}")
    if not problems:
        try:
            check_rules(rules, raw)  # all together: how many there are, and ids that come twice
        except InvalidRequest as error:
            problems.append(error.message.removeprefix(_PLACE))
    result["rules"] = len(rules)
    result["ok"] = not problems
    return result
