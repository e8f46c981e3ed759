"""A process that writes until it is killed: prints each version once the store has acknowledged it.

Usage: python -m tests.storage.crash_writer DATABASE
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from corral.storage.sqlite import SqliteStore
from tests.storage.make import FixedClock, append, session

SESSIONS = [f"s_{number}" for number in range(4)]


async def main(path: Path) -> None:
    store = await SqliteStore.open(path, FixedClock())
    for name in SESSIONS:
        await store.write(lambda tx, name=name: tx.sessions.insert(session(name)))  # type: ignore[misc]

    async def write(name: str) -> None:
        while True:
            version = await store.write(lambda tx: append(tx, name).version)
            # One write call for each line: what was printed is out, whenever the kill comes.
            os.write(1, f"{name} {version}\n".encode())

    await asyncio.gather(*(write(SESSIONS[number % 4]) for number in range(16)))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
