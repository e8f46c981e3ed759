"""The file tools. All of their work is done in threads or, for searching, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor as Threads
from io import BufferedReader
from pathlib import Path
from typing import TypeVar

from corral.executor.api import OUTPUT_LIMIT, CallContext
from corral.executor.catalogue import FileEdit, FileList, FileRead, FileSearch, FileWrite
from corral.executor.jail import Jail, refusal
from corral.executor.output import Result
from corral.executor.processes import Processes, Program
from corral.protocol.errors import LimitReached, ToolExecFailed

T = TypeVar("T")

READ_CHARACTERS = OUTPUT_LIMIT - 500
"""What one file.read gives at most, so that it is never cut in the middle afterwards."""
DEFAULT_LINES = 2000
SCAN_BYTES = 256 * 1024 * 1024
"""How far into a file file.read goes for its lines."""
EDIT_BYTES = 8 * 1024 * 1024
LIST_ENTRIES = 1000
LIST_SCAN = 100_000
SEARCH_MS = 30_000
_PROBE_BYTES = 8192
_STEP_BYTES = 64 * 1024
_SEARCH_LIMITS = {"DATA": 512 * 1024 * 1024, "CORE": 0}


class Files:
    """file.read, file.list, file.search, file.write, file.edit. All raise CorralError."""

    def __init__(self, threads: Threads, processes: Processes, hidden: Sequence[Path]) -> None:
        self._threads = threads
        self._processes = processes
        self._hidden = tuple(hidden)

    async def read(self, args: FileRead, context: CallContext) -> Result:
        return await self.in_thread(lambda jail: _read(jail, args), context)

    async def list(self, args: FileList, context: CallContext) -> Result:
        return await self.in_thread(lambda jail: _list(jail, args.path or "."), context)

    async def write(self, args: FileWrite, context: CallContext) -> Result:
        return await self.in_thread(lambda jail: _write(jail, args), context)

    async def edit(self, args: FileEdit, context: CallContext) -> Result:
        return await self.in_thread(lambda jail: _edit(jail, args), context)

    async def search(self, args: FileSearch, context: CallContext) -> Result:
        path = args.path or "."
        start, name = await self.in_thread(
            lambda jail: _search_start(jail, path), context, discard=lambda found: os.close(found[0])
        )
        try:
            timeout_ms = min(SEARCH_MS, context.timeout_ms)
            program = Program(
                argv=[
                    sys.executable,
                    "-I",
                    "-S",
                    str(Path(__file__).with_name("search_worker.py")),
                    args.pattern,
                    name,
                    *_identities(self._hidden),
                ],
                env={"PYTHONUTF8": "1"},
                cwd="/",
                limits=_SEARCH_LIMITS,
                descriptor=start,
            )
            ended = await self._processes.run(program, timeout_ms / 1000)
        finally:
            os.close(start)
        if ended.timed_out:
            raise LimitReached(f"the search was killed after {timeout_ms} ms; use a simpler pattern or a narrower path")
        if ended.exit_status == 2:
            raise ToolExecFailed(f"$.pattern: not a regular expression: {ended.stderr.text()[:300]}")
        if ended.exit_status != 0:
            raise ToolExecFailed("the search failed; use a simpler pattern or a narrower path")
        return Result(text=ended.stdout.text() or "no matches\n")

    async def in_thread(
        self, work: Callable[[Jail], T], context: CallContext, discard: Callable[[T], None] | None = None
    ) -> T:
        """Run `work` on an open jail in a thread.

        Cancelled, this waits for the thread: what a call does has happened, or has not, when the
        call is reported as ended, and never afterwards. A result that nobody takes goes to `discard`.
        """

        def job() -> T:
            with Jail(context.root, self._hidden) as jail:
                return work(jail)

        future = asyncio.get_running_loop().run_in_executor(self._threads, job)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                try:
                    await asyncio.wait([future])
                except asyncio.CancelledError:
                    continue
            if not future.cancelled() and future.exception() is None and discard is not None:
                discard(future.result())
            raise


def _read(jail: Jail, args: FileRead) -> Result:
    descriptor, about = jail.open_regular(args.path)
    with os.fdopen(descriptor, "rb") as file:
        try:
            if b"\0" in file.read(_PROBE_BYTES):
                raise ToolExecFailed(f"$.path: a binary file of {about.st_size} bytes; it has no lines to read")
            file.seek(0)
            return Result(text=_lines(file, args.offset or 1, args.limit or DEFAULT_LINES))
        except OSError as error:
            raise refusal(error) from error


def _lines(file: BufferedReader, first: int, limit: int) -> str:
    """Lines from `first` on, as many as fit and at most `limit`, and how to go on if there are more."""
    _skip_lines(file, first - 1)
    shown: list[str] = []
    room = READ_CHARACTERS
    number = first
    pushed = False
    while number < first + limit:
        # No character takes more than four bytes: what fits is read whole.
        line = file.readline(4 * room + 1).decode("utf-8", "replace")
        if not line:
            break
        if len(line) > room:
            if shown:
                pushed = True
                break
            after = f"\n[... line {number} is longer than this tool shows; the next line is offset {number + 1} ...]\n"
            return line[:room] + after
        shown.append(line)
        room -= len(line)
        number += 1
    text = "".join(shown)
    return text + f"[... there is more; go on with offset {number} ...]\n" if file.peek(1) or pushed else text


def _skip_lines(file: BufferedReader, count: int) -> None:
    """Go past `count` lines; ToolExecFailed if nothing comes after them."""
    skipped = 0
    ended = True  # whether what was read so far ends with a line's end
    while skipped < count or (count and not file.peek(1)):
        if file.tell() > SCAN_BYTES:
            raise ToolExecFailed(f"$.offset: lies beyond the first {SCAN_BYTES} bytes, as far as this tool reads")
        part = file.readline(_STEP_BYTES)
        if not part:
            raise ToolExecFailed(f"$.offset: the file has {skipped + (not ended)} lines")
        ended = part.endswith(b"\n")
        skipped += ended


def _list(jail: Jail, path: str) -> Result:
    descriptor = jail.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        names: list[str] = []
        more = False
        with os.scandir(descriptor) as entries:
            for entry in entries:
                if len(names) >= LIST_SCAN:
                    more = True
                    break
                mark = "@" if entry.is_symlink() else "/" if entry.is_dir(follow_symlinks=False) else ""
                names.append(entry.name + mark)
    except OSError as error:
        raise refusal(error) from error
    finally:
        os.close(descriptor)
    names.sort()
    text = "".join(f"{name}\n" for name in names[:LIST_ENTRIES])
    if len(names) > LIST_ENTRIES:
        count = f"more than {LIST_SCAN}" if more else str(len(names))
        text += f"[... {LIST_ENTRIES} of {count} entries ...]\n"
    return Result(text=text or "(empty directory)\n")


def _write(jail: Jail, args: FileWrite) -> Result:
    content = args.content.encode()
    new = jail.replace(args.path, content)
    return Result(text=f"{'made' if new else 'replaced'} {args.path}, {len(content)} bytes\n")


def _edit(jail: Jail, args: FileEdit) -> Result:
    descriptor, about = jail.open_regular(args.path)
    with os.fdopen(descriptor, "rb") as file:
        if about.st_size > EDIT_BYTES:
            raise ToolExecFailed(f"$.path: has {about.st_size} bytes; this tool edits files up to {EDIT_BYTES} bytes")
        # The file that was opened is the one that is replaced: a link that stays inside is edited at its end.
        target = jail.inner_path(descriptor) or args.path
        try:
            content = file.read(EDIT_BYTES + 1)
        except OSError as error:
            raise refusal(error) from error
    # Bytes, so that what is not UTF-8 elsewhere in the file stays as it is.
    old = args.old.encode()
    times = _occurrences(content, old)
    if times != 1:
        raise ToolExecFailed(
            "$.old: does not occur in the file"
            if times == 0
            else f"$.old: occurs {times} times in the file; give enough of its surroundings to make it unique"
        )
    jail.replace(target, content.replace(old, args.new.encode(), 1))
    line = content[: content.index(old)].count(b"\n") + 1
    return Result(text=f"edited {args.path} at line {line}\n")


def _occurrences(content: bytes, piece: bytes) -> int:
    """How often `piece` occurs, overlapping ones too."""
    times = 0
    at = content.find(piece)
    while at >= 0:
        times += 1
        at = content.find(piece, at + 1)
    return times


def _search_start(jail: Jail, path: str) -> tuple[int, str]:
    descriptor = jail.open(path)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ToolExecFailed("$.path: neither a directory nor a regular file")
    return descriptor, os.path.normpath(jail.relative(path))


def _identities(folders: Sequence[Path]) -> list[str]:
    """`DEVICE:INODE` of the folders that are there."""
    found = []
    for folder in folders:
        try:
            about = folder.stat()
        except OSError:
            continue
        found.append(f"{about.st_dev}:{about.st_ino}")
    return found
