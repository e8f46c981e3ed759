"""What was measured on, and how busy it was with other things."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import msgspec
import sqlalchemy
import uvloop


@dataclass(frozen=True)
class Machine:
    """`load` is the one-minute load average before the first measurement; `disk` is where the stores were."""

    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    python: str
    libraries: str
    disk: str
    load: float
    when: str

    def facts(self) -> list[tuple[str, str]]:
        """Name and value, in the order in which they are shown."""
        return [
            ("machine", f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB"),
            ("kernel", self.kernel),
            ("Python", f"{self.python}; {self.libraries}"),
            ("stores on", self.disk),
            ("load before", f"{self.load:.1f} on {self.cores} cores"),
            ("when", self.when),
        ]


def describe(folder: Path) -> Machine:
    """This machine, now; `folder` is where the stores will lie."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    libraries = (("aiohttp", aiohttp), ("uvloop", uvloop), ("msgspec", msgspec), ("SQLAlchemy", sqlalchemy))
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=pages / 2**30,
        kernel=f"{platform.system()} {platform.release()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        libraries=", ".join(f"{name} {module.__version__}" for name, module in libraries),
        disk=_file_system(folder),
        load=os.getloadavg()[0],
        when=datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _file_system(folder: Path) -> str:
    """The kind of file system: a commit to one in memory costs no fsync."""
    argv = ["stat", "--file-system", "--format=%T", str(folder)]
    try:
        found = subprocess.run(argv, capture_output=True, text=True, timeout=10)
    except OSError:
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def resident_kib(pid: int) -> int:
    """The process's resident memory (VmRSS) in KiB. Raises OSError if it is gone."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise ProcessLookupError(pid)
