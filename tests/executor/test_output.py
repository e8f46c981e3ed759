from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from corral.executor.api import FULL_OUTPUT_LIMIT, OUTPUT_LIMIT
from corral.executor.output import Budget, Capture, bounded, joined


def captured(data: bytes, budget: Budget | None = None, step: int = 50_000) -> Capture:
    capture = Capture(budget or Budget())
    for at in range(0, len(data), step):
        capture.feed(data[at : at + step])
    return capture


def test_short_output_is_given_whole() -> None:
    assert bounded("a\n" * 10) == ("a\n" * 10, False, None)


def test_long_output_is_head_and_tail_around_a_line_that_counts_what_is_missing() -> None:
    text = "".join(f"line {number} ä\n" for number in range(10_000))
    shown, truncated, full = bounded(text)
    assert truncated
    assert full == text.encode()
    assert len(shown) <= OUTPUT_LIMIT
    head, mark, tail = shown.partition("\n[... ")
    missing = int(tail.split()[0])
    rest = tail.partition(" ...]\n")[2]
    assert mark
    assert text.startswith(head)
    assert text.endswith(rest)
    assert missing == len(text.encode()) - len((head + rest).encode())
    assert "tools.output" in tail


@given(st.text(min_size=1, max_size=50), st.integers(OUTPUT_LIMIT - 10, OUTPUT_LIMIT + 10))
def test_output_is_never_longer_than_the_limit(piece: str, length: int) -> None:
    text = (piece * length)[:length]
    shown, truncated, _ = bounded(text)
    assert len(shown) <= OUTPUT_LIMIT
    assert truncated == (len(text) > OUTPUT_LIMIT)


def test_the_whole_is_bounded_too_and_stays_valid_utf_8() -> None:
    text = "x" + "ä" * FULL_OUTPUT_LIMIT
    shown, _, full = bounded(text)
    assert full is not None
    assert len(full) <= FULL_OUTPUT_LIMIT
    assert text.startswith(full.decode())
    assert f"first {len(full)} bytes" in shown


def test_lone_surrogates_do_not_break_the_output() -> None:
    assert bounded("a\ud800b")[0] == "a?b"


def test_a_stream_beyond_the_budget_keeps_its_beginning_and_its_end() -> None:
    data = b"".join(b"%08d\n" % number for number in range(2_000_000))
    capture = captured(data)
    text = capture.text()
    assert capture.overflowed
    assert len(text) <= FULL_OUTPUT_LIMIT
    assert text.startswith("00000000\n")
    assert text.endswith("01999999\n")
    head, _, rest = text.partition("\n[... ")
    dropped = int(rest.split()[0])
    tail = rest.partition(" ...]\n")[2]
    assert len(head) + dropped + len(tail) == len(data)


def test_two_streams_share_one_budget() -> None:
    budget = Budget(1_000_000)
    first = captured(b"a" * 900_000, budget)
    second = captured(b"b" * 900_000, budget)
    assert len(first.text()) + len(second.text()) <= 1_000_000


@given(st.binary(max_size=300), st.integers(1, 20))
def test_a_stream_within_the_budget_is_kept_whole_however_it_comes(data: bytes, step: int) -> None:
    assert captured(data, step=step).text() == data.decode("utf-8", "replace")


def test_output_is_stdout_then_stderr_then_a_status_that_is_not_0() -> None:
    assert joined("out", "err", 3) == "out\nerr\nexit status 3\n"
    assert joined("out\n", "", 0) == "out\n"
    assert joined("", "", 1) == "exit status 1\n"
    assert joined("", "err\n", None) == "err\n"
