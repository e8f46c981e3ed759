"""`corral stats`: what came of the runs of a period."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from corral.cli import OK, completing
from corral.cli.calling import ask
from corral.cli.common import data_dir_option
from corral.cli.find import url_option
from corral.cli.tables import print_json
from corral.cli.times import given_time
from corral.cli.visible import visible

if TYPE_CHECKING:
    from corral.client import Corral

_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("runs", ("total", "completed", "failed", "aborted", "success rate")),
    ("latency", ("median", "95 of 100 within", "99 of 100 within")),
    ("tool calls", ("total", "failed")),
    ("approvals", ("waiting now", "approved", "rejected", "median wait")),
    ("models", ("tokens in", "tokens out", "cost")),
)


@click.command()
@click.option(
    "--from", "from_", metavar="TIME", help="From this time on: RFC 3339, a day, or so long ago, like 2h or 7d."
)
@click.option("--to", metavar="TIME", help="Before this time. [default: now]")
@click.option("--agent", metavar="ID", shell_complete=completing.agents, help="Only runs of this agent.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@data_dir_option
@url_option
def command(**options: Any) -> int:
    """What came of the runs of a period: counts, latencies, costs.

    A run belongs to the period in which it ended. By default that is the last 24 hours.

    Exit codes: 0 done, 2 wrong usage, 4 no gateway, 5 refused for want of a role.
    """
    given = {"from": options["from_"], "to": options["to"]}
    params = {name: given_time(text, f"--{name}") for name, text in given.items() if text is not None}
    if options["agent"] is not None:
        params["agentId"] = options["agent"]

    async def go(corral: Corral) -> dict[str, Any]:
        metrics: dict[str, Any] = (await corral.request("metrics.summary", **params))["metrics"]
        return metrics

    metrics = ask(options, go)
    if options["as_json"]:
        print_json(metrics)
    else:
        print("\n".join(_lines(metrics, options["agent"])))
    return OK


def _lines(metrics: dict[str, Any], agent: str | None) -> list[str]:
    of = f" of agent {visible(agent)}" if agent is not None else ""
    lines = [*_title(f"Runs{of} that ended from {metrics['from']} to {metrics['to']}"), ""]
    for (title, names), values in zip(_GROUPS, _values(metrics), strict=True):
        for position, (name, value) in enumerate(zip(names, values, strict=True)):
            lines.append(f"{title if position == 0 else '':<12}{name:<18}{value:>12}")
        if title == "runs":
            lines += [f"{'':<14}{visible(code):<28}{count:>6,} failed" for code, count in _reasons(metrics)]
    return lines


def _title(text: str) -> list[str]:
    if not sys.stdout.isatty():
        return [text]
    from corral.cli.columns import fold
    from corral.cli.show import width

    return fold(text, max(20, width()), "")


def _values(metrics: dict[str, Any]) -> list[list[str]]:
    rate, cost = metrics["successRate"], metrics["costUsd"]
    return [
        [
            *_counts(metrics, "runsTotal", "runsCompleted", "runsFailed", "runsAborted"),
            "-" if rate is None else f"{rate:.1%}",
        ],
        [_time(metrics[name]) for name in ("p50LatencyMs", "p95LatencyMs", "p99LatencyMs")],
        _counts(metrics, "toolCallsTotal", "toolFailures"),
        [
            *_counts(metrics, "approvalsPending", "approvalsApproved", "approvalsRejected"),
            _time(metrics["approvalWaitP50Ms"]),
        ],
        [*_counts(metrics, "inputTokens", "outputTokens"), "not known" if cost is None else f"${cost:,.4f}"],
    ]


def _counts(metrics: dict[str, Any], *names: str) -> list[str]:
    return [f"{metrics[name]:,}" for name in names]


def _reasons(metrics: dict[str, Any]) -> list[tuple[str, int]]:
    """The most frequent first."""
    return sorted(metrics["failureReasons"].items(), key=lambda item: (-item[1], item[0]))


def _time(millis: float | None) -> str:
    """A length of time in the unit that suits it."""
    if millis is None:
        return "-"
    if millis < 1000:
        return f"{millis:.0f} ms"
    seconds = millis / 1000
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
