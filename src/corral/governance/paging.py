"""Cursors of pages that are ordered by (time, id), newest first."""

from __future__ import annotations

import base64

from corral.protocol.errors import InvalidRequest


def page_cursor(created_at: int, row_id: str) -> str:
    """The opaque cursor of the page that follows this row."""
    return base64.urlsafe_b64encode(f"{created_at}.{row_id}".encode()).decode().rstrip("=")


def read_page_cursor(cursor: str) -> tuple[int, str]:
    """(created_at, id) of the row that the page follows. Raises InvalidRequest for what is no cursor."""
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        created, _, row_id = text.partition(".")
        if not row_id or not 0 <= int(created) < 2**62:
            raise ValueError
        return int(created), row_id
    except ValueError:
        raise InvalidRequest("$.params.cursor is none that this method gave: send nextCursor as it came") from None
