"""Checks over several keys of a site, and over the sites of a run."""

import dataclasses
from collections.abc import Collection
from typing import Any

from titan_ext.config import defaults
from titan_ext.config.binder import Binder
from titan_ext.config.cost.inner_states import InnerStates, moments_by_size
from titan_ext.config.dept import own_vocabulary
from titan_ext.config.losses import name_of
from titan_ext.config.model import VOCABULARY, ModelChoice, parameter_shapes
from titan_ext.config.outer_loop import plan_of
from titan_ext.config.settings import Settings, show
from titan_ext.config.tokenizer import TokenizerChoice
from titan_ext.errors import UserError
from titan_ext.optim.switch import check_reset
from titan_ext.semi_sync.bind import averages_state, is_elementwise
from titan_ext.semi_sync.methods.registry import METHODS
from titan_ext.semi_sync.plan.components import shares_sparse_rows
from titan_ext.semi_sync.plan.plan import PARAMETERS, SOURCES_NEED, SyncPlan
from titan_ext.semi_sync.plan.regions import REGION
from titan_ext.semi_sync.plan.scopes import assign

_AT_LEAST_ZERO = (
    "profiler.profiler_warmup",
    "profiler.profiler_repeat",
    "profiler.profiler_skip_first",
    "profiler.profiler_skip_first_wait",
    "metrics.outer_norms_every",
    "metrics.parameter_norms_every",
    "metrics.activation_norms_every",
    "lr_scheduler.warmup_steps",
)
_AT_LEAST_ONE = (
    "profiler.profiler_active",
    "profiler.memory_snapshot_freq",
    "profiler.memory_snapshot_max_entries",
    "training.steps",
    "training.seq_len",
    "training.local_batch_size",
    "metrics.log_freq",
    "training.gc_freq",
    "comm.init_timeout_seconds",
    "comm.train_timeout_seconds",
)
# What a site may choose for itself although it shares the outer loop's other settings.
_SITES_OWN = {"outer_state_device"}


def check_numbers(settings: Settings, config: Any) -> None:
    """Refuse numbers that torchtitan would only stumble over later, each naming the key, its value and what is allowed."""

    def refuse(key: str, problem: str, value: Any) -> None:
        settings.refuse(settings.error(key, problem, value))

    for least, keys in ((0, _AT_LEAST_ZERO), (1, _AT_LEAST_ONE)):
        for key in keys:
            section, name = key.split(".")
            value = getattr(getattr(config, section), name)
            if value is not None and value < least:
                refuse(key, f"must be at least {least}", value)
    batch = config.training.global_batch_size
    if batch < 1 and batch != -1:
        refuse("training.global_batch_size", "must be -1 (one local batch a rank) or at least 1", batch)
    if not config.training.max_norm > 0:
        refuse("training.max_norm", "must be above 0 (inf turns clipping off)", config.training.max_norm)
    if not 0 <= config.metrics.serve_port < 65536:
        refuse("metrics.serve_port", "must be 0 or a port below 65536", config.metrics.serve_port)
    with settings.findings.catch():
        Binder(settings).guard("lr_scheduler", type(config.lr_scheduler), config.lr_scheduler.validate)
    seed = config.debug.seed
    if seed is not None and not 0 <= seed < 2**63:
        refuse("debug.seed", "must be from 0 to below 2**63", seed)
    with settings.findings.catch():
        _check_data(settings, "data", config.dataloader)
    if config.validator.enable:
        if not getattr(config.validator.dataloader, "dataset", ""):
            raise settings.error("validator.dataloader.dataset", "is missing: validation needs data of its own")
        if getattr(config.validator.dataloader, "has_sources", False):
            raise settings.error(
                "validator.dataloader", "must have one dataset: data sources take turns in training alone"
            )
        _check_data(settings, "validator.dataloader", config.validator.dataloader)


def check_experts(settings: Settings, config: Any, layout: Any) -> None:
    """Refuse expert parallelism of a model without experts, or that does not divide the experts or the ranks.

    Raises:
        UserError: naming the key.
    """
    from torchtitan.models.common.moe import MoE

    key, degree = "parallelism.expert_parallel_degree", config.parallelism.expert_parallel_degree
    mixtures = [moe for _, moe, _, _ in config.model_spec.model.traverse(MoE.Config)]
    if degree == 1:
        return
    if degree < 1:
        raise settings.error(key, "must be at least 1", degree)
    if not mixtures:
        raise settings.error(key, "must be 1: the model has no experts", degree)
    if config.fomoe.sites_per_expert:
        raise settings.error(key, "must be 1 with fomoe.sites_per_expert: a site's own experts are not cut", degree)
    ranks = layout.shard * layout.context * layout.tensor
    if ranks % degree:
        problem = f"must divide the {ranks} ranks of data_parallel_shard x context_parallel x tensor_parallel"
        raise settings.error(key, problem, degree)
    for moe in mixtures:
        if moe.num_experts % degree:
            raise settings.error(key, f"must divide the {moe.num_experts} experts of a layer", degree)


def check_vocabulary(settings: Settings, config: Any, model: ModelChoice, tokenizer: TokenizerChoice) -> list[str]:
    """Refuse a tokenizer whose ids the model has no rows for; a larger model is allowed and noted.

    Returns:
        notes for the user.
    """
    rows = getattr(config.model_spec.model, "vocab_size", tokenizer.vocabulary)
    if tokenizer.vocabulary > rows and VOCABULARY in model.taken:
        problem = f"has {tokenizer.vocabulary} ids, the weights {rows} rows: take the tokenizer that belongs to them"
        raise settings.error("tokenizer", problem, settings.get("tokenizer", defaults.TOKENIZER))
    if tokenizer.vocabulary > rows:
        problem = f"too small for the site's tokenizer of {tokenizer.vocabulary} ids; leave it out to follow that"
        raise settings.error("model.vocab_size", problem, rows)
    if tokenizer.vocabulary < rows and not model.vocabulary_derived:
        return [f"the model has {rows} embedding rows, the tokenizer {tokenizer.vocabulary} ids: the rest stay unused"]
    return []


def check_export(settings: Settings, config: Any) -> None:
    """Refuse Hugging Face's format for a model that has none, or with rows that stand for no token: there they would
    count."""
    from titan_ext.models.dept.head import MaskedHead

    for key in ("initial_load_in_hf", "last_save_in_hf") if config.model_spec.state_dict_adapter is None else ():
        if getattr(config.checkpoint, key):
            raise settings.error(f"checkpoint.{key}", "the model has no Hugging Face format", True)
    head = getattr(config.model_spec.model, "lm_head", None)
    if config.checkpoint.last_save_in_hf and isinstance(head, MaskedHead.Config) and head.used < head.out_features:
        problem = f"the last {head.out_features - head.used} rows stand for no token; titan-ext export leaves them out"
        raise settings.error("checkpoint.last_save_in_hf", problem, True)


def check_max_length(settings: Settings, config: Any) -> None:
    """Refuse sequences longer than the model's positions reach."""
    try:
        longest = config.model_spec.model.max_seq_len
    except (AttributeError, ValueError):
        return
    if config.training.seq_len > longest:
        problem = f"must be at most {longest}, the model's longest"
        raise settings.error("training.seq_len", problem, config.training.seq_len)


def check_sections(settings: Settings, config: Any) -> None:
    """Refuse what the sections of ours refuse by themselves."""
    binder = Binder(settings)
    sections = {"replica": config.replica.validate, "optimizer_switch": config.optimizer_switch.validate}
    for section, check in sections.items():
        with settings.findings.catch():
            binder.guard(section, type(getattr(config, section)), check)
    with settings.findings.check():
        _check_switch(settings, config)


_NO_TEXT = (
    'needs text that the site does not train on; hold some out with data.split = "train" and data.holdout_fraction, or '
    'with files that are called "validation" or "test"'
)


def check_outer_loop(settings: Settings, config: Any, num_sites: int) -> list[str]:
    """Refuse an outer loop that its method, its plan or the model does not allow.

    Args:
        num_sites: sites of the file; others may join them.

    Returns:
        notes for the user.
    """
    binder, outer = Binder(settings), config.semi_sync
    if outer.method == "none":
        if getattr(config.dataloader, "has_sources", False):
            raise settings.error("semi_sync.method", "must be an outer loop with data sources", "none")
        return []
    plan = binder.guard("semi_sync", type(outer), lambda: plan_of(config))
    if plan.num_fragments > 1 or plan.fragments is not None or plan.scopes:
        binder.guard("semi_sync", type(outer), lambda: _assign(config, plan))
    _check_states(settings, config, plan)
    _check_sources(settings, config, plan)
    if plan.weighting.needs_loss and config.dataloader.held_out() is None:
        raise settings.error("semi_sync.weighting", _NO_TEXT, outer.weighting)
    for group in plan.groups:
        if group.split("/")[0] not in config.site.labels:
            if group.startswith(REGION):
                raise settings.error(REGION, "is missing: [semi_sync] speaks of regions, so every site needs one")
            problem = f'has no "{group}", by which a scope of [semi_sync] is shared; every site needs one'
            raise settings.error("labels", problem, config.site.labels)
    if config.training.dtype != "float32" and any(rule.apply.needs_fp32 for rule in plan.rules):
        problem = f'must be "float32" with semi_sync.method = "{outer.method}"'
        raise settings.error("training.dtype", problem, config.training.dtype)
    return _without_effect(config, plan, num_sites)


def _without_effect(config: Any, plan: SyncPlan, num_sites: int) -> list[str]:
    """Notes on settings that come to nothing, or to less than they say."""
    outer, steps = config.semi_sync, config.training.steps
    notes = METHODS.get(outer.method).notes([group.optimizer_kwargs for group in config.optimizer.param_groups])
    first = min(rule.period for rule in plan.rules if not rule.final)
    if steps < first:
        notes.append(f"training.steps ({steps}) ends before the first sync (every {first} steps)")
    if outer.sites_per_round is not None and outer.sites_per_round >= num_sites:
        notes.append(
            f"semi_sync.sites_per_round = {outer.sites_per_round} of {num_sites} sites: all take part in each round"
        )
    needed = max(rule.wire.aggregation.sites_needed for rule in plan.rules)
    if needed > num_sites:
        notes.append(
            f'semi_sync.aggregation = "{outer.aggregation}" needs {needed} sites to do what it says; of {num_sites} it '
            "leaves out fewer"
        )
    inner = METHODS.get(outer.method).inner
    optimizers = sorted({group.optimizer_name for group in config.optimizer.param_groups})
    if inner and inner not in optimizers:
        notes.append(
            f'semi_sync.method = "{outer.method}" is made for optimizer.name = "{inner}", not {", ".join(optimizers)}'
        )
    return notes


def check_switch(config: Any) -> list[str]:
    """A note for the user where the inner optimizer's settings do not switch."""
    step, steps = config.optimizer_switch.step, config.training.steps
    if config.optimizer_switch.changes_nothing():
        return [f"optimizer_switch.step = {step} changes nothing: no other key of [optimizer_switch] is set"]
    return [f"training.steps ({steps}) ends before optimizer_switch.step ({step})"] if step >= steps else []


def check_warmup(config: Any) -> list[str]:
    """A note for the user where torchtitan shortens the learning rate's warm-up or decay to what the steps leave."""
    scheduler = config.lr_scheduler
    total = round((scheduler.total_steps or 0) * scheduler.stretch) or config.training.steps
    warmup, decay = round(scheduler.warmup_steps * scheduler.stretch), round((scheduler.decay_ratio or 0) * total)
    if warmup > total:
        return [f"lr_scheduler.warmup_steps ({warmup}) is cut to the {total} steps of the schedule"]
    if warmup + decay > total:
        return [
            f"lr_scheduler.decay_ratio ({decay} steps) is cut to the {total - warmup} steps that the warm-up leaves"
        ]
    return []


def check_rounding(config: Any) -> list[str]:
    """A note for the user where an optimizer rounds bfloat16 to the nearest, which loses what is small every time."""
    if config.training.dtype != "bfloat16":
        return []
    resolve = config.optimizer._owner._resolve_optimizer_factory
    names = sorted({group.optimizer_name for group in config.optimizer.param_groups})
    nearest = [name for name in names if not getattr(resolve(name), "rounds_at_random", False)]
    if not nearest:
        return []
    return [
        f'training.dtype = "bfloat16": {", ".join(nearest)} rounds to the nearest, so a step of less than half a unit in '
        "the last place (1/512 of a parameter) does nothing and a moment with a beta above 0.998 never decays; our own "
        "optimizers round at random (QHAdamW with omegas = [1.0] is AdamW)"
    ]


def _check_switch(settings: Settings, config: Any) -> None:
    """Refuse to change what the inner optimizer has not, and to reset what it does not keep, or half of what belongs
    together."""
    binder, switch = Binder(settings), config.optimizer_switch
    if switch.step == 0:
        return
    groups = InnerStates(config.optimizer).hyper_parameters
    binder.guard("optimizer_switch", type(switch), lambda: switch.validate_lengths(groups))
    if switch.reset_states:
        kept = [moments for _, moments in moments_by_size(config)]
        binder.guard("optimizer_switch", type(switch), lambda: check_reset(switch.reset_states, kept))


def _check_sources(settings: Settings, config: Any, plan: SyncPlan) -> None:
    """Refuse data sources with what cannot be had of a site that trains several models in turn."""
    data = config.dataloader
    key = "data.source" if data.source else "data.sources"
    if not data.has_sources:
        if plan.sources.placement == "pollen":
            problem = "needs data sources that all sites can read: [[source]] tables, or data.sources"
            raise settings.error("semi_sync.source_placement", problem, "pollen")
        return
    if not plan.takes_sources:
        raise settings.error(key, SOURCES_NEED)
    if plan.weighting.needs_loss:
        problem = "weighs by the loss on held-out text of one corpus, and the site has data sources"
        raise settings.error("semi_sync.weighting", problem, config.semi_sync.weighting)
    if name_of(config.loss) is not None:
        raise settings.error(
            "loss.name", "must be left out with data sources: it keeps statistics of one corpus", name_of(config.loss)
        )
    if config.regularizer.phases:
        problem = "must be left out with data sources, which take turns"
        raise settings.error("regularizer.phases", problem, [phase.name for phase in config.regularizer.phases])
    if config.optimizer_switch.step:
        raise settings.error(
            "optimizer_switch.step",
            "must be left out with data sources, which take turns",
            config.optimizer_switch.step,
        )


def _check_states(settings: Settings, config: Any, plan: Any) -> None:
    """Refuse an inner optimizer without the states that the method exchanges."""
    states = InnerStates(config.optimizer)
    kept = states.kept(parameter_shapes(config))
    names = ", ".join(sorted({group.optimizer_name for group in config.optimizer.param_groups}))
    for rule in plan.rules:
        having = [rule.state == PARAMETERS or not keys.isdisjoint(rule.state.split("|")) for keys in kept.values()]
        if (rule.required == "all" and not all(having)) or (rule.required == "some" and not any(having)):
            problem = f"exchanges the inner optimizer's {rule.state.replace('|', ' or ')}, which {names} does not keep"
            raise settings.error("semi_sync.method", problem, config.semi_sync.method)
    _check_covered(settings, config, plan, set().union(*kept.values()) - states.own_keys(), names)


def _check_covered(settings: Settings, config: Any, plan: Any, kept: Collection[str], optimizers: str) -> None:
    """Refuse a method that averages some of the inner optimizer's states and leaves others out."""
    averaged = {key for rule in plan.rules if averages_state(rule) for key in rule.state.split("|")}
    left = sorted({*kept} - averaged)
    if averaged and left:
        problem = f"averages the inner optimizer's states, but knows nothing of {left[0]!r}, which {optimizers} keeps"
        raise settings.error("semi_sync.method", problem, config.semi_sync.method)


def check_pairing(settings: Settings, config: Any) -> None:
    """Refuse leaders for a method that works on each rank's own shards.

    Raises:
        UserError: naming the method.
    """
    outer = config.semi_sync
    if outer.method == "none" or outer.pairing != "leader":
        return
    if not all(is_elementwise(rule) for rule in plan_of(config).rules):
        problem = "works on each rank's own shards and needs one parallel layout at all sites"
        raise settings.error("semi_sync.method", problem, outer.method)


def check_rows(settings: Settings, config: Any, layout: Any) -> None:
    """Refuse to pair ranks that hold different rows of a table which is shared by row.

    Raises:
        UserError: naming the pairing.
    """
    outer, cut = config.semi_sync, layout.shard * layout.context * layout.tensor > 1
    if outer.method != "none" and outer.pairing == "rank" and cut and shares_sparse_rows(outer):
        problem = 'must be "leader" where embeddings are shared by row and cut over ranks'
        raise settings.error("semi_sync.pairing", problem, "rank")


def check_sites(file: str, sites: list) -> None:
    """Refuse sites that cannot exchange with each other.

    Args:
        file: the configuration file, for the wording.
        sites: the ``Site`` objects of the run.

    Raises:
        UserError: naming the two sites and what differs.
    """
    first = sites[0]
    for other in sites[1:]:
        for what, ours, theirs in _differences(first, other):
            raise UserError(
                f'{file}: sites "{first.name}" and "{other.name}" differ in {what}: {show(ours)} and {show(theirs)};'
                + (
                    ' ranks are paired between sites (semi_sync.pairing = "leader" lets layouts differ)'
                    if what.startswith("parallelism")
                    else " model, outer loop and last step must be equal"
                )
            )


def _assign(config: Any, plan: SyncPlan) -> None:
    assign({name: shape.numel() for name, shape in parameter_shapes(config).items()}, plan)


def _check_data(settings: Settings, key: str, data: Any) -> None:
    validate = getattr(data, "validate", None)
    if callable(validate):
        Binder(settings).guard(key, type(data), validate)


def _differences(first: Any, other: Any) -> list[tuple[str, Any, Any]]:
    """Name and the two values of everything that must be equal and is not."""
    found = []
    if first.model.name != other.model.name or first.model.flavor != other.model.flavor:
        found.append(("model", f"{first.model.name} {first.model.flavor}", f"{other.model.name} {other.model.flavor}"))
    known = first.model.overrides.get(VOCABULARY) and other.model.overrides.get(VOCABULARY)
    # A tokenizer that is on another machine leaves its rows open.
    rows = set() if known and not own_vocabulary(first.config.dept) else {VOCABULARY}
    for key in sorted({*first.model.overrides, *other.model.overrides} - rows):
        found.append((f"model.{key}", first.model.overrides.get(key), other.model.overrides.get(key)))
    if first.config.semi_sync.pairing == "rank":
        found += [
            (f"parallelism.{axis} degree", getattr(first.layout, axis), getattr(other.layout, axis))
            for axis in ("replicate", "shard", "context", "tensor", "pipeline")
        ]
        own = {"data_parallel_shard_degree", "pipeline_parallel_microbatch_size"}
        found += _fields("parallelism", first, other, own)
    if first.config.semi_sync.method != "none":
        found.append(("training.steps", first.config.training.steps, other.config.training.steps))
    found += _fields("semi_sync", first, other, _SITES_OWN)
    found += _fields("optimizer_switch", first, other, set())
    found += _fields("dept", first, other, set())
    found += _fields("fomoe", first, other, set())
    return [(what, ours, theirs) for what, ours, theirs in found if ours != theirs]


def _fields(section: str, first: Any, other: Any, own: set[str]) -> list[tuple[str, Any, Any]]:
    ours, theirs = getattr(first.config, section), getattr(other.config, section)
    names = [each.name for each in dataclasses.fields(ours) if each.name not in own]
    return [(f"{section}.{name}", getattr(ours, name), getattr(theirs, name)) for name in names]
