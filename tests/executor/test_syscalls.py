"""The filter of system calls, run by a machine of our own."""

from __future__ import annotations

import errno
import struct

import pytest

from corral.executor.syscalls import sandbox_filter

ALLOWED = 0
X86_64, I386, AARCH64, ARM, RISCV64 = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028, 0xC00000F3


def answer(code: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What the kernel would say of a call: 0 if it is let through, else the errno."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    steps = list(struct.iter_unpack("<HBBI", code))
    register = position = 0
    while True:
        operation, if_so, if_not, value = steps[position]
        position += 1
        if operation == 0x20:
            (register,) = struct.unpack_from("<I", data, value)
        elif operation == 0x06:
            return ALLOWED if value == 0x7FFF0000 else value & 0xFFFF
        else:
            holds = {0x15: register == value, 0x35: register >= value, 0x45: bool(register & value)}[operation]
            position += if_so if holds else if_not


@pytest.mark.parametrize(
    ("machine", "architecture", "keyctl", "bpf", "chmod", "openat", "read"),
    [
        ("x86_64", X86_64, 250, 321, (90, 1), 257, 0),
        ("x86_64", I386, 288, 357, (15, 1), 295, 3),
        ("aarch64", AARCH64, 219, 280, (53, 2), 56, 63),
        ("aarch64", ARM, 311, 386, (15, 1), 322, 3),
    ],
)
def test_each_architecture_is_judged_by_its_own_numbers(
    machine: str, architecture: int, keyctl: int, bpf: int, chmod: tuple[int, int], openat: int, read: int
) -> None:
    code = sandbox_filter(machine)

    def ask(number: int, *arguments: int) -> int:
        return answer(code, architecture, number, *arguments)

    assert [ask(keyctl), ask(bpf), ask(425), ask(437)] == [errno.ENOSYS] * 4
    assert ask(read, 1, 2, 0o4755) == ALLOWED
    number, place = chmod
    before = [0o7777] * place
    assert [ask(number, *before, mode) for mode in (0o4755, 0o2755, 0o6000)] == [errno.EPERM] * 3
    assert [ask(number, *before, mode) for mode in (0o755, 0o1777, 0)] == [ALLOWED] * 3
    assert ask(openat, 3, 4, 0o101, 0o4755) == errno.EPERM
    assert ask(openat, 3, 4, 0o20200002, 0o4755) == errno.EPERM  # O_TMPFILE
    assert ask(openat, 3, 4, 0o1, 0o7777) == ALLOWED  # nothing is made, and the mode is whatever lay there
    assert ask(openat, 3, 4, 0o101, 0o666) == ALLOWED


def test_calls_by_the_numbers_of_another_architecture_are_not_there() -> None:
    assert answer(sandbox_filter("x86_64"), RISCV64, 63) == errno.ENOSYS
    assert answer(sandbox_filter("x86_64"), AARCH64, 63) == errno.ENOSYS
    assert answer(sandbox_filter("x86_64"), X86_64, 0x40000000 + 90, 0, 0o755) == errno.ENOSYS  # x32


def test_a_machine_whose_numbers_are_not_known_has_no_filter() -> None:
    assert sandbox_filter("s390x") == b""
