"""What waits for one socket."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec

from corral.bus.api import Delta
from corral.gateway.frames import EventFrame, delta_frame
from corral.gateway.outbox import Outbox


def box(max_bytes: int = 10_000, max_frames: int = 100) -> tuple[Outbox, list[str]]:
    told: list[str] = []
    return Outbox(max_bytes, max_frames, lambda: told.append("overflow")), told


def delta(offset: int, text: str, *, message: str = "m_1", session: str = "s_1") -> Delta:
    return Delta(
        tenant_id="t",
        workspace_id="w",
        session_id=session,
        run_id="run_1",
        message_id=message,
        offset=offset,
        text=text,
        version=1,
    )


def put(outbox: Outbox, piece: Delta, version: int = 1) -> None:
    outbox.put_delta(piece, version, delta_frame(piece, piece.text, version))


def event(version: int) -> EventFrame:
    return EventFrame("agent.message", b'{"sessionId":"s_1"}', version)


def drain(outbox: Outbox) -> list[Any]:
    frames = []
    while (frame := outbox.take()) is not None:
        frames.append(json.loads(frame))
    return frames


def test_responses_and_events_leave_in_the_order_they_came_and_seq_counts_events_alone() -> None:
    outbox, _ = box()
    outbox.put_event(event(1))
    outbox.put(b'{"type":"res"}')
    outbox.put_event(event(2))
    frames = drain(outbox)
    assert [frame["type"] for frame in frames] == ["event", "res", "event"]
    assert [frame.get("seq") for frame in frames] == [1, None, 2]
    outbox.put_event(event(3))
    assert drain(outbox)[0]["seq"] == 3


def test_waiting_text_of_one_message_is_one_frame() -> None:
    outbox, _ = box()
    put(outbox, delta(0, "Grü"))
    put(outbox, delta(3, "ße, "))
    put(outbox, delta(7, "😀!"))
    (frame,) = drain(outbox)
    assert (frame["payload"]["offset"], frame["payload"]["delta"], frame["seq"]) == (0, "Grüße, 😀!", 1)
    put(outbox, delta(9, "more"))
    assert [frame["payload"]["offset"] for frame in drain(outbox)] == [9]


def test_text_is_not_merged_across_a_gap_a_version_a_message_or_a_session() -> None:
    outbox, _ = box()
    put(outbox, delta(0, "a"))
    put(outbox, delta(5, "b"))
    put(outbox, delta(6, "c"), version=2)
    put(outbox, delta(7, "d", message="m_2"), version=2)
    put(outbox, delta(8, "e", session="s_2"), version=2)
    assert [frame["payload"]["delta"] for frame in drain(outbox)] == ["a", "b", "c", "d", "e"]


def test_text_of_several_sessions_is_merged_side_by_side() -> None:
    outbox, _ = box()
    for offset in range(10):
        put(outbox, delta(offset, "x", session="s_1"))
        put(outbox, delta(offset, "y", session="s_2"))
    assert [frame["payload"]["delta"] for frame in drain(outbox)] == ["x" * 10, "y" * 10]


def test_too_many_bytes_or_frames_forget_all_and_tell_once() -> None:
    for outbox, told in (box(max_bytes=300), box(max_frames=3)):
        for version in range(10):
            outbox.put_event(event(version))
        assert told == ["overflow"]
        assert (outbox.waiting_frames, outbox.waiting_bytes, outbox.take()) == (0, 0, None)


def test_text_counts_towards_the_limit_while_it_is_merged() -> None:
    outbox, told = box(max_bytes=2000)
    outbox.put(b"{}")
    for offset in range(0, 4000, 100):
        put(outbox, delta(offset, "x" * 100))
    assert told == ["overflow"]


def test_one_frame_beyond_the_limit_passes_if_it_is_alone() -> None:
    outbox, told = box(max_bytes=100)
    outbox.put(b"x" * 5000)
    assert told == []
    assert outbox.take() == b"x" * 5000
    assert outbox.waiting_bytes == 0


def test_the_count_of_bytes_comes_back_to_nothing() -> None:
    outbox, _ = box()
    for offset in range(20):
        put(outbox, delta(offset * 2, "äö"))
        outbox.put_event(event(offset))
        outbox.put(msgspec.json.encode({"n": offset}))
    drain(outbox)
    assert outbox.waiting_bytes == 0


async def test_who_waits_for_frames_or_for_room_is_woken() -> None:
    outbox, _ = box()
    waiting = asyncio.create_task(outbox.wait())
    await asyncio.sleep(0)
    outbox.put(b"x" * 50)
    assert await waiting is True
    room = asyncio.create_task(outbox.wait_below(10))
    await asyncio.sleep(0)
    assert not room.done()
    outbox.take()
    await room
    outbox.finish()
    assert await outbox.wait() is False
    outbox.put(b"late")
    assert outbox.take() is None


async def test_who_waits_for_room_is_woken_when_nothing_is_taken_any_more() -> None:
    outbox, _ = box()
    outbox.put(b"x" * 50)
    room = asyncio.create_task(outbox.wait_below(10))
    await asyncio.sleep(0)
    outbox.discard()
    async with asyncio.timeout(60):
        await room


def test_it_tells_whenever_a_frame_waits_where_none_did() -> None:
    told: list[int] = []
    outbox = Outbox(1000, 10, lambda: None, on_waiting=lambda: told.append(1))
    outbox.put(b"a")
    outbox.put(b"b")
    assert len(told) == 1
    assert [outbox.take(), outbox.take(), outbox.take()] == [b"a", b"b", None]
    outbox.put(b"c")
    assert len(told) == 2
    outbox.finish()
    outbox.put(b"d")
    assert len(told) == 2
