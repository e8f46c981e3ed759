"""`corral serve`."""

from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from corral import faults
from corral.cli import FAILED, LOCKED, USAGE, CliError
from corral.cli.common import data_dir_option, prepare_data_dir, settings_from
from corral.cli.logs import log_to_stderr
from corral.config import ConfigError, Settings, check_listen

log = logging.getLogger(__name__)


@click.command()
@click.option("--host", metavar="HOST", help="Where to listen. [default: CORRAL_HOST, else 127.0.0.1]")
@click.option("--port", metavar="PORT", help="On which port; 0 picks a free one. [default: CORRAL_PORT, else 7077]")
@data_dir_option
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The configuration. [default: corral.toml in the data directory]",
)
@click.option(
    "--model", metavar="PROVIDER:NAME", help="The model of runs that name none. [default: CORRAL_MODEL, else demo]"
)
def command(**flags: Any) -> int:
    """Start the gateway.

    The first line on standard output is `listening on http://HOST:PORT`; the log goes to standard
    error. SIGTERM and Ctrl-C end it: live runs are left to be taken up by the next start.

    An address that other machines may reach is refused unless there is an access token that
    somebody knows: CORRAL_TOKEN, `token` in corral.toml, or one that the data directory has already.

    \b
    corral serve
    OPENAI_API_KEY=… corral serve --model openai-chat:NAME

    Exit codes: 0 stopped, 1 failed (port in use, for one), 2 bad configuration,
    3 the data directory is in use by another process.
    """
    settings = settings_from(flags)
    if _settle(settings):
        settings = settings_from(flags)  # corral.toml may have come with it
    try:
        check_listen(settings)
        fault = faults.arm(os.environ)
    except (ConfigError, faults.FaultRefused) as error:
        raise CliError(str(error), code=USAGE) from None
    _check_models(settings)
    prepare_data_dir(settings)
    log_to_stderr(settings)
    if fault is not None:
        log.warning("this process will end at %s", fault, extra={"action": "fault.armed"})
    return _serve(settings)


def _settle(settings: Settings) -> bool:
    """Bring a restore that was interrupted to its end; whether there was one."""
    from corral.storage.exchange import interrupted, settle
    from corral.storage.lock import DataDirLock, DataDirLocked

    if not interrupted(settings.data_dir):
        return False
    try:
        with DataDirLock(settings.data_dir):
            told = settle(settings.data_dir)
    except DataDirLocked as error:
        raise _in_use(settings, error.pid) from None
    except OSError as error:
        raise CliError(
            f"a restore into {settings.data_dir} was interrupted and cannot be ended: {error}",
            "mend that, and start again",
        ) from None
    if told is not None:
        print(f"corral: {told}", file=sys.stderr)
    return True


def _in_use(settings: Settings, pid: int | None) -> CliError:
    who = "another process" if pid is None else f"process {pid}"
    return CliError(
        f"{settings.data_dir} is in use by {who}",
        "use that gateway, or stop it, or start this one with another --data-dir",
        code=LOCKED,
    )


def _serve(settings: Settings) -> int:
    # What is loaded from here on stays, so that looking for garbage among it would be in vain, a tenth of the start.
    # `serve` turns the collector on again.
    gc.disable()
    # Here, as the help needs none of it.
    import uvloop

    from corral.server import serve
    from corral.storage.api import StoreUnavailable
    from corral.storage.lock import DataDirLocked
    from corral.storage.schema import SchemaRefused

    try:
        uvloop.run(serve(settings, on_listening=_announce))
    except DataDirLocked as error:
        raise _in_use(settings, error.pid) from None
    except ConfigError as error:
        raise CliError(str(error), code=USAGE) from None
    except SchemaRefused as error:
        raise CliError(f"{settings.data_dir} cannot be served: {error}") from None
    except StoreUnavailable as error:
        raise CliError(error.message, f"look at {settings.data_dir}: is there room, and may it be written?") from None
    except OSError as error:
        raise _no_address(error, settings) from None
    return 0


def _check_models(settings: Settings) -> None:
    """Refuse a model that nobody could call now, instead of failing every run later. Raises CliError."""
    from corral.models.catalogue import parse
    from corral.protocol.errors import InvalidRequest

    for model in (settings.model, *settings.fallbacks):
        try:
            parse(model)
        except InvalidRequest as error:
            remedy = "name another with --model, CORRAL_MODEL, or `model` and `fallbacks` in corral.toml"
            raise CliError(error.message, remedy, code=USAGE) from None


def _no_address(error: OSError, settings: Settings) -> CliError:
    where = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return CliError(f"{where} is taken by another program", "choose another with --port; --port 0 picks one")
    if error.errno == errno.EACCES:
        return CliError(f"this user may not listen on {where}", "choose a port above 1023 with --port", code=FAILED)
    return CliError(f"cannot listen on {where}: {error.strerror or error}", "choose another with --host and --port")


def _announce(url: str) -> None:
    print(f"listening on {url}", flush=True)
    if sys.stderr.isatty():
        print(f'in a second terminal: {_own_name()} run "list"', file=sys.stderr)
        print("Ctrl-C here stops the gateway", file=sys.stderr)


def _own_name() -> str:
    """This command as it can be typed in another terminal."""
    found = shutil.which("corral")
    own = Path(sys.argv[0])
    if found is not None and own.exists() and Path(found).samefile(own):
        return "corral"
    return str(own.absolute()) if own.name == "corral" else f"{sys.executable} -m corral"
