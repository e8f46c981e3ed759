"""How often and how many: three sizes of the same measurements."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Numbers:
    """`fanout` is (subscribers, steps of the run, chunks of the long message) by place in the table."""

    turn_rounds: int
    crowd_rounds: int
    crowd: int
    turns_each: int
    fanout_rounds: int
    fanout: tuple[tuple[int, int, int], ...]
    calls_in_a_step: int
    idle_rounds: int
    idle: int
    idle_rest_s: float
    append_rounds: int
    writers: int
    appends_each: int
    start_rounds: int
    tool_rounds: int
    decision_rounds: int


FULL = Numbers(
    turn_rounds=200,
    crowd_rounds=9,
    crowd=16,
    turns_each=8,
    fanout_rounds=7,
    fanout=((1, 10, 4000), (100, 2, 1000), (1000, 1, 200)),
    calls_in_a_step=100,
    idle_rounds=3,
    idle=1000,
    idle_rest_s=3.0,
    append_rounds=9,
    writers=64,
    appends_each=100,
    start_rounds=9,
    tool_rounds=100,
    decision_rounds=50,
)

QUICK = Numbers(
    turn_rounds=40,
    crowd_rounds=3,
    crowd=16,
    turns_each=4,
    fanout_rounds=3,
    fanout=((1, 5, 2000), (100, 1, 500), (1000, 1, 100)),
    calls_in_a_step=60,
    idle_rounds=1,
    idle=1000,
    idle_rest_s=3.0,
    append_rounds=3,
    writers=64,
    appends_each=50,
    start_rounds=3,
    tool_rounds=25,
    decision_rounds=20,
)

TINY = Numbers(
    turn_rounds=2,
    crowd_rounds=1,
    crowd=2,
    turns_each=1,
    fanout_rounds=1,
    fanout=((1, 1, 20), (3, 1, 20)),
    calls_in_a_step=3,
    idle_rounds=1,
    idle=5,
    idle_rest_s=0.2,
    append_rounds=1,
    writers=4,
    appends_each=2,
    start_rounds=1,
    tool_rounds=1,
    decision_rounds=1,
)
"""Goes through everything; its figures mean nothing."""
