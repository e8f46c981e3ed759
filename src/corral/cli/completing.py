"""What the shell completes that only the gateway knows: the ids of what there is, with what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem

TIMEOUT_S = 2.0
"""How long the shell's line is held up at most; then nothing is completed."""

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _listed(method: str, name: str, about: str) -> Complete:
    """Complete the field `name` of what a method lists; `about` is shown beside it where the shell shows anything."""

    def complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            items = _ask(ctx, method)
        except Exception:
            return []
        from corral.cli.columns import cut
        from corral.cli.visible import visible

        # In one line: the shells' scripts read line by line.
        return [
            CompletionItem(item[name], help=cut(visible(" ".join(str(item.get(about, "")).split())), 60))
            for item in items
            if item[name].startswith(incomplete)
        ]

    return complete


def _ask(ctx: click.Context, method: str) -> list[dict[str, Any]]:
    import asyncio

    from corral.cli.common import settings_from
    from corral.cli.find import find_gateway, load_client

    data_dir = ctx.params.get("data_dir") or (ctx.parent.params.get("data_dir") if ctx.parent is not None else None)
    url, token = find_gateway(ctx.params.get("url"), settings_from({"data_dir": data_dir}))()
    client = load_client(url)

    async def go() -> list[dict[str, Any]]:
        async with (
            asyncio.timeout(TIMEOUT_S),
            client.Corral(url, token, reconnect_for=0, name="corral-completion") as corral,
        ):
            items: list[dict[str, Any]] = (await corral.request(method))["items"]
            return items

    return asyncio.run(go())


sessions = _listed("sessions.list", "id", "title")
approvals = _listed("approval.queue", "approvalId", "toolName")
agents = _listed("agents.list", "id", "name")
grants = _listed("grants.list", "grantId", "matcher")
tokens = _listed("tokens.list", "tokenId", "subject")


def tools(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a tool of Corral's own."""
    from corral.cli.common import TOOLS

    return [CompletionItem(tool) for tool in TOOLS if tool.startswith(incomplete)]


def files(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Leave it to the shell to complete the name of a file."""
    return [CompletionItem(incomplete, type="file")]


def folders(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Leave it to the shell to complete the name of a folder."""
    return [CompletionItem(incomplete, type="dir")]
