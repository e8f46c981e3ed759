"""`python -m bench`: measure, print one table, write it to files if asked to."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from bench import appends, decisions, fanout, idle, starts, tools, turns
from bench.children import ChildFailed, Children
from bench.machine import describe
from bench.numbers import FULL, QUICK, TINY, Numbers
from bench.stats import Row
from bench.table import as_json, as_markdown, as_text
from bench.wire import TurnFailed

Part = Callable[[Children, Path, Numbers], Awaitable[list[Row]]]

PARTS: dict[str, Part] = {
    "turns": turns.measure,
    "fanout": fanout.measure,
    "idle": idle.measure,
    "appends": lambda _children, folder, numbers: appends.measure(folder, numbers),
    "starts": starts.measure,
    "tools": lambda _children, folder, numbers: tools.measure(folder, numbers),
    "decisions": lambda _children, folder, numbers: asyncio.to_thread(decisions.measure, folder, numbers),
}
INTERRUPTED = 130


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="fewer rounds: about half a minute")
    sizes.add_argument("--tiny", action="store_true", help="only to see that it works; the figures mean nothing")
    parser.add_argument("--only", metavar="PART", action="append", choices=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the table with all samples there")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the table as a page there")
    parser.add_argument("--dir", metavar="DIR", type=Path, help="where the stores lie meanwhile [default: $TMPDIR]")
    options = parser.parse_args()
    try:
        return uvloop.run(_run(options))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except (ChildFailed, TurnFailed, tools.NoSandbox) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


async def _run(options: argparse.Namespace) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    numbers = TINY if options.tiny else QUICK if options.quick else FULL
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="corral-bench-", dir=options.dir) as name:
        folder = Path(name)
        machine = describe(folder)
        for part in options.only or PARTS:
            print(f"measuring: {part}", file=sys.stderr, flush=True)
            async with Children(folder) as children:
                rows += await PARTS[part](children, folder, numbers)
    print(as_text(rows, machine), end="")
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(rows, machine), indent=2) + "\n")
    if options.markdown is not None:
        size = " --tiny" if options.tiny else " --quick" if options.quick else ""
        options.markdown.write_text(as_markdown(rows, machine, f"python -m bench{size} --markdown FILE"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
