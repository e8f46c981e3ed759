"""What `corral doctor` looks at. Nothing here changes anything, a gateway that runs is left alone."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import msgspec
from msgspec import Struct

from corral import __version__
from corral.clock import SystemClock
from corral.config import ConfigError, Settings, read_endpoint, read_token, token_path
from corral.executor.api import CallContext
from corral.executor.service import Executor
from corral.models.api import Finished, ModelRequest, Text, TextDelta, UserMessage
from corral.models.catalogue import PROVIDERS, parse
from corral.models.http import Timeouts
from corral.models.router import ModelRouter, RetryPolicy
from corral.protocol.errors import CorralError
from corral.storage.examine import examine
from corral.storage.lock import NAME as LOCK_FILE
from corral.tracing import wanted

MODEL_TIMEOUT_S = 20.0
PROGRAM_TIMEOUT_S = 5.0
NEEDED_BYTES = 200 * 1024 * 1024
COMFORTABLE_BYTES = 2 * 1024 * 1024 * 1024

_LIBRARIES = ("aiohttp", "uvloop", "msgspec", "sqlalchemy", "click", "prompt_toolkit", "rich")


class Check(Struct, kw_only=True, frozen=True):
    """`missing` is needed and not there; `note` is worth knowing; both say what to do about it."""

    name: str
    state: Literal["ok", "note", "missing"]
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    return Check(name=name, state="ok", found=found)


def note(name: str, found: str, remedy: str = "") -> Check:
    return Check(name=name, state="note", found=found, remedy=remedy)


def missing(name: str, found: str, remedy: str) -> Check:
    return Check(name=name, state="missing", found=found, remedy=remedy)


async def check_all(settings: Settings, *, offline: bool) -> list[Check]:
    """Every check, in the order in which a person wants to read them."""
    # What the rooms log of their failures is told here in other words.
    logging.disable(logging.CRITICAL)
    groups: list[Awaitable[list[Check]]] = [
        asyncio.to_thread(_program),
        asyncio.to_thread(_data_dir, settings),
        _gateway(settings),
        _sandbox(settings),
        _model(settings, offline),
        asyncio.to_thread(_traces),
        _containers(),
    ]
    return [check for group in await asyncio.gather(*groups) for check in group]


# ---- the program


def _program() -> list[Check]:
    checks = [
        ok("corral", f"{__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    ]
    versions, lacking = [], []
    for name in _LIBRARIES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lacking.append(name)
    checks.append(ok("libraries", ", ".join(versions)))
    if lacking:
        checks.append(
            missing("libraries", f"not installed: {', '.join(lacking)}", "install corral anew with its dependencies")
        )
    return checks


# ---- the data directory


def _data_dir(settings: Settings) -> list[Check]:
    folder = settings.data_dir
    name = "data directory"
    if not folder.exists():
        parent = next(path for path in folder.parents if path.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            return [
                missing(name, f"{folder} cannot be made: {parent} may not be written", "name another with --data-dir")
            ]
        return [note(name, f"{folder} is not there yet", "`corral serve` makes it"), _room(parent)]
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return [missing(name, f"{folder} is no directory that you may write to", "name another with --data-dir")]
    status = folder.stat()
    if status.st_uid != os.geteuid():
        return [missing(name, f"{folder} belongs to another user", "name one of your own with --data-dir")]
    checks = [ok(name, str(folder))]
    if status.st_mode & 0o077:
        checks.append(missing(name, f"{folder} is open to other users", f"chmod 700 {folder}"))
    checks += [*_token(settings), _lock(folder), *_database(folder), _room(folder)]
    return checks


def _token(settings: Settings) -> list[Check]:
    if settings.token is None and not token_path(settings.data_dir).exists():
        return [note("access token", "none yet", "`corral serve` or `corral token` makes one")]
    try:
        read_token(settings)
    except ConfigError as error:
        return [missing("access token", str(error), "mend that, or set CORRAL_TOKEN")]
    origin = settings.origins["token"]
    return [ok("access token", "kept in the data directory" if origin == "default" else f"from {origin}")]


def _lock(folder: Path) -> Check:
    """Who has the lock, without taking it: a gateway that is just starting must find it free."""
    path = folder / LOCK_FILE
    try:
        status = path.stat()
        text = path.read_text(encoding="ascii", errors="replace").strip()
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except FileNotFoundError:
        return ok("lock", "free")
    except OSError as error:
        return note("lock", f"cannot be looked at: {error.strerror}")
    number = f":{status.st_ino}"
    if any(line.split()[1] == "FLOCK" and number in line for line in locks.splitlines() if len(line.split()) > 1):
        return ok("lock", f"held by process {text}")
    return ok("lock", "free")


def _database(folder: Path) -> list[Check]:
    path = folder / "corral.db"
    if not path.exists():
        return [note("database", "none yet", "`corral serve` makes it")]
    found = examine(path)
    checks = []
    size = path.stat().st_size / 1024 / 1024
    if found.problems:
        checks.append(
            missing(
                "database",
                f"damaged: {'; '.join(found.problems[:3])}",
                f"stop the gateway, keep a copy of {folder}, then put a backup back: corral restore --force FILE",
            )
        )
    else:
        checks.append(ok("database", f"sound by quick_check, {size:.1f} MiB"))
    if found.schema == found.expected:
        checks.append(ok("schema", found.schema))
    elif found.schema is not None and found.schema < found.expected:
        checks.append(
            note("schema", f"{found.schema}, this Corral's is {found.expected}", "the next start brings it up to date")
        )
    elif not found.problems:
        seen = "of no Corral" if found.schema is None else f"{found.schema}, newer than this Corral's {found.expected}"
        checks.append(missing("schema", seen, "upgrade Corral, or name another directory with --data-dir"))
    return checks


def _room(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    words = f"{free / 1024**3:.1f} GiB free"
    if free < NEEDED_BYTES:
        return missing("disk", words, f"make room on the disk of {folder}")
    return (
        ok("disk", words)
        if free >= COMFORTABLE_BYTES
        else note("disk", words, f"soon make room on the disk of {folder}")
    )


# ---- the gateway


async def _gateway(settings: Settings) -> list[Check]:
    endpoint = read_endpoint(settings.data_dir)
    if endpoint is None:
        return [note("gateway", "none is running here", "corral serve")]
    url = endpoint.url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    began = time.monotonic()
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as session,
            session.get(f"{url}/readyz") as response,
        ):
            status = response.status
    except (aiohttp.ClientError, OSError, TimeoutError):
        return [note("gateway", f"{url} does not answer (process {endpoint.pid})", "start it again: corral serve")]
    if status != 200:
        return [missing("gateway", f"{url} is not ready ({status})", "its log says why; is its disk full?")]
    return [ok("gateway", f"{url} is ready, answered in {(time.monotonic() - began) * 1000:.0f} ms")]


# ---- the sandbox


async def _sandbox(settings: Settings) -> list[Check]:
    executor = Executor(clock=SystemClock(), data_dir=settings.data_dir, environ=dict(os.environ))
    began = time.monotonic()
    try:
        await executor.ready(_anywhere(settings.data_dir))
    except CorralError as error:
        what, _, remedy = error.message.partition(". ")
        return [missing("sandbox", what, remedy or "install bubblewrap")]
    finally:
        await executor.close()
    version = await _output(["bwrap", "--version"])
    words = version or "bubblewrap"
    return [ok("sandbox", f"{words} works, first call {(time.monotonic() - began) * 1000:.0f} ms")]


def _anywhere(folder: Path) -> CallContext:
    """A context for asking whether commands could run: none does."""
    return CallContext(
        tenant_id="t_default",
        workspace_id="w_default",
        session_id="s_doctor",
        run_id="run_doctor",
        root=folder,
        runtime_mode="local",
        bash_mode="sandbox",
        bash_network="none",
        timeout_ms=20_000,
    )


# ---- the model


async def _model(settings: Settings, offline: bool) -> list[Check]:
    try:
        target = parse(settings.model)
    except CorralError as error:
        return [missing("model", error.message, "name one with --model or CORRAL_MODEL")]
    keys = sorted(
        variable for kind in PROVIDERS.values() for variable in kind.key_variables if os.environ.get(variable)
    )
    checks = [ok("keys", ", ".join(keys))] if keys else [note("keys", "no provider's key is set in this shell")]
    if target.kind.name == "demo":
        remedy = "name a real one: CORRAL_MODEL=openai-chat:NAME and OPENAI_API_KEY, for one"
        return [*checks, note("model", "demo, which answers by rule", remedy)]
    if offline:
        return [*checks, note("model", f"{settings.model}, not asked (--offline)")]
    return [*checks, await _asked(settings)]


async def _asked(settings: Settings) -> Check:
    router = ModelRouter(
        os.environ,
        timeouts=Timeouts(connect=5, idle=MODEL_TIMEOUT_S, total=MODEL_TIMEOUT_S),
        retry=msgspec.structs.replace(RetryPolicy(), attempts=1),
    )
    request = ModelRequest(
        system="Answer with one word.",
        messages=[UserMessage(content=[Text(text="Say OK.")])],
        tools=[],
        max_output_tokens=200,
    )
    began = time.monotonic()
    first = None
    try:
        async with (
            asyncio.timeout(MODEL_TIMEOUT_S + 5),
            contextlib.aclosing(router.stream(request, [settings.model])) as events,
        ):
            async for event in events:
                if isinstance(event, TextDelta | Finished) and first is None:
                    first = time.monotonic() - began
    except CorralError as error:
        remedy = _remedy(settings.model, error.message)
        return missing("model", f"{settings.model} does not answer: {error.message}", remedy)
    except TimeoutError:
        return missing("model", f"{settings.model} does not answer in time", _remedy(settings.model))
    finally:
        await router.close()
    total = time.monotonic() - began
    return ok(
        "model", f"{settings.model} answers: first word {(first or total) * 1000:.0f} ms, whole {total * 1000:.0f} ms"
    )


def _remedy(model: str, said: str = "") -> str:
    if "library that is not installed" in said:
        return "install it, or name another model with --model"
    kind = parse(model).kind
    variables = [*kind.url_variables[:1], *kind.key_variables[:1]]
    return f"check {' and '.join(variables)} and that the server runs, or name another model with --model"


# ---- traces


def _traces() -> list[Check]:
    """What this shell's variables ask for: the gateway has its own."""
    if not wanted(os.environ):
        return [note("traces", "not sent", "only who wants them needs OTEL_EXPORTER_OTLP_ENDPOINT")]
    try:
        importlib.metadata.version("opentelemetry-exporter-otlp-proto-http")
    except importlib.metadata.PackageNotFoundError:
        return [missing("traces", "asked for, and what sends them is not installed", "pip install 'corral[otel]'")]
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]
    return [ok("traces", f"sent to {_without_secrets(endpoint)}")]


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


# ---- containers


async def _containers() -> list[Check]:
    docker, runc, runsc = await asyncio.gather(
        _output(["docker", "version", "--format", "{{.Server.Version}}"]),
        _output(["runc", "--version"]),
        _output(["runsc", "--version"]),
    )
    here = f"server {docker}" if docker else "installed, but its server does not answer"
    if shutil.which("docker") is None:
        here = "not installed"
    found = ", ".join([here, *(version for version in (runc, runsc) if version)])
    if not docker:
        return [note("docker", found, "only runs in mode `cloud` need it")]
    remedy = (
        "a container is no boundary against hostile tenants, as they share one kernel: give those machines of their own"
    )
    return [note("docker", found, remedy if not runsc else f"{remedy}, or run them under runsc")]


async def _output(command: Sequence[str]) -> str | None:
    """The first line that a program prints, None if it is not there or fails."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return None
    try:
        async with asyncio.timeout(PROGRAM_TIMEOUT_S):
            out, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return None
    lines = out.decode("utf-8", "replace").splitlines()
    return lines[0].strip() if process.returncode == 0 and lines else None
