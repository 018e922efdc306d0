"""Words that torchtitan takes as any text and looks at in training alone: refused here, with what is allowed."""

from typing import Any

from titan_ext.config.model import block_modules
from titan_ext.config.settings import Settings, hint

_ALLOWED = {
    "activation_checkpoint.determinism_check": ("default", "none"),
    "parallelism.context_parallel_load_balancer": ("headtail", "ptrr"),
}
_RECOMPUTED = "activation_checkpoint.force_recompute_mm_shapes_by_fqns"


def check_words(settings: Settings, config: Any) -> None:
    """Refuse words that mean nothing, each by its key, and a folder of weights that nothing is read from."""
    for key, allowed in _ALLOWED.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name, None)
        if value and value not in allowed:
            settings.refuse(settings.error(key, f"unknown; {hint(value, allowed)}", value))
    folder = settings.get("hf_assets_path")
    if folder is not None and settings.get("tokenizer") is None and not reads_assets(config):
        problem = "is where checkpoint.initial_load_in_hf reads weights; the key tokenizer names the tokenizer's folder"
        settings.refuse(settings.error("hf_assets_path", problem, folder))


def reads_assets(config: Any) -> bool:
    """Whether the folder of weights in Hugging Face's format is looked at."""
    return config.checkpoint.initial_load_in_hf or config.checkpoint.last_save_in_hf


def check_recomputed(settings: Settings, config: Any) -> None:
    """Refuse names of layers whose products are to be computed again that fit none, or something else than a linear layer.

    Raises:
        UserError: naming the key.
    """
    checkpointing = config.activation_checkpoint
    patterns = getattr(checkpointing, "force_recompute_mm_shapes_by_fqns", ())
    # torchtitan's own are those of any of its models.
    if settings.get(_RECOMPUTED) is None or patterns == type(checkpointing)().force_recompute_mm_shapes_by_fqns:
        return
    modules = block_modules(config)
    for pattern in patterns:
        fitting = [name for name in modules if pattern in name]
        other = next((name for name in fitting if not modules[name]), None)
        if other is not None:
            problem = f"{pattern!r} fits {other} too, which is no linear layer: give more of the name"
            raise settings.error(_RECOMPUTED, problem)
        if not fitting:
            linear = [name for name, is_linear in modules.items() if is_linear]
            raise settings.error(
                _RECOMPUTED, f"{pattern!r} fits no linear layer of a block, such as {', '.join(linear[:3])}"
            )
