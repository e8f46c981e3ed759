"""How much an address may do before anybody knows who it is, and how much a principal may ask."""

from __future__ import annotations

import asyncio
import ipaddress
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

from corral.gateway.options import GatewayOptions
from corral.protocol.errors import RateLimited
from corral.protocol.types import Principal

_IPV6_NETWORK_BITS = 64
# When to ask again for a place before the gate; places come free at no certain time.
_PLACE_S = 1.0


def address_key(remote: str | None) -> str:
    """What counts as one address: IPv4 whole, also when mapped into IPv6; IPv6 by its /64, which one host owns."""
    try:
        address = ipaddress.ip_address((remote or "").partition("%")[0])
    except ValueError:
        return remote or "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, _IPV6_NETWORK_BITS), strict=False).network_address)
    return str(address)


def limited(message: str, wait_s: float) -> RateLimited:
    """The refusal of somebody who is to try again in `wait_s` seconds: `details.retryAfterMs` says so, 1 at least."""
    return RateLimited(message, details={"retryAfterMs": max(1, math.ceil(wait_s * 1000))})


class Buckets:
    """A token bucket for each key: `burst` at once, `rate` a second for ever.

    At most `capacity` of them are kept; the least recently used is forgotten first, which
    fills it up again.
    """

    def __init__(self, monotonic: Callable[[], float], rate: float, burst: float, capacity: int) -> None:
        self._monotonic = monotonic
        self._rate = rate
        self._burst = burst
        self._capacity = capacity
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def wait(self, key: Hashable) -> float:
        """Seconds until the key's bucket holds a token; 0.0 if it holds one now."""
        return max(0.0, 1.0 - self._left(key)) / self._rate

    def spend(self, key: Hashable) -> None:
        """Take a token; an empty bucket stays empty."""
        self._buckets[key] = (max(0.0, self._left(key) - 1.0), self._monotonic())
        self._buckets.move_to_end(key)
        while len(self._buckets) > self._capacity:
            self._buckets.popitem(last=False)

    def _left(self, key: Hashable) -> float:
        bucket = self._buckets.get(key)
        if bucket is None:
            return self._burst
        left, at = bucket
        return min(self._burst, left + (self._monotonic() - at) * self._rate)


class FailedAuthLimiter:
    """Failed attempts to show a good token, so many for each address.

    While an address's bucket is empty its attempts are refused without a look at what they
    carry, so that guessing gains nothing from speed.
    """

    def __init__(self, monotonic: Callable[[], float], options: GatewayOptions) -> None:
        self._buckets = Buckets(
            monotonic, options.failed_auth_refill, options.failed_auth_burst, options.tracked_addresses
        )

    def check(self, key: str) -> None:
        """Raises RateLimited when the address has used its failures up."""
        wait = self._buckets.wait(key)
        if wait > 0:
            raise limited("too many failed attempts from this address: wait and try again", wait)

    def failed(self, key: str) -> None:
        """Count one failure."""
        self._buckets.spend(key)

    def __len__(self) -> int:
        return len(self._buckets)


class RequestLimiter:
    """How many requests a principal, or an address that has shown no good token, may make.

    A request of somebody known counts for that principal alone: many may share an address, and
    none of them is held up for what the others do.
    """

    def __init__(self, monotonic: Callable[[], float], options: GatewayOptions, per_second: float) -> None:
        rate = per_second if options.request_rate is None else options.request_rate
        burst = 2 * rate if options.request_burst is None else options.request_burst
        self._principals = Buckets(monotonic, rate, burst, options.tracked_principals)
        self._addresses = Buckets(monotonic, rate, burst, options.tracked_addresses)

    def known(self, principal: Principal) -> None:
        """Count a request of the principal's. Raises RateLimited when it has used its requests up."""
        self._count(self._principals, (principal.tenant_id, principal.subject), "too many requests: wait and try again")

    def unknown(self, address: str) -> None:
        """Count a request of nobody known. Raises RateLimited when the address has used its requests up."""
        self._count(self._addresses, address, "too many requests from this address: wait and try again")

    @staticmethod
    def _count(buckets: Buckets, key: Hashable, message: str) -> None:
        wait = buckets.wait(key)
        if wait > 0:
            # A refused request takes nothing: who goes on asking is let in again as soon as who waits.
            raise limited(message, wait)
        buckets.spend(key)

    def __len__(self) -> int:
        return len(self._principals) + len(self._addresses)


class PreauthGate:
    """Places for sockets that have not connected yet, so many for each address.

    A burst waits its turn for a little while instead of being refused: places come free as
    fast as clients connect.
    """

    def __init__(self, options: GatewayOptions) -> None:
        self._places = options.preauth_sockets
        self._wait = options.preauth_wait
        self._waiting = options.preauth_waiting
        self._taken: dict[str, int] = {}
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}

    async def enter(self, key: str) -> None:
        """Take a place; `leave` gives it back. Raises RateLimited when none came free in time."""
        if self._taken.get(key, 0) < self._places:
            self._taken[key] = self._taken.get(key, 0) + 1
            return
        queue = self._queues.setdefault(key, deque())
        if len(queue) >= self._waiting:
            raise self._full()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            async with asyncio.timeout(self._wait):
                await turn
        except (TimeoutError, asyncio.CancelledError) as error:
            if turn.done() and not turn.cancelled():
                # The place was handed over in the same moment: pass it on.
                self.leave(key)
            else:
                queue.remove(turn)
                if not queue:
                    self._queues.pop(key, None)
            if isinstance(error, asyncio.CancelledError):
                raise
            raise self._full() from None

    def leave(self, key: str) -> None:
        """Give a place back: to the first who waits for it, else to nobody."""
        queue = self._queues.get(key)
        while queue:
            turn = queue.popleft()
            if not queue:
                del self._queues[key]
            if not turn.done():
                # The place changes hands; `_taken` stays as it is.
                turn.set_result(None)
                return
        left = self._taken[key] - 1
        if left:
            self._taken[key] = left
        else:
            del self._taken[key]

    def taken(self, key: str) -> int:
        """How many places the address holds now."""
        return self._taken.get(key, 0)

    @staticmethod
    def _full() -> RateLimited:
        return limited("too many connections from this address that have not connected yet: try again", _PLACE_S)
