"""The bubblewrap sandbox: the one place where the command line of a sandboxed program is made.

What a sandboxed program has: its session's folder, writable, at its own path; `/usr` and what belongs
to it, and a few files of `/etc`, read-only; its own `/tmp` (with its home in it), `/dev`, `/proc`;
its own PID, IPC, UTS, cgroup, user and (unless policy says otherwise) network namespace; no
capability, no way to gain one, a filter on system calls (`syscalls.py`); an environment made here. What it has
not: other folders, Corral's data directory, the host's `/run`, `/var`, `/home`, `/root`, the gateway's environment.

When the gateway is root, so is, for the kernel, the sandboxed program: bubblewrap can map one
user only, and it must be the one that owns the session's folder. It is shown as `nobody` and has
no capability in any namespace, so that it passes neither the permission bits of other users' files
nor anything that asks for a capability. Three things remain that go by "is it user 0" alone, and
are closed by mounts: root's own files (only `/usr` and the listed parts of `/etc` are there),
`/proc/sys` and `/proc/sysrq-trigger` (all of `/proc` is read-only), and RLIMIT_NPROC, which does not
bind user 0: a gateway that should hold fork bombs to a number runs as a normal user.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import structs

from corral.executor.launcher import FILTER_FD, GO_FD, HELD_FD, STATUS_FD
from corral.executor.processes import LauncherLost, Processes, Program
from corral.executor.syscalls import sandbox_filter
from corral.protocol.errors import SandboxUnavailable
from corral.protocol.types import BashNetwork

log = logging.getLogger(__name__)

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

LIMITS = {
    "DATA": 4 * 1024**3,
    "NPROC": 512,
    "NOFILE": 4096,
    "FSIZE": 2 * 1024**3,
    "CORE": 0,
}
"""Resource limits of a sandboxed program (setrlimit(2)): bytes of private writable memory for each
process (not RLIMIT_AS: JavaScript and Java runtimes reserve far more address space than they use),
processes of the sandbox, open files, bytes of one file, bytes of a core dump."""

TMP_BYTES = 1024**3
"""Size of the sandbox's `/tmp`, and of its `/dev/shm`; both live in memory."""

_USR_LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")

_ETC = (
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/crypto-policies",
    "/etc/group",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
    "/etc/os-release",
    "/etc/passwd",
    "/etc/pki/ca-trust/extracted",
    "/etc/pki/tls/certs",
    "/etc/pki/tls/openssl.cnf",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
)
"""What programs need of /etc. Not the folders that hold private keys beside certificates."""

_HELD = f'IFS= read -r -d "" text <&{HELD_FD} && exec {HELD_FD}<&- && exec -- "$@" "$text"; exit 125'
"""What a held sandbox starts with: bash reads a text up to a NUL and becomes the given command with the text as
its last argument. Without the NUL (whoever wrote died) it does not."""

_PASSED = ("LANG", "LANGUAGE", "TZ")

GIT = {
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "safe.bareRepository",
    "GIT_CONFIG_VALUE_0": "explicit",
}
"""git takes a folder with files named HEAD and config, and folders refs and objects, for a repository, and runs what
that config says: a `git status` that a rule allows would run what any file tool may write. With this only a `.git` is
one, which a rule can name."""

_NOBODY = "65534"


def environment(gateway: Mapping[str, str]) -> dict[str, str]:
    """The environment of a sandboxed program: a list of what may be there, whatever the gateway's holds."""
    env = {name: gateway[name] for name in sorted(gateway) if name in _PASSED or name.startswith("LC_")}
    env.update(
        PATH=SEARCH_PATH,
        HOME="/tmp/home",  # noqa: S108 - inside the sandbox, a private tmpfs
        TMPDIR="/tmp",  # noqa: S108
        USER="agent",
        LOGNAME="agent",
        SHELL="/bin/sh",
        TERM="dumb",
        **GIT,
    )
    env.setdefault("LANG", "C.UTF-8")
    return env


def usr_links(root: Path = Path("/")) -> list[tuple[str, str | None]]:
    """`/bin` and its like: with what they link to, or None where they are folders of their own."""
    found: list[tuple[str, str | None]] = []
    for name in _USR_LINKS:
        path = root / name[1:]
        if path.is_symlink():
            found.append((name, os.readlink(path)))
        elif path.is_dir():
            found.append((name, None))
    return found


def command_line(
    command: Sequence[str],
    *,
    root: Path,
    network: BashNetwork,
    bwrap: str,
    version: tuple[int, ...],
    user: int,
    links: Sequence[tuple[str, str | None]],
    hidden: Sequence[Path] = (),
    filtered: bool = True,
) -> list[str]:
    """The whole argv, bubblewrap first. `command` is given to execve as it is, element by element.

    `version` is bubblewrap's; `user` the gateway's user id; `hidden` are folders that stay invisible
    even where they lie within `root`; `filtered` says that a filter of system calls comes on FILTER_FD.
    """
    argv = [bwrap, "--unshare-user"]
    if user == 0:
        argv += ["--uid", _NOBODY, "--gid", _NOBODY]
    argv += ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if network == "none":
        argv.append("--unshare-net")
    argv += ["--hostname", "corral", "--new-session", "--die-with-parent", "--cap-drop", "ALL"]
    if version >= (0, 8):
        # No user namespaces within: they are where most local kernel exploits begin.
        argv.append("--disable-userns")
    argv += ["--json-status-fd", str(STATUS_FD), "--block-fd", str(GO_FD)]
    if filtered:
        argv += ["--seccomp", str(FILTER_FD)]
    argv += ["--ro-bind", "/usr", "/usr"]
    for name, target in links:
        argv += ["--ro-bind", name, name] if target is None else ["--symlink", target, name]
    for name in _ETC:
        argv += ["--ro-bind-try", name, name]
    if network == "host":
        argv += ["--ro-bind-try", "/etc/resolv.conf", "/etc/resolv.conf"]
    size = ["--size", str(TMP_BYTES)] if version >= (0, 7) else []
    # /dev itself is a file system in memory without a bound: only what is mounted in it may be written.
    argv += ["--dev", "/dev", *size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]  # noqa: S108
    argv += ["--proc", "/proc", "--remount-ro", "/proc"]
    argv += [*size, "--tmpfs", "/tmp", "--dir", "/tmp/home"]  # noqa: S108
    argv += ["--bind", str(root), str(root)]
    for folder in hidden:
        if folder != root and folder.is_relative_to(root):
            # A folder above it that is no mount could be renamed, by which the next call's sandbox would show it
            # under its new name.
            above = [parent for parent in folder.parents if parent.is_relative_to(root) and parent != root]
            for parent in reversed(above):
                argv += ["--bind", str(parent), str(parent)]
            argv += ["--tmpfs", str(folder)]
    # Everything has been put where it belongs: the base (parents of the session's folder) is closed.
    argv += ["--remount-ro", "/", "--chdir", str(root), "--", *command]
    return argv


def shown_files(root: Path, network: BashNetwork) -> tuple[tuple[int, int] | None, ...]:
    """Which files and folders a sandbox made now would show, by device and inode; None for what is not there."""
    names = [str(root), "/usr", *_USR_LINKS, *_ETC, *(["/etc/resolv.conf"] if network == "host" else [])]
    found: list[tuple[int, int] | None] = []
    for name in names:
        try:
            about = os.stat(name)
        except OSError:
            found.append(None)
        else:
            found.append((about.st_dev, about.st_ino))
    return tuple(found)


class Sandbox:
    """Whether there is a sandbox here, and the programs that run in it."""

    def __init__(
        self,
        processes: Processes,
        *,
        environ: Mapping[str, str],
        hidden: Sequence[Path] = (),
        search_path: str | None = None,
    ) -> None:
        """`search_path` is where bubblewrap is looked for (default: the gateway's PATH)."""
        self._processes = processes
        self._env = environment(environ)
        self._filter = sandbox_filter()
        self._hidden = tuple(hidden)
        self._search_path = environ.get("PATH") if search_path is None else search_path
        self._found: tuple[str, tuple[int, ...]] | None = None
        self._probing = asyncio.Lock()

    def distrust(self) -> None:
        """Forget that the sandbox worked: the next call tries it out again."""
        self._found = None

    async def require(self) -> None:
        """Raise SandboxUnavailable unless bubblewrap is here and may make its namespaces.

        Success is remembered, failure is tried again: the remedy may have been applied.
        """
        async with self._probing:
            if self._found is not None:
                return
            bwrap = shutil.which("bwrap", path=self._search_path) if sys.platform == "linux" else None
            if bwrap is None:
                raise SandboxUnavailable(_REMEDY.format(what="bubblewrap is not installed"))
            try:
                version = await asyncio.to_thread(_version, bwrap)
                with tempfile.TemporaryDirectory(prefix="corral-probe-") as folder:
                    program = self._program(["true"], Path(folder), "none", bwrap, version)
                    ended = await self._processes.run(program, 20)
            except (OSError, subprocess.SubprocessError, LauncherLost) as error:
                log.warning("the sandbox cannot be tried", extra={"action": "sandbox.unavailable"}, exc_info=error)
                raise SandboxUnavailable(_REMEDY.format(what="bubblewrap cannot be started")) from error
            if not ended.started or ended.exit_status != 0:
                log.warning(
                    "the sandbox does not work: %s",
                    ended.stderr.text()[:500].strip(),
                    extra={"action": "sandbox.unavailable"},
                )
                raise SandboxUnavailable(_REMEDY.format(what="bubblewrap may not make its namespaces here"))
            self._found = bwrap, version

    async def program(self, command: Sequence[str], root: Path, network: BashNetwork) -> Program:
        """`command` as a program in the sandbox. Raises SandboxUnavailable."""
        if root == Path(root.anchor):
            raise SandboxUnavailable("the session's folder is the whole file system, which no sandbox can hold")
        await self.require()
        if self._found is None:
            raise SandboxUnavailable(_REMEDY.format(what="bubblewrap stopped working"))
        return self._program(command, root, network, *self._found)

    async def held(self, command: Sequence[str], root: Path, network: BashNetwork) -> Program:
        """Like `program`, but held: the last argument of `command` comes later, by `Processes.run_prepared`.

        Needs bash, which becomes `command`: for a command that is a shell itself the variables that bash
        exports (`SHLVL`, `_`, `PWD`) come to the same. Raises SandboxUnavailable.
        """
        waiting = ["bash", "--noprofile", "--norc", "-c", _HELD, "bash", *command]
        return structs.replace(await self.program(waiting, root, network), held=True)

    def _program(
        self, command: Sequence[str], root: Path, network: BashNetwork, bwrap: str, version: tuple[int, ...]
    ) -> Program:
        argv = command_line(
            command,
            root=root,
            network=network,
            bwrap=bwrap,
            version=version,
            user=os.getuid(),
            links=usr_links(),
            hidden=self._hidden,
            filtered=bool(self._filter),
        )
        return Program(argv=argv, env=self._env, cwd="/", limits=LIMITS, sandbox=True, system_calls=self._filter)


_REMEDY = (
    "no sandbox to run commands in: {what}. Install bubblewrap (package `bubblewrap`) and allow "
    "unprivileged user namespaces, or set the policy's bashMode to `host` to run commands unconfined"
)


def _version(bwrap: str) -> tuple[int, ...]:
    """bubblewrap's version as numbers, (0,) if it does not say."""
    done = subprocess.run([bwrap, "--version"], capture_output=True, timeout=20, env={})
    digits = done.stdout.decode("ascii", "replace").split()[-1:] or ["0"]
    return tuple(int(part) for part in digits[0].split(".") if part.isdigit()) or (0,)
