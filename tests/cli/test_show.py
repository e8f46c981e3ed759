"""How the events of a run look in a terminal."""

from __future__ import annotations

import io

import pytest

from corral.cli.show import Transcript
from corral.protocol.events import AgentToolResult, ToolError
from corral.protocol.frames import Event


@pytest.mark.parametrize(
    ("status", "duration_ms", "shown"),
    [
        ("interrupted", 0, "interrupted (TOOL_EXEC_FAILED)"),
        ("interrupted", 12_300, "interrupted (TOOL_EXEC_FAILED, 12.3 s)"),
        ("failed", 0, "failed (TOOL_EXEC_FAILED, 0 ms)"),
    ],
)
def test_a_result_is_shown_with_how_long_the_call_ran_where_that_is_known(
    status: str, duration_ms: int, shown: str
) -> None:
    out = io.StringIO()
    result = AgentToolResult(
        session_id="s1",
        run_id="run_1",
        tool_call_id="tc_1",
        tool_name="bash.exec",
        status=status,  # type: ignore[arg-type]
        output="",
        error=ToolError(code="TOOL_EXEC_FAILED", message="why"),
        duration_ms=duration_ms,
        truncated=False,
    )
    Transcript(io.StringIO(), out).event(Event(event="agent.tool_result", payload=result, state_version=1))
    assert out.getvalue().splitlines() == [f"  {shown}"]
