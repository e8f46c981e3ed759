"""The plain model: what the people did and were told, and what the store must therefore hold.

Everybody asks again, with the same key, until there is an answer. So nothing is left open: the
sessions, runs, modes, titles and versions that there must be are known exactly, whatever was
killed meanwhile. What a run comes to is known up to what was done to it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tests.support.invariants.snapshot import Row, Snapshot
from tests.support.model_server import CallTools, CutAfter, Say, Status, turns_since_user, user_texts

TENANT = "t_default"

POLICY = {
    "tools": {
        "bash.exec": "allow",
        "process.exec": "approval-required",
        "file.write": "allow",
        "http.request": "deny",
    }
}

KINDS = ("mark", "slow", "two", "ask", "write", "deny", "read")
_WEIGHTS = (5, 2, 3, 4, 2, 1, 2)


def plan(rng: random.Random) -> list[str]:
    """What a run is to do, step by step, before it says that it is done."""
    return rng.choices(KINDS, _WEIGHTS, k=rng.choice((0, 1, 1, 2, 2, 3)))


def task(tag: str, steps: Sequence[str]) -> str:
    """The input that makes the model carry out a plan."""
    return " ".join([tag, *steps])


def _mark(tag: str, step: int, call: int) -> str:
    return f"{tag}.{step}.{call}"


def _calls(tag: str, step: int, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls of a step; those that leave a mark leave one of their own."""

    def marking(call: int, before: str = "") -> tuple[str, dict[str, Any]]:
        return "bash_exec", {"command": f"{before}echo {_mark(tag, step, call)} >> marks"}

    match kind:
        case "mark":
            return [marking(0)]
        case "slow":
            return [marking(0, "sleep 0.4; ")]
        case "two":
            return [marking(0), ("file_list", {}), marking(1)]
        case "ask":
            return [("process_exec", {"argv": ["sh", "-c", f"echo {_mark(tag, step, 0)} >> marks"]}), marking(1)]
        case "write":
            return [("file_write", {"path": _mark(tag, step, 0), "content": tag})]
        case "deny":
            return [("http_request", {"url": "http://example.com"}), marking(1)]
        case _:
            return [("file_list", {}), ("file_search", {"pattern": tag})]


def closing(tag: str) -> str:
    return f"{tag} is done: all that was to be done has been done or said why not."


class Brain:
    """The model: it carries plans out, and now and then it fails as models do."""

    def __init__(self, seed: str) -> None:
        self._rng = random.Random(seed)
        self._failed: set[tuple[str, int]] = set()

    def __call__(self, request: dict[str, Any]) -> Any:
        tag, *steps = user_texts(request)[-1].split()
        turn, luck = turns_since_user(request), self._rng.random()
        # Once for each step: what fails more often than it is tried again may fail the run.
        if luck < 0.05 and (tag, turn) not in self._failed:
            self._failed.add((tag, turn))
            return Status(503, retry_after=0) if luck < 0.025 else CutAfter(2, delay=0)
        if turn < len(steps):
            return CallTools(_calls(tag, turn, steps[turn]), text="I go on." if luck < 0.5 else "")
        return Say(closing(tag), chunks=8, delay=0.01)


@dataclass
class ExpectedSession:
    title: str
    mode: str = "local"


@dataclass
class ExpectedRun:
    """A run that was accepted; times are those of the monotonic clock here."""

    session: str
    tag: str
    steps: list[str]
    mode: str | None
    asked_at: float
    seen_ended_at: float | None = None
    abort_asked: bool = False


@dataclass
class Expected:
    """All that was answered, in the form of what must be there."""

    sessions: dict[str, ExpectedSession] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    """Sessions that several people use: their titles and modes are whoever's came last."""
    runs: dict[str, ExpectedRun] = field(default_factory=dict)
    policy_version: int = 0
    policy_tools: dict[str, str] = field(default_factory=dict)
    decisions: dict[str, str] = field(default_factory=dict)
    outages: list[tuple[float, float]] = field(default_factory=list)
    """When the model could not be had: from, to."""
    kills: list[float] = field(default_factory=list)
    leaps: list[float] = field(default_factory=list)
    """When the clock was set forward by more than a run's time."""

    def problems(self, store: Snapshot, marks: Counter[str]) -> Iterator[str]:
        """What the store has otherwise, in sentences. `marks`: how often each was left."""
        yield from self._sessions(store)
        yield from self._settings(store)
        there = {run_id for tenant, run_id in store.runs if tenant == TENANT}
        yield from (f"run {run_id} was accepted and is not there" for run_id in self.runs.keys() - there)
        yield from (f"run {run_id} is there and nobody was told of it" for run_id in there - self.runs.keys())
        calls: dict[str, list[Row]] = {}
        for row in store.tables["tool_runs"]:
            calls.setdefault(row["run_id"], []).append(row)
        left = Counter(marks)
        for run_id, run in self.runs.items():
            if run_id in there:
                row = store.runs[TENANT, run_id]
                yield from (f"run {run_id} ({run.tag}) {problem}" for problem in self._run(row, run))
                for problem in _effects(run, row, calls.get(run_id, []), left):
                    yield f"run {run_id} ({run.tag}) {problem}"
        yield from (f"mark {mark} was left {times} times by nobody's call" for mark, times in left.items() if times)

    def _sessions(self, store: Snapshot) -> Iterator[str]:
        there = {session_id: row for (tenant, session_id), row in store.sessions.items() if tenant == TENANT}
        yield from (f"session {name} was made and is not there" for name in self.sessions.keys() - there.keys())
        yield from (f"session {name} is there and nobody made it" for name in there.keys() - self.sessions.keys())
        for name in there.keys() & self.sessions.keys() - self.shared:
            row, due = there[name], self.sessions[name]
            if row["title"] != due.title:
                yield f"session {name} has the title {row['title']!r}; {due.title!r} was the last"
            if row["runtime_mode"] != due.mode or row["queued_runtime_mode"] is not None:
                yield f"session {name} is {row['runtime_mode']} (queued: {row['queued_runtime_mode']}), last {due.mode}"

    def _settings(self, store: Snapshot) -> Iterator[str]:
        for row in store.tables["policies"]:
            if (row["tenant_id"], row["layer"]) == (TENANT, "workspace"):
                if row["version"] != self.policy_version:
                    yield f"the policy is at version {row['version']}; {self.policy_version} was the last"
                tools = msgspec.json.decode(row["document"])["tools"]
                if tools != self.policy_tools:
                    yield f"the policy says {tools}; {self.policy_tools} was the last"
        for approval_id, decision in self.decisions.items():
            status = store.approvals[TENANT, approval_id]["status"]
            if status != decision:
                yield f"approval {approval_id} is {status}; {decision} was answered"

    def _run(self, row: Row, run: ExpectedRun) -> Iterator[str]:
        if row["session_id"] != run.session:
            yield f"is in session {row['session_id']}"
        if run.mode is not None and row["runtime_mode"] != run.mode:
            yield f"ran {row['runtime_mode']} in a session that was {run.mode}"
        if row["status"] == "completed":
            if row["output"] != closing(run.tag) or row["steps"] != len(run.steps) + 1:
                yield f"completed after {row['steps']} steps of {len(run.steps) + 1} with {row['output']!r}"
            if row["runtime_mode"] == "cloud":
                yield "completed in the cloud, where there is none"
            return
        error = msgspec.json.decode(row["error"]) if row["error"] is not None else {"code": None}
        if error["code"] not in self._excused(row, run):
            yield f"is {row['status']} ({error}), which nothing explains"

    def _excused(self, row: Row, run: ExpectedRun) -> set[str]:
        """The codes with which this run may have failed, by what was done to it."""
        codes = set()
        if run.abort_asked:
            codes.add("ABORTED")
        if row["runtime_mode"] == "cloud":
            codes.add("SANDBOX_UNAVAILABLE")
        end = run.seen_ended_at if run.seen_ended_at is not None else float("inf")
        if any(begun <= end and ended >= run.asked_at for begun, ended in self.outages):
            codes.add("MODEL_UNAVAILABLE")
        if any(run.asked_at <= at <= end for at in self.leaps):
            # Between its acceptance, or its being taken up, and its first step a run's time is that of the clock.
            codes.add("LIMIT_REACHED")
        if sum(run.asked_at <= at <= end for at in self.kills) >= 5 and row["stalls"] >= 5:
            codes.add("INTERNAL_ERROR")
        return codes


def _effects(run: ExpectedRun, row: Row, calls: Sequence[Row], left: Counter[str]) -> Iterator[str]:
    """That the run made the calls of its plan, each once, and that each left what its result says. Takes its marks."""
    due: list[tuple[str, dict[str, Any]]] = []
    for step, kind in enumerate(run.steps):
        due += [(name.replace("_", "."), args) for name, args in _calls(run.tag, step, kind)]
    made = sorted(calls, key=lambda call: (call["step"], call["position"]))
    told = [(call["tool_name"], msgspec.json.decode(call["args"])) for call in made]
    if told != due[: len(told)] or (row["status"] == "completed" and len(told) != len(due)):
        yield f"made the calls {told}; its plan is {due}"
        return
    for call in made:
        mark = _mark_of(call)
        times = left.pop(mark, 0) if mark is not None else 0
        name = f"call {call['id']} ({call['tool_name']}), {call['status']},"
        if row["runtime_mode"] == "cloud" and (times or call["started_at"] is not None):
            yield f"{name} was started here for a run in the cloud"
        if mark is None:
            continue
        allowed = {"success": (1,), "interrupted": (0, 1), "denied": (0,)}.get(call["status"])
        if allowed is None or times not in allowed:
            yield f"{name} left its mark {times} times"
        if times and call["started_at"] is None:
            yield f"{name} left its mark, and no start of it is recorded"


def _mark_of(call: Row) -> str | None:
    args = msgspec.json.decode(call["args"])
    words = str(args.get("command") or (args.get("argv") or [""])[-1]).split()
    return words[words.index("echo") + 1] if "echo" in words else None


def marks_in(folder: Path) -> Counter[str]:
    """What the tools left in all sessions' folders."""
    marks: Counter[str] = Counter()
    for path in folder.glob("*/marks"):
        marks.update(path.read_text().split())
    return marks
