"""`make chaos`: one storm of some minutes. See the package's text."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.storm import Storm, rage
from tests.support import needs


def main() -> int:
    # The model's connections are cut all the time: that is no news.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)
    seconds = float(os.environ.get("CHAOS_SECONDS") or 300)
    seed = os.environ.get("CHAOS_SEED") or str(random.randrange(10**6))
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:7.1f} s  {text}", flush=True)  # noqa: T201

    if not needs.bubblewrap_works():
        say("cannot run: bubblewrap is not installed or may not make namespaces, and the tools run in it")
        return 2
    disk = 256 if needs.mount_works() else None
    if disk is None:
        say("the disk is never filled: that needs a file system of its own, and this process may not mount one")
    say(f"CHAOS_SEED={seed} CHAOS_SECONDS={seconds:g}")
    folder = Path(tempfile.mkdtemp(prefix="corral-chaos-"))
    storm = Storm(seed, seconds, workers=12, pause=(0.5, 4.0), disk_mib=disk, say=say)
    try:
        say("\n" + asyncio.run(rage(storm, folder)))
    except BaseException:
        say(f"seed {seed} failed; what is left is in {folder}")
        raise
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
