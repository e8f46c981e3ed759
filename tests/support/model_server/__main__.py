"""The scripted server as a process of its own; see the package's text."""

from __future__ import annotations

import argparse
import asyncio
import runpy
import sys
from collections.abc import Sequence

from tests.support.model_server import ModelServer, Script, default_brain


async def _serve(script: Script, port: int) -> None:
    async with ModelServer(script, port=port) as server:
        sys.stdout.write(f"{server.port}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A scripted model server; prints its port.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--script", help="a Python file that sets `script`; without it the default brain runs")
    options = parser.parse_args(argv)
    script = runpy.run_path(options.script)["script"] if options.script else default_brain
    try:
        asyncio.run(_serve(script, options.port))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
