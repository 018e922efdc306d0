"""Settings of a site's membership: the ``[replica]`` section."""

from dataclasses import dataclass

from titan_ext.errors import require

_TLS_KEYS = ("tls_certificate", "tls_key", "tls_authority")
_SECONDS = (
    "quorum_timeout_seconds",
    "timeout_seconds",
    "connect_timeout_seconds",
    "heartbeat_interval_seconds",
    "heartbeat_timeout_seconds",
    "join_timeout_seconds",
    "expected_timeout_seconds",
    "admission_timeout_seconds",
)


@dataclass(kw_only=True)
class ReplicaConfig:
    """How a site finds the others and how long it waits for them."""

    lighthouse: str | None = None
    """Address of the torchft lighthouse, ``host:port`` or ``http://host:port``; unset: that in TORCHFT_LIGHTHOUSE."""

    region_lighthouse: str | None = None
    """Address of a lighthouse of the site's region alone, at which its sites meet for the averages of
    ``semi_sync.region_sync_every``: then no message of theirs leaves the region, and they wait for no other. It belongs into
    the ``[[region]]`` table, at all regions of a run or at none; ``titan-ext launch`` starts one for each region where it starts
    all sites. Unset: these averages are rounds of the quorum of all sites."""

    min_sites: int = 1
    """Sites that a round needs; fewer wait instead of committing alone. A site that has just joined counts, although it
    has nothing to contribute yet: waiting until it has would delay the others by a round."""

    expected_sites: int = 0
    """Sites that a run waits for when it begins, or begins again after all have stopped; 0: no more than ``min_sites``.
    ``titan-ext launch`` sets it to the number of sites that it starts."""

    expected_timeout_seconds: float = 120.0
    """How long a run waits for ``expected_sites``; then ``min_sites`` are enough."""

    allow_rollback: bool = False
    """Go on from a checkpoint older than the run's last commit although a site that took part in that commit is
    missing; without it a site waits for the others."""

    heal_from_checkpoints: bool = False
    """A site without a checkpoint of its own begins with the shared state of the newest one that another site has beside
    its place: on the object store of ``checkpoint.folder``, or on a disk that both see. It is for sites that come back on
    an empty disk while no other is alive: without it such a site begins a run anew, which those that return later refuse.
    Whoever is alive and further on is joined all the same. Its inner optimizer and its place in the data start fresh."""

    prefetch_state: bool = True
    """A site that starts while others train, or was away for a while, fetches a snapshot of their shared state before
    it asks for a quorum, so that they need not wait for the transfer. The member that it fetches from keeps the
    snapshot in host memory until its next round."""

    hostname: str | None = None
    """Name or address under which the other sites reach this one; unset: that of the interface towards the lighthouse.
    It must be one of this machine's own, since a site listens on the address that it tells the others: behind a NAT that
    translates addresses sites need a VPN, and give the address inside it."""

    interface: str | None = None
    """Instead of ``hostname``: the network interface, such as ``eth1`` or ``wg0``, at whose address the others reach
    this site."""

    secret_file: str | None = None
    """File of at least 16 bytes, readable by its owner alone, the same at all sites and on every machine of a site.
    Only sites that prove to hold it take part in a round and receive shared state; unset: all that reach the
    lighthouse."""

    admission_timeout_seconds: float = 15.0
    """How long the sites of a new quorum wait for proofs of the secret; those that have given none are left out."""

    manager_port: int = 0
    """Port of this site's manager server; 0 takes a free one."""

    state_port: int = 0
    """Port from which rank 0 serves shared state to joining sites, rank r this plus r; 0 takes free ones."""

    quorum_timeout_seconds: float = 3600.0
    """How long a site waits for the others at a sync: longer than their inner steps between two rounds."""

    timeout_seconds: float = 600.0
    """How long one bucket's reduction, a vote or the transfer of state may take."""

    connect_timeout_seconds: float = 60.0
    """How long connecting to the lighthouse or a peer may take."""

    heartbeat_interval_seconds: float = 0.5
    """Time between two heartbeats of a site to the lighthouse."""

    lighthouse_retries: int = 3
    """Further attempts to reach the lighthouse at the start, ``connect_timeout_seconds`` each."""

    heartbeat_timeout_seconds: float = 5.0
    """Time without a heartbeat after which a site counts as dead. The launcher starts its lighthouse with it; the sites
    train on for so long before they repeat a round that failed."""

    join_timeout_seconds: float = 600.0
    """How long the launcher's lighthouse waits in a quorum for a site that sends heartbeats but is late."""

    tls_certificate: str | None = None
    """PEM file of this site's certificate, issued for its hostname, with which it serves and fetches shared state.
    Unset, as must be ``tls_key`` and ``tls_authority`` then: plain HTTP."""

    tls_key: str | None = None
    """PEM file of the private key of ``tls_certificate``, without a passphrase."""

    tls_authority: str | None = None
    """PEM file of the authority that signs the certificates of all sites; others are refused."""

    def validate(self) -> None:
        """Raises ValueError naming the key, its value and what is allowed."""
        require(self.min_sites >= 1, "min_sites", self.min_sites, "at least 1")
        require(self.expected_sites >= 0, "expected_sites", self.expected_sites, "at least 0")
        require(self.lighthouse_retries >= 0, "lighthouse_retries", self.lighthouse_retries, "at least 0")
        for key in ("manager_port", "state_port"):
            require(0 <= getattr(self, key) < 65536, key, getattr(self, key), "0 or a port below 65536")
        one_name = self.hostname is None or self.interface is None
        require(one_name, "interface", self.interface, f'unset where hostname ("{self.hostname}") is set')
        for key in _SECONDS:
            require(getattr(self, key) > 0, key, getattr(self, key), "above 0 seconds")
        self._validate_tls()
        require(
            self.heartbeat_interval_seconds < self.heartbeat_timeout_seconds,
            "heartbeat_interval_seconds",
            self.heartbeat_interval_seconds,
            f"below heartbeat_timeout_seconds ({self.heartbeat_timeout_seconds}), or every site counts as dead",
        )

    def _validate_tls(self) -> None:
        given = [key for key in _TLS_KEYS if getattr(self, key) is not None]
        for key in _TLS_KEYS:
            value = getattr(self, key)
            require(not given or value is not None, key, value, f"set with {' and '.join(given)}, or none of them")
