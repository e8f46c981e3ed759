"""The whole server in the test's own process and loop, before a scripted model server."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from corral.clock import Clock
from corral.config import Settings
from corral.gateway.options import GatewayOptions
from corral.server import Server, Traces
from corral.storage.rows import TokenRow
from tests.support.invariants import Inspection, Seen
from tests.support.model_server import ModelServer, Script, default_brain
from tests.support.wire import Wire

TOKEN = "a-token-for-the-tests-0123456789"


class House:
    """A running server: `url`, the owner's `token`, and the model that its runs talk to."""

    def __init__(self, server: Server, model: ModelServer) -> None:
        self.server = server
        self.model = model
        self.url = server.url
        self.token = TOKEN
        self.wires: list[Wire] = []
        self.unchecked: str | None = None
        """Why the invariants are not looked at in the end; None: they are."""

    async def wire(self, token: str | None = TOKEN, *, ordered: bool = True, **params: Any) -> Wire:
        """A client that is connected. Use with `async with`."""
        wire = await Wire.open(self.url, ordered=ordered)
        try:
            await wire.connect(token, **params)
        except BaseException:
            await wire.close()
            raise
        self.wires.append(wire)
        return wire

    async def sockets_gone(self, left: int = 0) -> None:
        """Until the server has let go of all sockets but `left`."""
        async with asyncio.timeout(60):
            while self.server.gateway.connections > left:  # noqa: ASYNC110  (the server tells nobody)
                await asyncio.sleep(0.02)

    async def add_token(self, user: str, *, workspaces: list[str] | None = None, **changes: Any) -> str:
        """A token for another person; `roles`, `tenant_id`, `expires_at` and so on as in TokenRow."""
        token = f"token-of-{user}-{changes.get('id', '')}-0123456789"
        tenant = changes.get("tenant_id", "t_default")
        spaces = ["w_default"] if workspaces is None else workspaces
        fields: dict[str, Any] = {
            "tenant_id": tenant,
            "id": f"tok_{user}",
            "token_hash": hashlib.sha256(token.encode()).hexdigest(),
            "subject": user,
            "user_id": user,
            "display_name": None,
            "workspace_ids": spaces,
            "roles": ["member"],
            "created_at": 1,
        }
        row = TokenRow(**{**fields, **changes})

        def unit(tx: Any) -> None:
            for space in spaces:
                tx.tenants.ensure(tenant, space, user, now_ms=1)
            tx.tokens.upsert(row)

        await self.server.store.write(unit)
        return token


@asynccontextmanager
async def house(
    data_dir: Path,
    *,
    script: Script = default_brain,
    options: GatewayOptions | None = None,
    environment: Mapping[str, str] | None = None,
    clock: Clock | None = None,
    traces: Traces | None = None,
    unchecked: str | None = None,
    **settings: Any,
) -> AsyncIterator[House]:
    """Start a model server and a Corral over `data_dir`; stop both at the end, and see that all invariants hold.

    `environment` adds to the variables that say where models are and with which key. `unchecked`
    is for a test that damages the store on purpose or writes into it what no server would: the reason.
    """
    async with ModelServer(script) as model:
        given = Settings(
            data_dir=data_dir,
            **{"host": "127.0.0.1", "port": 0, "token": TOKEN, "model": "openai-chat:test", **settings},
        )
        environ = {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "k"}
        for name in ("ANTHROPIC", "GOOGLE_GEMINI"):
            environ[f"{name}_BASE_URL"] = model.root_url
        environ.update(environment or {})
        async with Server(given, clock=clock, options=options, environ=environ, traces=traces) as server:
            home = House(server, model)
            home.unchecked = unchecked
            yield home
    if home.unchecked is None:
        inspect(home, data_dir)


def inspect(home: House, data_dir: Path) -> None:
    """After the server's end: raises Broken unless the store keeps the invariants, every client saw what
    it has and was promised, and nothing is left of what the server had in hand."""
    look = Inspection(data_dir / "corral.db")
    look.store()
    for number, wire in enumerate(home.wires, 1):
        look.client(f"client {number}", Seen([wire.frames], tenant=wire.hello["principal"]["tenantId"]))
    look.promises([promise for wire in home.wires for promise in wire.promises])
    server = home.server
    look.idle(
        {"connections": server.gateway.connections, "runs": server.core.active_runs, "units": server.store.waiting}
    )
    look.report()
