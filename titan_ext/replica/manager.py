"""A rank's membership in the run: torchft's manager with a site's addresses, admission and transport of state."""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

from titan_ext.errors import RunError, UserError
from titan_ext.memory import release_free_memory
from titan_ext.replica.address import (
    check_port,
    interface_address,
    is_listening,
    lighthouse_url,
    own_address,
    reachable_address,
)
from titan_ext.replica.config import ReplicaConfig
from titan_ext.replica.membership.admission import Admission
from titan_ext.replica.membership.quorum import AdmittedQuorumClient
from titan_ext.replica.membership.shared_secret import Secret, load_secret
from titan_ext.replica.membership.standing_quorum import SitesOfLastQuorum
from titan_ext.replica.state_transfer.prefetch_state import prefetch_state
from titan_ext.replica.state_transfer.tls import load_tls
from titan_ext.replica.state_transfer.transport import StateTransport
from titan_ext.replica.streams.group import StreamGroup
from titan_ext.replica.streams.pace import Pace
from titan_ext.replica.torchft_internals import OpenManager, QuorumClient
from titan_ext.semi_sync.wire.manager import SentBytes

logger = logging.getLogger(__name__)

# Between attempts to reach a lighthouse that has gone.
_RETRY_SECONDS = 1.0


class Replica(OpenManager):
    """torchft's manager for one rank of a site.

    Every rank of the site builds it at the same time, under torchrun.

    Args:
        config: the ``[replica]`` section.
        site: the site's name.
        region: path of its region, if it has one; whoever is behind takes the state from the nearest.
        nearest: names of the sites near to this one, the nearest first.
        rank: this rank within the site.
        world_size: ranks of the site.
        streams: connections to this rank's like at each other site; 0: by their distance.
        max_rate: bytes a second that this rank sends to the others, in rounds and as shared state; 0: no limit.
        store_port: of the store that its ranks share, at torchrun's address; None: torchrun's own. Two replicas of a rank
            must not share one.

    Raises:
        UserError: no lighthouse is named or its name does not resolve; the address is not this machine's or a port is
            taken; a file of TLS or the secret's is invalid.
        RunError: the lighthouse cannot be reached.
    """

    Config = ReplicaConfig

    def __init__(
        self,
        config: ReplicaConfig,
        *,
        site: str,
        region: str = "",
        nearest: Sequence[str] = (),
        rank: int,
        world_size: int,
        streams: int = 0,
        max_rate: float = 0.0,
        store_port: int | None = None,
    ) -> None:
        config.validate()
        self._config, self._region = config, region
        self._site_rank, self._site_ranks = rank, world_size
        self._last_group: int | None = None
        self.lighthouse = lighthouse_url(config.lighthouse)
        hostname = advertised_address(config, self.lighthouse)
        _check_ports(config, rank, world_size)
        secret = load_secret(config.secret_file)
        # The other sites connect to this site's store, so rank 0 gives the address under which they reach it.
        store_host = hostname if rank == 0 else os.environ["MASTER_ADDR"]
        store_port = int(os.environ["MASTER_PORT"]) if store_port is None else store_port
        pace = Pace(max_rate)
        self._streams = StreamGroup(hostname, timedelta(seconds=config.timeout_seconds), streams=streams, pace=pace)
        self._transport = _transport(config, hostname, rank, secret, pace)
        if rank == 0:
            self._find_lighthouse()
        prefetch = None
        if config.prefetch_state:
            prefetch = partial(
                prefetch_state, self.lighthouse, site=site, rank=rank, fetch=self._transport.prefetch, nearest=nearest
            )
            # Before the manager sends its first heartbeat: from then on the others' rounds wait for this site.
            prefetch()
        try:
            super().__init__(
                pg=self._streams,
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
                checkpoint_transport=self._transport,
                # torchft's server asks the lighthouse again for all ranks; it spreads this number over the timeout.
                quorum_retries=math.ceil(config.quorum_timeout_seconds / _RETRY_SECONDS),
            )
        except RuntimeError as error:
            raise RunError(f"cannot join through the lighthouse at {self.lighthouse}: {error}") from error
        self._quorums = self.wrap_quorum_client(
            partial(self._with_admission, f"{store_host}:{store_port}", secret, prefetch)
        )

    @property
    def bytes_sent(self) -> SentBytes:
        """As ``semi_sync.wire.manager.ReplicaManager`` asks. Calls of the lighthouse and of stores are not in it."""
        group = self._streams
        return SentBytes(
            frames=group.bytes_sent, control=group.control_bytes_sent, healing=self._transport.frame_bytes_sent
        )

    def standing_quorum(self) -> SitesOfLastQuorum | None:
        """As ``semi_sync.wire.manager.ReplicaManager`` asks; call it before ``start_quorum``."""
        connections, quorum = self._streams.connections, self.quorum_id
        if self._quorums.last_vote_failed or connections is None or self.num_participants() == 1:
            return None
        return SitesOfLastQuorum(
            connections,
            self.num_participants(),
            self.participating_rank(),
            start_quorum=self.start_quorum,
            stands=lambda: self.quorum_id == quorum,
        )

    def start_quorum(self, **options: Any) -> None:
        """Wait for the other sites and agree on who takes part.

        If the sites of the quorum could not authenticate each other, the next vote is a no.

        Raises:
            RunError: no quorum of enough sites came about within ``quorum_timeout_seconds``.
            UserError: the sites that are running do not admit this one.
        """
        try:
            # From here to the quorum's end this rank answers no request for a snapshot: see ``StateOffers.in_quorum``.
            with self._transport.offers.in_quorum(), self._streams.in_quorum():
                super().start_quorum(**options)
        except UserError:
            self.forget_failed_quorum()
            raise
        except (TimeoutError, RuntimeError) as error:
            self.forget_failed_quorum()
            waiting = self._quorums.waiting_for() if is_listening(self.lighthouse) else "the lighthouse does not answer"
            raise RunError(
                f"no quorum within replica.quorum_timeout_seconds = {self._config.quorum_timeout_seconds:g} "
                f"at {self.lighthouse} ({waiting}): {error}"
            ) from error
        self._transport.drop_prefetched()
        if self._quorums.problem is not None:
            self.report_error(RuntimeError(self._quorums.problem))

    def should_commit(self, timeout: timedelta | None = None) -> bool:
        """The vote over the ranks of this site: true if every one of them was without error."""
        committed = super().should_commit(timeout)
        group, self._last_group = self._last_group, self.quorum_id
        if group != self._last_group:
            # Threads that came and went with the old group have left holes in their arenas.
            release_free_memory()
        return committed

    def serve_snapshot_requests(self, make: Callable[[], Any] | None = None) -> None:
        """Call between inner steps: makes a snapshot of the shared state if a joining site has asked for one.

        Args:
            make: the state; by default all that was registered.
        """
        self._transport.offers.serve_snapshot_requests(self.current_step(), make or self.registered_state)

    def _with_admission(
        self, store_address: str, secret: Secret | None, prefetch: Callable[..., Any] | None, client: QuorumClient
    ) -> AdmittedQuorumClient:
        admission = None
        if self._site_rank == 0:
            admission = Admission(
                self.site_store,
                store_address=store_address,
                manager_address=self.server_address(),
                secret=secret,
                min_sites=self._config.min_sites,
                seconds=self._config.admission_timeout_seconds,
                expected=(self._config.expected_sites, self._config.expected_timeout_seconds),
                region=self._region,
            )
        return AdmittedQuorumClient(
            client,
            ranks=self._site_ranks,
            store=self.site_store,
            admission=admission,
            min_sites=self._config.min_sites,
            abort_group=self.abort_group,
            lighthouse=self.lighthouse if self._site_rank == 0 else None,
            prefetch=prefetch,
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


def advertised_address(config: ReplicaConfig, lighthouse: str) -> str:
    """The name or address under which the other sites are to reach this one.

    Raises:
        UserError: it is not this machine's, or there is no way to the lighthouse.
    """
    if config.interface is not None:
        return interface_address(config.interface)
    return own_address(config.hostname) if config.hostname is not None else reachable_address(lighthouse)


def _check_ports(config: ReplicaConfig, rank: int, world_size: int) -> None:
    manager = f"replica.manager_port = {config.manager_port}"
    state = f"replica.state_port = {config.state_port}"
    if config.state_port and config.manager_port - config.state_port in range(world_size):
        raise UserError(f"{manager}: lies among the {world_size} ports of the ranks from {state} on")
    if rank == 0:
        check_port(manager, config.manager_port)
    if config.state_port:
        check_port(f"{state}, of rank {rank}", config.state_port + rank)


def _transport(config: ReplicaConfig, hostname: str, rank: int, secret: Secret | None, pace: Pace) -> StateTransport:
    tls = None
    if config.tls_certificate is not None:
        tls = load_tls(config.tls_certificate, config.tls_key, config.tls_authority)
    timeout = timedelta(seconds=config.timeout_seconds)
    port = config.state_port and config.state_port + rank
    return StateTransport(hostname, port, timeout, tls=tls, secret=secret, pace=pace)
