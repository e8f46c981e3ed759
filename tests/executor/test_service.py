from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from corral.executor.api import FULL_OUTPUT_LIMIT, OUTPUT_LIMIT, Call, ToolExecutor
from corral.executor.service import Executor
from tests.executor.make import Bench, context
from tests.support import needs


class SteppingClock:
    """Each look at the clock finds it 1.5 s later."""

    def __init__(self) -> None:
        self.now = 0.0

    def now_ms(self) -> int:
        return round(self.now * 1000)

    def monotonic(self) -> float:
        self.now += 1.5
        return self.now


def test_it_is_a_tool_executor() -> None:
    executor: ToolExecutor = Executor()
    assert [spec.name for spec in executor.specs()][:2] == ["bash.exec", "process.exec"]
    assert executor.spec("nope") is None
    assert executor.check("file.list", {}) is None


async def test_output_is_stdout_then_stderr_then_the_status_and_a_status_is_a_failure(bench: Bench) -> None:
    needs.bubblewrap()
    outcome = await bench.bash("echo err >&2; echo out; exit 3")
    assert outcome.output == "out\nerr\nexit status 3\n"
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert (outcome.error.code, outcome.error.message) == ("TOOL_EXEC_FAILED", "exit status 3")


async def test_what_was_printed_before_the_time_was_up_is_kept(bench: Bench) -> None:
    outcome = await bench.on(bash_mode="host").bash("echo before; sleep 60", timeoutMs=300)
    assert outcome.output.startswith("before\n")
    assert "300 ms" in outcome.output


async def test_the_contexts_time_bounds_the_calls_own(bench: Bench) -> None:
    outcome = await bench.on(bash_mode="host", timeout_ms=300).bash("sleep 60", timeoutMs=60_000)
    assert outcome.error is not None
    assert "300 ms" in outcome.error.message


async def test_long_output_is_cut_for_the_model_and_kept_whole_beside(bench: Bench) -> None:
    outcome = await bench.on(bash_mode="host").bash("seq 100000")
    assert outcome.truncated
    assert len(outcome.output) <= OUTPUT_LIMIT
    assert outcome.output.startswith("1\n2\n")
    assert outcome.output.endswith("99999\n100000\n")
    assert outcome.full is not None
    assert outcome.full.decode() == "".join(f"{number}\n" for number in range(1, 100001))


async def test_output_beyond_what_is_kept_is_dropped_and_said_to_be(bench: Bench) -> None:
    outcome = await bench.on(bash_mode="host").bash("yes | head -c 20000000; echo end")
    assert outcome.status == "success"
    assert outcome.full is not None
    assert len(outcome.full) <= FULL_OUTPUT_LIMIT
    assert b"bytes were not kept" in outcome.full
    assert outcome.output.endswith("end\n")


async def test_durations_come_from_the_injected_clock(root: Path) -> None:
    executor = Executor(clock=SteppingClock())
    assert (await Bench(executor, root).call("file.list")).duration_ms == 1500
    await executor.close()


async def test_wrong_arguments_and_unknown_tools_are_results_not_exceptions(bench: Bench) -> None:
    outcome = await bench.call("bash.exec", command=5)
    assert outcome.error is not None
    assert outcome.error.message == "$.command: expected string, got integer"
    assert (await bench.call("nope")).status == "failed"


async def test_an_unexpected_exception_is_logged_and_tells_the_model_nothing(
    bench: Bench, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*args: Any) -> None:
        raise KeyError(f"{root}/secret-path")

    driver = bench.executor._drivers["local"]
    monkeypatch.setattr(driver, "execute", broken)
    with caplog.at_level(logging.ERROR):
        outcome = await bench.call("file.list")
    assert outcome.error is not None
    assert outcome.error.code == "INTERNAL_ERROR"
    assert str(root) not in outcome.output + outcome.error.message
    assert "Traceback" not in outcome.output
    assert any(getattr(record, "action", "") == "tool.error" for record in caplog.records)


async def test_a_command_that_is_not_there_is_named(bench: Bench) -> None:
    needs.bubblewrap()
    for mode in ("sandbox", "host"):
        outcome = await bench.on(bash_mode=mode).call("process.exec", argv=["no-such-program"])
        assert outcome.error is not None
        assert outcome.error.message == "cannot run no-such-program: No such file or directory"


async def test_a_closed_executor_runs_nothing(root: Path) -> None:
    executor = Executor()
    await executor.close()
    outcome = await executor.execute(
        Call(id="tc", tool_name="bash.exec", args={"command": "touch ran"}), context(root, bash_mode="host")
    )
    assert outcome.status == "failed"
    assert list(root.iterdir()) == []
