"""What the fuzzers share: values that no honest client sends, types turned into strategies, how values are changed."""

from __future__ import annotations

import enum
import logging
import re
import types
import typing
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import strategies as st

from corral.protocol.errors import ErrorCode
from corral.protocol.schema import protocol_schema
from tests.support.house import TOKEN


def nothing_unexpected(caplog: pytest.LogCaptureFixture) -> None:
    """Fails if the server logged an error: an exception that nobody had in mind, a task that died."""
    shown = logging.Formatter("%(name)s: %(message)s")
    bad = [shown.format(record) for record in caplog.records if record.levelno >= logging.ERROR]
    caplog.clear()
    assert bad == [], "\n".join(bad)


# ---- answers

CODES = {code.value for code in ErrorCode} - {"INTERNAL_ERROR"}
_RESPONSE = jsonschema.Draft202012Validator({"$ref": "#/$defs/Response", "$defs": protocol_schema()["$defs"]})
_INSIDE = re.compile(r"Traceback|File \"|\.py\b|site-packages|/tmp/|corral\.db|sqlite|" + re.escape(TOKEN))


def check_response(response: Any) -> None:
    """A response is of the published schema; an error has a code of the contract and tells nothing of the inside."""
    assert list(_RESPONSE.iter_errors(response)) == [], response
    assert set(response) in ({"type", "id", "ok", "payload"}, {"type", "id", "ok", "error"})
    assert response["ok"] is ("payload" in response)
    if not response["ok"]:
        assert response["error"]["code"] in CODES, response
        assert response["error"]["message"]
        assert response["error"]["traceId"]
        assert _INSIDE.search(str(response["error"])) is None, response


# ---- values

LETTERS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("\0\n\r\t\x1b\u2028\u202e\ufeff'\"\\%_*;-/.:{}[]$")),
    max_size=12,
)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**30, 10**300]),
    st.floats(allow_nan=False, allow_infinity=False),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, LETTERS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(LETTERS, inner, max_size=4)),
    max_leaves=8,
)
"""JSON values, all of which msgspec and the standard library can write."""

HOSTILE = st.one_of(
    SCALARS,
    st.sampled_from([[], {}, [[]], {"": {}}, "x" * 5000, ["x"] * 300, "\0", "null", "../..", "' OR 1=1 --", "%"]),
    VALUES,
)


# ---- types


def _meta(kind: Any) -> tuple[Any, msgspec.Meta | None]:
    if typing.get_origin(kind) is typing.Annotated:
        inner, *more = typing.get_args(kind)
        return inner, next((each for each in more if isinstance(each, msgspec.Meta)), None)
    return kind, None


def valid(kind: Any, pools: dict[str, st.SearchStrategy[Any]], name: str = "") -> st.SearchStrategy[Any]:
    """JSON values that decode as `kind`. A field whose name is in `pools` is taken from there."""
    if name in pools:
        return pools[name]
    inner, meta = _meta(kind)
    origin = typing.get_origin(inner)
    if origin in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(inner) if part is not msgspec.UnsetType]
        return st.one_of([valid(part, pools, name) for part in parts])
    if origin is typing.Literal:
        return st.sampled_from(typing.get_args(inner))
    if origin is list:
        (item,) = typing.get_args(inner)
        return st.lists(valid(item, pools), min_size=(meta and meta.min_length) or 0, max_size=3)
    if origin is dict:
        return st.dictionaries(LETTERS, valid(typing.get_args(inner)[1], pools), max_size=3)
    if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
        return _object(inner, pools)
    if isinstance(inner, type) and issubclass(inner, enum.Enum):
        return st.sampled_from([member.value for member in inner])
    return _scalar(inner, meta)


def _object(kind: type[msgspec.Struct], pools: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    required: dict[str, st.SearchStrategy[Any]] = {}
    optional: dict[str, st.SearchStrategy[Any]] = {}
    for field in msgspec.structs.fields(kind):
        strategy = valid(hints[field.name], pools, field.encode_name)
        (required if field.required else optional)[field.encode_name] = strategy
    tag = kind.__struct_config__.tag
    if tag is not None:
        required[str(kind.__struct_config__.tag_field)] = st.just(tag)
    return st.fixed_dictionaries(required, optional=optional)


def _scalar(kind: Any, meta: msgspec.Meta | None) -> st.SearchStrategy[Any]:
    if kind is str:
        if meta is not None and meta.pattern:
            return st.from_regex(meta.pattern.replace(r"(?![\s\S])", r"\Z"), fullmatch=True)
        low = (meta and meta.min_length) or 0
        high = (meta and meta.max_length) or 20
        return st.text(st.characters(codec="utf-8"), min_size=low, max_size=min(high, low + 20))
    if kind is int:
        least, most = (meta.ge, meta.le) if meta is not None else (None, None)
        return st.integers(int(least) if least is not None else -9, int(most) if most is not None else None)
    if kind is float:
        return st.floats(min_value=meta.ge if meta else None, allow_nan=False, allow_infinity=False)
    if kind is bool:
        return st.booleans()
    if kind is type(None):
        return st.none()
    assert kind is Any, kind
    return VALUES


# ---- mutations

Path = tuple[str | int, ...]


def paths(value: Any, at: Path = ()) -> list[Path]:
    """Every place in a JSON value, the whole first."""
    found: list[Path] = [at]
    if isinstance(value, dict):
        for key, item in value.items():
            found += paths(item, (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += paths(item, (*at, index))
    return found


def replaced(value: Any, path: Path, new: Any) -> Any:
    """`value` with something else at `path`."""
    if not path:
        return new
    key, *rest = path
    copy = list(value) if isinstance(value, list) else dict(value)
    copy[key] = replaced(value[key], tuple(rest), new)  # type: ignore[index]
    return copy


def without(value: Any, path: Path) -> Any:
    """`value` without what is at `path`, which is not the whole."""
    *outer, last = path
    holder = value
    for key in outer:
        holder = holder[key]
    copy = list(holder) if isinstance(holder, list) else dict(holder)
    del copy[last]  # type: ignore[arg-type]
    return replaced(value, tuple(outer), copy)


@st.composite
def mutated(draw: st.DrawFn, values: st.SearchStrategy[Any], most: int = 2) -> Any:
    """One of `values` with something in it replaced, left out or added."""
    value = draw(values)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(paths(value)))
        how = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if how == "drop" and path:
            value = without(value, path)
        elif how == "add":
            value = replaced(value, path, {draw(LETTERS): draw(HOSTILE), **_as_dict(value, path)})
        else:
            value = replaced(value, path, draw(HOSTILE))
    return value


def _as_dict(value: Any, path: Path) -> dict[str, Any]:
    for key in path:
        value = value[key]
    return value if isinstance(value, dict) else {"was": value}
