"""Clocks that a test can set."""

from __future__ import annotations

from corral.clock import SystemClock


class Later(SystemClock):
    """A clock that is `ahead` milliseconds ahead."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead

    def now_ms(self) -> int:
        return super().now_ms() + self.ahead
