from __future__ import annotations

import pytest

from corral.models.sse import EventTooLong, SseParser

STREAM = 'data: {"a":"Grüße 🐎"}\n\n: comment\nid: 7\nevent: x\ndata: one\ndata: two\n\ndata:tight\n\n'
EVENTS = ['{"a":"Grüße 🐎"}'.encode(), b"one\ntwo", b"tight"]


def parse(*chunks: bytes) -> list[bytes]:
    parser = SseParser()
    events = [event for chunk in chunks for event in parser.feed(chunk)]
    return events + parser.end()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_gives_the_same_events_wherever_the_bytes_are_cut(end: str) -> None:
    raw = STREAM.replace("\n", end).encode()
    assert parse(raw) == EVENTS
    for cut in range(1, len(raw)):
        assert parse(raw[:cut], raw[cut:]) == EVENTS
    assert parse(*(raw[i : i + 1] for i in range(len(raw)))) == EVENTS


def test_an_event_is_given_as_soon_as_its_empty_line_is_here() -> None:
    parser = SseParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\n") == [b"a"]


def test_the_last_event_counts_although_its_empty_line_is_missing() -> None:
    assert parse(b"data: [DONE]") == [b"[DONE]"]


def test_a_field_that_only_begins_like_data_is_no_data() -> None:
    assert parse(b"database: x\n\ndata: y\n\n") == [b"y"]


def test_a_line_without_end_is_refused_at_the_limit() -> None:
    parser = SseParser(limit=1000)
    for _ in range(9):
        parser.feed(b"data: " + b"x" * 100)
    with pytest.raises(EventTooLong):
        parser.feed(b"data: " + b"x" * 100)


def test_an_event_of_many_lines_is_refused_at_the_limit() -> None:
    parser = SseParser(limit=1000)
    for _ in range(9):
        parser.feed(b"data: " + b"x" * 100 + b"\n")
    with pytest.raises(EventTooLong):
        parser.feed(b"data: " + b"x" * 100 + b"\n")


def test_events_one_after_another_may_be_longer_together_than_the_limit() -> None:
    parser = SseParser(limit=1000)
    assert sum(len(parser.feed(b"data: " + b"x" * 100 + b"\n\n")) for _ in range(50)) == 50
