"""Types that several threads decode are looked through before there are threads."""

from __future__ import annotations

from typing import Any

import msgspec


def look_through(*kinds: Any) -> None:
    """Have msgspec look the types through now. To be called where a module is imported.

    It does that at a type's first use, and marks the type as done before it is: another thread that uses
    the type in that moment reads fields that are not there yet, which ends the process (msgspec 0.22.0).
    What is decoded or converted in the store's threads, or in any but the event loop's, is named here.
    """
    for kind in kinds:
        msgspec.json.Decoder(kind)
