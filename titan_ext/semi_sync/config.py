"""Settings of the outer loop: the ``[semi_sync]`` section."""

from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from titan_ext.semi_sync.methods import build_plan, method_defaults, method_fixed, method_names
from titan_ext.semi_sync.plan.plan import SyncPlan
from titan_ext.semi_sync.plan.sampling import check_rounds
from titan_ext.semi_sync.plan.scopes import ScopeConfig, check_scopes, rows_of_scopes
from titan_ext.semi_sync.state.outer_optimizers import OuterSettings, outer_optimizer_names
from titan_ext.semi_sync.wire.aggregations import RobustReduction
from titan_ext.semi_sync.wire.codecs import CODECS, Codec, build_codec
from titan_ext.semi_sync.wire.reductions import AllReduce, CodedReduction, Reduction


@dataclass(kw_only=True)
class SemiSyncConfig:
    """What a method exchanges between sites, how often, and how it is applied.

    Fields left at None take the method's own default (see the method's file).
    """

    method: str = "diloco"
    """The outer loop's method; "none" trains without one."""

    sync_every: int | None = None
    """Inner steps between two syncs of the same parameters (K, H)."""

    first_moment_sync_every: int | None = None
    """DES-LOC's K_u: inner steps between two averages of the first moment; by default 3 times sync_every."""

    second_moment_sync_every: int | None = None
    """DES-LOC's and MT-DAO's K_v: inner steps between two averages of the second moment; by default 6 times
    sync_every in the one, sync_every in the other."""

    half_life_periods: bool | None = None
    """DES-LOC: average each moment about once in its half-life (from the inner optimizer's betas) instead of
    every 3 and 6 times sync_every."""

    momentum_sync_every: list[int] | None = None
    """MT-DAO: inner steps between two averages of each momentum, in the order of the optimizer's betas; one
    momentum, averaged with the parameters, by default."""

    order: Literal["after_step", "paper"] = "after_step"
    """Sync after the inner step, or, as algorithm 1 of DES-LOC prints it, between a step's gradient and the step."""

    sparta_share: float | None = None
    """SPARTA: share of the parameters averaged after each inner step; 0.005 by default."""

    gossip_gamma: float | None = None
    """NoLoCo: how strongly the slow weights of a pair pull at each other; 0.7 by default."""

    demo_chunk: int | None = None
    """DeMo: largest side of a tile, 64 by default."""

    demo_kept: int | None = None
    """DeMo: coefficients of a tile that travel, 32 by default."""

    num_fragments: int = 1
    """Parts of the model that sync in turn, ``sync_every / num_fragments`` steps apart."""

    fragments: list[list[str]] | None = None
    """Module names of each fragment; by default layers are dealt evenly by size."""

    fragment_sync_delay: int = 0
    """Inner steps that overlap an exchange before its result is applied (tau)."""

    fragment_update_alpha: float = 0.0
    """Share of the local parameters kept when a result is applied (alpha); 0 takes the global ones."""

    outer_optimizer: str | None = None
    """"average", "sgd", "adam", "yogi", "adagrad", or a registered name."""

    outer_lr: float | None = None
    """Learning rate of the outer optimizer."""

    outer_momentum: float | None = None
    """Momentum of the outer SGD."""

    nesterov: bool | None = None
    """Nesterov momentum in the outer SGD."""

    outer_betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of an adaptive outer optimizer (arXiv 2003.00295)."""

    outer_eps: float = 1e-3
    """Adaptivity floor of an adaptive outer optimizer (arXiv 2003.00295)."""

    weighting: Literal["uniform", "site", "tokens"] = "uniform"
    """A site's weight in a round's mean: equal, fixed by ``[[site]] weight``, or its tokens since the last commit."""

    outlier_threshold: float = 10.0
    """An update (pseudo-gradient) whose norm is above this many times the median of the sites' is an outlier, if at
    least three sites contribute; 0 lets everything pass."""

    outlier_action: Literal["clip", "drop"] = "clip"
    """What becomes of an outlier: shrunk to the threshold, or the site's whole contribution left out of the round."""

    aggregation: Literal["mean", "median", "trimmed_mean"] = "mean"
    """How the sites' contributions become one: their weighted mean, or, coordinate by coordinate, their median or
    the mean without the ``trimmed_sites`` largest and smallest (arXiv 1803.01498). The last two send each
    site's values to every other one."""

    trimmed_sites: int = 1
    """Contributions that "trimmed_mean" cuts off at either end."""

    codec: Literal["fp32", "bf16", "int8", "int4", "topk"] = "fp32"
    """How values travel; all but fp32 lose something and send differences instead of values."""

    topk_density: float = 0.01
    """Share of the elements that "topk" sends."""

    error_feedback: bool | None = None
    """Add what the codec lost to the next contribution; by default for "int4" and "topk"."""

    scopes: list[ScopeConfig] = field(default_factory=list)
    """Parameters with settings of their own, or that stay at their site: ``[[semi_sync.scopes]]`` tables."""

    sites_per_round: int | None = None
    """How many of the run's sites train in a round, drawn anew for each; the others wait. None: all."""

    sampling_seed: int = 0
    """Seed of that draw."""

    reset_inner_optimizer: bool = False
    """Set the inner optimizer's states to zero after each round, as DEPT's authors do."""

    pairing: Literal["auto", "rank", "leader"] = "auto"
    """Who exchanges: rank r with rank r of the other sites, or one leader for all ranks of its site, so that
    sites may differ in GPUs and parallel layout. "auto" takes leaders if the sites' layouts differ."""

    bucket_mib: float = 32.0
    """Largest message handed to the wire at once, in MiB."""

    global_device: Literal["same", "cpu"] = "same"
    """Where the fp32 copy of the global parameters lives: with the parameters, or in host memory."""

    def resolved(self) -> "SemiSyncConfig":
        """A copy with the method's defaults filled in and every value checked.

        Raises:
            ValueError: naming the key, its value and what is allowed.
        """
        if self.method not in method_names():
            raise ValueError(_unknown("method", self.method, method_names()))
        if self.method == "none":
            return replace(self)
        self._check_belongs()
        filled = {"outer_lr": 1.0, "outer_momentum": 0.0, "nesterov": False} | method_defaults(self.method)
        unset = {each.name for each in fields(self) if getattr(self, each.name) is None}
        result = replace(self, **{key: value for key, value in filled.items() if key in unset})
        if self.error_feedback is None:
            result.error_feedback = self.codec in ("int4", "topk")
        if self.fragments is not None:
            result.num_fragments = len(self.fragments)
        result._check()
        return result

    def validate(self) -> None:
        """Raises ValueError naming the key, its value and what is allowed."""
        self.resolved()

    def plan(self) -> SyncPlan:
        """The method's sync plan."""
        config = self.resolved()
        return SyncPlan((*build_plan(config).rows, *rows_of_scopes(config)))

    def outer_settings(self) -> OuterSettings:
        """Hyper-parameters of the outer optimizer; call it on a resolved configuration."""
        return OuterSettings(
            lr=self.outer_lr,
            momentum=self.outer_momentum,
            nesterov=self.nesterov,
            betas=tuple(self.outer_betas),
            eps=self.outer_eps,
        )

    def build_reduction(self) -> Reduction:
        """How a row is summed that has no way of its own."""
        codec, elements = self.build_codec(), max(1, int(self.bucket_mib * 2**18))
        if self.aggregation != "mean":
            return RobustReduction(codec, elements, self.trimmed_sites if self.aggregation == "trimmed_mean" else None)
        return AllReduce(elements) if codec is None else CodedReduction(codec, elements)

    def build_codec(self) -> Codec | None:
        """The codec; None is fp32."""
        return build_codec(self.codec, self.topk_density)

    def build(self, *, model_parts, optimizers, manager, **options: Any):
        """Build the outer loop; see ``SemiSync`` for the arguments."""
        from titan_ext.semi_sync.engine import SemiSync

        return SemiSync(self, model_parts=model_parts, optimizers=optimizers, manager=manager, **options)

    def _check_belongs(self) -> None:
        """Settings of one method are refused with another, which would ignore them."""
        for key in _OF_ONE_METHOD:
            value = getattr(self, key)
            owners = [name for name in method_names() if name != "none" and key in method_defaults(name)]
            _require(
                value is None or self.method in owners,
                key,
                value,
                f'left out unless method = "{", ".join(owners)}"',
            )

    def _check(self) -> None:
        self._check_periods()
        self._check_own()
        self._check_fragments()
        self._check_outer()
        self._check_guard()
        self._check_aggregation()
        self._check_wire()
        check_scopes(self)
        check_rounds(self)

    def _check_periods(self) -> None:
        _require(self.sync_every >= 1, "sync_every", self.sync_every, "at least 1")
        for key in ("first_moment_sync_every", "second_moment_sync_every"):
            period = getattr(self, key)
            _require(period is None or period >= 1, key, period, "at least 1")
        momenta = self.momentum_sync_every
        _require(
            momenta is None or (len(momenta) > 0 and all(each >= 1 for each in momenta)),
            "momentum_sync_every",
            momenta,
            "a list of periods, each at least 1",
        )
        _require(
            not self.half_life_periods or (self.first_moment_sync_every is None and self.second_moment_sync_every is None),
            "half_life_periods",
            self.half_life_periods,
            "false where first_moment_sync_every or second_moment_sync_every is given",
        )
        if self.order not in ("after_step", "paper"):
            raise ValueError(_unknown("order", self.order, ["after_step", "paper"]))

    def _check_own(self) -> None:
        """What belongs to one method alone, and what a method does not let the user choose."""
        share, gamma = self.sparta_share, self.gossip_gamma
        _require(share is None or 0 < share <= 1, "sparta_share", share, "above 0 and at most 1")
        _require(gamma is None or gamma >= 0, "gossip_gamma", gamma, "at least 0")
        _require(self.demo_chunk is None or 1 <= self.demo_chunk <= 64, "demo_chunk", self.demo_chunk, "from 1 to 64")
        _require(self.demo_kept is None or self.demo_kept >= 1, "demo_kept", self.demo_kept, "at least 1")
        for key, value in method_fixed(self.method).items():
            _require(getattr(self, key) == value, key, getattr(self, key), f'{value!r} with method = "{self.method}"')

    def _check_fragments(self) -> None:
        _require(self.num_fragments >= 1, "num_fragments", self.num_fragments, "at least 1")
        _require(
            self.sync_every % self.num_fragments == 0,
            "num_fragments",
            self.num_fragments,
            f"a divisor of sync_every ({self.sync_every}), so that fragments sync at even distances",
        )
        spacing = self.sync_every // self.num_fragments
        _require(
            0 <= self.fragment_sync_delay < spacing,
            "fragment_sync_delay",
            self.fragment_sync_delay,
            f"from 0 to {spacing - 1} (below sync_every / num_fragments = {spacing})",
        )
        _require(0 <= self.fragment_update_alpha <= 1, "fragment_update_alpha", self.fragment_update_alpha, "0 to 1")

    def _check_outer(self) -> None:
        if self.outer_optimizer not in outer_optimizer_names():
            raise ValueError(_unknown("outer_optimizer", self.outer_optimizer, outer_optimizer_names()))
        _require(self.outer_lr >= 0, "outer_lr", self.outer_lr, "at least 0")
        _require(0 <= self.outer_momentum < 1, "outer_momentum", self.outer_momentum, "from 0 to below 1")
        _require(
            all(0 <= beta < 1 for beta in self.outer_betas), "outer_betas", self.outer_betas, "two numbers in [0, 1)"
        )
        _require(self.outer_eps > 0, "outer_eps", self.outer_eps, "above 0")

    def _check_guard(self) -> None:
        _require(
            self.outlier_threshold == 0 or self.outlier_threshold > 1,
            "outlier_threshold",
            self.outlier_threshold,
            "above 1, or 0 to let everything pass",
        )
        if self.outlier_action not in ("clip", "drop"):
            raise ValueError(_unknown("outlier_action", self.outlier_action, ["clip", "drop"]))

    def _check_wire(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(_unknown("codec", self.codec, list(CODECS)))
        _require(0 < self.topk_density <= 1, "topk_density", self.topk_density, "above 0 and at most 1")
        _require(
            not (self.error_feedback and self.codec == "fp32"),
            "error_feedback",
            self.error_feedback,
            "false with codec \"fp32\", which loses nothing",
        )
        if self.pairing not in ("auto", "rank", "leader"):
            raise ValueError(_unknown("pairing", self.pairing, ["auto", "rank", "leader"]))
        _require(self.bucket_mib > 0, "bucket_mib", self.bucket_mib, "above 0")

    def _check_aggregation(self) -> None:
        if self.aggregation not in ("mean", "median", "trimmed_mean"):
            raise ValueError(_unknown("aggregation", self.aggregation, ["mean", "median", "trimmed_mean"]))
        _require(self.trimmed_sites >= 1, "trimmed_sites", self.trimmed_sites, "at least 1")
        robust = self.aggregation != "mean"
        _require(
            not robust or self.weighting == "uniform",
            "aggregation",
            self.aggregation,
            f'"mean" with weighting = "{self.weighting}"',
        )
        _require(
            not robust or self.codec != "topk", "aggregation", self.aggregation, 'other than with codec = "topk": "mean"'
        )


_OF_ONE_METHOD = (
    "first_moment_sync_every",
    "second_moment_sync_every",
    "half_life_periods",
    "momentum_sync_every",
    "sparta_share",
    "gossip_gamma",
    "demo_chunk",
    "demo_kept",
)


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{key} = {value!r}: must be {allowed}")


def _unknown(key: str, value: object, allowed: list[str]) -> str:
    close = get_close_matches(str(value), allowed, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{key} = {value!r}: must be one of {', '.join(allowed)}{hint}"
