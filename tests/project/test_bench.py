"""The benchmarks run, say what they measured, and leave nobody behind. What they find is not judged here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.stats import Row, Target
from bench.table import cells
from tests.support import needs

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    """The benchmarks in a session of their own, by which their processes are found again.

    As a terminal starts them: who runs the suite in the background has SIGINT ignored, and children inherit that.
    """
    argv = [sys.executable, "-m", "bench", "--tiny", "--dir", str(folder), *arguments]
    return subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def processes_of_session(leader: int) -> list[str]:
    """Command lines of the session's processes that have not ended."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, _, _, session = Path("/proc", entry, "stat").read_text().rpartition(") ")[2].split()[:4]
                line = Path("/proc", entry, "cmdline").read_text()
            except OSError:
                continue
            if int(session) == leader and state != "Z":
                found.append(line.replace("\0", " "))
    return found


def test_every_part_runs_and_its_rows_come_with_the_machine(tmp_path: Path) -> None:
    needs.bubblewrap()
    work, samples, page = tmp_path / "work", tmp_path / "samples.json", tmp_path / "page.md"
    work.mkdir()
    bench = start("--json", str(samples), "--markdown", str(page), folder=work)
    out, errors = bench.communicate(timeout=110)
    assert bench.returncode == 0, errors
    said = json.loads(samples.read_text())
    names = [row["name"] for row in said["rows"]]
    for part in (
        "durable turn",
        "at once",
        "durable events",
        "deltas",
        "idle",
        "appends",
        "start",
        "sandbox",
        "help",
        "deciding",
    ):
        assert any(part in name for name in names), part
    for row in said["rows"]:
        assert len(row["ours"]["samples"]) == len(row["bare"]["samples"]) == row["rounds"] > 0
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
        assert min(row["ours"]["samples"] + row["bare"]["samples"]) > 0
    for text in (out, page.read_text()):
        assert all(name in text for name in names)
        assert said["machine"]["kernel"] in text
    assert processes_of_session(bench.pid) == []
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_it_ends_all_its_processes_and_removes_its_files(
    tmp_path: Path, number: signal.Signals
) -> None:
    bench = start("--only", "turns", folder=tmp_path)
    with bench:
        assert bench.stderr is not None
        assert bench.stderr.readline() == "measuring: turns\n"
        # Until the gateway is there: the model server is before it.
        while not any("corral serve" in line for line in processes_of_session(bench.pid)):
            assert bench.poll() is None
        bench.send_signal(number)
        _, errors = bench.communicate(timeout=60)
        assert bench.returncode == 130, errors
    assert errors == "stopped\n"
    assert processes_of_session(bench.pid) == []
    assert list(tmp_path.iterdir()) == []


def test_a_ratio_is_the_median_of_neighbouring_pairs_and_not_of_the_whole() -> None:
    row = Row("a", "ms", "b", target=Target(3.0, at_most=True))
    for ours, bare in ((2.0, 1.0), (20.0, 10.0), (4.0, 1.0)):  # the machine was slow for a while
        row.add(ours, bare)
    assert row.ratios == [2.0, 2.0, 4.0]
    assert cells(row)[1:] == ("4.00 ms", "1.00 ms", "2.00× (2.00× to 4.00×)", "≤ 3×: met", "3")


@pytest.mark.parametrize(("ratio", "verdict"), [(0.59, "missed"), (0.6, "met")])
def test_a_rate_is_shown_in_percent_and_more_of_it_is_better(ratio: float, verdict: str) -> None:
    row = Row("a", "/s", "b", target=Target(0.6, at_most=False))
    row.add(1000 * ratio, 1000.0)
    assert f"≥ 60%: {verdict}" in cells(row)
    assert f"{ratio:.0%} " in cells(row)[3]


@pytest.mark.parametrize(("ours", "verdict"), [(101.0, "missed"), (100.0, "met")])
def test_an_absolute_bound_is_kept_by_our_own_figure_whatever_the_ratio(ours: float, verdict: str) -> None:
    row = Row("a", "µs", "b", target=Target(100, at_most=True, absolute=True))
    row.add(ours, 1.0)
    assert f"≤ 100 µs: {verdict}" in cells(row)
    assert row.as_json()["targetMet"] is (verdict == "met")


def test_the_time_of_a_recovery_is_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.recovery", "--runs", "3", "--rounds", "1"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "3 runs: listening after" in done.stdout
    assert list(tmp_path.iterdir()) == []
