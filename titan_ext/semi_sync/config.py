"""Settings of the outer loop: the ``[semi_sync]`` section. ``plan.resolve`` checks them and makes a plan of them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from titan_ext.semi_sync.plan.scopes import ScopeConfig


@dataclass(kw_only=True)
class SemiSyncConfig:
    """What a method exchanges between sites, how often, and how it is applied.

    Fields left at None take the method's own default (see the method's file).
    """

    method: str = "diloco"
    """The outer loop's method, or the dotted path of one of your own; "none" trains without an outer loop."""

    sync_every: int | None = None
    """Inner steps between two syncs of the same parameters (K, H)."""

    sync_point: Literal["after_step", "before_step"] = "after_step"
    """Sync after the inner step, or, as algorithm 1 of DES-LOC (arXiv 2505.22549) prints it, between a step's gradient
    and the step."""

    num_fragments: int = 1
    """Parts of the model that sync in turn, ``sync_every / num_fragments`` steps apart."""

    fragments: list[list[str]] | None = None
    """Module names of each fragment; by default layers are assigned evenly by size, in Decoupled DiLoCo the embeddings and
    the head to a fragment by themselves."""

    fragment_sync_delay: int = 0
    """Inner steps that overlap an exchange before its result is applied (tau)."""

    fragment_update_alpha: float = 0.0
    """Share of the local parameters kept when a result is applied (alpha); 0 takes the global ones."""

    outer_optimizer: str | None = None
    """"average", "sgd", "delayed_nesterov", "adam", "yogi", "adagrad", or the dotted path of one of your own."""

    outer_lr: float | None = None
    """Learning rate of the outer optimizer; by default 0.01 for an adaptive one, and the method's own for "sgd" (0.7 in
    DiLoCo, 1 in DES-LOC)."""

    outer_momentum: float | None = None
    """Momentum of the outer SGD; 0.9 by default (MuLoCo: 0.6)."""

    nesterov: bool | None = None
    """Nesterov momentum in the outer SGD, the default."""

    outer_betas: tuple[float, float] | None = None
    """Decay rates of an adaptive outer optimizer (arXiv 2003.00295); 0.9 and 0.99 by default."""

    outer_eps: float | None = None
    """Adaptivity floor of an adaptive outer optimizer (arXiv 2003.00295); 0.001 by default."""

    outer_reading: Literal["paper", "torch"] | None = None
    """Outer "adam" and "adagrad" as arXiv 2003.00295 prints them ("paper", the default: algorithm 2, no bias correction,
    a second moment that begins at the square of ``outer_eps``, and momentum in both), or as torch has them ("adam" from
    zero and bias-corrected, as in Photon's server; "adagrad" from zero without momentum)."""

    weighting: str | None = None
    """A site's weight in a round's mean: equal ("uniform", the default where all take the same steps), fixed by
    ``[[site]] weight`` ("site"), its tokens since the last commit of what travels ("tokens", the default with another
    ``round_box``), those times its tokens a step ("tokens_times_batch"), by the loss of the received model on its own
    held-out text ("q_fair", "agnostic", "tilted"), or the dotted path of a policy of your own."""

    round_box: Literal["steps", "speed", "seconds", "tokens"] = "steps"
    """What ends a site's part of a round: ``sync_every`` inner steps at all sites ("steps"); so many at the fastest and,
    at the others, as many as fit in the same time at their measured speed ("speed": DyLU, arXiv 2401.09135, by the time
    model of arXiv 2306.17453); as many as fit in ``round_box_size`` seconds; or as many as make ``round_box_size`` tokens.
    No site takes more than ``sync_every``. All count ``sync_every`` steps, by which the learning rate and the run go."""

    round_box_size: float | None = None
    """Seconds or tokens of a round, with ``round_box = "seconds"`` or ``"tokens"``."""

    round_box_grace: float = 0.1
    """Share by which a round's time may grow for steps that would otherwise just not fit, where that makes more tokens a
    second of all sites together. A site that has slowed down ends its part when this is over."""

    late_work: Literal["drop", "keep"] = "drop"
    """What becomes of the work of a site that rounds did not wait for, since ``replica.min_sites`` others were there and
    ``replica.join_timeout_seconds`` were over: dropped for the others' state ("drop"), or kept beside it and brought to the
    next round of the same part of the model ("keep": Decoupled DiLoCo, arXiv 2604.21428). A site whose work is in a round
    that it could not commit itself drops it all the same."""

    staleness_exponent: float = 0.5
    """With ``late_work = "keep"``: work that missed s commits of its part of the model weighs ``(1 + s) ** -staleness_exponent``
    times what it would (Async Local-SGD, arXiv 2401.09135); 0 takes no account of it."""

    overdue_result: Literal["wait", "train_on"] = "wait"
    """What a site does when the result of a round is to be applied (after ``fragment_sync_delay`` inner steps) and is not there
    yet: stand still until it is ("wait"), so that a run goes by steps alone, or take further inner steps and apply it when
    it comes ("train_on"), so that no inner step ever waits for another site. The latter needs ``late_work = "keep"``, a
    delay and pairing by rank."""

    quorum_grace: float = 0.0
    """Share of its slack for which a site holds a round back, so that slower sites come in time (Decoupled DiLoCo's adaptive
    grace, arXiv 2604.21428): slack is what the ``fragment_sync_delay`` inner steps leave after quorum and reduction, by moving
    averages of this site's own times. Within it no inner step waits, since the result would not be applied earlier. Beside it the
    lighthouse waits ``replica.join_timeout_seconds`` from the first site that asks. 0 asks at once."""

    outlier_threshold: float = 10.0
    """An update (pseudo-gradient) whose norm is above this many times the median of the sites' is an outlier, if at
    least three sites contribute; 0 lets everything pass."""

    outlier_action: Literal["clip", "drop"] = "clip"
    """What becomes of an outlier: shrunk to the threshold, or the site's whole contribution left out of the round."""

    aggregation: str = "mean"
    """How the sites' contributions become one: their weighted mean ("mean"), or, coordinate by coordinate, their
    "median" or their "trimmed_mean" (arXiv 1803.01498), or the dotted path of one of your own. All but the mean send
    each site's values to every other one."""

    codec: str = "fp32"
    """How values travel: "fp32", "bf16", "int8", "int4", "topk", or the dotted path of one of your own; all but fp32
    lose something and send differences instead of values."""

    error_feedback: bool | None = None
    """Add what the codec lost to the next contribution; by default where the codec asks for it ("int8", "int4",
    "topk"). Without it elements far below the largest of their block never arrive."""

    scopes: list[ScopeConfig] = field(default_factory=list)
    """Parameters with settings of their own, or that stay at their site: ``[[semi_sync.scopes]]`` tables."""

    topology: Literal["flat", "regions"] = "flat"
    """Who sends to whom in a round: every site to every other ("flat"), or the sites of a region to one of them, which
    speaks for it ("regions"): between regions travels what one site sends. Needs ``region`` at every site, and a mean."""

    region_sync_every: int | None = None
    """Inner steps between two averages of the parameters among the sites of one region, below ``sync_every`` (HierFAVG,
    arXiv 1905.06641). None: regions do not average by themselves."""

    region_average: Literal["parameters", "gradients"] = "parameters"
    """What those averages are of: of parameters, after a step; or of the gradients of each step, weighted by tokens, before
    they are clipped, which is data parallelism within a region and needs ``region_sync_every = 1`` and lighthouses of the
    regions (``replica.region_lighthouse``)."""

    sites_per_round: int | None = None
    """How many of the run's sites train in a round, sampled anew for each; the others wait. None: all."""

    sources_per_round: int | None = None
    """How many of all sites' data sources (``[[source]]`` tables; a site without any is one) train in a round, sampled
    anew for each; the others wait (Photon, arXiv 2411.02908). None: all."""

    sampling_seed: int = 0
    """Seed of those samplings."""

    source_optimizer: Literal["stateless", "stateful"] | None = None
    """Whether a source keeps the inner optimizer's states from its turn in one round to the next ("stateful"), or begins
    each without any; by default stateful where all sources train in each round, stateless where they are sampled or
    placed. States lie in host memory, one set for each source of the site."""

    source_clock: Literal["run", "source", "round"] = "run"
    """Inner steps by which a source's learning rate goes: the run's, which all share (Photon's server clock); those that
    the source itself has taken; or those since its turn began (Photon's ``reset_timestamp``)."""

    reset_source_data: bool = False
    """Let each turn of a source read its data from the beginning (Photon's ``reset_dataset_state``)."""

    source_placement: Literal["own", "pollen"] = "own"
    """Whether each site trains the sources that its settings name ("own"), or the sources are common to all sites, can be
    read at all, and are placed anew for each round by the sites' measured speed (Pollen, arXiv 2306.17453)."""

    reset_inner_optimizer: bool = False
    """Set the inner optimizer's states to zero after each round, as DEPT's authors do."""

    pairing: Literal["auto", "rank", "leader"] = "auto"
    """Who exchanges: rank r with rank r of the other sites, or one leader for all ranks of its site, so that
    sites may differ in GPUs and parallel layout. "auto" takes leaders if the sites' layouts differ."""

    bucket_mib: float = 32.0
    """Largest message handed to the wire at once, in MiB; equal at all sites, which pair their messages by it."""

    streams: int | Literal["auto"] = "auto"
    """TCP connections between each two sites (or, rank by rank, each two ranks), over which every message is spread: one
    connection fills a long link only slowly, and loses speed with every lost packet. "auto" measures the distance when
    sites meet: of two sites 2 up to 16 ms, 10 at 80 ms, at most 16; of more sites fewer to each. Where two ask for different
    numbers the larger counts."""

    max_rate: str | None = None
    """What this site sends to the others at most, all its ranks together, such as "400mbit": in rounds, and as shared state
    to a site that joins. None: as much as the link takes. What sites tell each other about a round does not wait for it."""

    outer_state_device: Literal["same", "cpu"] = "same"
    """Where the fp32 copy of the global parameters and the outer optimizer's state live: with the parameters, or in
    host memory."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings that belong to one method, codec, aggregation or outer optimizer, by its name: the ``[semi_sync.NAME]``
    tables of a file."""
