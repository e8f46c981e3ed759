"""How a command speaks to its gateway, and how what the gateway refuses reads at a terminal."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from corral.cli import FAILED, NO_GATEWAY, REFUSED, USAGE, CliError
from corral.cli.common import settings_from
from corral.cli.find import find_gateway, load_client, no_gateway
from corral.protocol.errors import CorralError, ErrorCode

if TYPE_CHECKING:
    from corral.client import Corral

T = TypeVar("T")

RECONNECT_FOR = 15.0
POLICY_CODES = frozenset({ErrorCode.POLICY_DENIED, ErrorCode.APPROVAL_REQUIRED, ErrorCode.FORBIDDEN})


def ask(options: Mapping[str, Any], work: Callable[[Corral], Awaitable[T]]) -> T:
    """Carry out `work` with a client of the gateway that `options` (`url`, `data_dir`) mean.

    Raises CliError: for a gateway that is not to be had, and for what it refuses.
    """
    settings = settings_from({"data_dir": options["data_dir"]})
    address = find_gateway(options["url"], settings)
    client = load_client(address()[0])

    async def go() -> T:
        url, token = address()
        async with client.Corral(url, token, address=address, reconnect_for=RECONNECT_FOR, name="corral-cli") as corral:
            return await work(corral)

    try:
        return asyncio.run(go())
    except client.GatewayUnreachable as error:
        raise no_gateway(str(error), settings, options["url"]) from None
    except CorralError as error:
        raise refusal(error) from None


def unauthorized(error: CorralError) -> tuple[str, str]:
    """What is wrong with the token, without what the gateway advises in its own words, and what to do here."""
    return error.message.partition(": `corral token`")[0], "set CORRAL_TOKEN to what `corral token` prints there"


def refusal(error: CorralError) -> CliError:
    """What the gateway refused, with what may be done about it."""
    if error.code is ErrorCode.UNAUTHORIZED:
        return CliError(*unauthorized(error), code=NO_GATEWAY)
    if error.code in POLICY_CODES:
        return CliError(f"{error.code}: {error.message}", code=REFUSED)
    message, remedy = at_a_terminal(error.message), ""
    if error.code is ErrorCode.SESSION_BUSY:
        remedy = "wait for its run to end, or leave --session out for a new one"
    elif error.code is ErrorCode.NOT_FOUND:
        remedy = next((f"`{lists}` shows them" for kind, lists in _LISTS.items() if kind in error.message), "")
    elif error.retryable:
        remedy = "it may work if you try again"
    code = USAGE if error.code is ErrorCode.INVALID_REQUEST else FAILED
    return CliError(f"{error.code}: {message}", remedy, code=code)


_OPTIONS = {
    "agentId": "--agent",
    "model": "--model",
    "sessionId": "--session",
    "root": "--cwd",
    "runtimeMode": "--mode",
}
_FIELD = re.compile(r"`?\$\.params\.([A-Za-z](?:[\w.\[\]]*[\w\]])?)`?")
_NONE_OF = re.compile(r": (\$\.params\.\w+ is none of \w+\.list|\w+\.list shows the ones there are)")
_LISTS = {
    "agent": "corral agents list",
    "grant": "corral grants list",
    "token": "corral token list",
    "approval": "corral approvals list",
    "session": "corral sessions list",
}


def at_a_terminal(message: str) -> str:
    """What the gateway says of a request's field, said of the option that it came from."""

    def named(found: re.Match[str]) -> str:
        field = found[1].removeprefix("patch.").removeprefix("agent.")
        return _OPTIONS.get(field, field)

    return _FIELD.sub(named, _NONE_OF.sub("", message))
