"""Spans of runs: one tree, without payloads, through a crash; and a collector that fails harms nothing."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from corral import server as assembled
from corral.clock import SystemClock
from corral.ids import Ids
from corral.otel import Traces, span_number, trace_number
from corral.tracing import Span, wanted
from tests.core.conftest import OPEN_TOOLS
from tests.core.test_recovery import connected
from tests.support import needs
from tests.support.collector import Collector
from tests.support.gateway import Gateway
from tests.support.house import house
from tests.support.model_server import CallTools, ModelServer, Say, Status, conversation
from tests.support.wire import Wire

CANARY = "canary-7f3a"


def tree(spans: Sequence[ReadableSpan]) -> dict[str, list[ReadableSpan]]:
    found: dict[str, list[ReadableSpan]] = {}
    for span in spans:
        found.setdefault(span.name, []).append(span)
    return found


def said(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_run_is_a_tree_of_spans_with_its_ids_and_nothing_that_anybody_wrote(tmp_path: Path) -> None:
    kept = InMemorySpanExporter()
    script = conversation(
        [
            CallTools([("file_write", {"path": f"{CANARY}.txt", "content": CANARY})], text=f"{CANARY} I write."),
            CallTools([("file_read", {"path": f"missing-{CANARY}"}), ("file_list", {})]),
            Say(f"{CANARY} done."),
        ]
    )
    async with house(tmp_path / "data", script=script, traces=Traces(kept)) as home, await home.wire() as wire:
        await wire.effect("policy.update", patch=OPEN_TOOLS)
        run = await wire.effect("agent.run", input=f"go {CANARY}", sessionId="s1")
        await wire.event("agent.completed")
        audit = await wire.request("audit.query", {"runId": run["runId"], "limit": 100})
    spans = kept.get_finished_spans()
    found = tree(spans)
    assert {name: len(each) for name, each in found.items()} == {
        "connect": 1,
        "agent.run": 1,
        "invoke_agent a_default": 1,
        "chat test": 3,
        "execute_tool file.write": 1,
        "execute_tool file.read": 1,
        "execute_tool file.list": 1,
    }
    [connect], [request], [whole] = found["connect"], found["agent.run"], found["invoke_agent a_default"]
    assert connect.context is not None
    assert request.context is not None
    assert whole.context is not None
    assert request.parent is None
    assert [link.context.span_id for link in request.links] == [connect.context.span_id]
    assert whole.parent is not None
    assert whole.parent.span_id == request.context.span_id
    inner = [span for name, each in found.items() if name.startswith(("chat", "execute_tool")) for span in each]
    assert {span.parent.span_id for span in inner if span.parent} == {whole.context.span_id}
    # The trace's id is the UUID of the traceId that the audit has.
    [trace_id] = {record["traceId"] for record in audit["items"]}
    of_run = [request, whole, *inner]
    assert {span.context.trace_id for span in of_run if span.context} == {int(trace_id.removeprefix("tr_"), 16)}
    for span in (whole, *inner):
        about = said(span)
        assert about["corral.tenant.id"] == "t_default"
        assert (about["corral.session.id"], about["corral.run.id"]) == ("s1", run["runId"])
        assert about["corral.trace.id"] == trace_id
        assert about["gen_ai.conversation.id"] == "s1"
    first = said(found["chat test"][0])
    assert (first["gen_ai.operation.name"], first["gen_ai.provider.name"]) == ("chat", "openai")
    assert (first["gen_ai.usage.input_tokens"], first["gen_ai.usage.output_tokens"]) == (100, 10)
    assert first["gen_ai.response.finish_reasons"] == ("tool_call",)
    read = said(found["execute_tool file.read"][0])
    assert read["error.type"] == "TOOL_EXEC_FAILED"
    assert (said(whole)["corral.run.status"], said(whole)["corral.run.steps"]) == ("completed", 3)
    assert CANARY not in "".join(span.to_json() for span in spans)


async def test_a_run_that_was_aborted_while_a_person_was_asked_has_its_span_too(tmp_path: Path) -> None:
    kept = InMemorySpanExporter()
    script = conversation([CallTools([("bash_exec", {"command": "ls"})])])
    async with house(tmp_path / "data", script=script, traces=Traces(kept)) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="go")
        await wire.event("approval.required")
        await wire.effect("agent.abort", runId=run["runId"])
        await wire.event("agent.failed")
    [whole] = tree(kept.get_finished_spans())["invoke_agent a_default"]
    assert (said(whole)["corral.run.status"], said(whole)["error.type"]) == ("aborted", "ABORTED")


async def test_a_run_whose_end_is_not_yet_told_when_the_server_stops_is_told_before_it_has_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, stopping = InMemorySpanExporter(), asyncio.Event()
    async with house(tmp_path / "data", script=[Say("fine")], traces=Traces(kept)) as home, await home.wire() as wire:
        telling = home.server._run_traces
        assert telling is not None
        tell, stop = telling._tell, telling._stop

        async def slow(tenant_id: str, run_id: str) -> None:
            await stopping.wait()
            await tell(tenant_id, run_id)

        def stopped() -> None:
            stop()
            stopping.set()

        monkeypatch.setattr(telling, "_tell", slow)
        monkeypatch.setattr(telling, "_stop", stopped)
        await wire.effect("agent.run", input="go")
        await wire.event("agent.completed")
    assert len(tree(kept.get_finished_spans())["invoke_agent a_default"]) == 1


async def test_a_model_that_does_not_answer_and_a_handshake_that_fails_are_errors(tmp_path: Path) -> None:
    kept = InMemorySpanExporter()
    async with house(tmp_path / "data", script=[Status(401)] * 3, traces=Traces(kept)) as home:
        wire = await Wire.open(home.url)
        async with wire:
            await wire.call("connect", {"auth": {"token": "wrong"}})
        async with await home.wire() as wire:
            await wire.effect("agent.run", input="go")
            await wire.event("agent.failed")
    found = tree(kept.get_finished_spans())
    assert [said(span).get("error.type") for span in found["connect"]] == ["UNAUTHORIZED", None]
    assert said(found["chat test"][0])["error.type"] == "MODEL_UNAVAILABLE"
    assert said(found["invoke_agent a_default"][0])["error.type"] == "MODEL_UNAVAILABLE"


def traced(tmp_path: Path, model: ModelServer, endpoint: str) -> Gateway:
    env = {
        "CORRAL_MODEL": "openai-chat:test",
        "CORRAL_LOG_FORMAT": "json",
        "OPENAI_BASE_URL": model.base_url,
        "OPENAI_API_KEY": "sk-canary-0123456789",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    return Gateway(tmp_path / "data", env)


async def test_a_run_taken_up_after_a_kill_goes_on_in_the_same_trace(tmp_path: Path) -> None:
    needs.bubblewrap()
    script = conversation(
        [
            CallTools([("bash_exec", {"command": "echo one"})]),
            CallTools([("bash_exec", {"command": "touch up; sleep 777"})]),
            Say("I see."),
        ]
    )
    async with Collector() as collector, ModelServer(script) as model:
        async with traced(tmp_path, model, collector.url) as running:
            wire = await connected(running)
            await wire.effect("policy.update", patch=OPEN_TOOLS)
            run = await wire.effect("agent.run", input="go", sessionId="s1")
            await collector.until(lambda: len(collector.named("chat test")) == 2)
            await running.kill()
            await wire.close()
            assert collector.named("invoke_agent a_default") == []
            await running.start()
            await collector.until(lambda: bool(collector.named("invoke_agent a_default")))
        [whole], [request] = collector.named("invoke_agent a_default"), collector.named("agent.run")
        assert whole.parent_span_id == request.span_id
        inner = [span for span in collector.spans if span.name.startswith(("chat", "execute_tool"))]
        assert sorted(span.name for span in inner) == ["chat test"] * 3 + ["execute_tool bash.exec"]
        assert {span.parent_span_id for span in inner} == {whole.span_id}
        assert {span.trace_id for span in (*inner, whole)} == {request.trace_id}
        assert int.from_bytes(whole.span_id) == span_number(run["runId"])
        attempts = next(each.value.int_value for each in whole.attributes if each.key == "corral.run.attempts")
        assert attempts == 2
        assert collector.services == {"corral"}


@pytest.mark.parametrize("status", [None, 503])
async def test_a_collector_that_takes_nothing_disturbs_no_run_and_is_told_of_once(
    tmp_path: Path, status: int | None
) -> None:
    async with Collector(status or 200) as collector, ModelServer([Say("fine")] * 5) as model:
        endpoint = collector.url if status else "http://127.0.0.1:9"
        running = traced(tmp_path, model, endpoint)
        async with running, await connected(running) as wire:
            for number in range(5):
                await wire.effect("agent.run", input="go", sessionId=f"s{number}")
                await wire.event("agent.completed", sessionId=f"s{number}")
            if status:
                await collector.until(lambda: collector.requests > 0)
        assert running.process.returncode == 0
        lines = [json.loads(line) for line in running.log.splitlines()]
        actions = [line.get("action") for line in lines]
        assert actions.count("traces.export_failed") <= 1
        assert {"traces.export_failed", "traces.close_timeout"} & set(actions)
        assert not [line for line in lines if line["level"] == "error"]


async def test_the_lines_that_a_run_logs_have_its_ids(tmp_path: Path) -> None:
    async with ModelServer([Status(401)] * 3) as model, Collector() as collector:
        async with traced(tmp_path, model, collector.url) as running, await connected(running) as wire:
            run = await wire.effect("agent.run", input=f"go {CANARY}", sessionId="s1")
            await wire.event("agent.failed")
            audit = await wire.request("audit.query", {"runId": run["runId"], "limit": 1})
        assert CANARY not in running.log
        lines = [json.loads(line) for line in running.log.splitlines()]
        failed = next(line for line in lines if line.get("action") == "model.failed")
        assert (failed["tenant"], failed["session"], failed["run"]) == ("t_default", "s1", run["runId"])
        assert failed["trace_id"] == audit["items"][0]["traceId"]


def test_where_no_endpoint_is_set_nothing_of_opentelemetry_is_imported() -> None:
    program = "import sys, corral.server as s; s._traces({}); print(sorted(m for m in sys.modules if 'otel' in m or m.startswith('opentelemetry')))"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_what_asks_for_traces() -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    assert wanted(endpoint)
    assert wanted({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"})
    assert not wanted({})
    assert not wanted({"OTEL_EXPORTER_OTLP_ENDPOINT": " "})
    assert not wanted({**endpoint, "OTEL_SDK_DISABLED": "true"})
    assert not wanted({**endpoint, "OTEL_TRACES_EXPORTER": "none"})


def test_a_server_without_the_library_says_so_and_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "corral.otel", None)
    assert assembled._traces({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}) is None
    assert [record.__dict__["action"] for record in caplog.records] == ["traces.not_installed"]


async def test_a_ratio_takes_or_leaves_whole_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    kept = InMemorySpanExporter()
    traces, ids = Traces(kept), Ids(SystemClock())
    asked = [(ids.new("tr"), ids.new("run")) for _ in range(400)]

    def span(trace_id: str, own: str, parent: str) -> Span:
        return Span(
            name="s",
            kind="internal",
            trace_id=trace_id,
            own=own,
            parent=parent,
            started_ns=1,
            ended_ns=2,
            attributes={},
        )

    for trace_id, run_id in asked:
        for own, parent in ((trace_id, ""), (run_id, trace_id), ("", run_id)):
            traces.record(span(trace_id, own, parent))
    await asyncio.to_thread(traces.close)
    counts: dict[int, int] = {}
    for each in kept.get_finished_spans():
        assert each.context is not None
        counts[each.context.trace_id] = counts.get(each.context.trace_id, 0) + 1
    assert set(counts.values()) == {3}
    assert 50 <= len(counts) <= 160
    assert set(counts) <= {trace_number(trace_id) for trace_id, _ in asked}
