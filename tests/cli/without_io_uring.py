"""Runs a program under a seccomp filter that refuses io_uring, as many containers do."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_RET_ALLOW = 0x7FFF0000
_RET_ERRNO = 0x00050000
_LOAD_WORD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_IO_URING_SETUP = 425  # the same number on every architecture


def refuse_io_uring() -> None:
    """io_uring_setup fails with EPERM from now on, in this process and its children."""
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (_LOAD_WORD, 0, 0, 0),  # struct seccomp_data: the number of the system call
            (_JUMP_EQUAL, 0, 1, _IO_URING_SETUP),
            (_RETURN, 0, 0, _RET_ERRNO | errno.EPERM),
            (_RETURN, 0, 0, _RET_ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(
        struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    )
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0),
    ):
        if prctl(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "prctl")


if __name__ == "__main__":
    refuse_io_uring()
    os.execv(sys.argv[1], sys.argv[1:])
