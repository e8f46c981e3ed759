"""`corral serve` whose wall clock is off by what a shared file says.

Usage: CHAOS_CLOCK=FILE python -m tests.chaos.gateway --port 0 --data-dir DIR

The file has eight bytes, the milliseconds that the clock is ahead. The monotonic clock goes on as it
does when somebody sets a machine's time.
"""

from __future__ import annotations

import argparse
import faulthandler
import mmap
import os
from pathlib import Path

import uvloop

from corral.cli.logs import log_to_stderr
from corral.clock import SystemClock
from corral.config import ensure_data_dir, load_settings
from corral.server import serve
from corral.storage.lock import DataDirLocked


class SteppedClock(SystemClock):
    """The machine's clocks; the wall clock is moved by whoever writes into the file."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._ahead = mmap.mmap(file.fileno(), 8)

    def now_ms(self) -> int:
        return super().now_ms() + int.from_bytes(self._ahead[:8], "little", signed=True)


def step(path: Path, ahead_ms: int) -> None:
    """Make the clocks that read the file be ahead by so much from now on."""
    with path.open("r+b") as file:
        file.write(ahead_ms.to_bytes(8, "little", signed=True))


def main() -> int:
    faulthandler.enable()
    parser = argparse.ArgumentParser()
    parser.add_argument("--port")
    parser.add_argument("--data-dir", type=Path)
    settings = load_settings(vars(parser.parse_args()), os.environ)
    ensure_data_dir(settings.data_dir)
    log_to_stderr(settings)
    clock = SteppedClock(Path(os.environ["CHAOS_CLOCK"]))
    try:
        uvloop.run(serve(settings, on_listening=lambda url: print(f"listening on {url}", flush=True), clock=clock))  # noqa: T201
    except DataDirLocked:
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
