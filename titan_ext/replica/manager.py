"""A rank's membership in the run: torchft's manager with a site's addresses, patience and words."""

import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

from torch.distributed import ProcessGroup
from torchft.manager import Manager

from titan_ext.errors import RunError, UserError
from titan_ext.replica.address import (
    check_port,
    interface_address,
    is_listening,
    lighthouse_url,
    own_address,
    reachable_address,
)
from titan_ext.replica.config import ReplicaConfig
from titan_ext.replica.membership.admission import Doorkeeper
from titan_ext.replica.membership.quorum import AdmittedQuorums
from titan_ext.replica.membership.quorum_log import QuorumWatch
from titan_ext.replica.membership.shared_secret import Secret, load_secret
from titan_ext.replica.process_group import SiteProcessGroup
from titan_ext.replica.state_transfer.prefetch_state import fetch_ahead
from titan_ext.replica.state_transfer.tls import load_tls
from titan_ext.replica.state_transfer.transport import StateTransport
from titan_ext.trainer.memory import release_free_memory

logger = logging.getLogger(__name__)

# Between attempts to reach a lighthouse that has gone.
_RETRY_SECONDS = 1.0


class Replica(Manager):
    """torchft's manager for one rank of a site.

    Every rank of the site builds it at the same time, under torchrun.

    Args:
        config: the ``[replica]`` section.
        site: the site's name.
        rank: this rank within the site.
        world_size: ranks of the site.

    Raises:
        UserError: no lighthouse is named or its name does not resolve; the address is not this machine's or a port is
            taken; the files of TLS or of the secret are not what they should be.
        RunError: the lighthouse cannot be reached.
    """

    Config = ReplicaConfig

    def __init__(self, config: ReplicaConfig, *, site: str, rank: int, world_size: int) -> None:
        config.validate()
        self._config = config
        self._settled_group: int | None = None
        self.lighthouse = lighthouse_url(config.lighthouse)
        hostname = _advertised(config, self.lighthouse)
        _check_ports(config, rank, world_size)
        secret = load_secret(config.secret_file)
        # The other sites rendezvous at this site's store, so it is named as they know it.
        store_host, store_port = hostname if rank == 0 else os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        transport = _transport(config, hostname, rank, secret)
        if rank == 0:
            self._find_lighthouse()
        catch_up = None
        if config.prefetch_state:
            catch_up = partial(fetch_ahead, self.lighthouse, site=site, rank=rank, fetch=transport.fetch_ahead)
            # Before the lighthouse hears of this site: from then on the others' rounds wait for it.
            catch_up()
        try:
            super().__init__(
                pg=SiteProcessGroup(hostname, timedelta(seconds=config.timeout_seconds)),
                load_state_dict=None,
                state_dict=None,
                min_replica_size=config.min_sites,
                use_async_quorum=False,
                timeout=timedelta(seconds=config.timeout_seconds),
                quorum_timeout=timedelta(seconds=config.quorum_timeout_seconds),
                connect_timeout=timedelta(seconds=config.connect_timeout_seconds),
                rank=rank,
                world_size=world_size,
                store_addr=store_host,
                store_port=store_port,
                lighthouse_addr=self.lighthouse,
                replica_id=site,
                port=config.manager_port,
                hostname=hostname,
                heartbeat_interval=timedelta(seconds=config.heartbeat_interval_seconds),
                checkpoint_transport=transport,
                # torchft's server asks the lighthouse again for all ranks; it spreads this number over the timeout.
                quorum_retries=math.ceil(config.quorum_timeout_seconds / _RETRY_SECONDS),
            )
        except RuntimeError as error:
            raise RunError(f"cannot join through the lighthouse at {self.lighthouse}: {error}") from error
        self._client = self._quorums = self._admitted(f"{store_host}:{store_port}", secret, catch_up)

    def start_quorum(self, **options: Any) -> None:
        """Wait for the other sites and agree on who takes part.

        A quorum of sites that could not meet makes the next vote a no.

        Raises:
            RunError: no quorum of enough sites came about within ``quorum_timeout_seconds``.
            UserError: the sites that are running do not admit this one.
        """
        watch = QuorumWatch(self.lighthouse, self._quorums.waiting_for) if self._group_rank == 0 else nullcontext()
        try:
            with self._checkpoint_transport.in_quorum(), watch:
                super().start_quorum(**options)
        except UserError:
            self._quorum_future = None
            raise
        except (TimeoutError, RuntimeError) as error:
            # torchft would raise the old failure again at the next quorum.
            self._quorum_future = None
            waiting = self._quorums.waiting_for() if is_listening(self.lighthouse) else "the lighthouse does not answer"
            raise RunError(
                f"no quorum within replica.quorum_timeout_seconds = {self._config.quorum_timeout_seconds:g} "
                f"at {self.lighthouse} ({waiting}): {error}"
            ) from error
        self._checkpoint_transport.forget_ahead()
        if self._quorums.problem is not None:
            self.report_error(RuntimeError(self._quorums.problem))

    def should_commit(self, timeout: timedelta | None = None) -> bool:
        """The vote over the ranks of this site: true if every one of them was without error."""
        committed = super().should_commit(timeout)
        if self._quorum_id != self._settled_group:
            # Threads that came and went with the old group have left holes in their arenas.
            self._settled_group = self._quorum_id
            release_free_memory()
        return committed

    @property
    def process_group(self) -> ProcessGroup:
        """The group of this rank and those it is paired with at the other sites."""
        return self._pg

    def serve_snapshot_requests(self, make: Callable[[], Any] | None = None) -> None:
        """Call between inner steps: a site that is about to join may want a copy of the shared state.

        Args:
            make: the state; by default all that was registered.
        """
        self._checkpoint_transport.serve_snapshot_requests(self.current_step(), make or self._manager_state_dict)

    def _admitted(
        self, store_address: str, secret: Secret | None, catch_up: Callable[..., Any] | None
    ) -> AdmittedQuorums:
        doorkeeper = None
        if self._group_rank == 0:
            doorkeeper = Doorkeeper(
                self._store,
                store_address=store_address,
                manager_address=self._manager.address(),
                secret=secret,
                min_sites=self._config.min_sites,
                seconds=self._config.admission_timeout_seconds,
                expected=(self._config.expected_sites, self._config.expected_timeout_seconds),
            )
        return AdmittedQuorums(
            self._client,
            ranks=self._group_world_size,
            store=self._store,
            doorkeeper=doorkeeper,
            min_sites=self._config.min_sites,
            leave=lambda: self._pg.abort(errored=False),
            catch_up=catch_up,
        )

    def _find_lighthouse(self) -> None:
        for attempt in range(self._config.lighthouse_retries + 1):
            if is_listening(self.lighthouse, timeout=self._config.connect_timeout_seconds):
                return
            logger.warning(
                "no lighthouse answers at %s (attempt %d of %d)",
                self.lighthouse,
                attempt + 1,
                self._config.lighthouse_retries + 1,
            )
            if attempt < self._config.lighthouse_retries:
                time.sleep(min(2.0**attempt, self._config.connect_timeout_seconds))
        raise RunError(
            f"no lighthouse answers at {self.lighthouse} after {self._config.lighthouse_retries + 1} attempts "
            "(replica.lighthouse_retries): start one with `titan-ext lighthouse` or correct replica.lighthouse"
        )


def _advertised(config: ReplicaConfig, lighthouse: str) -> str:
    if config.interface is not None:
        return interface_address(config.interface)
    return own_address(config.hostname) if config.hostname is not None else reachable_address(lighthouse)


def _check_ports(config: ReplicaConfig, rank: int, world_size: int) -> None:
    manager = f"replica.manager_port = {config.manager_port}"
    state = f"replica.state_port = {config.state_port}"
    if rank == 0:
        check_port(manager, config.manager_port)
    if config.state_port:
        if config.manager_port - config.state_port in range(world_size):
            raise UserError(f"{manager}: lies among the {world_size} ports of the ranks from {state} on")
        check_port(f"{state}, of rank {rank}", config.state_port + rank)


def _transport(config: ReplicaConfig, hostname: str, rank: int, secret: Secret | None) -> StateTransport:
    tls = None
    if config.tls_certificate is not None:
        tls = load_tls(config.tls_certificate, config.tls_key, config.tls_authority)
    timeout = timedelta(seconds=config.timeout_seconds)
    port = config.state_port and config.state_port + rank
    return StateTransport(hostname, port, timeout, tls=tls, secret=secret)
