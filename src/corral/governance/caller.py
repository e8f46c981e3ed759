"""Who asks: the principal and the workspace that one request is about."""

from __future__ import annotations

from msgspec import Struct

from corral.protocol.types import Principal


class Caller(Struct, kw_only=True, frozen=True):
    """Made by the gateway from the token and the request; nothing in it is the client's word.

    `workspace_id` is one that the principal may enter.
    """

    principal: Principal
    workspace_id: str
    trace_id: str

    @property
    def tenant_id(self) -> str:
        return self.principal.tenant_id

    @property
    def user_id(self) -> str:
        return self.principal.user_id
