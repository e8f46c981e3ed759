"""Callers as the gateway makes them, for tests that call a room below it."""

from __future__ import annotations

from corral.governance.caller import Caller
from corral.protocol.types import Principal


def caller_of(
    subject: str = "u_owner", *, user: str | None = None, tenant: str = "t_default", workspace: str = "w_default"
) -> Caller:
    """An owner in the workspace; by default the one that a first start makes."""
    principal = Principal(
        subject=subject,
        user_id=user or subject,
        tenant_id=tenant,
        workspace_ids=[workspace],
        roles=["owner"],
        auth_source="token",
    )
    return Caller(principal=principal, workspace_id=workspace, trace_id="trace")


OWNER = caller_of()
