"""What stands before a site of a rehearsal: from here on the laboratory is asked about every connection the site makes.

It runs as ``python -m titan_ext.lab.real_time.gate SOCKET PLACE COMMAND…``: it installs a filter of system calls
(seccomp, which needs no root), hands its descriptor to the laboratory and becomes the command. The filter is inherited by
all processes of the site and looks at ``connect`` alone, whatever language calls it; the kernel then lets the laboratory
decide. Nothing of the product knows of it.
"""

import ctypes
import os
import platform
import socket
import struct
import sys

from titan_ext.errors import RunError
from titan_ext.launcher.log import ERROR_PREFIX

_CALLS = {"x86_64": (0xC000003E, 317, 42), "aarch64": (0xC00000B7, 277, 203)}
"""By machine: linux/audit.h's name of it, and the numbers of ``seccomp`` and ``connect``."""
_NO_NEW_PRIVILEGES = 38
_SET_FILTER, _NEW_LISTENER = 1, 8
_ALLOW, _ASK = 0x7FFF0000, 0x7FC00000
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def pass_through(path: str, place: int) -> None:
    """Put this process, and those it will start, behind the laboratory that listens at ``path``.

    Call it before there are threads: they would not be meant.

    Args:
        path: of the laboratory's socket.
        place: of the site among those of the run.

    Raises:
        RunError: the kernel refuses.
        OSError: there is no laboratory.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as laboratory:
        laboratory.connect(path)  # the last one that nobody is asked about
        listener = _install_filter()
        socket.send_fds(laboratory, [str(place).encode()], [listener])
        os.close(listener)
        laboratory.recv(1)  # the laboratory answers from now on


def _install_filter() -> int:
    """The descriptor at which the kernel asks."""
    if platform.machine() not in _CALLS or sys.platform != "linux":
        raise RunError(f"a rehearsal in real time needs Linux on {' or '.join(_CALLS)}; add --virtual-time")
    machine, seccomp, connect = _CALLS[platform.machine()]
    code = b"".join(
        struct.pack("=HBBI", *each)
        for each in (
            (_LOAD, 0, 0, 4),  # the machine of the call
            (_JUMP_IF_EQUAL, 0, 3, machine),
            (_LOAD, 0, 0, 0),  # its number
            (_JUMP_IF_EQUAL, 0, 1, connect),
            (_RETURN, 0, 0, _ASK),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    listener: int = libc.syscall(seccomp, _SET_FILTER, _NEW_LISTENER, ctypes.byref(program))
    if listener < 0:
        reason = os.strerror(ctypes.get_errno())
        raise RunError(f"the kernel refuses a filter of system calls (seccomp: {reason}); add --virtual-time")
    return listener


def main() -> None:
    """Become the command."""
    path, place, *command = sys.argv[1:]
    try:
        pass_through(path, int(place))
    except RunError as error:
        print(f"{ERROR_PREFIX} {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
