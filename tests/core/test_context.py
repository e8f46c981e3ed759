"""What of a history is sent to the model when it does not fit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from corral.core.context import RECENT_RESULTS, fit
from corral.models.api import AssistantMessage, Message, Text, ToolCall, ToolMessage, UserMessage
from corral.models.tokens import message_tokens


def user(text: str) -> UserMessage:
    return UserMessage(content=[Text(text=text)])


def turn(name: str, steps: int, size: int) -> list[Message]:
    messages: list[Message] = [user(f"do {name}")]
    for number in range(steps):
        call = ToolCall(id=f"{name}-{number}", name="file.read", args={"path": name})
        messages.append(AssistantMessage(text="", tool_calls=[call]))
        messages.append(ToolMessage(tool_call_id=call.id, name="file.read", output="x" * size))
    messages.append(AssistantMessage(text=f"{name} done"))
    return messages


def tokens(messages: list[Message]) -> int:
    return sum(message_tokens(message) for message in messages)


def whole(messages: list[Message]) -> bool:
    """Every call has its result and every result its call."""
    calls = [call.id for m in messages if isinstance(m, AssistantMessage) for call in m.tool_calls]
    results = [m.tool_call_id for m in messages if isinstance(m, ToolMessage)]
    return calls == results


def test_what_fits_is_sent_as_it_is() -> None:
    messages = turn("a", 3, 100)
    assert fit(messages, tokens(messages)) == messages


def test_old_tool_results_are_cut_before_anything_is_left_out() -> None:
    messages = [*turn("a", 10, 4000), user("now")]
    fitted = fit(messages, tokens(messages) // 2 + 500)
    assert len(fitted) == len(messages)
    results = [m for m in fitted if isinstance(m, ToolMessage)]
    assert all(len(m.output) == 4000 for m in results[-RECENT_RESULTS:])
    assert all("characters left out" in m.output for m in results[:-RECENT_RESULTS])


def test_the_oldest_turns_go_first_and_whole() -> None:
    messages = turn("a", 2, 100) + turn("b", 2, 100) + [user("now")]
    fitted = fit(messages, tokens(turn("b", 2, 100)) + 20)
    assert fitted[0] == user("do b")
    assert whole(fitted)


@given(
    shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3000)), max_size=5),
    room=st.integers(0, 6000),
)
def test_a_fitted_history_is_always_a_whole_transcript_that_ends_as_the_history_does(
    shapes: list[tuple[int, int]], room: int
) -> None:
    messages: list[Message] = []
    for index, (steps, size) in enumerate(shapes):
        messages += turn(f"t{index}", steps, size)
    messages.append(user("now"))
    fitted = fit(messages, room)
    assert fitted[-1] == messages[-1]
    assert whole(fitted)
    assert isinstance(fitted[0], UserMessage)
    assert tokens(fitted) <= max(room, message_tokens(messages[-1]))


def test_a_single_run_that_is_too_long_loses_its_oldest_steps_but_never_its_input() -> None:
    messages = turn("a", 60, 4000)[:-1]
    fitted = fit(messages, 1500)
    assert fitted[0] == messages[0]
    assert tokens(fitted) <= 1500
    assert whole(fitted)
    last_result = fitted[-1]
    assert isinstance(last_result, ToolMessage)
    assert last_result.tool_call_id == "a-59"
