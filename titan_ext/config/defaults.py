"""Our defaults where torchtitan's do not suit sites that train together.

They stand above torchtitan's and below the flavor's: a default is laid only where the flavor left
torchtitan's own value. What a machine without GPU cannot do at all is ``titan_ext.trainer.cpu``'s business.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from titan_ext.config.sections import DEPT_METHOD, DEPT_UNTIED
from titan_ext.semi_sync.config import SemiSyncConfig

FLAVOR = "debugmodel"
MODEL = "llama3"
TOKENIZER = "byte"
VOCABULARY_MULTIPLE = 8
"""A vocabulary taken from a tokenizer is rounded up to this, so that tensor parallelism cuts it evenly
(torchtitan's vocabulary-parallel loss needs that) and the model does not depend on the layout."""
DUMP_FOLDER = "runs/{stem}"
"""``dump_folder`` of ``demo.toml`` is ``runs/demo``, so two files never share one."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What a default may depend on."""

    device_type: str
    """torchtitan's device: ``cuda``, ``cpu`` …"""

    site_count: int
    """Sites of the run."""

    site_index: int
    """Place of the site among them."""

    get: Callable[[str], Any]
    """The value of a dotted key as far as user and flavor say."""


@dataclass(frozen=True, slots=True)
class Default:
    """One value of ours."""

    key: str
    value: Any
    """The value, or a function of the ``Situation``; ``MISSING`` from it leaves torchtitan's."""

    why: str

    said: str = ""
    """The value in words, where it is a function."""


def _off_gpu(value: Any) -> Callable[[Situation], Any]:
    return lambda situation: MISSING if situation.device_type == "cuda" else value


def _cuda_graphs_off(situation: Situation) -> Any:
    pipelined = (situation.get("parallelism.pipeline_parallel_degree") or 1) != 1
    return True if pipelined or situation.device_type != "cuda" else MISSING


def _warmup(situation: Situation) -> Any:
    steps = situation.get("training.steps")
    return min(200, steps // 5) if isinstance(steps, int) and steps < 1000 else MISSING


def _seed(situation: Situation) -> Any:
    return situation.site_index if situation.get("dept.variant") in DEPT_UNTIED else 0


def _loads_initially(situation: Situation) -> bool:
    return bool(situation.get("checkpoint.initial_load_path") or situation.get("checkpoint.initial_load_in_hf"))


def _method(situation: Situation) -> Any:
    if situation.site_count == 1:
        return "none"
    return MISSING if situation.get("dept.variant") == "none" else DEPT_METHOD


_VARIANTS = " and ".join(f'"{each}"' for each in DEPT_UNTIED)
DEFAULTS = (
    Default("metrics.log_freq", 1, "metrics.jsonl has a line for every step"),
    Default("metrics.enable_tensorboard", True, "a run leaves TensorBoard events"),
    Default(
        "debug.seed",
        _seed,
        "sites start from equal parameters without sending them; embeddings of their own differ",
        f"0; the site's index under dept.variant {_VARIANTS}",
    ),
    Default(
        "checkpoint.last_save_model_only",
        lambda situation: MISSING if situation.get("checkpoint.last_save_in_hf") else False,
        "the last checkpoint can be resumed, outer loop included; Hugging Face's format holds only a model",
        "false; true with last_save_in_hf",
    ),
    Default(
        "checkpoint.initial_load_model_only",
        lambda situation: MISSING if _loads_initially(situation) else False,
        "torchtitan warns of its own default where no initial checkpoint is named",
        "true where something is loaded at the start",
    ),
    Default(
        "lr_scheduler.warmup_steps",
        _warmup,
        "200 steps would fill a short run; a fifth is torchtitan's advice",
        "200, but at most a fifth of training.steps below 1000",
    ),
    Default("comm.trace_buf_size", _off_gpu(0), "the flight recorder is NCCL's", "20000; 0 without a GPU"),
    Default(
        "training.disable_cuda_graphs",
        _cuda_graphs_off,
        "torchtitan refuses them with pipelines; CPUs have none",
        "false; true with a pipeline or without a GPU",
    ),
    Default(
        "semi_sync.method",
        _method,
        "a single site has nobody to sync with; DEPT averages parameters",
        f'"{SemiSyncConfig().method}"; "none" for a single site, "{DEPT_METHOD}" under DEPT',
    ),
    Default(
        "semi_sync.reset_inner_optimizer",
        lambda situation: situation.get("dept.variant") != "none" and situation.get("semi_sync.method") == DEPT_METHOD,
        "DEPT's authors begin each round with a fresh inner optimizer",
        f"false; true under DEPT with {DEPT_METHOD}",
    ),
)


def apply_defaults(base: Any, situation: Situation, skip: Mapping[str, Any]) -> set[str]:
    """Lay our defaults on a trainer config in place.

    Args:
        base: a ``Trainer.Config``, with what the flavor says.
        situation: what defaults may depend on.
        skip: keys (dotted) that the user set.

    Returns:
        the dotted keys that now hold a default of ours.
    """
    applied = set()
    for default in DEFAULTS:
        section, name = default.key.split(".")
        owner = getattr(base, section)
        value = default.value(situation) if callable(default.value) else default.value
        if value is MISSING or default.key in skip or getattr(owner, name) != own_defaults(type(owner))[name]:
            continue
        setattr(owner, name, value)
        applied.add(default.key)
    return applied


def own_defaults(owner: type) -> dict[str, Any]:
    """The default of each of a dataclass's fields; ``MISSING`` where one has none."""
    return {
        each.name: each.default_factory() if each.default_factory is not MISSING else each.default
        for each in fields(owner)
    }
