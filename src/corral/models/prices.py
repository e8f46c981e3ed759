"""Context windows and list prices, out of the data that the package genai-prices carries.

The package is not imported: that costs 0.45 s and 30 MiB (it brings pydantic and an HTTP client),
and its data another 0.23 s and 10 MiB, where a server has 1 s and 90 MiB for everything. Its data
module is generated text of a regular form, so the one model asked for is cut out of it and read as
the literal that it is: 3 to 8 ms, no memory to speak of, and nothing is ever fetched. A test
compares every model that is read here with what the package itself says, so that a new form of
the data is noticed when the dependency is raised.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from msgspec import Struct

log = logging.getLogger(__name__)


class Rate(Struct, kw_only=True, frozen=True):
    """US dollars a million tokens, once a request's input is longer than `above` tokens."""

    above: int
    usd: float


class Listed(Struct, kw_only=True, frozen=True):
    """What the list says of a model. The rates ascend by `above`, the first is for 0; empty: not known."""

    context_window: int | None
    input_rates: tuple[Rate, ...]
    output_rates: tuple[Rate, ...]
    cache_read_rates: tuple[Rate, ...] = ()
    cache_write_rates: tuple[Rate, ...] = ()

    def cost_usd(
        self, input_tokens: int, output_tokens: int, cache_read_tokens: int = 0, cache_write_tokens: int = 0
    ) -> float | None:
        """What a call costs at list price.

        `cache_read_tokens` and `cache_write_tokens` are part of `input_tokens`; where they have no
        price of their own they are counted in full. A tier is chosen by the whole input.
        """
        if not self.input_rates or not self.output_rates:
            return None
        rate_in = _at(self.input_rates, input_tokens)
        read = _at(self.cache_read_rates or self.input_rates, input_tokens)
        write = _at(self.cache_write_rates or self.input_rates, input_tokens)
        fresh = input_tokens - cache_read_tokens - cache_write_tokens
        cost_in = fresh * rate_in + cache_read_tokens * read + cache_write_tokens * write
        return (cost_in + output_tokens * _at(self.output_rates, input_tokens)) / 1_000_000


def _at(rates: tuple[Rate, ...], input_tokens: int) -> float:
    return [rate.usd for rate in rates if rate.above == 0 or input_tokens > rate.above][-1]


def find(provider: str, name: str, now_ms: int) -> Listed | None:
    """What provider `provider`'s list says of the model `name` at a time; None if nothing."""
    name = name.lower()
    try:
        for fields in _models(provider):
            if "match" in fields and _matches(_literal(fields["match"]), name):
                window = _literal(fields.get("context_window", "None"))
                rates = _rates(_literal(fields.get("prices", "None")), datetime.fromtimestamp(now_ms / 1000, UTC))
                return Listed(
                    context_window=window,
                    input_rates=rates["input_mtok"],
                    output_rates=rates["output_mtok"],
                    cache_read_rates=rates["cache_read_mtok"],
                    cache_write_rates=rates["cache_write_mtok"],
                )
    except (OSError, ValueError, SyntaxError, TypeError, KeyError) as error:
        # Prices that cannot be read are prices that are not known; calls do not depend on them.
        log.warning("cannot read the price list: %r", error, extra={"action": "prices.unreadable"})
    return None


def provider_of(url: str) -> str | None:
    """The price list for an endpoint's address; None where it is nobody's that is known."""
    try:
        return next((name for name, pattern in _patterns() if re.match(pattern, url)), None)
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, re.error) as error:
        log.warning("cannot read the price list: %r", error, extra={"action": "prices.unreadable"})
        return None


# ---- the text


def _data_file() -> Path:
    spec = find_spec("genai_prices")
    if spec is None or not spec.submodule_search_locations:
        raise OSError("the package genai-prices is not installed")
    return Path(spec.submodule_search_locations[0]) / "data.py"


@cache
def _patterns() -> tuple[tuple[str, str], ...]:
    """Each provider's id and the pattern of its address."""
    found = []
    provider = ""
    with _data_file().open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("        id="):
                provider = _literal(_field(line)[1])
            elif line.startswith("        api_pattern="):
                found.append((provider, _literal(_field(line)[1])))
    return tuple(found)


def _models(provider: str) -> Iterator[dict[str, str]]:
    """The text of each field of each ModelInfo of a provider, in the list's order."""
    wanted = f"        id={provider!r},\n"
    inside = False
    block: list[str] = []
    with _data_file().open(encoding="utf-8") as lines:
        for line in lines:
            if not inside:
                inside = line == wanted
            elif line.startswith("    )"):
                return
            elif line.startswith("            ModelInfo("):
                block = [line]
                if line.endswith("),\n"):
                    yield _one_line(line)
                    block = []
            elif block and line.startswith("            )"):
                yield _fields(block[1:]) if len(block) > 2 else _one_line("".join([*block, ")"]))
                block = []
            elif block:
                block.append(line)


def _fields(lines: list[str]) -> dict[str, str]:
    """A ModelInfo over several lines: each field begins at 16 spaces, what belongs to it stands deeper or closes it."""
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        if line.startswith(" " * 16) and line[16].isalpha():
            name, text = _field(line)
            fields[name] = text
        elif name:
            fields[name] += line
    return fields


def _field(line: str) -> tuple[str, str]:
    name, _, text = line.strip().partition("=")
    return name, text


def _one_line(line: str) -> dict[str, str]:
    text = line.strip().rstrip(",")
    call = ast.parse(text, mode="eval").body
    if not isinstance(call, ast.Call):
        raise ValueError("a model that is no call")
    return {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg}


# ---- the literals


class _Made(Struct):
    """A constructor call: the class's name and its arguments."""

    kind: str
    fields: dict[str, Any]


def _literal(text: str) -> Any:
    return _value(ast.parse(text.strip().rstrip(","), mode="eval").body)


def _value(node: ast.expr) -> Any:
    """A literal, or a `_Made` for a constructor call. Nothing is executed."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_value(key): _value(item) for key, item in zip(node.keys, node.values, strict=True) if key is not None}
    if isinstance(node, ast.Call):
        kind = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        positional = {str(number): _value(item) for number, item in enumerate(node.args)}
        named = {word.arg: _value(word.value) for word in node.keywords if word.arg}
        return float(positional["0"]) if kind == "Decimal" else _Made(kind, positional | named)
    if isinstance(node, ast.Attribute):
        return node.attr
    raise ValueError(f"unexpected {type(node).__name__} in the price data")


_CLAUSES: dict[str, Callable[[str, Any], bool]] = {
    "ClauseEquals": lambda name, value: name == value.lower(),
    "ClauseStartsWith": lambda name, value: name.startswith(value.lower()),
    "ClauseEndsWith": lambda name, value: name.endswith(value.lower()),
    "ClauseContains": lambda name, value: value.lower() in name,
    "ClauseRegex": lambda name, value: re.search(value, name) is not None,
    "ClauseOr": lambda name, value: any(_matches(one, name) for one in value),
    "ClauseAnd": lambda name, value: all(_matches(one, name) for one in value),
}


def _matches(clause: _Made, name: str) -> bool:
    (value,) = clause.fields.values()
    return _CLAUSES[clause.kind](name, value)


_PRICES = ("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok")


def _rates(prices: Any, now: datetime) -> dict[str, tuple[Rate, ...]]:
    """The rates of each kind of token. Of prices under conditions the last whose condition holds counts."""
    if isinstance(prices, list):
        active = [one for one in prices if _active(one.fields.get("constraint"), now)]
        prices = (active or prices)[-1 if active else 0].fields["prices"]
    fields = prices.fields if isinstance(prices, _Made) else {}
    return {name: _tiers(fields.get(name)) for name in _PRICES}


def _active(constraint: _Made | None, now: datetime) -> bool:
    """Whether a price applies on this day. One for some hours of it counts all day: those are the dear ones."""
    if constraint is None or constraint.kind == "TimeOfDateConstraint":
        return True
    if constraint.kind != "StartDateConstraint":
        return False
    date = constraint.fields["start_date"].fields
    return (now.year, now.month, now.day) >= (date["0"], date["1"], date["2"])


def _tiers(price: Any) -> tuple[Rate, ...]:
    if price is None:
        return ()
    if isinstance(price, float):
        return (Rate(above=0, usd=price),)
    tiers = [Rate(above=tier.fields["start"], usd=tier.fields["price"]) for tier in price.fields["tiers"]]
    return (Rate(above=0, usd=price.fields["base"]), *sorted(tiers, key=lambda rate: rate.above))
