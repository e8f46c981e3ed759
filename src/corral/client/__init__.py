"""The Python client: `async with Corral(url, token) as corral: async for event in corral.run("…")`.

For scripts: `with CorralSync(url, token) as corral: print(corral.run("…").output)`.

It knows the protocol alone. What the gateway refuses is raised as the error classes of
`corral.protocol.errors`; a gateway that is not reached as `GatewayUnreachable`.
"""

from corral.client.api import Corral
from corral.client.errors import GatewayUnreachable
from corral.client.sync import CorralSync, Done, RunFailed
from corral.protocol.frames import Event

__all__ = ["Corral", "CorralSync", "Done", "Event", "GatewayUnreachable", "RunFailed"]
