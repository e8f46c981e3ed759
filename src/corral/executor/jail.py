"""Opening files beneath a session's folder and nowhere else.

The folder is opened once for a call, and every name is resolved by the kernel from that descriptor with
`openat2(2)` and RESOLVE_BENEATH: `..`, links and races with somebody who swaps a directory for a link are
judged in the same step in which the file is opened, so that there is no check to race with. Links that stay
inside work, links out do not; absolute links count as out. Where the kernel has no openat2 (macOS, Linux before
5.6) names are walked one by one with O_NOFOLLOW from one directory descriptor to the next, and links are
not followed at all. No containment decision compares strings of paths.

A hard link is a file of the folder like any other: whoever made it could read the file already. It is never
written through, since writing replaces the name.
"""

from __future__ import annotations

import errno
import functools
import os
import secrets
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType

from corral import faults
from corral.protocol.errors import ToolExecFailed

_SYS_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_BENEATH = 0x08
_RACES = 64
"""How often openat2 is asked again after EAGAIN (a rename raced with `..`)."""
_PATH_ONLY = getattr(os, "O_PATH", os.O_RDONLY)
_DIRECTORY = _PATH_ONLY | os.O_DIRECTORY | os.O_CLOEXEC
_F_GETPATH = 50

OUTSIDE = "$.path: leads out of the session's folder"

_WORDS = {
    errno.ENOENT: "$.path: no such file or directory",
    errno.ENOTDIR: "$.path: a part of it that should be a directory is none",
    errno.EISDIR: "$.path: is a directory",
    errno.EACCES: "$.path: permission denied",
    errno.EPERM: "$.path: permission denied",
    errno.EROFS: "$.path: the file system is read-only",
    errno.ENAMETOOLONG: "$.path: too long",
    errno.EINVAL: "$.path: not a possible path",
    errno.ENXIO: "$.path: not a regular file",
    errno.ENOSPC: "$.path: no space left on the device",
    errno.EDQUOT: "$.path: the disk quota is used up",
    errno.EFBIG: "$.path: the file would be too large",
    errno.EEXIST: "$.path: something is in the way",
    errno.ENOTEMPTY: "$.path: is a directory",
    errno.EXDEV: OUTSIDE,
    errno.ELOOP: OUTSIDE,
}


def refusal(error: OSError) -> ToolExecFailed:
    """What the model is told of an error of the file system: never a path of the server."""
    return ToolExecFailed(_WORDS.get(error.errno or 0, f"$.path: {os.strerror(error.errno or errno.EIO)}"))


class Jail:
    """A session's folder as an open directory. Use it as a context manager, in a thread.

    All methods raise ToolExecFailed, with words for the model. Descriptors they return are the caller's to close.
    """

    def __init__(self, root: Path, hidden: Sequence[Path] = (), *, openat2: bool | None = None) -> None:
        """`hidden` are folders that do not exist for this jail even inside `root`; `openat2` is for tests."""
        self.root = root
        try:
            # The folder itself comes from the session's row; that it is a link is its owner's business.
            self._fd = os.open(root, _DIRECTORY)
        except OSError as error:
            raise ToolExecFailed("the session's folder is not there") from error
        self._openat2 = has_openat2() if openat2 is None else openat2
        real = Path(os.path.realpath(root))
        self.real_root = real
        self._hidden = [folder for folder in hidden if folder.is_relative_to(real) and folder != real]

    def __enter__(self) -> Jail:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def relative(self, path: str) -> str:
        """`path` from the folder on. An absolute one must begin with the folder's own components."""
        if "\0" in path:
            raise ToolExecFailed("$.path: a NUL character is not possible here")
        if not path.startswith("/"):
            return path or "."
        parts = PurePosixPath(path).parts
        for root in (self.root, self.real_root):
            if parts[: len(root.parts)] == root.parts:
                return "/".join(parts[len(root.parts) :]) or "."
        raise ToolExecFailed(OUTSIDE)

    def open(self, path: str, flags: int = os.O_RDONLY) -> int:
        """Open what `path` names beneath the folder. Does not create anything, does not wait for a FIFO."""
        try:
            descriptor = self._resolve(self.relative(path), flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            raise refusal(error) from error
        try:
            self._refuse_hidden(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def open_regular(self, path: str) -> tuple[int, os.stat_result]:
        """Open a regular file for reading; devices, FIFOs, sockets and directories are refused."""
        descriptor = self.open(path)
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            os.close(descriptor)
            kind = "a directory" if stat.S_ISDIR(about.st_mode) else "not a regular file"
            raise ToolExecFailed(f"$.path: is {kind}")
        return descriptor, about

    def inner_path(self, descriptor: int) -> str | None:
        """Where an open file really lies, from the folder on; None if the system cannot say."""
        real = _path_of(descriptor)
        if real is None or not real.is_relative_to(self.real_root):
            return None
        return str(real.relative_to(self.real_root))

    def replace(self, path: str, content: bytes) -> bool:
        """Make `path` a regular file with this content, at once or not at all; True if it is new.

        A link is replaced, not followed; an existing file keeps its permission bits; missing
        directories are made. The content is on the disk when this returns.
        """
        inner = self.relative(path)
        above, _, name = inner.rstrip("/").rpartition("/")
        if inner.endswith("/") or name in ("", ".", ".."):
            raise ToolExecFailed("$.path: is a directory")
        try:
            folder = self._make_folders(above or ".")
            try:
                self._refuse_hidden(folder)
                return _replace_in(folder, name, content)
            finally:
                os.close(folder)
        except OSError as error:
            raise refusal(error) from error

    def _make_folders(self, path: str) -> int:
        """Open the directory `path`, making it and those above it where they are missing."""
        readable = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            return self._resolve(path, readable)
        except FileNotFoundError:
            parts = [part for part in path.split("/") if part not in ("", ".")]
        here = os.dup(self._fd)
        try:
            for count, name in enumerate(parts, 1):
                try:
                    step = self._resolve("/".join(parts[:count]), _DIRECTORY)
                except FileNotFoundError:
                    # Made in a directory that is open, not at a path: nobody can put a link in between.
                    os.mkdir(name, 0o777, dir_fd=here)
                    step = self._resolve("/".join(parts[:count]), _DIRECTORY)
                os.close(here)
                here = step
            return self._resolve("/".join(parts), readable)
        finally:
            os.close(here)

    def _resolve(self, path: str, flags: int) -> int:
        """The one way to a descriptor beneath the folder. Raises OSError."""
        return _openat2(self._fd, path, flags) if self._openat2 else _walk(self._fd, path, flags)

    def _refuse_hidden(self, descriptor: int) -> None:
        if not self._hidden:
            return
        real = _path_of(descriptor)
        if real is None or any(real.is_relative_to(folder) for folder in self._hidden):
            raise ToolExecFailed(_WORDS[errno.ENOENT])


@functools.lru_cache(maxsize=1)
def has_openat2() -> bool:
    """Whether the kernel has openat2 and lets us use it (old container profiles answer EPERM)."""
    if sys.platform != "linux":
        return False
    folder = os.open("/", _DIRECTORY)
    try:
        os.close(_openat2(folder, ".", _DIRECTORY))
    except OSError:
        return False
    finally:
        os.close(folder)
    return True


def _openat2(folder: int, path: str, flags: int) -> int:
    call = _openat2_call()
    name = os.fsencode(path)
    number = errno.EAGAIN
    for _ in range(_RACES):
        descriptor, number = call(folder, name, flags)
        if descriptor >= 0:
            return descriptor
        if number not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(number, os.strerror(number))


@functools.lru_cache(maxsize=1)
def _openat2_call() -> Callable[[int, bytes, int], tuple[int, int]]:
    """(directory's descriptor, name, flags) to (descriptor or -1, errno). Python has no openat2 of its own."""
    # Imported when the first file is opened: it costs some milliseconds that no start-up should pay.
    import ctypes

    class How(ctypes.Structure):
        """`struct open_how` of linux/openat2.h."""

        _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))

    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long

    def call(folder: int, name: bytes, flags: int) -> tuple[int, int]:
        how = How(flags, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
        descriptor = syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(folder),
            ctypes.c_char_p(name),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        return int(descriptor), ctypes.get_errno()

    return call


def _walk(folder: int, path: str, flags: int) -> int:
    """Name by name, without following any link. `..` goes back along the descriptors that led here."""
    trail = [os.dup(folder)]
    try:
        parts = [part for part in path.split("/") if part not in ("", ".")]
        for name in parts[:-1]:
            if name == "..":
                _step_back(trail)
            else:
                trail.append(os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=trail[-1]))
        last = parts[-1] if parts else "."
        if last == "..":
            _step_back(trail)
            last = "."
        return os.open(last, flags | os.O_NOFOLLOW, dir_fd=trail[-1])
    except NotADirectoryError as error:
        # O_DIRECTORY with O_NOFOLLOW says this of a link too.
        raise OSError(errno.ENOTDIR, "not a directory or a link") from error
    finally:
        for descriptor in trail:
            os.close(descriptor)


def _step_back(trail: list[int]) -> None:
    if len(trail) == 1:
        raise OSError(errno.EXDEV, "above the root")
    os.close(trail.pop())


def _path_of(descriptor: int) -> Path | None:
    """Where an open file lies, as the kernel knows it."""
    try:
        if sys.platform == "linux":
            return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        import fcntl

        return Path(os.fsdecode(fcntl.fcntl(descriptor, _F_GETPATH, b"\0" * 1024).rstrip(b"\0")))
    except OSError:
        return None


def _replace_in(folder: int, name: str, content: bytes) -> bool:
    mode: int | None = None
    try:
        about = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        new = True
    else:
        new = False
        if stat.S_ISDIR(about.st_mode):
            raise OSError(errno.EISDIR, "is a directory")
        if stat.S_ISREG(about.st_mode):
            mode = stat.S_IMODE(about.st_mode) & 0o777
        elif not stat.S_ISLNK(about.st_mode):
            raise OSError(errno.ENXIO, "not a regular file")
    temporary = f".corral-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o666, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        faults.reached("tool.during", "file")
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.unlink(temporary, dir_fd=folder)
        raise
    os.fsync(folder)
    return new
