"""The fork server: starts the processes of tool calls, and sees to it that they all die.

Run as a program of its own by `corral.executor.processes`, with the standard library alone. It
exists because of four things that a gateway cannot do well from inside itself:

- forking a process of several hundred MiB with many threads is slow and unsafe; this one is small
  and has one thread, so that what lies between fork and exec (limits, signals, session) is plain code;
- the kernel's "signal me when my parent dies" speaks of the parent *thread*, and bubblewrap asks
  for it some milliseconds after it began; a gateway killed in between would leave a sandbox behind;
- a process that double-forks, calls `setsid` or clears its environment leaves its process group and
  every marker. A *child subreaper* (prctl(2)) gets each orphan below it back as its own child, so
  that "everything below the supervisor" is exactly what the call started;
- a gateway that is killed with -9 cannot clean up. The supervisor notices by the end of its socket.
  What it cannot end itself the next gateway finds by the mark in this program's last argument (`leftovers.py`).

One connection to the gateway carries one byte and the descriptors for each call; for each the
server forks a *supervisor*, which reads what to run from the call's own control socket, runs it,
and answers on it. The control socket's end, for whatever reason, means: kill everything.

Messages on the control socket are JSON behind a four-byte big-endian length.
Request:  {"argv": [str], "env": {str: str}, "cwd": str, "limits": {"NPROC": int, …}, "sandbox": bool, "held": bool,
           "filter": HEX}
Then, for a held one, once: {"text": str}
Answer:   {"exit": int|null, "error": int|null, "started": bool, "given": bool, "leftover": ["PID: COMMAND"]}
`exit` is the status as a shell gives it (128 + signal); `error` an errno of execve or of what
comes before it; `started` is false if bubblewrap gave up before it started the command. A held sandbox is
set up and then reads from descriptor HELD_FD, to a NUL, what it shall run; `given` is false if it never got that.
"""

import fcntl
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
KILL_PATIENCE_S = 5.0
"""How long the supervisor tries to kill a tree before it names what is left (a process in
uninterruptible sleep, or one that became another user)."""
STATUS_FD = 3
GO_FD = 4
"""Where bubblewrap is told to write its status and to wait for the go-ahead; see `sandbox.py`."""
HELD_FD = 5
"""Where a held sandbox reads its command."""
FILTER_FD = 6
"""Where bubblewrap reads its filter of system calls."""


def serve(connection: socket.socket) -> None:
    """Fork a supervisor for each byte that comes with descriptors; return when the gateway is gone."""
    # Before the first fork, so that no supervisor pays for it; not with this module, of which the
    # gateway takes two constants and no more.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors need no reaping
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, 1, 8)
        for descriptor in descriptors:
            # Unlike all that Python opens, what comes over a socket is inherited (`recv_fds` drops its `flags`).
            os.set_inheritable(descriptor, False)
        if not data:
            return
        try:
            pid = os.fork()
        except OSError:
            pid = -1  # closing the descriptors tells the gateway: no answer will come
        if pid == 0:
            status = 70
            try:
                connection.close()
                supervise(descriptors, libc)
                status = 0
            finally:
                os._exit(status)
        for descriptor in descriptors:
            os.close(descriptor)


def supervise(descriptors: list[int], libc: Any) -> None:
    """Run one program to its end, or until the control socket says or shows that it must die."""
    control = socket.socket(fileno=descriptors[0])
    become_subreaper(libc)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    request = receive(control)
    if request is None:
        return
    job = Job(request, descriptors[1:])
    failure = job.start()
    for descriptor in descriptors[1:]:
        os.close(descriptor)
    if failure:
        send(control, {"exit": None, "error": failure, "started": False, "given": False, "leftover": []})
        return
    job.watch(control, wake_read)
    send(control, job.answer())


def become_subreaper(libc: Any) -> None:
    """Get every orphan below this process as a child of this process (Linux; elsewhere nothing)."""
    if sys.platform == "linux" and libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("this process cannot become a child subreaper")


class Job:
    """One program, from fork to the death of the last process it brought about."""

    def __init__(self, request: dict[str, Any], descriptors: list[int]) -> None:
        self.request = request
        self.descriptors = descriptors
        self.pid = 0
        self.exit: int | None = None
        self.status_read = -1
        self.go_write = -1
        self.held_write = -1
        self.given = not request["held"]
        self.status_text = b""
        self.let_go = False
        self.left: list[str] = []
        self.error: int | None = None

    def start(self) -> int:
        """Fork and exec; 0, or the errno of what failed. The program has begun when this returns."""
        passed = dict(enumerate(self.descriptors, 1))
        status_write = go_read = held_read = filter_read = -1
        if self.request["sandbox"]:
            self.status_read, status_write = os.pipe()
            go_read, self.go_write = os.pipe()
            passed |= {STATUS_FD: status_write, GO_FD: go_read}
        if self.request["held"]:
            held_read, self.held_write = os.pipe()
            passed[HELD_FD] = held_read
        if self.request["filter"]:
            filter_read, filter_write = os.pipe()
            os.write(filter_write, bytes.fromhex(self.request["filter"]))  # some hundred bytes: the pipe takes them
            os.close(filter_write)
            passed[FILTER_FD] = filter_read
        report_read, report_write = os.pipe()
        try:
            self.pid = os.fork()
        except OSError as error:
            return error.errno or 11
        if self.pid == 0:
            try:
                self.become(passed, report_write)
            except OSError as error:
                os.write(report_write, str(error.errno or 1).encode())
            except Exception:
                os.write(report_write, b"22")
            finally:
                os._exit(127)
        for descriptor in (report_write, status_write, go_read, held_read, filter_read):
            if descriptor >= 0:
                os.close(descriptor)
        # Ends without a byte when execve closed the other end.
        failed = os.read(report_read, 16)
        os.close(report_read)
        if failed:
            os.waitpid(self.pid, 0)
        return int(failed or 0)

    def become(self, passed: dict[int, int], report: int) -> None:
        """In the child: set everything up and become the program."""
        os.setsid()
        # First out of the way of the numbers they shall have, then onto them. All others close at execve.
        high = {number: fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 100) for number, descriptor in passed.items()}
        report_high = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, 100)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        for number, descriptor in high.items():
            os.dup2(descriptor, number)
        for number in signal.valid_signals():
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                try:
                    signal.signal(number, signal.SIG_DFL)
                except OSError:
                    continue  # the C library keeps a few for itself
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.chdir(self.request["cwd"])
        if not self.request["sandbox"]:
            for name, value in self.request["limits"].items():
                kind = getattr(resource, f"RLIMIT_{name}", None)
                if kind is not None:
                    resource.setrlimit(kind, lowered(resource.getrlimit(kind), value))
        argv, env = self.request["argv"], self.request["env"]
        try:
            os.execvpe(argv[0], argv, env)  # noqa: S606 - that there is no shell is the point
        except OSError as error:
            os.write(report_high, str(error.errno or 1).encode())
            os._exit(127)

    def watch(self, control: socket.socket, wake: int) -> None:
        """Wait for the program's end or the control socket's, then kill what is left."""
        poll = select.poll()
        poll.register(control, select.POLLIN)
        poll.register(wake, select.POLLIN)
        if self.status_read >= 0:
            os.set_blocking(self.status_read, False)
            poll.register(self.status_read, select.POLLIN)
        while not self.reap() and self.exit is None:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if wake in ready:
                os.read(wake, 4096)
            try:
                if self.status_read in ready and not self.read_status():
                    poll.unregister(self.status_read)
            except OSError as error:
                self.error = error.errno or 1  # no limits, no run
                break
            if control.fileno() in ready and not self.give(control):
                break  # the gateway writes nothing else here: this is its word to kill, or its death
        self.kill_all()
        while self.status_read >= 0 and self.read_status():
            continue

    def give(self, control: socket.socket) -> bool:
        """Hand a held program what it waits for, once; False if the gateway has something else to say, or is gone."""
        if self.given:
            return False
        message = receive(control)
        if message is None:
            return False
        try:
            # The pipe is empty and takes it at once (the gateway sees to the size). The NUL is how the reader
            # knows that it has the whole: half a command must not run if this process dies here.
            os.write(self.held_write, message["text"].encode() + b"\0")
        except BrokenPipeError:
            return True  # nobody reads any more: its end will be noticed next, with nothing given
        os.close(self.held_write)
        self.given = True
        return True

    def read_status(self) -> bool:
        """Take in what bubblewrap says; False at its end. Lets it go on once its limits are set."""
        try:
            data = os.read(self.status_read, 4096)
        except BlockingIOError:
            return False
        self.status_text += data
        if not self.let_go and b"\n" in self.status_text:
            first = json.loads(self.status_text.split(b"\n", 1)[0])
            # The sandbox's init stands still before it starts the command, so that setting its limits from
            # here is no race. Not earlier, by inheritance: NPROC is counted within a user namespace, and
            # set before that exists it would count all the processes that the user has on this machine.
            self.limit(int(first["child-pid"]))
            self.let_go = True
            os.write(self.go_write, b"g")
            os.close(self.go_write)
        return bool(data)

    def limit(self, pid: int) -> None:
        for name, value in self.request["limits"].items():
            kind = getattr(resource, f"RLIMIT_{name}")
            resource.prlimit(pid, kind, lowered(resource.prlimit(pid, kind), value))

    def reap(self) -> bool:
        """Collect the dead; True if no child is left. Sets `exit` when the program itself is among them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if pid == self.pid:
                code = os.waitstatus_to_exitcode(status)
                self.exit = code if code >= 0 else 128 - code

    def kill_all(self) -> None:
        """Kill until there is no child left: every descendant ends up as a child of this process."""
        linux = sys.platform == "linux"
        end = time.monotonic() + KILL_PATIENCE_S
        pause = 0.0005
        if not linux:
            kill_group(self.pid)
        while not self.reap():
            living = descendants(os.getpid()) if linux else [self.pid]
            # Stopped first, so that none forks while the others are being killed.
            for sign in (signal.SIGSTOP, signal.SIGKILL):
                for pid in living:
                    send_signal(pid, sign)
            if time.monotonic() > end:
                self.left = [f"{pid}: {command_of(pid)}" for pid in living]
                return
            time.sleep(pause)
            pause = min(pause * 2, 0.02)

    def answer(self) -> dict[str, Any]:
        # bubblewrap reports its command's end, unless somebody killed it: then the command may well have run.
        killed = self.let_go and self.exit is not None and self.exit > 128
        started = not self.request["sandbox"] or b'"exit-code"' in self.status_text or killed
        return {
            "exit": self.exit,
            "error": self.error,
            "started": started,
            "given": self.given,
            "leftover": self.left,
        }


def lowered(present: tuple[int, int], wanted: int) -> tuple[int, int]:
    """`wanted` as soft and hard limit, but never more than the present hard one."""
    hard = present[1]
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    return value, value


def descendants(ancestor: int) -> list[int]:
    """Everything below `ancestor`, by the parent links in /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            parent = parent_of(int(entry))
            if parent:
                children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    todo = [ancestor]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold anything; what follows the last one is fixed.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return int(fields[1]) if len(fields) > 1 and fields[0] != b"Z" else 0


def send_signal(pid: int, sign: int) -> None:
    try:
        os.kill(pid, sign)
    except (ProcessLookupError, PermissionError):
        return  # gone, or not ours any more: kill_all names it if it stays


def kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def command_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(200).replace(b"\0", b" ").decode("utf-8", "replace").strip() or "?"
    except OSError:
        return "?"


def receive(control: socket.socket) -> dict[str, Any] | None:
    size = int.from_bytes(receive_exactly(control, 4), "big")
    body = receive_exactly(control, size)
    if not size or len(body) != size:
        return None
    request: dict[str, Any] = json.loads(body)
    return request


def receive_exactly(control: socket.socket, size: int) -> bytes:
    body = b""
    while len(body) < size:
        part = control.recv(size - len(body))
        if not part:
            return b""
        body += part
    return body


def send(control: socket.socket, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    try:
        control.sendall(len(body).to_bytes(4, "big") + body)
    except OSError:
        return  # the gateway is gone; everything is dead, which is all that was left to do


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
