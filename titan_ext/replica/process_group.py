"""The process group between sites: Gloo over TCP, bound to the address the other sites know."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torchft.process_group import ProcessGroupGloo


class SiteProcessGroup(ProcessGroupGloo):
    """torchft's reconfigurable Gloo group on a chosen interface.

    Left alone, Gloo listens on whatever the machine's own host name resolves to, which on many
    machines is loopback.

    Args:
        hostname: name or address under which other sites reach this machine.
        timeout: how long a collective may take.
    """

    def __init__(self, hostname: str, timeout: timedelta) -> None:
        super().__init__(timeout=timeout)
        self._hostname = hostname

    def _create_pg(self, store: dist.Store, rank: int, world_size: int) -> dist.ProcessGroup:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._hostname)]
        options._timeout = self._timeout
        options._threads = 2
        backend = dist.ProcessGroupGloo(store, rank, world_size, options)
        group = dist.ProcessGroup(store, rank, world_size)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        kinds = ["cpu"] + ([torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else [])
        for kind in kinds:
            group._register_backend(torch.device(kind), dist.ProcessGroup.BackendType.GLOO, backend)
        return group
