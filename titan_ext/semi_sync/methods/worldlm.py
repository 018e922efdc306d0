"""WorldLM (arXiv 2405.14446): federations of federations share a backbone and personalise key layers by attention.

What of the paper could be read says that the backbone is averaged along the tree, that key layers are aggregated by attention
over the constituents, and that constituents stay close to their federation without losing what is their own. **Its
equations of attention are not public; what follows is our reading**, and each choice of it is a setting. At a node q with
constituents c, for each key layer:

``a_c = softmax_c(cos(z(K_q), z(K_c)) / T)`` and ``K_q = (1 - s) K_q + s sum_c a_c K_c``, from the sites up, with z a random
projection; then, from the root down, ``K_c = (1 - l) K_c + l K_q`` at each constituent, the sites' own layers at last. T is
``temperature``, s ``attention_step``, l ``pull``. With ``attention = "fedatt"`` the softmax is that of FedAtt
(arXiv 1812.07108), over the distances ``|K_q - K_c|``. All other parameters, the backbone, go by the outer optimizer, as
in DiLoCo; without key layers the method is DiLoCo.

A layer of a site with ``a_c < routing_share / n`` among the n sites of its smallest federation is a residual: one round
later it is one constituent more of the federation whose layer it resembles most, if by more than ``routing_similarity``.

With ``clip`` and ``noise`` each site's edge of the tree has a Gaussian mechanism: sketches, sums and residuals are made of
noised values alone. Edges between federations have none of their own.

The tree is that of the sites' regions; ``topology = "regions"`` sends all but the federations' own sums along it. Since
each site applies the pull from the root down, the root's layers reach it in the same round. A late site begins with the
layers of its federation, one that comes back keeps its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from titan_ext.errors import InvalidValue, require, require_one_of
from titan_ext.semi_sync.methods.local_sgd import local_sgd
from titan_ext.semi_sync.methods.registry import MethodContext, register_method
from titan_ext.semi_sync.plan.plan import ScopePatterns
from titan_ext.semi_sync.plan.regions import MOST_LEVELS, REGION
from titan_ext.semi_sync.plan.rule import SyncRule
from titan_ext.semi_sync.state.key_layers import SCORES, KeyAttention
from titan_ext.semi_sync.state.privacy import Noise, NoisedStep
from titan_ext.semi_sync.state.routed_keys import KeyRouting

KEYS = "worldlm.keys"
"""The method's scope: key layers."""

_TEMPERATURES = {"cosine": 0.1, "fedatt": 1.0}


@dataclass(frozen=True, kw_only=True)
class WorldLMSettings:
    """``[semi_sync.worldlm]``.

    Raises:
        InvalidValue: one is outside its range.
    """

    key_blocks: float = 0.3
    """Share of the model's blocks, from the last one on, that are key layers: 0 to below 1. 30% in the paper's reviews."""

    keys: list[str] = field(default_factory=lambda: ["lm_head.*"])
    """Patterns of parameters that are key layers as well. With none, and without blocks, the method is DiLoCo."""

    federations: int = 1
    """Levels of federations between the sites and the root, 0 to 3: those of the sites' regions, `"eu"` and then `"eu/de"`.
    A site whose region has fewer names is, at the deeper levels, in a federation of that region's name."""

    attention: Literal["cosine", "fedatt"] = "cosine"
    """What the softmax over a node's constituents takes: how similar their layers are to the node's, or, as in FedAtt, how
    far away."""

    attention_over: Literal["block", "parameter"] = "block"
    """What has an attention of its own: a whole block, or each parameter."""

    compared: Literal["layers", "differences"] = "layers"
    """What of layers attention and routing compare: all of them, or how they differ from the root's. Layers that began alike
    are alike for long, so that of all of them attention comes to an average, and next to nothing is routed; of the
    differences the root itself takes the average, since it has none."""

    temperature: float | None = None
    """Divides what the softmax takes; the larger, the more alike constituents count. By default 0.1, and 1 with "fedatt". With
    a low one a constituent that is most like its node makes the node still more like itself, and can take it over."""

    attention_step: float = 1.0
    """Share of the constituents' sum in a node's new layers, 0 to 1; the rest is what it had."""

    pull: float = 0.5
    """Share of its parent's new layers in a constituent's, 0 to 1. With 0 sites keep theirs for themselves."""

    routing_share: float | None = None
    """Route a layer of a site, one round later, to the federation that it resembles most, if its attention in its own is
    below this share of an equal one, 0 to 1. By default 0.5 where there are federations, with "cosine"; 0: never."""

    routing_similarity: float = 0.2
    """Least cosine of a layer with that of the federation it is routed to, -1 to 1."""

    clip: float = 0.0
    """Euclidean norm to which a site's update of the backbone, and the distance of its key layers to its federation's, are
    clipped before anything of them leaves it; 0: they are not."""

    noise: float = 0.0
    """Standard deviation, divided by `clip`, of Gaussian noise on all that leaves a site. Its own layers stay as they are."""

    projection: int = 1024
    """Numbers of the random projection by which layers are compared; sites send as many for each block and level."""

    def __post_init__(self) -> None:
        require(0 <= self.key_blocks < 1, "key_blocks", self.key_blocks, "from 0 to below 1")
        require(0 <= self.federations <= MOST_LEVELS, "federations", self.federations, f"from 0 to {MOST_LEVELS}")
        require_one_of("attention", self.attention, tuple(SCORES))
        require_one_of("compared", self.compared, ("layers", "differences"))
        require_one_of("attention_over", self.attention_over, ("block", "parameter"))
        require(self.temperature is None or self.temperature > 0, "temperature", self.temperature, "above 0")
        require(0 <= self.attention_step <= 1, "attention_step", self.attention_step, "from 0 to 1")
        require(0 <= self.pull <= 1, "pull", self.pull, "from 0 to 1")
        share = self.routing_share
        require(share is None or 0 <= share <= 1, "routing_share", share, "from 0 to 1")
        allowed = 'left out or 0 without federations, and with attention = "fedatt", which prefers what fits badly'
        require(not share or self.default_routing > 0, "routing_share", share, allowed)
        similarity = self.routing_similarity
        require(-1 <= similarity <= 1, "routing_similarity", similarity, "from -1 to 1")
        require(0 <= self.clip < math.inf, "clip", self.clip, "at least 0")
        require(0 <= self.noise < math.inf, "noise", self.noise, "at least 0")
        require(not self.noise or self.clip > 0, "clip", self.clip, "above 0 with noise, whose size goes by it")
        require(self.projection >= 1, "projection", self.projection, "at least 1")

    @property
    def default_routing(self) -> float:
        """The share of routing where none is set."""
        return 0.5 if self.federations and self.attention == "cosine" else 0.0


def key_layers(settings: WorldLMSettings) -> Sequence[ScopePatterns]:
    """The scope of the key layers, if there are any."""
    if not settings.keys and not settings.key_blocks:
        return ()
    return [ScopePatterns(name=KEYS, parameters=tuple(settings.keys), shared=True, last_blocks=settings.key_blocks)]


@register_method(
    "worldlm",
    settings=WorldLMSettings,
    scopes=key_layers,
    fixed={"num_fragments": 1, "fragment_sync_delay": 0, "fragment_update_alpha": 0.0, "aggregation": "mean"},
    outer={"sgd": {"outer_lr": 0.7, "outer_momentum": 0.9, "nesterov": True}},
    sync_every=32,
    outer_optimizer="sgd",
)
def worldlm(context: MethodContext) -> list[SyncRule]:
    """The backbone as in DiLoCo, and the key layers of each level of the tree, from the root down."""
    settings: WorldLMSettings = context.settings
    backbone, noise = local_sgd(context), None
    if settings.clip:
        noise = Noise(clip=settings.clip, multiplier=settings.noise)
        backbone = [
            replace(rule, apply=NoisedStep(optimizer=context.outer_optimizer, noise=noise)) for rule in backbone
        ]
    if not key_layers(settings):
        return list(backbone)
    if context.wire.codec.sparse:
        problem = (
            "must send all values: without error feedback, which shares that change do not allow, some never travelled"
        )
        raise InvalidValue("codec", type(context.wire.codec).__name__.lower(), problem)
    apply = KeyAttention(
        score=settings.attention,
        temperature=settings.temperature or _TEMPERATURES[settings.attention],
        step=settings.attention_step,
        pull=settings.pull,
        by_block=settings.attention_over == "block",
        sketch=settings.projection,
        from_root=settings.compared == "differences",
        noise=noise,
    )
    share = settings.default_routing if settings.routing_share is None else settings.routing_share
    groups = ["", *(f"{REGION}/{level}" for level in range(1, settings.federations + 1))]
    keys = SyncRule(scope=KEYS, period=context.sync_every, wire=context.wire, apply=apply)
    rules = [replace(keys, name=f"level {level}", group=group) for level, group in enumerate(groups)]
    if share:
        routing = KeyRouting(share=share, similarity=settings.routing_similarity, group=groups[-1])
        rules.append(replace(keys, name="routed", apply=routing))
    return [*backbone, *rules]
