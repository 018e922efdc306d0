"""One site of the wide-area benchmark: two of titan_ext's trainers that take turns, one of them exchanging."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CONFIG = """
[model]
name = "llama3"
flavor = "{flavor}"
[training]
seq_len = {seq_len}
local_batch_size = {batch}
steps = 1000000
[metrics]
enable_tensorboard = false
log_freq = 1000000
[semi_sync]
method = "{method}"
sync_every = {sync_every}
num_fragments = {fragments}
fragment_sync_delay = {delay}
fragment_update_alpha = 0.5
[[site]]
name = "site{site}"
data = "builtin:code"
tokenizer = "byte"
"""


class Trainers:
    """The trainers ``silent``, which never exchanges, and ``streaming``.

    Args:
        site: index of this site.
        lighthouse: URL of the lighthouse.
        folder: for what the runs leave.
        sizes: flavor, tokens, batch, periods: what the configuration below leaves open.
        threads: threads that torch may compute with.
    """

    def __init__(self, site: int, lighthouse: str, folder: str, sizes: Mapping[str, Any], threads: int) -> None:
        _divert_output(f"{folder}/site{site}.log")
        _single_rank_environment(self)
        import torch

        torch.set_num_threads(threads)
        self._sync_every = sizes["sync_every"]
        self._until_silent = self._sync_every // sizes["fragments"] + sizes["delay"]
        self._trainers = {}
        for name, method in (("silent", "none"), ("streaming", "diloco")):
            path = Path(folder) / f"{name}{site}.toml"
            path.write_text(_CONFIG.format(method=method, site=site, **sizes), encoding="utf-8")
            self._trainers[name] = _trainer(str(path), f"site{site}", f"{folder}/{name}", lighthouse)
        self._batches = {name: each.batch_generator(each.dataloader) for name, each in self._trainers.items()}

    def warm_up(self) -> None:
        """Join, and step to where nothing is in flight; turns then hold whole exchanges only."""
        for name, trainer in self._trainers.items():
            trainer.should_continue_training()
            self._step(name, self._until_silent)

    def take(self, name: str) -> dict[str, float]:
        """A turn of ``sync_every`` steps: its ``seconds``, the ledger's ``bytes`` and seconds an ``exchange`` took (mean)."""
        before = self._ledger(name)
        started = time.perf_counter()
        self._step(name, self._sync_every)
        seconds = time.perf_counter() - started
        rounds, sent, exchanging = (after - start for after, start in zip(self._ledger(name), before))
        return {"seconds": seconds, "bytes": sent, "exchange": exchanging / rounds if rounds else 0.0}

    def _ledger(self, name: str) -> tuple[int, int, float]:
        outer = self._trainers[name].outer
        return (
            (outer.ledger.rounds, outer.ledger.bytes_sent, outer.ledger.seconds) if outer is not None else (0, 0, 0.0)
        )

    def _step(self, name: str, steps: int) -> None:
        trainer = self._trainers[name]
        for _ in range(steps):
            trainer.step += 1
            trainer.train_step(self._batches[name])


def _divert_output(path: str) -> None:
    """What the trainers log would drown the table."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _trainer(path: str, site: str, folder: str, lighthouse: str):
    from titan_ext.config import load_site

    flags = [f"--dump_folder={folder}", f"--replica.lighthouse={lighthouse}"]
    return load_site(path, site, flags).config.build()


def _single_rank_environment(owner: Trainers) -> None:
    from torch.distributed import TCPStore

    # The rendezvous of the manager must live as long as its owner.
    owner._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(owner._store.port),  # type: ignore[attr-defined]
        # The port is served already; torch must not try to serve it again.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
