"""A real S3 server on loopback whose connections can be cut and mended, as pytest fixtures."""

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest


class Forwarder:
    """Passes connections to a port on to another; cut, it refuses them, and ends those that there are."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._open: set[socket.socket] = set()
        self._listening: socket.socket | None = None
        self.port = 0
        self.requests = 0
        """Connections so far."""
        self.mend()

    def mend(self) -> None:
        """Listen, at the same port as ever."""
        if self._listening is None:
            self._listening = socket.create_server(("127.0.0.1", self.port))
            self.port = self._listening.getsockname()[1]
            threading.Thread(target=self._accept, args=[self._listening], daemon=True).start()

    def cut(self) -> None:
        """Refuse connections from now on."""
        if self._listening is not None:
            self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
            self._listening = None
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                inner, _ = listening.accept()
            except OSError:
                return
            self.requests += 1
            threading.Thread(target=self._pass_on, args=[inner], daemon=True).start()

    def _pass_on(self, inner: socket.socket) -> None:
        with inner, socket.create_connection(("127.0.0.1", self._target)) as outer:
            other = {inner: outer, outer: inner}
            self._open |= other.keys()
            try:
                while True:
                    for ready in select.select(list(other), [], [])[0]:
                        data = ready.recv(1 << 16)
                        if not data:
                            return
                        other[ready].sendall(data)
            except OSError:
                return
            finally:
                self._open -= other.keys()


class S3:
    """A server of moto's in a process of its own, behind a ``Forwarder``."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            assert self._process.poll() is None, "moto's server did not start"
            time.sleep(0.05)
        self._forwarder = Forwarder(port)
        self.cut, self.mend = self._forwarder.cut, self._forwarder.mend
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._forwarder.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
            # Below ours, botocore would try for a few seconds by itself.
            "AWS_MAX_ATTEMPTS": "1",
        }
        """By which s3fs finds it."""

    @property
    def connections(self) -> int:
        """How many there were."""
        return self._forwarder.requests

    def stop(self) -> None:
        """End the server."""
        self._forwarder.cut()
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """The server, for all tests of a process."""
    pytest.importorskip("moto.server")
    server = S3()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3, monkeypatch) -> Iterator[S3]:
    """The server, found by the environment, with an empty bucket ``s3://bucket``."""
    import s3fs

    for key in [key for key in os.environ if key.startswith("AWS_")]:
        monkeypatch.delenv(key)
    for key, value in s3_server.environment.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3_server.mend()
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    yield s3_server
    s3_server.mend()
    files.invalidate_cache()
    files.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
