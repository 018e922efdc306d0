"""Values of a site that cannot be, each refused by its key, or that a user should know something of."""

from typing import Any

from titan_ext.config import defaults
from titan_ext.config.binder import Binder
from titan_ext.config.cost.inner_states import InnerStates, moments_by_size
from titan_ext.config.model import VOCABULARY, ModelChoice
from titan_ext.config.settings import Settings
from titan_ext.config.tokenizer import TokenizerChoice
from titan_ext.optim.switch import check_reset

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


def check_switch(config: Any) -> list[str]:
    """A note for the user where the inner optimizer's settings do not switch."""
    step, steps = config.optimizer_switch.step, config.training.steps
    if config.optimizer_switch.changes_nothing():
        return [f"optimizer_switch.step = {step} changes nothing: no other key of [optimizer_switch] is set"]
    return [f"training.steps ({steps}) ends before optimizer_switch.step ({step})"] if step >= steps else []


def check_mix_changes(config: Any) -> list[str]:
    """A note for the user where shares of corpora would change after the last step."""
    steps = config.training.steps
    late = [change.step for change in config.dataloader.mix_changes if change.step >= steps]
    return [f"training.steps ({steps}) ends before data.mix_changes change at step {late[0]}"] if late else []


def check_lengths(config: Any) -> list[str]:
    """Notes for the user where the run ends before a batch has grown, or before spikes are judged."""
    steps, growth, spikes = config.training.steps, config.batch_warmup.steps, config.spikes
    notes = []
    if growth >= steps:
        notes.append(f"training.steps ({steps}) ends before the batch has grown (batch_warmup.steps = {growth})")
    if spikes.action != "none" and spikes.window // 2 >= steps:
        notes.append(
            f"training.steps ({steps}) ends before spikes are judged, after half of spikes.window ({spikes.window} steps)"
        )
    return notes


def check_warmup(config: Any) -> list[str]:
    """A note for the user where torchtitan shortens the learning rate's warm-up or decay to what the steps leave, or where
    nothing is stretched."""
    scheduler = config.lr_scheduler
    total = round((scheduler.total_steps or 0) * scheduler.stretch) or config.training.steps
    warmup, decay = round(scheduler.warmup_steps * scheduler.stretch), round((scheduler.decay_ratio or 0) * total)
    if scheduler.stretch != 1 and warmup == scheduler.warmup_steps and scheduler.total_steps is None:
        return [
            f"without effect, because it stretches lr_scheduler.warmup_steps ({warmup}) and total_steps (not set) alone: "
            "lr_scheduler.stretch"
        ]
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


def _check_data(settings: Settings, key: str, data: Any) -> None:
    validate = getattr(data, "validate", None)
    if callable(validate):
        Binder(settings).guard(key, type(data), validate)
