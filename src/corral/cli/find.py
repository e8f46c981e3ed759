"""How a command finds the gateway that it speaks to, and the token for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from urllib.parse import urlsplit

import click

from corral.cli import NO_GATEWAY, USAGE, CliError
from corral.config import ConfigError, Settings, is_loopback_literal, read_endpoint, read_token

url_option = click.option(
    "--url",
    metavar="URL",
    help="The gateway, http://HOST:PORT. [default: CORRAL_URL, else the running gateway of the data directory]",
)


def find_gateway(url: str | None, settings: Settings) -> Callable[[], tuple[str, str]]:
    """How to get (url, token) now, and again after the gateway has gone: it may come back elsewhere.

    Raises CliError if there is none to begin with, or if the token would go to a stranger.
    """
    named = url or os.environ.get("CORRAL_URL", "").strip() or None
    if named is not None:
        answer = (_checked_url(named), _token_for(named, settings))
        return lambda: answer

    GatewayUnreachable = load_client("http:").GatewayUnreachable

    def address() -> tuple[str, str]:
        endpoint = read_endpoint(settings.data_dir)
        if endpoint is None or not _alive(endpoint.pid):
            raise GatewayUnreachable(f"no gateway is running for {settings.data_dir}")
        try:
            return _reachable(endpoint.url), read_token(settings)
        except ConfigError as error:
            raise GatewayUnreachable(str(error)) from None

    try:
        address()
    except GatewayUnreachable as error:
        raise no_gateway(str(error), settings) from None
    return address


def load_client(url: str) -> ModuleType:
    """`corral.client`, imported for a gateway at `url`.

    aiohttp reads the system's certificates twice as it is imported, a fifth of what a short command
    costs. A gateway spoken to without TLS needs none of them, so they are left out; should such a
    process speak TLS after all, it would trust nobody.
    """
    if urlsplit(url).scheme != "http":
        import corral.client

        return corral.client
    hidden = {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": os.devnull}
    before = {name: os.environ.get(name) for name in hidden}
    os.environ.update(hidden)
    try:
        import corral.client

        return corral.client
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def no_gateway(what: str, settings: Settings, url: str | None = None) -> CliError:
    """The error for a gateway that is not to be had, with the command that starts one.

    `url` is what the person named it by.
    """
    if url is not None or os.environ.get("CORRAL_URL", "").strip():
        name = "--url" if url is not None else "CORRAL_URL"
        return CliError(what, f"check {name}, or leave it out for the gateway of the data directory", code=NO_GATEWAY)
    option = "" if settings.origins["data_dir"] == "default" else f" --data-dir {settings.data_dir}"
    return CliError(what, f"start one in another terminal: corral serve{option}", code=NO_GATEWAY)


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise CliError(f"{url!r} is no gateway's URL", "it looks like http://127.0.0.1:7077", code=USAGE)
    return url


def _token_for(url: str, settings: Settings) -> str:
    """The token for a gateway that was named. The one that the data directory keeps is for this
    machine's own: it goes nowhere but to a loopback address, and a name is none."""
    host = urlsplit(url).hostname or ""
    if settings.token is None and not is_loopback_literal(host):
        raise CliError(
            f"no access token for {host}: the one in {settings.data_dir} is for this machine's own gateway",
            "set CORRAL_TOKEN to that gateway's token",
            code=USAGE,
        )
    try:
        return read_token(settings)
    except ConfigError as error:
        raise CliError(str(error), code=USAGE) from None


def _reachable(url: str) -> str:
    """A gateway that listens on every address is called on this machine's own."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
