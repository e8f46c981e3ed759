"""From a token to a principal."""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict

from msgspec import UNSET, Struct

from corral.clock import Clock
from corral.gateway.limits import FailedAuthLimiter
from corral.protocol.errors import Unauthorized
from corral.protocol.types import Principal
from corral.storage.api import Store
from corral.storage.rows import TokenRow

_REFUSED = "the access token is missing or not valid: `corral token` prints the right one"


class Known(Struct, kw_only=True, frozen=True):
    """`digest` is the token's hash; `ms_left` how long it still holds, None if it does not expire."""

    principal: Principal
    digest: str
    ms_left: int | None


_SHARED = 1000
"""Tokens whose principals connections share."""


class Authenticator:
    """Finds out who a token speaks for. Nothing but the token's own row says so."""

    def __init__(self, store: Store, clock: Clock, limiter: FailedAuthLimiter) -> None:
        self._store = store
        self._clock = clock
        self._limiter = limiter
        self._shown: OrderedDict[str, tuple[str, Principal]] = OrderedDict()

    async def authenticate(self, token: str | None, address: str) -> tuple[Principal, str]:
        """The principal and the token's hash, as `known` says."""
        known = await self.known(token, address)
        return known.principal, known.digest

    async def known(self, token: str | None, address: str) -> Known:
        """Who shows the token, with the hash by which `still_valid` asks again.

        Raises Unauthorized for a missing, unknown, expired or revoked token, all alike;
        RateLimited when `address` has failed too often; StoreUnavailable. A missing token is
        no guess and is not counted.
        """
        if not token:
            raise Unauthorized(_REFUSED)
        self._limiter.check(address)
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
        row = await self._store.read(lambda tx: tx.tokens.by_hash(digest))
        if row is None or not self._holds(row, digest):
            self._limiter.failed(address)
            raise Unauthorized(_REFUSED)
        left = row.expires_at - self._clock.now_ms() if row.expires_at is not None else None
        digest, principal = self._shared(digest, _principal(row))
        return Known(principal=principal, digest=digest, ms_left=left)

    def _shared(self, digest: str, principal: Principal) -> tuple[str, Principal]:
        """The same, as an equal one has it that was made before: many connections may show one token."""
        before = self._shown.pop(digest, None)
        if before is None or before[1] != principal:
            before = digest, principal
        self._shown[digest] = before
        while len(self._shown) > _SHARED:
            self._shown.popitem(last=False)
        return before

    async def still_valid(self, digests: set[str]) -> set[str]:
        """Those of the hashes whose tokens are still good."""
        rows = await self._store.read(lambda tx: [(digest, tx.tokens.by_hash(digest)) for digest in digests])
        return {digest for digest, row in rows if row is not None and self._holds(row, digest)}

    def _holds(self, row: TokenRow, digest: str) -> bool:
        # The index look-up compares in its own time; this one does not depend on the contents.
        same = hmac.compare_digest(row.token_hash, digest)
        expired = row.expires_at is not None and row.expires_at <= self._clock.now_ms()
        return same and not expired and row.revoked_at is None and bool(row.tenant_id)


def bearer_token(header: str | None) -> str | None:
    """The token of an `Authorization: Bearer TOKEN` header, or None."""
    scheme, _, token = (header or "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _principal(row: TokenRow) -> Principal:
    return Principal(
        subject=row.subject,
        user_id=row.user_id,
        tenant_id=row.tenant_id,
        workspace_ids=row.workspace_ids,
        roles=row.roles,
        auth_source="token",
        display_name=row.display_name if row.display_name is not None else UNSET,
    )
