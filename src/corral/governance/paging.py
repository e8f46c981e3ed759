"""Cursors of pages that are ordered by (time, id), newest first."""

from __future__ import annotations

import base64

from corral.protocol.errors import InvalidRequest


def page_cursor(of: str, created_at: int, row_id: str) -> str:
    """The opaque cursor of the page that follows this row; `of` names the list."""
    return base64.urlsafe_b64encode(f"{of}.{created_at}.{row_id}".encode()).decode().rstrip("=")


def read_page_cursor(of: str, cursor: str) -> tuple[int, str]:
    """(created_at, id) of the row that the page follows. Raises InvalidRequest for what is no cursor of this list."""
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        whose, _, place = text.partition(".")
        created, _, row_id = place.partition(".")
        if whose != of or not row_id or not 0 <= int(created) < 2**62:
            raise ValueError
        return int(created), row_id
    except ValueError:
        raise InvalidRequest("$.params.cursor is none that this method gave: send nextCursor as it came") from None
