"""Worker processes of a benchmark: each holds an object, whose methods are called in all of them at once."""

import contextlib
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from titan_ext.errors import RunError
from titan_ext.launcher.processes import die_with_parent
from titan_ext.links.namespaces import enter_network

# Each worker is a fork of a process that has paid for these imports.
_context = get_context("forkserver")
_context.set_forkserver_preload(["torchft.local_sgd", "titan_ext.replica.manager", "titan_ext.semi_sync"])

_GRACE_SECONDS = 5.0

Network = int | Callable[[], None] | None


class WorkerGroup:
    """Processes that each hold one object and run its methods on demand.

    Use it as a context manager: the processes end with it, and with the calling process, whatever happens.

    Args:
        build: makes a worker's object; importable by name.
        arguments: one tuple of arguments for each worker.
        networks: for each worker the process id whose network it shall use, or what lets it into one; None is that of the
            caller.

    Raises:
        RunError: a worker could not be built.
    """

    def __init__(
        self, build: Callable[..., Any], arguments: Sequence[tuple], networks: Sequence[Network] | None = None
    ) -> None:
        self._members = []
        for variable in ("RUST_LOG", "TORCH_CPP_LOG_LEVEL"):
            os.environ.setdefault(variable, "ERROR")  # their cores would report every heartbeat and group
        try:
            for each, network in zip(arguments, networks or [None] * len(arguments), strict=True):
                ours, theirs = _context.Pipe()
                process = _context.Process(target=_serve, args=(theirs, build, each, network), daemon=True)
                process.start()
                theirs.close()
                self._members.append((process, ours))
            self._answers()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "WorkerGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Run a method at every worker at the same time; returns what each returned.

        Raises:
            RunError: a worker raised or ended.
        """
        for _, connection in self._members:
            connection.send((method, arguments))
        return self._answers()

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._members:
            connection.close()
            process.terminate()
        for process, _ in self._members:
            process.join(_GRACE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        self._members = []

    def _answers(self) -> list[Any]:
        answers = []
        for index, (_, connection) in enumerate(self._members):
            try:
                failure, answer = connection.recv()
            except (EOFError, ConnectionError):
                failure, answer = "it ended without a word", None
            if failure is not None:
                raise RunError(f"worker {index} of the benchmark failed: {failure}")
            answers.append(answer)
        return answers


def _serve(connection: Connection, build: Callable[..., Any], arguments: tuple, network: Network) -> None:
    # Ctrl-C reaches the whole foreground group; the caller decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            # Before there are threads: it holds for the calling one.
            if callable(network):
                network()
            elif network is not None:
                enter_network(network)
            worker = build(*arguments)
            connection.send((None, None))
            while True:
                method, values = connection.recv()
                connection.send((None, getattr(worker, method)(*values)))
        except (EOFError, ConnectionError):
            pass
        except Exception:  # noqa: BLE001 — the parent process reports it
            connection.send((traceback.format_exc(), None))
    os._exit(0)  # torchft's threads are not ours to join
