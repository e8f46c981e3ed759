"""What the gateway may be told beside the settings: limits and times, with the values that hold by default."""

from __future__ import annotations

from msgspec import Struct


class GatewayOptions(Struct, kw_only=True, frozen=True):
    """Times are seconds, sizes bytes. Tests shorten the times; nobody else needs to."""

    # Before connect.
    connect_timeout: float = 10.0
    preauth_frame_bytes: int = 64 * 1024
    preauth_sockets: int = 128
    preauth_waiting: int = 4096
    preauth_wait: float = 5.0
    # TCP connections on which no good token was shown; at most half of what the process may have open.
    strangers: int = 4096
    # How long after an answer such a connection may wait for its next request.
    kept_alive: float = 75.0
    failed_auth_burst: float = 200.0
    failed_auth_refill: float = 10.0
    tracked_addresses: int = 10_000

    # Requests a second and at once: of a principal; and of an address whose requests show no good token.
    # None: what Settings.requests_per_second says, and twice that at once.
    request_rate: float | None = None
    request_burst: float | None = None
    tracked_principals: int = 10_000

    # Of one connection.
    bad_frames: int = 10
    in_flight: int = 64
    max_subscriptions: int = 1000
    outbox_bytes: int = 8 * 1024 * 1024
    outbox_frames: int = 8192
    # A catch-up from the store waits while more than this waits in the outbox.
    outbox_mark_bytes: int = 512 * 1024
    catch_up_page: int = 64
    # How long a client that reads nothing may hold a catch-up up before it counts as too slow.
    stall_timeout: float = 30.0

    # How often a stream of server-sent events gets a comment: proxies cut off what is silent.
    stream_comment: float = 15.0

    # Closing.
    close_grace: float = 5.0
    # Each of: answers to requests in flight, frames that wait, the close handshake, when the server goes down.
    drain_grace: float = 1.5

    # How often the tokens of open connections are looked at again: revoked and expired ones close (4401).
    token_recheck: float = 5.0
    readiness_cache: float = 1.0
    # What takes longer than this to write a row counts as a store that cannot write.
    readiness_wait: float = 5.0
