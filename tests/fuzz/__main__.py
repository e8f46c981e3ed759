"""`make fuzz`: the property-based tests again and again, each round with other examples, until the time is up.

    python -m tests.fuzz [--minutes M] [--seed N] [pytest's arguments]

Each round's seed is printed before it begins; `--seed` with it and `--minutes 0` runs that round alone. It
ends with the first round that fails, whose examples the output shows.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time

from tests.support.examples import SCALE_VARIABLE

TESTS = [
    "tests/fuzz",
    "tests/governance/test_shell.py",
    "tests/governance/test_rules.py",
    "tests/governance/test_policy.py",
    "tests/governance/test_audit_chain.py",
    "tests/governance/test_audit_export.py",
    "tests/core/test_context.py",
    "tests/executor/test_output.py",
]
SCALE = "10"


def one_round(seed: int, more: list[str]) -> int:
    """pytest's exit status."""
    print(f"round with seed {seed}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"--hypothesis-seed={seed}", "-o", "timeout=1800"]
    # Only what draws examples takes longer with more of them; the rest of the files would only be run again.
    command += ["-m", "hypothesis", "--show-capture=no", *(more or TESTS)]
    return subprocess.run(command, env={**os.environ, SCALE_VARIABLE: SCALE}).returncode


def main() -> int:
    """Exit status 0 if all rounds passed."""
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--minutes", type=float, default=10, help="no round begins after them (default 10)")
    parser.add_argument("--seed", type=int, help="of the first round")
    known, more = parser.parse_known_args()
    end = time.monotonic() + known.minutes * 60
    seed = known.seed if known.seed is not None else random.randrange(2**32)
    while True:
        if status := one_round(seed, more):
            print(f"failed: make fuzz FUZZ_ARGS='--seed {seed} --minutes 0' runs this round again", flush=True)
            return status
        if time.monotonic() >= end:
            return 0
        seed += 1


if __name__ == "__main__":
    sys.exit(main())
