"""Access tokens: made, listed, revoked. docs/decisions/0005-token-texts.md says why it is done this way.

A token's text is `crl_` and HMAC-SHA256(server secret, tenant and token id). The database has the
text's SHA-256 alone, in the token's row and in the answer that is kept for replays; the secret is a
file beside it. So a replayed `tokens.create` can tell the same text again, and who has only the
database has no token.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
from msgspec import UNSET

from corral.clock import Clock, rfc3339
from corral.governance.audit import Audit
from corral.governance.caller import Caller
from corral.ids import Ids
from corral.protocol.errors import Conflict, Forbidden, InvalidRequest, NotFound
from corral.protocol.methods import (
    Params,
    TokenResult,
    TokensCreateParams,
    TokensCreateResult,
    TokensListResult,
    TokensRevokeParams,
)
from corral.protocol.types import Token
from corral.storage.repositories import Transaction
from corral.storage.rows import TokenRow

MAX_TOKENS = 10_000
"""Tokens of one tenant, revoked ones too: a limit against mistakes, not a quota."""

_ADMIN_GIVES = frozenset({"admin", "operator", "member", "viewer", "auditor"})
_GIVES: dict[str, frozenset[str]] = {"owner": _ADMIN_GIVES | {"owner"}, "admin": _ADMIN_GIVES}
"""Role -> the roles that it may give, and take back. A role that is not here gives none."""


class TokenMethods:
    """`tokens.create`, `tokens.list` and `tokens.revoke`. `key` is the secret that the texts come from."""

    def __init__(self, clock: Clock, ids: Ids, audit: Audit, key: bytes) -> None:
        if len(key) < 32:
            raise ValueError("the key of the tokens' texts must have 32 bytes")
        self._clock = clock
        self._ids = ids
        self._audit = audit
        self._key = key

    def create(self, tx: Transaction, caller: Caller, params: TokensCreateParams) -> TokensCreateResult:
        """Make a token within what the caller's own may do. In the result, which is kept, `token` is
        the text's hash; `with_text` puts the text in its place when it is answered.

        Raises Forbidden for roles, workspaces and users beyond the caller, InvalidRequest for a time
        that has passed and for a subject that is somebody else's.
        """
        now = self._clock.now_ms()
        roles = sorted({str(role) for role in params.roles})
        workspaces = [caller.workspace_id] if params.workspace_ids is UNSET else sorted(set(params.workspace_ids))
        _require_within(caller, roles, workspaces)
        user = params.user_id if params.user_id is not UNSET else caller.user_id
        subject = params.subject if params.subject is not UNSET else user
        standing = tx.tokens.list(caller.tenant_id)
        _check_person(caller, user, subject, standing)
        if len(standing) >= MAX_TOKENS:
            raise Conflict(f"there are {MAX_TOKENS} tokens already")
        token_id = self._ids.new("tok")
        row = TokenRow(
            tenant_id=caller.tenant_id,
            id=token_id,
            token_hash=_hash(self._text(caller.tenant_id, token_id)),
            subject=subject,
            user_id=user,
            display_name=params.display_name if params.display_name is not UNSET else None,
            workspace_ids=workspaces,
            roles=roles,
            created_at=now,
            expires_at=_expiry(params, now),
        )
        for workspace in workspaces:
            tx.tenants.ensure(row.tenant_id, workspace, user, now_ms=now)
        tx.tokens.upsert(row)
        self._record(tx, caller, row, "token.created")
        view = token_view(row)
        return TokensCreateResult(
            token=row.token_hash, **{name: getattr(view, name) for name in view.__struct_fields__}
        )

    def with_text(self, caller: Caller, payload: bytes) -> bytes:
        """The kept answer of `create` as it is given: with the token's text.

        A replay comes here too, and perhaps from another token of the same person: it must be one that
        might have made this. Raises Forbidden if not, Conflict if the server's secret has changed since.
        """
        kept = msgspec.json.decode(payload, type=TokensCreateResult)
        _require_within(caller, kept.roles, kept.workspace_ids)
        text = self._text(caller.tenant_id, kept.token_id)
        if not hmac.compare_digest(_hash(text), kept.token):
            raise Conflict(
                "the text of this token cannot be told again, as the server's token.key has changed since: "
                "revoke the token and make another",
                details={"tokenId": kept.token_id},
            )
        return msgspec.json.encode(msgspec.structs.replace(kept, token=text))

    def list(self, tx: Transaction, caller: Caller, _params: Params) -> TokensListResult:
        """The tokens that open a workspace of the caller's, the oldest first, revoked and expired ones too."""
        rows = tx.tokens.list(caller.tenant_id)
        return TokensListResult(items=[token_view(row) for row in rows if _visible(caller, row)])

    def revoke(self, tx: Transaction, caller: Caller, params: TokensRevokeParams) -> TokenResult:
        """End a token. Revoking twice changes nothing.

        Raises NotFound for one that the caller does not see, Forbidden for one that they might not have
        made, Conflict if no owner's token that does not expire would be left.
        """
        row = tx.tokens.get(caller.tenant_id, params.token_id)
        if row is None or not _visible(caller, row):
            raise NotFound("there is no such token: $.params.tokenId is none of tokens.list")
        _require_within(caller, row.roles, row.workspace_ids)
        if row.revoked_at is None:
            others = [other for other in tx.tokens.list(caller.tenant_id) if other.id != row.id]
            if not any("owner" in other.roles and _lasts(other) for other in others):
                raise Conflict(
                    "this is the last owner's token that does not expire: make another first, or nobody could "
                    "manage this server",
                )
            row.revoked_at = self._clock.now_ms()
            tx.tokens.upsert(row)
            self._record(tx, caller, row, "token.revoked")
        return TokenResult(token=token_view(row))

    def _text(self, tenant_id: str, token_id: str) -> str:
        said = f"corral-token-1\0{tenant_id}\0{token_id}".encode()
        mac = hmac.digest(self._key, said, "sha256")
        return "crl_" + base64.urlsafe_b64encode(mac).decode().rstrip("=")

    def _record(self, tx: Transaction, caller: Caller, row: TokenRow, action: str) -> None:
        # Not under names that stand for secrets, which are cut out of records: the text is not here anyway.
        shown = {
            "subject": row.subject,
            "userId": row.user_id,
            "roles": row.roles,
            "workspaceIds": row.workspace_ids,
            "expiresAt": rfc3339(row.expires_at) if row.expires_at is not None else None,
        }
        self._audit.record_by(tx, caller, action, "token", row.id, metadata=shown)


def token_view(row: TokenRow) -> Token:
    return Token(
        token_id=row.id,
        subject=row.subject,
        user_id=row.user_id,
        display_name=row.display_name if row.display_name is not None else UNSET,
        roles=row.roles,
        workspace_ids=row.workspace_ids,
        created_at=rfc3339(row.created_at),
        expires_at=rfc3339(row.expires_at) if row.expires_at is not None else UNSET,
        revoked_at=rfc3339(row.revoked_at) if row.revoked_at is not None else UNSET,
    )


def _require_within(caller: Caller, roles: Sequence[str], workspaces: Sequence[str]) -> None:
    """Raise Forbidden unless the caller may give all of the roles and enter all of the workspaces."""
    gives = frozenset[str]().union(*(_GIVES.get(role, frozenset()) for role in caller.principal.roles))
    if not gives.issuperset(roles):
        raise Forbidden("none of your roles may give or take $.params.roles: nobody gives more than they have")
    if not set(caller.principal.workspace_ids).issuperset(workspaces):
        raise Forbidden("$.params.workspaceIds names a workspace that you may not enter")


def _check_person(caller: Caller, user: str, subject: str, standing: Sequence[TokenRow]) -> None:
    """Whom a token may speak for: oneself, somebody new, and for an owner anybody.

    Who speaks for another sees their private sessions and acts in their name, which an admin must
    not be able to arrange. A subject, by which records name who acted, belongs to one user for ever.
    """
    known = {row.user_id for row in standing}
    if user in known and user != caller.user_id and "owner" not in caller.principal.roles:
        raise Forbidden("$.params.userId is another person: only an owner makes tokens for people who are here already")
    taken = any(row.subject == subject and row.user_id != user for row in standing)
    if taken or (subject != user and subject in known):
        raise InvalidRequest("$.params.subject stands for another user: leave it out, or choose another")
    if any(row.subject == user and row.user_id != user for row in standing):
        raise InvalidRequest("$.params.userId is the subject of another user: choose another")


def _expiry(params: TokensCreateParams, now_ms: int) -> int | None:
    if params.expires_in_ms is not UNSET:
        if params.expires_at is not UNSET:
            raise InvalidRequest("$.params.expiresAt and $.params.expiresInMs exclude each other: send one of them")
        return now_ms + params.expires_in_ms
    if params.expires_at is UNSET:
        return None
    try:
        moment = datetime.fromisoformat(params.expires_at)
        if moment.tzinfo is None:
            raise ValueError(params.expires_at)
        millis = int(moment.astimezone(UTC).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise InvalidRequest("$.params.expiresAt is no RFC 3339 time: write it like 2026-01-31T12:00:00Z") from None
    if millis <= now_ms:
        raise InvalidRequest("$.params.expiresAt lies in the past")
    return millis


def _visible(caller: Caller, row: TokenRow) -> bool:
    return not set(row.workspace_ids).isdisjoint(caller.principal.workspace_ids)


def _lasts(row: TokenRow) -> bool:
    return row.revoked_at is None and row.expires_at is None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
