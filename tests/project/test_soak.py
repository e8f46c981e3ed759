"""The soak tells what levels off from what grows, and runs. What it finds is not judged here."""

from __future__ import annotations

import random
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from bench.levels import Quantity, judge, plot, slope, table
from tests.support import needs

ROOT = Path(__file__).resolve().parents[2]
MEMORY = Quantity("memory", "MiB", 0.05, 4.0)
TIMES = [5.0 * number for number in range(240)]


def noisy(*, each_minute: float = 0.0, warm_up: float = 0.0, noise: float = 1.0) -> list[float]:
    """90 MiB that grow so much each minute, and by `warm_up` in the first five; one sample in ten is far off."""
    randomly = random.Random(3)
    values = []
    for time in TIMES:
        value = 90 + each_minute * time / 60 + warm_up * min(time, 290) / 290 + randomly.gauss(0, noise)
        values.append(value + 60 * (randomly.random() < 0.1))
    return values


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        (noisy(), True),
        (noisy(warm_up=40), True),
        (noisy(each_minute=-1), True),
        (noisy(each_minute=0.6), False),
        (noisy(each_minute=5, noise=8), False),
    ],
)
def test_growth_after_the_warm_up_is_found_through_noise_and_outliers(values: list[float], levels: bool) -> None:
    verdict = judge(MEMORY, TIMES, values)
    assert verdict.levels is levels, verdict
    assert ("levels off" if levels else "**grows**") in table([verdict])


def test_the_slope_is_that_of_most_pairs() -> None:
    assert slope([0, 1, 2, 3, 4], [0, 2, 4, 6, 1000]) == 2
    assert slope([0], [7]) == 0


def test_what_has_a_ceiling_may_grow_up_to_it_and_never_beyond() -> None:
    threads = Quantity("threads", "", None, None, ceiling=20)
    late = [18.0] * 200 + [20.0] * 40
    assert judge(threads, TIMES, late).levels is True
    assert judge(threads, TIMES, [*late[:-100], 21.0, *late[-99:]]).levels is False
    assert judge(replace(threads, ceiling=None), TIMES, late).levels is None


def test_the_plot_is_a_picture_with_every_quantity() -> None:
    verdict = judge(MEMORY, TIMES, noisy())
    root = ET.fromstring(plot(TIMES, [(verdict, noisy())] * 3))
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_short_soak_works_and_writes_its_report(tmp_path: Path) -> None:
    needs.bubblewrap()
    report = tmp_path / "soak.md"
    argv = [sys.executable, "-m", "bench.soak", "--seconds", "90", "--runs", "5", "--every", "0.3"]
    done = subprocess.run(
        [*argv, "--report", str(report), "--dir", str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=110
    )
    assert done.returncode in (0, 1), done.stderr
    text = report.read_text()
    assert "What went wrong: nothing." in text, text
    assert "the gateway's log" not in done.stderr
    assert "\n0 runs" not in text
    assert (tmp_path / "soak.svg").read_text().startswith("<svg")
    assert {path.name for path in tmp_path.iterdir()} == {"soak.md", "soak.svg"}
