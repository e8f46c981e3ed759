"""How many examples the property-based tests try, and which.

In the suite they are few and always the same, so that it passes or fails by the code alone. `make fuzz` runs
the same tests with more of them, drawn by chance from a seed that it prints.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

SCALE_VARIABLE = "CORRAL_FUZZ_SCALE"
SCALE = float(os.environ.get(SCALE_VARIABLE, "0"))
"""0 in the suite. Otherwise examples are drawn by chance, this many times as many."""


def load_profile() -> None:
    """What holds for every property-based test that says nothing else. No example is kept from run to run."""
    settings.register_profile(
        "corral",
        derandomize=not SCALE,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("corral")


def examples(count: int) -> settings:
    """The settings of a test that tries `count` examples in the suite."""
    return settings(max_examples=max(1, round(count * (SCALE or 1))))
