"""What holds for the whole suite."""

from __future__ import annotations

from tests.support.examples import load_profile

load_profile()
