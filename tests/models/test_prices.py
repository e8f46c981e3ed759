"""The prices that are read out of genai-prices' text are those that the package itself would give."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from genai_prices import Usage, calc_price
from genai_prices.data import providers
from genai_prices.types import TieredPrices, TimeOfDateConstraint

from corral.models import prices

NOW_MS = 1_795_000_000_000
NOW = datetime.fromtimestamp(NOW_MS / 1000, UTC)


def _rates(price: object) -> list[tuple[int, float]]:
    if price is None:
        return []
    if isinstance(price, TieredPrices):
        return [(0, float(price.base)), *((tier.start, float(tier.price)) for tier in price.tiers)]
    return [(0, float(str(price)))]


def _names(clause: Any) -> list[str]:
    """Names that a match clause was written for: every text in it."""
    value = next(iter(vars(clause).values()))
    return [name for one in value for name in _names(one)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("source", providers, ids=lambda source: source.id)
def test_every_model_has_the_window_and_the_prices_that_the_package_gives_it(source: Any) -> None:
    for model in source.models[:60]:
        name = _names(model.match)[0]
        theirs = source.find_model(name)
        mine = prices.find(source.id, name, NOW_MS)
        if theirs is None:  # a regular expression, which does not match itself
            assert mine is None
            continue
        assert mine is not None, name
        assert mine.context_window == theirs.context_window, name
        if isinstance(theirs.prices, list) and any(
            isinstance(one.constraint, TimeOfDateConstraint) for one in theirs.prices
        ):
            continue
        expected = theirs.get_prices(NOW)
        assert [(rate.above, rate.usd) for rate in mine.input_rates] == _rates(expected.input_mtok), name
        assert [(rate.above, rate.usd) for rate in mine.output_rates] == _rates(expected.output_mtok), name


def test_an_unknown_model_and_an_unknown_list_have_no_price() -> None:
    assert prices.find("openai", "no-such-model", NOW_MS) is None
    assert prices.find("no-such-provider", "gpt-4o", NOW_MS) is None


def test_a_price_counts_from_its_date_on() -> None:
    dated = [
        (source.id, model)
        for source in providers
        for model in source.models
        if isinstance(model.prices, list) and all(hasattr(one.constraint, "start_date") for one in model.prices[1:])
    ]
    assert dated
    for provider, model in dated[:10]:
        for when in (
            datetime(2023, 1, 1, tzinfo=UTC),
            datetime(2026, 6, 1, tzinfo=UTC),
            datetime(2030, 1, 1, tzinfo=UTC),
        ):
            name = _names(model.match)[0]
            mine = prices.find(provider, name, int(when.timestamp() * 1000))
            assert mine is not None
            found = next(one for one in providers if one.id == provider).find_model(name)
            assert found is not None
            assert [(rate.above, rate.usd) for rate in mine.input_rates] == _rates(found.get_prices(when).input_mtok)


def test_beyond_a_tier_all_tokens_cost_its_rate() -> None:
    rates = (prices.Rate(above=0, usd=1.0), prices.Rate(above=1000, usd=2.0))
    listed = prices.Listed(context_window=None, input_rates=rates, output_rates=(prices.Rate(above=0, usd=10.0),))
    assert listed.cost_usd(1000, 100) == pytest.approx(0.002)
    assert listed.cost_usd(2000, 100) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("url", "provider"),
    [
        ("https://openrouter.ai/api/v1", "openrouter"),
        ("https://api.groq.com/openai/v1", "groq"),
        ("https://api.openai.com/v1", "openai"),
        ("http://127.0.0.1:8000/v1", None),
    ],
)
def test_a_vendors_address_leads_to_its_list(url: str, provider: str | None) -> None:
    assert prices.provider_of(url) == provider


@pytest.mark.parametrize(
    ("list_id", "name"),
    [
        ("anthropic", "claude-haiku-4-5"),
        ("anthropic", "claude-haiku-5-5"),
        ("anthropic", "claude-sonnet-5"),
        ("google", "gemini-2.5-pro"),
        ("google", "gemini-2.5-flash"),
        ("openai", "gpt-4o"),
        ("deepseek", "deepseek-chat"),
        ("mistral", "mistral-large-latest"),
    ],
)
@pytest.mark.parametrize("counts", [(1_000, 100, 0, 0), (60_000, 700, 50_000, 2_000), (400_000, 700, 90_000, 0)])
def test_a_call_costs_what_the_package_says_cached_tokens_among_them(
    list_id: str, name: str, counts: tuple[int, int, int, int]
) -> None:
    mine = prices.find(list_id, name, NOW_MS)
    assert mine is not None
    total, output, read, written = counts
    if not mine.cache_write_rates:
        written = 0
    theirs = calc_price(
        Usage(input_tokens=total, output_tokens=output, cache_read_tokens=read, cache_write_tokens=written),
        model_ref=name,
        provider_id=list_id,
        genai_request_timestamp=NOW,
    )
    assert mine.cost_usd(total, output, read, written) == pytest.approx(float(theirs.total_price))
