"""Feed cursors: a place in a workspace's feed that tells nothing of the rest of the store."""

from __future__ import annotations

import base64
import binascii
import hmac

from corral.protocol.errors import InvalidRequest

_WIDTH = 8


class FeedCursors:
    """Writes and reads cursors, each good for one tenant's one workspace.

    A cursor is a tag over (tenant, workspace, feed id) and the feed id masked by a stream
    drawn from the tag (a synthetic initialisation vector, as in RFC 5297), so that feed ids,
    which count the events of all tenants, cannot be read off it. With `key` empty a reader of
    this code can still compute them; the server gives it a secret of its own.
    """

    def __init__(self, key: bytes = b"") -> None:
        self._key = key or b"\0"

    def write(self, tenant_id: str, workspace_id: str, feed_id: int) -> str:
        """The cursor for everything after `feed_id`."""
        plain = feed_id.to_bytes(_WIDTH, "big")
        tag = self._mac(tenant_id, workspace_id, b"tag", plain)
        mask = self._mac(tenant_id, workspace_id, b"mask", tag)
        hidden = bytes(a ^ b for a, b in zip(plain, mask, strict=True))
        return base64.urlsafe_b64encode(tag + hidden).decode().rstrip("=")

    def read(self, tenant_id: str, workspace_id: str, cursor: str) -> int:
        """The feed id. Raises InvalidRequest for one that was not given for this workspace."""
        try:
            raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) == 2 * _WIDTH:
            tag, hidden = raw[:_WIDTH], raw[_WIDTH:]
            mask = self._mac(tenant_id, workspace_id, b"mask", tag)
            plain = bytes(a ^ b for a, b in zip(hidden, mask, strict=True))
            if hmac.compare_digest(tag, self._mac(tenant_id, workspace_id, b"tag", plain)):
                return int.from_bytes(plain, "big")
        raise InvalidRequest("$.params.after must be a feedCursor of this workspace's feed, as it came")

    def _mac(self, tenant_id: str, workspace_id: str, use: bytes, data: bytes) -> bytes:
        named = [use, tenant_id.encode(), workspace_id.encode(), data]
        message = b"".join(len(part).to_bytes(4, "big") + part for part in named)
        return hmac.digest(self._key, message, "sha256")[:_WIDTH]
