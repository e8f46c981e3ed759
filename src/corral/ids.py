"""Server-made identifiers: a prefix and a UUIDv7, so that they sort by the time they were made.

No id grants anything; they are names, not secrets.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

from corral.clock import Clock, SystemClock

_AT_ONCE = 64


class Ids:
    """Makes ids from an injected clock and source of randomness.

    Layout: RFC 9562, section 5.7 (48 bits of Unix milliseconds, version, 74 random bits),
    written as 32 hexadecimal digits without dashes.
    """

    def __init__(self, clock: Clock | None = None, random: Callable[[int], bytes] = os.urandom) -> None:
        self._clock = clock or SystemClock()
        self._random = random
        # Asking the system costs more than all the rest of an id, so for many at once. Ids are made in several
        # threads: a deque's methods are atomic, and two that fill it do no harm.
        self._noise: deque[bytes] = deque()

    def new(self, prefix: str) -> str:
        """A new id such as `run_0198c1f2…`; `prefix` is written without the underscore."""
        millis = self._clock.now_ms() & ((1 << 48) - 1)
        noise = int.from_bytes(self._take(), "big")
        value = millis << 80 | 0x7 << 76 | (noise >> 68 & 0xFFF) << 64 | 0b10 << 62 | noise & ((1 << 62) - 1)
        return f"{prefix}_{value:032x}"

    def _take(self) -> bytes:
        """Ten bytes that nobody else has got."""
        while True:
            try:
                return self._noise.popleft()
            except IndexError:
                block = self._random(_AT_ONCE * 10)
                self._noise.extend(block[start : start + 10] for start in range(0, len(block), 10))
