"""A configuration of torchtitan 0.1 or 0.2 as one of ours: the same run, or a word about what is not the same.

What those versions did by default and we do otherwise is written out. What must not be guessed (a corpus, a tokenizer,
the number of sites) is left as a blank, which the loader refuses.
"""

from collections.abc import Mapping
from typing import Any

from titan_ext.config.migration.draft import Draft
from titan_ext.config.migration.layout import migrate_parallelism, migrate_sites
from titan_ext.config.migration.old_format import OF_MODE, OLD_DEFAULTS, names_in, renamed
from titan_ext.config.migration.old_keys import CONVERTED, GONE, KEPT, MOVED, find, find_gone
from titan_ext.config.migration.old_models import EARLY, SECOND, old_dataset, old_model
from titan_ext.config.migration.result import Migration
from titan_ext.config.toml_text import toml_value

_MANY = 4
_KEPT = {f"{section}.{name}" for section, names in KEPT.items() for name in names.split()}


def migrate(old: Mapping[str, Any]) -> Migration:
    """Our configuration of a parsed file of torchtitan 0.1 or 0.2."""
    draft = Draft(old)
    for convert in (
        _quantized,
        _model,
        _tokenizer,
        _data,
        _optimizer,
        _activation_checkpoint,
        _checkpoint,
        _metrics,
        migrate_parallelism,
        migrate_sites,
    ):
        convert(draft)
    _foreign_sections(draft)
    for key in list(draft.old):
        _rest(draft, key)
    for key, value in (OLD_DEFAULTS | _profiler_folders(draft)).items():
        draft.new.setdefault(key, value)
    _validation(draft)
    _tidy(draft)
    for key, value in draft.new.items():
        _put(draft.done.tree, key, value)
    return draft.done


def _quantized(draft: Draft) -> None:
    """Settings of quantized training mean nothing where no converter asks for it; float8 by a recipe is the same here."""
    converters = names_in(draft.old.get("model.converters") or [])
    if converters in (["float8"], ["quantize.linear.float8"]):
        _float8(draft, converters[0])
    if converters or any(value is True for key, value in draft.old.items() if key.endswith("_float8_linear")):
        return
    if draft.old.pop("model.converters", None) is not None:
        draft.done.harmless.append("model.converters")
    for key in [key for key in draft.old if key.split(".")[0] in ("float8", "mx", "quantize")]:
        draft.done.harmless.append(key)
        del draft.old[key]


def _float8(draft: Draft, section: str) -> None:
    recipe = draft.old.get(f"{section}.recipe_name")
    if recipe not in ("rowwise", "rowwise_with_gw_hp"):
        return
    skipped = names_in(draft.take(f"{section}.filter_fqns", default=[]))
    table = {"name": "float8", "recipe_name": recipe, "filter_fqns": renamed([skipped])[0]}
    table["emulate"] = draft.take(f"{section}.emulate", default=False)
    draft.new["model.converters"] = [table]
    for key in [key for key in draft.old if key == "model.converters" or key.startswith(f"{section}.")]:
        if key not in ("model.converters", f"{section}.recipe_name"):
            draft.done.harmless.append(key)  # a recipe decides the rest
        del draft.old[key]


def _model(draft: Draft) -> None:
    name = draft.take("model.name", default="llama3")
    flavor = draft.take("model.flavor", default="debugmodel")
    found = old_model(str(name), str(flavor), draft.done.era)
    draft.layers = found.layers
    draft.new |= {f"model.{key}": value for key, value in found.keys.items()}
    draft.done.blanks |= {f"model.{key}": why for key, why in found.blanks.items()}
    draft.done.changed += [found.note] if found.note else []
    flexible = "attn_backend" in found.keys or draft.old.get("model.use_flex_attn")
    if not flexible and draft.old.get("model.attn_mask_type") != "block_causal":
        draft.done.changed.append("attention: documents packed into one sequence no longer see each other")


def _tokenizer(draft: Draft) -> None:
    default = "./tests/assets/tokenizer" if draft.done.era == SECOND else ""
    path = draft.take("model.hf_assets_path", "model.tokenizer_path", default=default)
    if path and not str(path).endswith(".model"):
        draft.new["tokenizer"] = path
    elif path:
        draft.blank("tokenizer", f"{path} is not read here; the folder with the tokenizer.json of the same model")
    else:
        draft.blank("tokenizer", "the file named none; a folder with tokenizer.json")


def _data(draft: Draft) -> None:
    dataset, why = old_dataset(draft.take("training.dataset"), draft.take("training.dataset_path"))
    if why:
        draft.blank("data.dataset", why)
    else:
        draft.new["data.dataset"] = dataset
    draft.new["data.shuffle"] = False
    workers = draft.old.get("training.dataloader.num_workers", 0)
    if workers > 1 and dataset.startswith("hf:"):
        draft.old["training.dataloader.num_workers"] = 1
        draft.done.changed.append(f"training.dataloader.num_workers = {workers}: a streamed dataset is read by 1 here")


def _validation(draft: Draft) -> None:
    """After the rest: validation takes the batches of training here."""
    given = {key: draft.take(f"validation.{key}") for key in ("dataset", "dataset_path", "local_batch_size", "seq_len")}
    enabled = draft.new["validator.enable"]
    dataset, why = old_dataset(given["dataset"] or "c4_validation", given["dataset_path"])
    if dataset and (enabled or given["dataset"]):
        draft.new["validator.dataloader.dataset"] = dataset
    if not enabled:
        kept = ("dataset", "dataset_path") if dataset else ()
        draft.done.harmless += [f"validation.{key}" for key, value in given.items() if value and key not in kept]
        return
    if why:
        draft.blank("validator.dataloader.dataset", why)
    draft.new |= {"validator.dataloader.shuffle": False, "validator.dataloader.infinite": False}
    draft.new.setdefault("validator.freq", 10)
    draft.new.setdefault("validator.steps", -1)
    for key, default in (("local_batch_size", 8), ("seq_len", 2048)):
        there, here = given[key] or default, draft.new[f"training.{key}"]
        if there != here:
            draft.done.changed.append(f"validation.{key} = {there}: validation takes training.{key} ({here}) here")


def _optimizer(draft: Draft) -> None:
    name = draft.take("optimizer.name", default="AdamW")
    fused = draft.take("optimizer.fused")
    default = "foreach" if draft.done.era == EARLY and not fused else "fused"
    draft.new["optimizer.name"] = name
    draft.new["optimizer.lr"] = draft.take("optimizer.lr", default=8e-4)
    betas = [draft.take("optimizer.beta1", default=0.9), draft.take("optimizer.beta2", default=0.95)]
    if name in ("Adam", "AdamW"):
        draft.new["optimizer.betas"] = draft.take("optimizer.betas", default=betas)
        draft.new["optimizer.eps"] = draft.take("optimizer.eps", default=1e-8)
        draft.new["optimizer.weight_decay"] = draft.take("optimizer.weight_decay", default=0.1)
    else:
        draft.done.changed.append(
            f'optimizer.name = "{name}": torchtitan had only Adam and AdamW; compare its settings'
        )
    draft.new["optimizer.implementation"] = draft.take("optimizer.implementation", default=default)


def _activation_checkpoint(draft: Draft) -> None:
    mode = draft.old.get("activation_checkpoint.mode", "selective")
    option = str(draft.take("activation_checkpoint.selective_ac_option", default="2"))
    if mode == "selective" and option != "op":
        draft.done.changed.append(
            f'activation_checkpoint.selective_ac_option = "{option}": only "op" is left; memory differs, results do not'
        )


def _checkpoint(draft: Draft) -> None:
    late = draft.done.era == SECOND
    draft.new["checkpoint.last_save_model_only"] = draft.take(
        "checkpoint.last_save_model_only",
        "checkpoint.last_save_model_weights_only",
        "checkpoint.model_weights_only",
        default=late,
    )
    draft.new["checkpoint.keep_latest_k"] = draft.take(
        "checkpoint.keep_latest_k", default=0 if draft.done.era == EARLY else 10
    )
    excluded = draft.take("checkpoint.exclude_from_loading")
    if excluded:
        draft.new["checkpoint.exclude_from_loading"] = names_in(excluded)
    if draft.take("checkpoint.interval_type", "training.checkpoint_interval_type", default="steps") != "steps":
        interval = draft.take("checkpoint.interval", "training.checkpoint_interval", default=500)
        draft.blank("checkpoint.interval", f"it was {interval} seconds; here it counts steps", 0)
    if draft.old.get("checkpoint.initial_load_path") and not draft.old.get("checkpoint.initial_load_in_hf"):
        draft.done.changed.append(
            "checkpoint.initial_load_path: torchtitan's own checkpoints have other parameter names here; turn it into "
            "Hugging Face's format there first, set checkpoint.initial_load_in_hf = true, and give an absolute path"
        )


def _metrics(draft: Draft) -> None:
    for old, new in (
        ("metrics.enable_color_printing", "metrics.disable_color_printing"),
        ("metrics.rank_0_only", "metrics.save_for_all_ranks"),
    ):
        if (value := draft.take(old)) is not None:
            draft.new[new] = not value


def _rest(draft: Draft, key: str) -> None:
    """A key that needs nobody's company."""
    if key not in draft.old or (key.startswith("validation.") and key in CONVERTED):
        return
    value = draft.old.pop(key)
    if key in _KEPT or key in MOVED:
        new = key if key in _KEPT else MOVED[key]
        if draft.new.setdefault(new, renamed(value) if new.endswith("module_fqns_per_model_part") else value) != value:
            draft.done.changed.append(f"{key} = {toml_value(value)}: {new} = {toml_value(draft.new[new])} is taken")
        return
    gone = find_gone(key)
    if gone is not None and (gone.always or value in gone.harmless):
        draft.done.harmless.append(key)
    elif gone is not None:
        draft.done.homeless.append(f"{key} = {toml_value(value)}: {gone.why}")
    else:
        _unknown(draft, key, value)


def _foreign_sections(draft: Draft) -> None:
    """Whole sections that were never torchtitan's, in a line each."""
    known = {key.split(".")[0] for key in (*_KEPT, *MOVED, *CONVERTED, *GONE)}
    sections: dict[str, list[str]] = {}
    for key in draft.old:
        if key.split(".")[0] not in known:
            sections.setdefault(key.split(".")[0], []).append(key)
    for section, keys in sections.items():
        if len(keys) >= _MANY:
            draft.done.homeless.append(f"{section}, {len(keys)} keys: not a section of torchtitan's")
            for key in keys:
                del draft.old[key]


def _unknown(draft: Draft, key: str, value: Any) -> None:
    if key == "training.gradient_accumulation_steps" and value == 1:
        draft.done.harmless.append(key)
        return
    old = find(key)
    why = "not a key of torchtitan's" if old is None else old.by_hand
    draft.done.homeless.append(f"{key} = {toml_value(value)}: {why}")


def _profiler_folders(draft: Draft) -> dict[str, str]:
    traces, memory = draft.new.get("profiler.enable_profiling"), draft.new.get("profiler.enable_memory_snapshot")
    found = {"profiler.save_traces_folder": "profile_traces"} if traces else {}
    return found | ({"profiler.save_memory_snapshot_folder": "memory_snapshot"} if memory else {})


def _tidy(draft: Draft) -> None:
    """Leave out what means nothing beside the rest."""
    mode = draft.new["activation_checkpoint.mode"]
    keep = OF_MODE.get(mode, ())
    for key in [key for key in draft.new if key.startswith("activation_checkpoint.")]:
        name = key.removeprefix("activation_checkpoint.")
        if name != "mode" and name not in keep:
            del draft.new[key]
            draft.done.harmless.append(key)
    if draft.new["parallelism.pipeline_parallel_degree"] == 1:
        draft.new.pop("parallelism.module_fqns_per_model_part", None)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
    tree[last] = value
