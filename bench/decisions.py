"""What it takes to decide on a call: its facts, then the layers of a policy over them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from bench.children import ROOT
from bench.numbers import Numbers
from bench.stats import Row, Target
from corral.executor.catalogue import parse
from corral.governance.facts import facts_for
from corral.governance.policy import BUILT_IN, EffectivePolicy, Layer
from corral.governance.shell import _parser
from corral.protocol.types import PolicyDocument

_COMMAND = "git status && git diff | head -5 && " + " && ".join(
    f"ls -l src/part-{number}/module.py" for number in range(6)
)
_SESSION = {"id": "s_1", "agentId": "a_default", "runtimeMode": "local"}
_AT_ONCE = 20


def measure(folder: Path, numbers: Numbers) -> list[Row]:
    document = json.loads((ROOT / "docs/examples/policies/developer.json").read_bytes())
    policy = EffectivePolicy(
        [
            Layer(name="default", document=BUILT_IN),
            Layer(name="workspace", document=msgspec.convert(document, PolicyDocument)),
        ]
    )
    plain = Row(
        "deciding on a plain tool",
        "µs",
        "checking the same arguments against the tool's type",
        target=Target(100, at_most=True, absolute=True),
        note="`http.request`, facts and decision; the built-in policy and `docs/examples/policies/developer.json`.",
    )
    shell = Row(
        f"deciding on a shell command of {len(_COMMAND)} characters",
        "µs",
        "parsing the same text by tree-sitter",
        target=Target(1000, at_most=True, absolute=True),
        note="`bash.exec` of eight simple commands under the same policy, which has a rule for them.",
    )
    fetch = {"url": "https://example.com/a/b?c=d", "method": "GET"}
    parser, text = _parser(), _COMMAND.encode()
    for _ in range(numbers.decision_rounds):
        plain.add(
            _timed(lambda: _decide(policy, "http.request", fetch, folder)), _timed(lambda: parse("http.request", fetch))
        )
        shell.add(
            _timed(lambda: _decide(policy, "bash.exec", {"command": _COMMAND}, folder)),
            _timed(lambda: parser.parse(text)),
        )
    return [plain, shell]


def _decide(policy: EffectivePolicy, tool_name: str, args: dict[str, Any], root: Path) -> None:
    facts = facts_for(tool_name, "high", args, session=_SESSION, actor="u_owner", root=root)
    decision = policy.decide(facts).decision
    # Only the shell command has a rule that allows it.
    assert decision == ("allow" if tool_name == "bash.exec" else "approval-required"), decision


def _timed(work: Callable[[], object]) -> float:
    """Microseconds of one of several in a row."""
    begin = time.perf_counter()
    for _ in range(_AT_ONCE):
        work()
    return (time.perf_counter() - begin) / _AT_ONCE * 1e6
