"""A rank's membership in the run: torchft's manager with a site's addresses, patience and words."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torchft.manager import Manager

from titan_ext.errors import RunError
from titan_ext.replica.address import is_listening, lighthouse_url, reachable_address
from titan_ext.replica.config import ReplicaConfig
from titan_ext.replica.process_group import SiteProcessGroup
from titan_ext.replica.tls import load_tls
from titan_ext.replica.transport import StateTransport

logger = logging.getLogger(__name__)

_REMINDER_SECONDS = 30.0


class Replica(Manager):
    """torchft's manager for one rank of a site.

    Every rank of the site builds it at the same time, under torchrun.

    Args:
        config: the ``[replica]`` section.
        site: the site's name.
        rank: this rank within the site.
        world_size: ranks of the site.

    Raises:
        UserError: no lighthouse is named, its name does not resolve, or the TLS files are not what they should be.
        RunError: the lighthouse cannot be reached.
    """

    Config = ReplicaConfig

    def __init__(self, config: ReplicaConfig, *, site: str, rank: int, world_size: int) -> None:
        config.validate()
        self._config = config
        self.lighthouse = lighthouse_url(config.lighthouse)
        hostname = config.hostname or reachable_address(self.lighthouse)
        timeout = timedelta(seconds=config.timeout_seconds)
        tls = None
        if config.tls_certificate is not None:
            tls = load_tls(config.tls_certificate, config.tls_key, config.tls_authority)
        if rank == 0:
            self._find_lighthouse()
        try:
            super().__init__(
                pg=SiteProcessGroup(hostname, timeout),
                load_state_dict=None,
                state_dict=None,
                min_replica_size=config.min_sites,
                use_async_quorum=False,
                timeout=timeout,
                quorum_timeout=timedelta(seconds=config.quorum_timeout_seconds),
                connect_timeout=timedelta(seconds=config.connect_timeout_seconds),
                rank=rank,
                world_size=world_size,
                # The other sites rendezvous at this site's store, so it is named as they know it.
                store_addr=hostname if rank == 0 else os.environ["MASTER_ADDR"],
                store_port=int(os.environ["MASTER_PORT"]),
                lighthouse_addr=self.lighthouse,
                replica_id=site,
                port=config.manager_port,
                hostname=hostname,
                heartbeat_interval=timedelta(seconds=config.heartbeat_interval_seconds),
                checkpoint_transport=StateTransport(
                    hostname, config.state_port and config.state_port + rank, timeout, tls=tls
                ),
            )
        except RuntimeError as error:
            raise RunError(f"cannot join through the lighthouse at {self.lighthouse}: {error}") from error

    def start_quorum(self, **options: Any) -> None:
        """Wait for the other sites and agree on who takes part.

        Raises:
            RunError: no quorum came about within ``quorum_timeout_seconds``.
        """
        try:
            with self._reminding():
                super().start_quorum(**options)
        except (TimeoutError, RuntimeError) as error:
            # torchft would raise the old failure again at the next quorum.
            self._quorum_future = None
            raise RunError(
                f"no quorum within replica.quorum_timeout_seconds = {self._config.quorum_timeout_seconds:g} "
                f"at {self.lighthouse} ({self._waiting_for()}): {error}"
            ) from error

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

    def _waiting_for(self) -> str:
        if not is_listening(self.lighthouse):
            return "the lighthouse does not answer"
        return f"waiting for {self._config.min_sites} site(s) at least, and for those alive but busy"

    @contextmanager
    def _reminding(self) -> Iterator[None]:
        """Say now and then why nothing happens while the quorum is awaited."""
        done = threading.Event()

        def remind() -> None:
            started = time.monotonic()
            while not done.wait(_REMINDER_SECONDS):
                logger.info("%.0f s in the quorum: %s", time.monotonic() - started, self._waiting_for())

        if self._group_rank == 0:
            threading.Thread(target=remind, daemon=True, name="titan_ext-reminder").start()
        try:
            yield
        finally:
            done.set()
