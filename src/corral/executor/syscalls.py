"""The system calls that a sandboxed program cannot make: what no namespace holds.

Keyrings belong to the user and not to a namespace: a sandboxed program, which for the kernel is the gateway's
user, could read keys (Kerberos tickets, keys of encrypted folders) out of the ones that the gateway's session has.
A file of the session's folder belongs to the gateway's user: with the set-user-id bit it would be that user for
whoever starts it on the host. io_uring would do all of this without the calls that are looked at; bpf,
userfaultfd and perf_event_open are where kernel exploits begin, and nothing that an agent builds needs them.

The filter is a program for seccomp(2) as bubblewrap takes it: `struct sock_filter` after `struct sock_filter`.
Numbers are those of the kernel's tables (arch/*/entry/syscalls, include/uapi/asm-generic/unistd.h), architectures
those of linux/audit.h. A call by the numbers of another architecture fails as one that the kernel does not have.
"""

from __future__ import annotations

import errno
import platform
import struct
import sys

from msgspec import Struct

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW = 0x7FFF_0000
_ERRNO = 0x0005_0000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_SET_ID = 0o6000
_MAKES_A_FILE = 0o100 | 0o20000000
"""O_CREAT, and the bit that O_TMPFILE has beside O_DIRECTORY: without either the mode means nothing."""
_X32 = 0x4000_0000


class _Calls(Struct, kw_only=True, frozen=True):
    """One architecture: `missing` are answered ENOSYS; the others are numbers with the places of arguments.

    `modes` gives where the mode is, `opens` where flags and mode are.
    """

    audit: int
    missing: tuple[int, ...]
    modes: dict[int, int]
    opens: dict[int, tuple[int, int]]


# add_key, request_key, keyctl, bpf, userfaultfd, perf_event_open; io_uring_setup, _enter, _register, openat2 (whose
# mode lies in memory, where no filter sees it; programs fall back to openat).
_NEWER = (425, 426, 427, 437)
# chmod, fchmod, fchmodat, fchmodat2, creat, mknod, mknodat; open, openat.
_X86_64 = _Calls(
    audit=0xC000_003E,
    missing=(248, 249, 250, 321, 323, 298, *_NEWER),
    modes={90: 1, 91: 1, 268: 2, 452: 2, 85: 1, 133: 1, 259: 2},
    opens={2: (1, 2), 257: (2, 3)},
)
_I386 = _Calls(
    audit=0x4000_0003,
    missing=(286, 287, 288, 357, 374, 336, *_NEWER),
    modes={15: 1, 94: 1, 306: 2, 452: 2, 8: 1, 14: 1, 297: 2},
    opens={5: (1, 2), 295: (2, 3)},
)
_AARCH64 = _Calls(
    audit=0xC000_00B7,
    missing=(217, 218, 219, 280, 282, 241, *_NEWER),
    modes={52: 1, 53: 2, 452: 2, 33: 2},
    opens={56: (2, 3)},
)
_ARM = _Calls(
    audit=0x4000_0028,
    missing=(309, 310, 311, 386, 388, 364, *_NEWER),
    modes={15: 1, 94: 1, 333: 2, 452: 2, 8: 1, 14: 1, 324: 2},
    opens={5: (1, 2), 322: (2, 3)},
)
_MACHINES = {"x86_64": (_X86_64, _I386), "aarch64": (_AARCH64, _ARM)}


def sandbox_filter(machine: str | None = None) -> bytes:
    """The filter for this machine (or another); empty where the numbers are not known here."""
    if machine is None:
        machine = platform.machine() if sys.platform == "linux" else ""
    known = _MACHINES.get(machine)
    if known is None:
        return b""
    code = [_step(_LOAD, _ARCHITECTURE)]
    for calls in known:
        block = _block(calls)
        code += [_step(_EQUAL, calls.audit, 0, len(block)), *block]
    return b"".join([*code, _step(_RETURN, _ERRNO | errno.ENOSYS)])


def _block(calls: _Calls) -> list[bytes]:
    """What is asked of a call of one architecture. The jumps of the machine reach 255 steps."""
    missing = _step(_RETURN, _ERRNO | errno.ENOSYS)
    code = [_step(_LOAD, _NUMBER)]
    if calls is _X86_64:
        code += [_step(_AT_LEAST, _X32, 0, 1), missing]
    for number in calls.missing:
        code += [_step(_EQUAL, number, 0, 1), missing]
    for number, mode in calls.modes.items():
        judged = _refusing(mode)
        code += [_step(_EQUAL, number, 0, len(judged)), *judged]
    for number, (flags, mode) in calls.opens.items():
        judged = [_argument(flags), _step(_ANY_BIT, _MAKES_A_FILE, 1, 0), _step(_RETURN, _ALLOW), *_refusing(mode)]
        code += [_step(_EQUAL, number, 0, len(judged)), *judged]
    return [*code, _step(_RETURN, _ALLOW)]


def _refusing(mode: int) -> list[bytes]:
    """Refuse a call whose argument at that place has a set-id bit, allow any other."""
    refused = _step(_RETURN, _ERRNO | errno.EPERM)
    return [_argument(mode), _step(_ANY_BIT, _SET_ID, 0, 1), refused, _step(_RETURN, _ALLOW)]


def _argument(place: int) -> bytes:
    """Load the lower half of an argument; all of these architectures are little-endian."""
    return _step(_LOAD, _ARGUMENTS + 8 * place)


def _step(code: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_so, if_not, value)
