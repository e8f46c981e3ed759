"""Anything at all put before or behind a shell text: the decision on it never gets weaker.

What a shell itself reads in a text that counts as simple is in tests/governance/test_shell.py.
"""

from __future__ import annotations

import subprocess

from hypothesis import given
from hypothesis import strategies as st

from corral.governance.shell import parse
from tests.governance.test_rules import BY_COMMAND, PIECE, STRICT, bash
from tests.governance.test_shell import NOISE, SEPARATOR, TEXT
from tests.support.examples import examples

ANYTHING = st.lists(
    st.one_of(
        NOISE,
        PIECE,
        st.text(max_size=4),
        st.sampled_from(
            ["<<E\n", "E\n", "$(", "((", "case x in x)", "esac", "if", "then", "#", "function f", "\r", "\0"]
        ),
    ),
    max_size=6,
).map(" ".join)


@examples(150)
@given(text=st.one_of(PIECE, TEXT), separator=SEPARATOR, anything=ANYTHING)
def test_nothing_before_or_behind_a_text_weakens_the_decision_on_it(text: str, separator: str, anything: str) -> None:
    alone = STRICT[BY_COMMAND.decide(bash(text)).decision]
    for whole in (f"{text}{separator}{anything}", f"{anything}{separator}{text}"):
        assert STRICT[BY_COMMAND.decide(bash(whole)).decision] >= alone, whole


@examples(80)
@given(text=ANYTHING, separator=SEPARATOR, more=PIECE)
def test_two_texts_in_a_row_are_decided_on_as_the_stricter_of_both(text: str, separator: str, more: str) -> None:
    whole = STRICT[BY_COMMAND.decide(bash(f"{text}{separator}{more}")).decision]
    assert whole >= STRICT[BY_COMMAND.decide(bash(more)).decision]
    if parse(text).simple:
        assert whole >= STRICT[BY_COMMAND.decide(bash(text)).decision]


@examples(15)
@given(texts=st.lists(ANYTHING, min_size=20, max_size=20))
def test_a_simple_text_is_one_that_bash_can_read(texts: list[str]) -> None:
    """Without running anything: `bash -n` finds no mistake in it."""
    simple = [text for text in texts if parse(text).simple]
    for text in simple:
        done = subprocess.run(["bash", "-n", "-c", "--", text], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), text
