"""What holds for the whole suite."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.support.examples import load_profile

load_profile()


@pytest.fixture(scope="module", autouse=True)
def what_a_file_leaks_is_told_in_it() -> Iterator[None]:
    """A socket that nobody closed is told of when it is collected: by then another file's test would fail for it."""
    yield
    gc.collect()
