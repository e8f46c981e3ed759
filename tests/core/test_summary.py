"""Where a history is cut, and how it is put to the model that summarises it."""

from __future__ import annotations

import pytest

from corral.core.summary import MOST_PIECES, PIECE_SHARE, find_cut, longest, requests
from corral.models.api import AssistantMessage, Message, Text, ToolCall, ToolMessage, UserMessage
from corral.models.tokens import message_tokens, text_tokens


def user(text: str) -> Message:
    return UserMessage(content=[Text(text=text)])


def step(number: int, results: int, length: int) -> list[Message]:
    """One message with calls, and their results."""
    calls = [ToolCall(id=f"c{number}-{at}", name="file.read", args={"path": "f"}) for at in range(results)]
    outputs = [ToolMessage(tool_call_id=call.id, name=call.name, output="w" * length) for call in calls]
    return [AssistantMessage(text="", tool_calls=calls), *outputs]


def history() -> list[Message]:
    messages = [user("first " * 100)]
    for number in range(12):
        messages += step(number, number % 4, 40 * (number % 5 + 1))
        if number % 5 == 4:
            messages += [AssistantMessage(text="done"), user(f"turn {number}")]
    return messages


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_wherever_it_is_cut_a_call_and_its_results_are_on_one_side(scale: float) -> None:
    messages, places = history(), set[int]()
    for window in range(50, 4000, 7):
        cut = find_cut(messages, 0, window, scale)
        if cut is None:
            continue
        places.add(cut.at)
        called = {call.id for m in messages[: cut.at] if isinstance(m, AssistantMessage) for call in m.tool_calls}
        answered = {m.tool_call_id for m in messages[: cut.at] if isinstance(m, ToolMessage)}
        assert called == answered
        kept = cut.kept(messages)
        assert kept[0] is messages[0]
        assert kept[-1] is messages[-1]
    assert len(places) > 5


def test_the_last_step_is_kept_however_long_it_is() -> None:
    messages = [user("go"), *step(1, 1, 4000), *step(2, 3, 40_000)]
    cut = find_cut(messages, 0, 8000, 1.0)
    assert cut is not None
    assert cut.at == 3


def test_what_would_make_too_little_room_is_not_cut_off() -> None:
    messages = [user("short"), AssistantMessage(text="short"), user("x" * 40_000)]
    assert find_cut(messages, 2, 8000, 1.0) is None
    # The input of the run that is on is sent all the same: to summarise it makes no room.
    assert find_cut([user("x" * 40_000), *step(1, 1, 400), *step(2, 1, 9000)], 0, 8000, 1.0) is None


def test_the_pieces_hold_all_of_it_in_order_and_none_is_longer_than_the_window_has_room() -> None:
    texts = [f"<{number}> {'word ' * 900}" for number in range(20)]
    window = 8000
    pieces = requests([user(text) for text in texts], window)
    assert 1 < len(pieces) <= MOST_PIECES
    whole = "".join(pieces)
    assert [whole.index(f"<{number}>") for number in range(20)] == sorted(whole.index(f"<{n}>") for n in range(20))
    assert all(text.strip() in whole for text in texts)
    assert all(text_tokens(piece) + longest(window) <= window * PIECE_SHARE for piece in pieces)


def test_what_is_too_long_for_all_pieces_loses_its_oldest_part_and_says_so() -> None:
    messages = [user(f"<{number}> {'w' * 40_000}") for number in range(12)]
    pieces = requests(messages, 8000)
    assert len(pieces) == MOST_PIECES
    assert pieces[0].startswith("[What came before this was too long")
    assert "<11>" in "".join(pieces)
    assert "<0>" not in "".join(pieces)
    assert sum(message_tokens(message) for message in messages) > 8000 * MOST_PIECES


def test_long_results_are_cut_before_anything_is_left_out() -> None:
    messages = [user("<begin>"), *(m for n in range(12) for m in step(n, 1, 40_000))]
    whole = "".join(requests(messages, 8000))
    assert "<begin>" in whole
    assert "characters left out]" in whole
