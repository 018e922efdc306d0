"""Answers the kernel, which asks about each connection that a site wants to make (seccomp_unotify(2)).

One to another site, or to the lighthouse, is led to the relay: the address in the caller's memory is replaced by that of a
port of the relay's, and the call goes on. All others go on as they are.
"""

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

_RECEIVE, _ANSWER, _IS_VALID = 0xC0502100, 0xC0182101, 0x40082102
_ASKED = struct.Struct("=QI20x3Q24x")  # number, thread; of the call its first three arguments
_REPLY = struct.Struct("=QqiI")
_GO_ON = 1
_DIAL_SECONDS = 5.0
_LOOPBACK = "127.0.0.1"
_MAPPED = bytes(10) + b"\xff\xff"  # before an IPv4 address in an IPv6 one
_LONGEST_ADDRESS = 28
_BUFFER_BYTES = 128 * 1024
"""Of the kernel on this side of a connection: bytes there count as sent, and are not on the link yet."""
_SEGMENT = 1460

Address = tuple[str, int]
Opened = Callable[["Port"], None]


class Port:
    """Where the relay takes connections of one site to one address of another place."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        self.server = socket.socket()
        _shape(self.server)
        self.server.bind((_LOOPBACK, 0))
        self.server.listen(128)
        self.address: Address = self.server.getsockname()
        self.expected: deque[socket.socket] = deque()
        """Connections to where those that come are meant for."""


class Doorkeeper:
    """Threads that listen to gates and to the kernel.

    Args:
        addresses: of the sites, and last that of the lighthouse.
        path: of the socket at which gates announce themselves.
        opened: called with each new port.
    """

    def __init__(self, addresses: Sequence[str], path: Path, opened: Opened) -> None:
        self._places = {address: place for place, address in enumerate(addresses)}
        self._opened = opened
        self._lock = threading.Lock()
        self._ports: dict[tuple[int, Address], Port] = {}
        self._meant: dict[Address, Address] = {}
        """By an address of the relay the one that it stands for: a caller may use the same memory again."""
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen()
        _start(self._take_gates)

    def close(self) -> None:
        """Take no more gates."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _take_gates(self) -> None:
        while True:
            try:
                gate, _ = self._server.accept()
            except OSError:
                return
            with gate:
                message, (listener,), _, _ = socket.recv_fds(gate, 16, 1)
                _start(partial(self._answer, listener, int(message)))
                gate.send(b"\0")

    def _answer(self, listener: int, place: int) -> None:
        """Answer until all processes behind a gate are gone."""
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while poll.poll()[0][1] & select.POLLIN:
            asked = bytearray(80)
            with contextlib.suppress(OSError):  # it has been killed meanwhile
                fcntl.ioctl(listener, _RECEIVE, asked)
                number, thread, _, pointer, size = _ASKED.unpack(asked)
                error = self._decide(listener, number, place, thread, pointer, size)
                fcntl.ioctl(listener, _ANSWER, _REPLY.pack(number, 0, -error, 0 if error else _GO_ON))
        os.close(listener)

    def _decide(self, listener: int, number: int, place: int, thread: int, pointer: int, size: int) -> int:
        """Lead a call to where it is to go; returns the error with which it is to fail, or 0."""
        with open(f"/proc/{thread}/mem", "r+b", buffering=0) as memory:
            fcntl.ioctl(listener, _IS_VALID, struct.pack("=Q", number))  # else the memory may be another's
            memory.seek(pointer)
            wanted = bytearray(memory.read(min(size, _LONGEST_ADDRESS)))
            address = _parse(wanted)
            meant = self._meant.get(address, address) if address is not None else None
            target = self._places.get(meant[0]) if meant is not None else None
            if target is None or target == place:
                return 0
            try:
                far = _dial(meant)
            except OSError as error:
                return error.errno or errno.ETIMEDOUT
            port = self._port(place, target, meant)
            port.expected.append(far)
            memory.seek(pointer)
            memory.write(_replace(wanted, port.address))
        return 0

    def _port(self, source: int, target: int, meant: Address) -> Port:
        with self._lock:
            if (source, meant) not in self._ports:
                port = self._ports[source, meant] = Port(source, target)
                self._meant[port.address] = meant
                self._opened(port)
            return self._ports[source, meant]


def _start(action: Callable[[], None]) -> None:
    threading.Thread(target=action, daemon=True, name="titan_ext-doorkeeper").start()


def _dial(address: Address) -> socket.socket:
    far = socket.socket()
    try:
        _shape(far)
        far.settimeout(_DIAL_SECONDS)
        far.connect(address)
    except BaseException:
        far.close()
        raise
    return far


def _shape(each: socket.socket) -> None:
    """Before it connects or listens: segments as on Ethernet, and little room for bytes that have not left yet."""
    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
    each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)


def _parse(wanted: bytearray) -> Address | None:
    """The IPv4 address in a ``struct sockaddr``, also one that is mapped into IPv6; None for any other."""
    family, port = int.from_bytes(wanted[:2], "little"), int.from_bytes(wanted[2:4], "big")
    if family == socket.AF_INET and len(wanted) >= 8:
        return socket.inet_ntoa(wanted[4:8]), port
    if family == socket.AF_INET6 and wanted[8:20] == _MAPPED and len(wanted) >= 24:
        return socket.inet_ntoa(wanted[20:24]), port
    return None


def _replace(wanted: bytearray, address: Address) -> bytes:
    """The same ``struct sockaddr`` with another address."""
    start = 4 if int.from_bytes(wanted[:2], "little") == socket.AF_INET else 20
    wanted[2:4] = address[1].to_bytes(2, "big")
    wanted[start : start + 4] = socket.inet_aton(address[0])
    return bytes(wanted)
