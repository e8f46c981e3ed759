"""What the gateway takes the place of in aiohttp, which has no public way to it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

from aiohttp import web

from corral.gateway.door import Refused
from corral.gateway.listening import Runner
from corral.gateway.strangers import Strangers

STANDS_ON: dict[str, tuple[Callable[..., Any], str]] = {
    "making a server": (web.AppRunner._make_server, "2d5358865abd00e3"),
    "making a connection": (web.Server.__call__, "c5700549e688b164"),
    "setting up": (web.AppRunner.setup, "4ceee18981cfca3a"),
    "answering what could not be read": (web.RequestHandler.handle_error, "94962ffef500c172"),
    "telling of an error": (web.RequestHandler.log_exception, "cece6fbeb4835022"),
}
"""aiohttp's own functions that `listening.py` overrides or relies on, with a digest of what they are."""


async def test_every_connection_of_the_gateway_is_of_its_own_class() -> None:
    def refusal(_request: web.BaseRequest, _refused: Refused) -> web.Response:
        return web.Response(status=400)

    runner = Runner(web.Application(), refusal, Strangers(idle=10, kept=75, limit=10))
    await runner.setup()
    try:
        assert runner.server is not None
        connection = runner.server()
        assert type(connection).__module__ == "corral.gateway.listening"
        assert connection.handle_error.__func__ is not web.RequestHandler.handle_error  # type: ignore[attr-defined]
    finally:
        await runner.cleanup()


def test_aiohttp_is_what_listening_was_written_for() -> None:
    """Changed by a new aiohttp: see whether there is a public way now, or what `listening.py` must do
    otherwise, and then set the digest."""
    found = {
        what: hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
        for what, (function, _) in STANDS_ON.items()
    }
    assert found == {what: digest for what, (_, digest) in STANDS_ON.items()}
