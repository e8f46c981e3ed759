"""Frames of every kind of nonsense, over a WebSocket and over `/rpc`.

What must hold: each is answered once, under its own id where that can be read, with a code of the
contract that is never INTERNAL_ERROR; the connection stays open; the server logs no error.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.protocol.frames import INVALID_ID
from corral.protocol.methods import METHODS
from tests.fuzz.support import HOSTILE, LETTERS, check_response, nothing_unexpected
from tests.support.examples import examples
from tests.support.house import TOKEN, House

pytestmark = pytest.mark.asyncio(loop_scope="module")

STATUSES = {200, 400, 413}

# ---- texts: JSON that says things twice, JSON that is almost JSON, and what is none

ESCAPES = st.sampled_from(["\\ud800", "\\udfff", "\\ud83d\\ude00", "\\u0000", "\\n", "\\x", '\\"', "\ud83d\ude00"[:0]])
STRINGS = st.one_of(
    LETTERS.map(lambda text: json.dumps(text, ensure_ascii=False)),
    st.tuples(ESCAPES, ESCAPES).map(lambda pair: f'"{pair[0]}{pair[1]}"'),
)
ODD = st.sampled_from(
    [
        *("NaN", "Infinity", "-0", "1e999", "-1e999", "1E400", "0.1e-999", "01", "+1", ".5", "1.", "0x10", "1_0"),
        *("9" * 40, "9" * 400, "9" * 5000, "-" + "9" * 5000, "1" + "0" * 308 + ".5", "tru", "'x'", "undefined", ""),
    ]
)
SCALAR_TEXTS = st.one_of(STRINGS, ODD, HOSTILE.map(json.dumps), st.sampled_from(["null", "true", "[]", "{}"]))


def _object_text(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"


ANY_TEXT = st.recursive(
    SCALAR_TEXTS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: "[" + ",".join(items) + "]"),
        st.lists(st.tuples(STRINGS, inner), max_size=4).map(_object_text),
    ),
    max_leaves=8,
)
DEEP = st.tuples(st.sampled_from(["[", '{"a":', '[{"id":']), st.integers(1, 3000), st.booleans()).map(
    lambda parts: (
        parts[0] * parts[1] + ("1" + {"[": "]", '{"a":': "}"}.get(parts[0], "}]") * parts[1] if parts[2] else "")
    )
)
IDS = st.one_of(st.just('"r"'), LETTERS.map(lambda text: json.dumps(text, ensure_ascii=False)), SCALAR_TEXTS)
# What would end or change the server under test is left out.
NAMES = st.one_of(
    st.sampled_from([f'"{name}"' for name in METHODS if name not in ("agent.run", "policy.update", "tokens.revoke")]),
    SCALAR_TEXTS,
)
FIELDS = st.one_of(
    st.tuples(st.just('"type"'), st.one_of(st.just('"req"'), st.just('"req"'), SCALAR_TEXTS)),
    st.tuples(st.just('"id"'), IDS),
    st.tuples(st.just('"method"'), NAMES),
    st.tuples(st.just('"params"'), st.one_of(ANY_TEXT, DEEP)),
    st.tuples(STRINGS, ANY_TEXT),
)


@st.composite
def frames(draw: st.DrawFn) -> str:
    """Mostly a request with something wrong in it."""
    kind = draw(st.sampled_from(["request", "request", "request", "fields", "any", "text", "deep"]))
    if kind == "any":
        return draw(ANY_TEXT)
    if kind == "text":
        return draw(st.text(max_size=40))
    if kind == "deep":
        return draw(DEEP)
    pairs = draw(st.lists(FIELDS, max_size=6))
    if kind == "request":
        whole = [('"type"', '"req"'), ('"id"', draw(IDS)), ('"method"', draw(NAMES)), ('"params"', draw(ANY_TEXT))]
        pairs = draw(st.permutations(whole + draw(st.lists(FIELDS, max_size=1))))
    text = _object_text(pairs)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        place = draw(st.integers(0, len(text)))
        cut = draw(st.integers(0, 3))
        text = (
            text[:place]
            + draw(st.sampled_from(["", "", '"', "{", "}", ",", "\\", "\0", "\ufeff", " "]))
            + text[place + cut :]
        )
    return text


def id_of(text: str) -> set[str]:
    """The ids under which this frame may be answered, as another reader of JSON sees it."""

    def no_constant(name: str) -> Any:
        raise ValueError(name)

    try:
        # Numbers are no matter: only whether this is an object with an id.
        frame = json.loads(text, parse_int=lambda _: 0, parse_float=lambda _: 0.0, parse_constant=no_constant)
    except RecursionError:
        return {"*"}
    except ValueError:
        # Of what is cut off or too deep the id may have been read before that showed.
        return {INVALID_ID} if text.count("[") + text.count("{") < 100 else {"*"}
    if text.count("[") + text.count("{") >= 400:
        return {"*"}
    given = frame.get("id") if isinstance(frame, dict) else None
    if not isinstance(given, str) or not 1 <= len(given) <= 128 or any("\ud800" <= char <= "\udfff" for char in given):
        return {INVALID_ID}
    return {given}


@examples(35)
@given(texts=st.lists(frames(), min_size=1, max_size=8))
async def test_every_frame_on_a_websocket_is_answered_under_its_id_and_the_socket_stays(
    home: House, caplog: pytest.LogCaptureFixture, texts: list[str]
) -> None:
    async with await home.wire() as wire:
        before = len(wire.frames)
        for text in texts:
            await wire.send(text)
        assert (await wire.call("sessions.get", {"sessionId": "s_last"}))["payload"] == {"session": None}
        await wire.until(lambda: sum(frame["type"] == "res" for frame in wire.frames[before:]) == len(texts) + 1)
        responses = [frame for frame in wire.frames[before:] if frame["type"] == "res"]
        for response in responses:
            check_response(response)
        got = Counter(response["id"] for response in responses)
        got.subtract(["r2"])
        wanted = [id_of(text) for text in texts]
        got.subtract(next(iter(ids)) for ids in wanted if "*" not in ids)
        # What is left over are the answers to those whose id may have been read or not.
        assert sum(got.values()) == sum("*" in ids for ids in wanted), (texts, responses)
        assert min(got.values(), default=0) >= 0, (texts, responses)
        assert wire.close_code is None
    nothing_unexpected(caplog)


BODIES = st.one_of(
    frames().map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=60),
    st.tuples(frames(), st.integers(0, 200), st.binary(max_size=3)).map(
        lambda parts: parts[0].encode()[: parts[1]] + parts[2] + parts[0].encode()[parts[1] :]
    ),
)


@examples(25)
@given(bodies=st.lists(BODIES, min_size=1, max_size=5))
async def test_every_body_of_rpc_is_answered_in_its_shape_with_a_status_of_the_contract(
    home: House, caplog: pytest.LogCaptureFixture, bodies: list[bytes]
) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(headers=headers) as session:
        for body in bodies:
            async with session.post(f"{home.url}/rpc", data=body) as answer:
                assert answer.status in STATUSES
                said = await answer.json()
                assert set(said) == {"response", "events"}
                check_response(said["response"])
                try:
                    ids = id_of(body.decode())
                except UnicodeDecodeError:
                    ids = {INVALID_ID}
                assert "*" in ids or said["response"]["id"] in ids, body
    nothing_unexpected(caplog)
