"""Which providers there are, and where each finds its address and its key: one table.

A provider of another dialect is a row here and, where it needs one, a function in `_DIALECTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec import Struct

from corral.models import prices
from corral.models.http import Endpoint, HttpClient, Timeouts
from corral.models.provider import Provider, ProviderError, Remedy
from corral.protocol.errors import InvalidRequest


class Kind(Struct, kw_only=True, frozen=True):
    """A provider. `url_variables` and `key_variables` are tried in order; `prices` is its price list's id.

    `key_header`: where the key goes, if not into `Authorization` as a bearer token.
    `key_needed`: at the default address no call is made without a key. `free`: calls cost nothing.
    `strict`: the vendor refuses fields that it does not know, `stream_options` among them. `short_ids`: it
    wants tool call ids of nine letters and digits.
    `takes_name`: the model string is `provider:name`, else the provider's name alone.
    """

    name: str
    dialect: str
    url_variables: tuple[str, ...] = ()
    default_url: str = ""
    key_variables: tuple[str, ...] = ()
    key_header: str | None = None
    key_needed: bool = False
    prices: str | None = None
    free: bool = False
    takes_name: bool = True
    strict: bool = False
    short_ids: bool = False


def _vendor(
    name: str, url: str, key_variable: str, prices: str | None = None, *, strict: bool = False, short_ids: bool = False
) -> Kind:
    """A vendor that speaks Chat Completions at an address of its own; NAME_BASE_URL names another."""
    return Kind(
        name=name,
        dialect="chat-completions",
        url_variables=(f"{name.upper()}_BASE_URL",),
        default_url=url,
        key_variables=(key_variable,),
        key_needed=True,
        prices=prices,
        strict=strict,
        short_ids=short_ids,
    )


PROVIDERS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="openai-chat",
            dialect="chat-completions",
            url_variables=("OPENAI_BASE_URL",),
            default_url="https://api.openai.com/v1",
            key_variables=("OPENAI_API_KEY",),
            key_needed=True,
            prices="openai",
        ),
        Kind(
            name="anthropic",
            dialect="messages",
            url_variables=("ANTHROPIC_BASE_URL",),
            default_url="https://api.anthropic.com",
            key_variables=("ANTHROPIC_API_KEY",),
            key_header="x-api-key",
            key_needed=True,
            prices="anthropic",
        ),
        Kind(
            name="google",
            dialect="library",
            url_variables=("GOOGLE_GEMINI_BASE_URL",),
            default_url="https://generativelanguage.googleapis.com",
            key_variables=("GOOGLE_API_KEY", "GEMINI_API_KEY"),
            key_header="x-goog-api-key",
            key_needed=True,
            prices="google",
        ),
        Kind(
            name="ollama",
            dialect="chat-completions",
            url_variables=("OLLAMA_BASE_URL", "OLLAMA_HOST"),
            default_url="http://127.0.0.1:11434/v1",
            key_variables=("OLLAMA_API_KEY",),
            free=True,
        ),
        _vendor("openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", "openrouter"),
        _vendor("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY", "groq"),
        _vendor("mistral", "https://api.mistral.ai/v1", "MISTRAL_API_KEY", "mistral", strict=True, short_ids=True),
        _vendor("cohere", "https://api.cohere.ai/compatibility/v1", "CO_API_KEY", "cohere", strict=True),
        _vendor("deepseek", "https://api.deepseek.com", "DEEPSEEK_API_KEY", "deepseek"),
        _vendor("xai", "https://api.x.ai/v1", "XAI_API_KEY", "x-ai"),
        _vendor("together", "https://api.together.xyz/v1", "TOGETHER_API_KEY", "together"),
        _vendor("fireworks", "https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY", "fireworks"),
        _vendor("cerebras", "https://api.cerebras.ai/v1", "CEREBRAS_API_KEY", "cerebras"),
        _vendor("moonshotai", "https://api.moonshot.ai/v1", "MOONSHOTAI_API_KEY", "moonshotai"),
        Kind(name="demo", dialect="demo", free=True, takes_name=False),
    )
}


class Target(Struct, frozen=True):
    """A model string taken apart; `model` is the whole of it."""

    model: str
    kind: Kind
    name: str


def parse(model: str) -> Target:
    """`provider:name`; the name may hold colons itself. Raises InvalidRequest."""
    provider, colon, name = model.partition(":")
    kind = PROVIDERS.get(provider)
    if kind is None:
        named = ", ".join(one.name for one in PROVIDERS.values() if one.takes_name)
        bare = " or ".join(one.name for one in PROVIDERS.values() if not one.takes_name)
        ways = f"PROVIDER:NAME with one of {named}, or it is {bare}"
        raise InvalidRequest(f"there is no model provider {provider[:100]!r}; a model is {ways}")
    if kind.takes_name and not name:
        raise InvalidRequest(f"the model {model[:100]!r} lacks a name; write {provider}:NAME")
    if not kind.takes_name and colon:
        raise InvalidRequest(f"the provider {provider} has one model; write {provider} alone")
    return Target(model, kind, name or provider)


def price_list(kind: Kind, env: Mapping[str, str]) -> str | None:
    """The id of the price list for a provider as `env` configures it.

    An address that belongs to a known vendor has that vendor's list. Any other (a proxy of one's
    own, say) is taken to charge what the provider's own list says.
    """
    if kind.prices is None:
        return None
    _, url = _first(kind.url_variables, env)
    return (prices.provider_of(url) if url else None) or kind.prices


def build(
    kind: Kind, env: Mapping[str, str], client: HttpClient, timeouts: Timeouts, new_id: Callable[[], str]
) -> Provider:
    """The provider as `env` configures it. Raises ProviderError (NEXT), which names the variable to set."""
    if kind.dialect == "demo":
        from corral.models.demo import DemoModel

        return DemoModel(new_id=new_id)
    endpoint = _endpoint(kind, env)
    if kind.dialect == "messages":
        from corral.models.anthropic import Anthropic

        return Anthropic(endpoint, client, timeouts=timeouts, new_id=new_id)
    if kind.dialect == "library":
        from corral.models.library import Library

        return Library(kind.name, endpoint, client, timeouts=timeouts, new_id=new_id)
    from corral.models.chat_completions import ChatCompletions

    at_home = kind.name == "openai-chat" and endpoint.shown == kind.default_url
    return ChatCompletions(
        endpoint,
        client,
        timeouts=timeouts,
        new_id=new_id,
        token_limit_field="max_completion_tokens" if at_home else "max_tokens",
        strict=kind.strict,
        short_ids=kind.short_ids,
    )


def _endpoint(kind: Kind, env: Mapping[str, str]) -> Endpoint:
    url_variable, url = _first(kind.url_variables, env)
    key_variable, key = _first(kind.key_variables, env)
    if kind.name == "ollama":
        url = _ollama_url(url or kind.default_url)
    if not url or url.rstrip("/") == kind.default_url:
        url = kind.default_url
        if kind.key_needed and not key:
            raise ProviderError(
                f"there is no key: set {key_variable}, or {url_variable} for a server of your own that needs none",
                Remedy.NEXT,
            )
    try:
        return Endpoint(
            url, key, url_variable=url_variable, key_variable=key_variable or None, key_header=kind.key_header
        )
    except ValueError as error:
        raise ProviderError(str(error), Remedy.NEXT) from None


def _first(variables: tuple[str, ...], env: Mapping[str, str]) -> tuple[str, str]:
    """The first variable that is set, and its value; else the first variable and an empty text."""
    for variable in variables:
        if value := env.get(variable, "").strip():
            return variable, value
    return (variables[0] if variables else ""), ""


def _ollama_url(value: str) -> str:
    """OLLAMA_HOST is written in several ways: `host`, `host:port`, `:port`, a URL with or without `/v1`."""
    if "://" not in value:
        host, _, rest = value.partition("/")
        if host.startswith(":"):
            host = f"127.0.0.1{host}"
        if ":" not in host.rpartition("]")[2]:
            host = f"{host}:11434"
        value = f"http://{host}/{rest}"
    # The address to listen on, which the same variable also is, is not one to connect to everywhere.
    value = value.replace("://0.0.0.0", "://127.0.0.1").replace("://[::]", "://[::1]").rstrip("/")
    return value if value.count("/") > 2 else f"{value}/v1"
