"""A site's ranks begin each attempt of torchrun with a clean store.

torchrun keeps one store for the ranks over its own restarts. What an attempt left there (a request to leave,
the address of torchft's manager, those of Gloo's connections) would be read by the next one.
"""

import os
import secrets
import time
from datetime import timedelta

from torch.distributed import Store, TCPStore

_PREFIX = "titan_ext/attempt/"
_HELLO, _REPLY, _HERE = (f"{_PREFIX}{word}/" for word in ("hello", "reply", "here"))
# All that ranks write; with a static rendezvous the keys of torchrun itself lie beside them.
_OF_RANKS = ("titan_ext/", "torchft/", "default_pg/", "manager_addr", "replica_id")
_POLL_SECONDS = 0.02


def begin_attempt(rank: int, ranks: int, patience: timedelta) -> None:
    """Clear what an earlier attempt left in the ranks' store, before any rank of this one uses it.

    Call before the default process group is made, on every rank. Does nothing where no agent keeps the store.

    Raises:
        torch.distributed.DistStoreError: the other ranks have not come within ``patience``.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=patience)
    clear_store(store, rank, ranks)


def clear_store(store: Store, rank: int, ranks: int) -> None:
    """Rank 0 clears the store; the others return once it has.

    No number tells attempts apart on all nodes (each agent counts its own restarts), and a word of the last attempt's
    rank looks like one of this attempt's. So each rank says a word never said before and waits for the answer to it.
    """
    word = secrets.token_hex(8)
    if rank:
        store.set(f"{_HELLO}{rank}", word)
        store.wait([f"{_REPLY}{word}"])
        attempt = store.get(f"{_REPLY}{word}").decode()
        store.set(f"{_HERE}{attempt}/{rank}", "")
        return
    for key in store.list_keys():
        if key.startswith(_OF_RANKS) and not key.startswith(_HELLO):
            store.delete_key(key)
    _answer(store, set(range(1, ranks)), attempt=word)


def _answer(store: Store, waiting: set[int], attempt: str) -> None:
    answered: dict[int, str] = {}
    while waiting:
        for rank in waiting:
            hello = f"{_HELLO}{rank}"
            word = store.get(hello).decode() if store.check([hello]) else None
            if word is not None and answered.get(rank) != word:
                answered[rank] = word  # of this attempt's rank or of a dead one; that shows in who comes
                store.set(f"{_REPLY}{word}", attempt)
        waiting = {rank for rank in waiting if not store.check([f"{_HERE}{attempt}/{rank}"])}
        time.sleep(_POLL_SECONDS)
