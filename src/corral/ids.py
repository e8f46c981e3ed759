"""Server-made identifiers: a prefix and a UUIDv7, so that they sort by the time they were made.

No id grants anything; they are names, not secrets.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from corral.clock import Clock, SystemClock


class Ids:
    """Makes ids from an injected clock and source of randomness.

    Layout: RFC 9562, section 5.7 (48 bits of Unix milliseconds, version, 74 random bits),
    written as 32 hexadecimal digits without dashes.
    """

    def __init__(self, clock: Clock | None = None, random: Callable[[int], bytes] = os.urandom) -> None:
        self._clock = clock or SystemClock()
        self._random = random

    def new(self, prefix: str) -> str:
        """A new id such as `run_0198c1f2…`; `prefix` is written without the underscore."""
        millis = self._clock.now_ms() & ((1 << 48) - 1)
        noise = int.from_bytes(self._random(10), "big")
        value = millis << 80 | 0x7 << 76 | (noise >> 68 & 0xFFF) << 64 | 0b10 << 62 | noise & ((1 << 62) - 1)
        return f"{prefix}_{value:032x}"
