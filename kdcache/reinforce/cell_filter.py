"""The wall around generated code: a seccomp filter of the Linux kernel that lets through a short list of system calls.

What is on the list: memory, time, reading (files may be opened for reading alone), pipes that are open already, and ending.
Everything else fails with EPERM, known or unknown: sockets of any kind, starting processes or threads, other programs,
signals to anyone, opening a file for writing, making, renaming and removing files, changing their modes, io_uring, ptrace,
namespaces, keys, shared memory. The filter cannot be taken off and holds for whatever the process does, ctypes included.

Run by `cell.py` in an interpreter of its own: the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

# System calls by name: their numbers on x86-64, and on arm64 (where several older ones do not exist).
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "readv": (19, 65), "writev": (20, 66), "access": (21, None), "pipe": (22, None), "select": (23, None),
    "sched_yield": (24, 124), "mremap": (25, 216), "mincore": (27, 232), "madvise": (28, 233), "dup": (32, 23),
    "dup2": (33, None), "nanosleep": (35, 101), "getitimer": (36, 102), "setitimer": (38, 103), "getpid": (39, 172),
    "exit": (60, 93), "uname": (63, 160), "getcwd": (79, 17), "readlink": (89, None), "gettimeofday": (96, 169),
    "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176),
    "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178),
    "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61),
    "set_tid_address": (218, 96), "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79), "readlinkat": (267, 78),
    "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99), "dup3": (292, 24),
    "pipe2": (293, 59), "getcpu": (309, 168), "getrandom": (318, 278), "statx": (332, 291), "rseq": (334, 293),
    "faccessat2": (439, 439),
}  # fmt: skip
_OPEN, _OPENAT, _FCNTL = (2, None), (257, 56), (72, 25)
# Opening for writing, making, emptying, or a nameless file.
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000
# Copies and flags of descriptors. Not who is signalled about them: that would be a way to kill other processes.
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: ld abs word, jeq, jset, ret
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # with errno 1, EPERM
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine() -> None:
    """Put the filter on this process, for good.

    Raises:
        OSError: the kernel, or whatever contains this process, does not let a process do that, or the machine is neither
            x86-64 nor arm64.
    """
    column, architecture = _ARCHITECTURES.get(platform.machine(), (None, 0))
    if column is None:
        raise OSError(f"no filter of system calls is known for {platform.machine()}")
    code = _program(column, architecture)
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    done = libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero)
    done = done or libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.byref(program), zero, zero)
    if done != 0:
        raise OSError(ctypes.get_errno(), "the kernel refuses a filter of system calls (seccomp)")


def _program(column: int, architecture: int) -> bytes:
    """The filter for one architecture, as an array of ``struct sock_filter``."""
    lines = [
        _line(_LOAD, value=_ARCHITECTURE),
        _line(_EQUAL, 1, 0, architecture),
        _line(_RETURN, value=_KILL),
        _line(_LOAD, value=_NUMBER),
    ]
    for numbers in _ALLOWED.values():
        if numbers[column] is not None:
            lines += [_line(_EQUAL, 0, 1, numbers[column]), _line(_RETURN, value=_ALLOW)]
    for numbers, argument in ((_OPEN, 1), (_OPENAT, 2)):
        if numbers[column] is not None:
            lines += _checked(numbers[column], argument, [_line(_ANY_BIT, 0, 1, _WRITING)], if_met=_REFUSE)
    commands = [
        _line(_EQUAL, len(_FCNTL_COMMANDS) - 1 - i, int(i == len(_FCNTL_COMMANDS) - 1), command)
        for i, command in enumerate(_FCNTL_COMMANDS)
    ]
    lines += _checked(_FCNTL[column], 1, commands, if_met=_ALLOW)
    return b"".join([*lines, _line(_RETURN, value=_REFUSE)])


def _checked(number: int | None, argument: int, tests: list[bytes], *, if_met: int) -> list[bytes]:
    """One system call whose argument (its low 32 bits) decides: ``tests`` jump to the next line when met, over it when not."""
    otherwise = _REFUSE if if_met == _ALLOW else _ALLOW
    body = [
        _line(_LOAD, value=_FIRST_ARGUMENT + 8 * argument),
        *tests,
        _line(_RETURN, value=if_met),
        _line(_RETURN, value=otherwise),
    ]
    # The accumulator still holds the number: whoever gets here was none of those before.
    return [_line(_EQUAL, 0, len(body), number), *body]


def _line(code: int, met: int = 0, unmet: int = 0, value: int | None = 0) -> bytes:
    return struct.pack("<HBBI", code, met, unmet, value or 0)
