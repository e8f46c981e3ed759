"""Searches files for a regular expression; a program of its own, with the standard library alone.

Its own process, because Python's regular expressions can take for ever on a short line: a process can be
killed at its time limit, a thread cannot. Arguments: pattern, the name to print for the starting
point, then `DEVICE:INODE` of directories to leave out. Descriptor 3 is the starting point, a directory
or a regular file. Links are not followed; every file is opened from the descriptor of its directory.
"""

import os
import re
import stat
import sys
from collections.abc import Iterator

START = 3
MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_MATCHES = 200
MAX_FILES = 50_000
MAX_LINE = 250
PROBE_BYTES = 8192


def main(arguments: list[str]) -> int:
    try:
        # What it looks for and where is text; the system's encoding must not decide.
        pattern = re.compile(arguments[0])
    except (re.error, OverflowError, RecursionError) as error:
        sys.stderr.write(str(error))
        return 2
    hidden = {tuple(int(part) for part in entry.split(":")) for entry in arguments[2:]}
    search = Search(pattern, hidden)
    about = os.fstat(START)
    if stat.S_ISDIR(about.st_mode):
        prefix = "" if arguments[1] in ("", ".") else arguments[1].rstrip("/") + "/"
        for name, folder, file in search.walk(START, prefix):
            if search.full():
                break
            search.look_into(name, folder, file)
    else:
        search.grep(arguments[1], os.dup(START))
    search.report()
    return 0


class Search:
    """What is looked for, and what was found so far."""

    def __init__(self, pattern: re.Pattern[str], hidden: set[tuple[int, ...]]) -> None:
        self.pattern = pattern
        self.hidden = hidden
        self.matches = 0
        self.files = 0
        self.large = 0

    def full(self) -> bool:
        return self.matches >= MAX_MATCHES or self.files >= MAX_FILES

    def walk(self, start: int, prefix: str) -> Iterator[tuple[str, int, str]]:
        """(name to print, directory's descriptor, name in it) of every file, in order of names."""
        for path, folders, files, descriptor in os.fwalk(".", dir_fd=start, onerror=None, follow_symlinks=False):
            kept = []
            for name in sorted(folders):
                about = lstat(name, descriptor)
                if about is None or not stat.S_ISDIR(about.st_mode) or name == ".git":
                    continue
                if (about.st_dev, about.st_ino) not in self.hidden:
                    kept.append(name)
            folders[:] = kept
            below = "" if path == "." else path[2:] + "/"
            for name in sorted(files):
                yield prefix + below + name, descriptor, name

    def look_into(self, name: str, folder: int, file: str) -> None:
        self.files += 1
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            descriptor = os.open(file, flags, dir_fd=folder)
        except OSError:
            return  # gone, a link, or not ours to read: not a file to search
        self.grep(name, descriptor)

    def grep(self, name: str, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                return
            if about.st_size > MAX_FILE_BYTES:
                self.large += 1
                return
            content = file.read(MAX_FILE_BYTES)
        if b"\0" in content[:PROBE_BYTES]:
            return
        for number, line in enumerate(content.decode("utf-8", "replace").split("\n"), 1):
            if self.pattern.search(line.rstrip("\r")):
                self.matches += 1
                shown = line.strip("\r")
                cut = shown if len(shown) <= MAX_LINE else shown[:MAX_LINE] + " [...]"
                write(f"{name}:{number}: {cut}\n")
                if self.matches >= MAX_MATCHES:
                    return

    def report(self) -> None:
        if self.matches >= MAX_MATCHES:
            write(f"[... only the first {MAX_MATCHES} matches; narrow the pattern or the path ...]\n")
        elif self.files >= MAX_FILES:
            write(f"[... only the first {MAX_FILES} files were searched; narrow the path ...]\n")
        if self.large:
            write(f"[... {self.large} files larger than {MAX_FILE_BYTES} bytes were not searched ...]\n")


def lstat(name: str, folder: int) -> "os.stat_result | None":
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None


def write(text: str) -> None:
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
