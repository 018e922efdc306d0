"""A count that the ranks of a site stop at together without exchanging messages before."""

import threading
from concurrent.futures import Future
from datetime import timedelta

from torch.distributed import Store


class AgreedStop:
    """Counts something that every rank does in the same order, until a thread beside it closes the count.

    Then the ranks agree on the highest count that any has reached: each goes on to that one and no
    further. So none waits in a collective for a rank that has stopped, wherever the ranks were, and
    as long as nothing is closed, counting costs no message.

    Args:
        store: shared by the ranks; used by ``close`` alone.
        name: of what is counted, unique in the store.
        rank: this rank of the site.
        ranks: ranks of the site.
    """

    def __init__(self, store: Store, name: str, rank: int, ranks: int) -> None:
        self.agreed: Future[int] = Future()
        """The last count, once the ranks have agreed on it."""
        self._store = store
        self._keys = [f"titan_ext/shutdown/{name}/{index}" for index in range(ranks)]
        self._own_key = self._keys[rank]
        # Closing and counting exclude each other: a count that begins after ``close`` is not in what it publishes.
        self._lock = threading.Lock()
        self._closed = False
        self._count = 0

    def advance(self) -> bool:
        """Count one more; False at the agreed end. Waits where the count is closed and not yet agreed on."""
        with self._lock:
            if not self._closed:
                self._count += 1
                return True
        if self._count >= self.agreed.result():
            return False
        self._count += 1
        return True

    def close(self, timeout: timedelta) -> int:
        """Agree with the other ranks, which close theirs too.

        To be called from another thread than ``advance``, which may be waiting for the agreement.

        Returns:
            The last count.

        Raises:
            torch.distributed.DistError: the store is gone, or a rank has not closed within ``timeout``.
        """
        with self._lock:
            self._closed = True
        self._store.set(self._own_key, str(self._count))
        self._store.wait(self._keys, timeout)
        self.agreed.set_result(max(int(self._store.get(key)) for key in self._keys))
        return self.agreed.result()
