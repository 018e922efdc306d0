"""One site of a sync benchmark: a synthetic model that is synchronised by torchft's DiLoCo or by ours."""

import logging
import math
import os
import time
from datetime import timedelta
from functools import partial

import torch
from torch import nn
from torch.distributed import TCPStore
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from titan_ext.links.namespaces import LINK
from titan_ext.memory import memory_stats, reset_peak
from titan_ext.replica import Replica, ReplicaConfig
from titan_ext.semi_sync import SemiSync
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes

TORCHFT = "torchft"
TORCHFT_BUCKETS = "torchft, buckets"

_LAYERS = 12
_TIMEOUT = timedelta(seconds=300)


class SyntheticModel(nn.Module):
    """Parameters in the shapes of a Llama of 12 layers; it computes nothing.

    Args:
        parameters: how many, roughly.
    """

    def __init__(self, parameters: float) -> None:
        super().__init__()
        # 12 layers of 4 dim^2 (attention) and 8 dim^2 (feed-forward), twice a vocabulary of 32 dim.
        dim = max(8, 8 * round(math.sqrt(parameters / (_LAYERS * 12 + 64)) / 8))
        hidden = 8 * dim // 3
        self.weights = nn.ParameterList()
        self._add(32 * dim, dim)
        for _ in range(_LAYERS):
            for shape in [(dim,), *[(dim, dim)] * 4, (dim,), (hidden, dim), (dim, hidden), (hidden, dim)]:
                self._add(*shape)
        self._add(dim)
        self._add(32 * dim, dim)

    def _add(self, *shape: int) -> None:
        generator = torch.Generator().manual_seed(len(self.weights))
        self.weights.append(nn.Parameter(torch.randn(*shape, generator=generator).mul_(0.02)))


class SyncSite:
    """A site whose every inner step ends in a round.

    Args:
        name: ``TORCHFT``, ``TORCHFT_BUCKETS``, or the codec of our own engine.
        site: index of this site.
        sites: how many there are.
        lighthouse: URL of the lighthouse.
        parameters: size of the model.
        threads: threads that torch may compute with.
        host: address at which the other sites reach this one.
        streams: connections of ours to each of them; 0: by the distance.
    """

    def __init__(
        self,
        name: str,
        site: int,
        sites: int,
        lighthouse: str,
        parameters: float,
        threads: int,
        host: str = "127.0.0.1",
        streams: int = 0,
    ) -> None:
        logging.disable(logging.WARNING)
        torch.set_num_threads(threads)
        reset_peak()
        self._bare = _peak()
        self._site = site
        self._model = SyntheticModel(parameters)
        self._inner = torch.optim.SGD(self._model.parameters(), lr=1.0)  # without gradients it changes nothing
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        build = _TorchftSync if name.startswith(TORCHFT) else partial(_TitanExtSync, streams=streams)
        self._outer = build(name, f"site{site}", sites, lighthouse, (host, self._store.port), self._model, self._inner)

    @torch.no_grad()
    def round(self) -> dict[str, float]:
        """One round: ``seconds``, ``bytes`` sent, ``peak_bytes`` of memory for model and outer loop, a ``checksum``."""
        for parameter in self._model.parameters():
            parameter.mul_(1 + 1e-3 * (self._site + 1))
        reset_peak()
        started = time.perf_counter()
        self._inner.step()
        self._outer.after_step()
        seconds = time.perf_counter() - started
        peak = _peak() - self._bare
        checksum = sum(parameter.double().sum().item() for parameter in self._model.parameters())
        return {
            "seconds": seconds,
            "bytes": self._outer.bytes_sent(),
            "peak_bytes": peak,
            "checksum": checksum,
            **self._outer.parts(),
        }


class _TorchftSync:
    """torchft's DiLoCo; it runs on the optimizer's hooks."""

    def __init__(self, name, site, sites, lighthouse, store, model, inner) -> None:
        if store[0] != "127.0.0.1":
            os.environ["GLOO_SOCKET_IFNAME"] = LINK  # Gloo would listen at whatever the host's name resolves to
        self._manager = _CountingManager(
            pg=ProcessGroupGloo(timeout=_TIMEOUT),
            load_state_dict=None,
            state_dict=None,
            min_replica_size=sites,
            use_async_quorum=False,
            init_sync=False,  # the sites start equal
            timeout=_TIMEOUT,
            quorum_timeout=_TIMEOUT,
            rank=0,
            world_size=1,
            store_addr=store[0],
            store_port=store[1],
            lighthouse_addr=lighthouse,
            replica_id=site,
            hostname=store[0],
        )
        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        buckets = name == TORCHFT_BUCKETS
        self._diloco = DiLoCo(self._manager, [model], inner, outer, sync_every=1, use_bucketization=buckets)
        self._diloco.__enter__()
        self._rounds = 0

    def after_step(self) -> None:
        self._rounds += 1
        assert self._manager.current_step() == self._rounds, "torchft did not commit a round"

    def bytes_sent(self) -> int:
        sent, self._manager.sent = self._manager.sent, 0
        return sent

    def parts(self) -> dict[str, float]:
        return {}


class _CountingManager(Manager):
    """Counts what it is given to reduce."""

    sent = 0

    def allreduce(self, tensor, *arguments, **options):
        self.sent += ring_all_reduce_bytes(tensor.numel() * tensor.element_size(), self.num_participants())
        return super().allreduce(tensor, *arguments, **options)


class _TitanExtSync:
    """Our engine under a codec."""

    def __init__(self, name, site, sites, lighthouse, store, model, inner, *, streams) -> None:
        os.environ |= {"MASTER_ADDR": store[0], "MASTER_PORT": str(store[1])}
        config = ReplicaConfig(lighthouse=lighthouse, min_sites=sites, hostname=store[0])
        replica = Replica(config, site=site, rank=0, world_size=1, streams=streams)
        self._outer = SemiSync.Config(method="diloco", sync_every=1, codec=name).build(
            model_parts=[model], optimizers=inner, manager=replica
        )
        self._joined = False

    def after_step(self) -> None:
        if not self._joined:
            # Sites that start together agree on the first one's parameters; the round comes on top.
            self._outer.join(loaded=False)
            self._joined = True
        self._outer.step()
        assert self._outer.ledger.last.committed, f"round not committed: {self._outer.ledger.last.error}"

    def bytes_sent(self) -> int:
        return self._outer.ledger.last.bytes_sent

    def parts(self) -> dict[str, float]:
        """Seconds of quorum, reduction and apply; bytes of frames."""
        last = self._outer.ledger.last
        return {
            "quorum": last.seconds_quorum,
            "reduce": last.seconds_reduce,
            "apply": last.seconds_apply,
            "frames": last.wire_bytes_sent,
        }


class Lighthouse:
    """A lighthouse for a number of sites."""

    def __init__(self, sites: int) -> None:
        from torchft.coordination import LighthouseServer

        self._server = LighthouseServer(bind="0.0.0.0:0", min_replicas=sites, join_timeout_ms=60_000)

    def port(self) -> int:
        """The port on which it listens."""
        return int(self._server.address().rsplit(":", 1)[1])


def _peak() -> int:
    return memory_stats()["active_bytes.all.peak"]
